"""The rollout server: leases in, graded groups out, new weights in between.

    task            consumes                    produces                            waits for
    receiving       messages of the trainer     leases' tasks, announcements, acks  the link
    hello           -                           Hello, until Welcome                a reason to say it
    a lease's task  one Lease                   one Group, or Failed                weights, engine, grading workers
    swapping        announced WeightsReady      Swapped, SwapFailed                 an announcement
    engine watch    the engine's health         a restarted engine                  Welcome; then its interval, a suspicion
    heartbeats      the counts                  Status; groups again; a new Hello   its interval

All of them share one event loop and one `asyncio.TaskGroup`: the first that fails ends the server with its error. A
finished group stays in the outbox until the trainer acknowledges it, and is sent again when it does not.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

import numpy as np

from asyncppo import fingerprints
from asyncppo.config import Config
from asyncppo.errors import EngineError, MessageError, RefusedError, UserError
from asyncppo.messages import (
    PROTOCOL,
    Ack,
    Cancel,
    Failed,
    Goodbye,
    Group,
    Hello,
    Lease,
    Message,
    Pulse,
    Refused,
    Status,
    Stop,
    Swapped,
    Unknown,
    WeightsReady,
    Welcome,
)
from asyncppo.transport.base import Link
from rollout_server.engine import Engine, Response
from rollout_server.hot_swap import HotSwap
from rollout_server.reward import Grade, Grader

log = logging.getLogger("rollout_server")

MISSED_PULSES = 10
"""Heartbeats without a message from the trainer after which the server says Hello again."""
_ATTEMPTS = 2
"""Generations tried for one lease: the second after the engine has been looked at, and restarted if need be."""
_GOODBYE_S = 1.0

T = TypeVar("T")


class RolloutServer:
    """See the module; `run` is the whole life of the server.

    Args:
        config: the run's config.
        link: the connection to the trainer.
        engine: not started; it is started after the trainer's Welcome, so that a refusal costs nothing.
        grader: ready to grade.
        name: what people call this server.
        model: the directory (or hub name) of the engine's starting weights.
        incarnation: new for every process.
    """

    def __init__(
        self,
        config: Config,
        link: Link,
        engine: Engine,
        grader: Grader,
        name: str,
        model: str,
        incarnation: str | None = None,
    ) -> None:
        self._config = config
        self._link = link
        self._engine = engine
        self._grader = grader
        self._name = name
        self._swap = HotSwap(engine)
        self._hello = Hello(
            protocol=PROTOCOL,
            server=name,
            incarnation=incarnation or uuid.uuid4().hex,
            capacity=config.rollout.max_groups,
            agreement=config.agreement_hash(),
            model=fingerprints.model_fingerprint(model),
            tokenizer=fingerprints.tokenizer_fingerprint(model),
            engine=engine.description,
        )
        self._heartbeat_s = config.stream.heartbeat_s
        self._trainer: str | None = None
        self._last_heard = time.monotonic()
        self._welcomed = asyncio.Event()
        self._hello_wanted = asyncio.Event()
        self._hello_wanted.set()
        self._serving = asyncio.Event()  # the engine lives and has published weights
        self._suspicion = asyncio.Event()  # somebody saw the engine fail
        self._looked_at = asyncio.Condition()  # the engine's watch has looked at it
        self._stopping = asyncio.Event()
        self._stop_reason = ""
        self._tasks: asyncio.TaskGroup
        self._leases: dict[int, asyncio.Task[None]] = {}
        self._outbox: dict[int, tuple[float, Group]] = {}  # lease: when it was sent last, and what
        self._generating = 0
        self._idle_since: float | None = None
        self._idle_s = 0.0
        self._engine_started = False
        self._responses = self._tokens = self._reward_errors = self._restarts = self.malformed = 0

    async def run(self) -> None:
        """Serve until `stop`, the trainer's Stop, or the first failure. Then, in this order: end the leases' tasks and
        the others, say Goodbye, end the grading workers, end the engine, close the link.

        Raises:
            RefusedError: the trainer turned this server away.
            UserError: no trainer answered within `rollout.connect_timeout_s`.
            EngineError: the engine does not start.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:
                background = [
                    self._tasks.create_task(coroutine, name=name)
                    for name, coroutine in (
                        ("receiving", self._receiving()),
                        ("hello", self._saying_hello()),
                        ("swapping", self._swapping()),
                        ("engine watch", self._watching_engine()),
                        ("heartbeats", self._heartbeats()),
                    )
                ]
                await self._stopping.wait()
                for task in [*background, *self._leases.values()]:
                    task.cancel()
        except BaseExceptionGroup as failures:
            for other in failures.exceptions[1:]:
                log.error("and also: %s: %s", type(other).__name__, other)
            self._stop_reason = f"{type(failures.exceptions[0]).__name__}: {failures.exceptions[0]}"
            raise failures.exceptions[0] from None
        finally:
            await self._leave()

    def stop(self, reason: str) -> None:
        """End `run` in order, from the same event loop."""
        if not self._stopping.is_set():
            log.info("stopping: %s", reason)
            self._stop_reason = reason
            self._stopping.set()

    async def _leave(self) -> None:
        if self._welcomed.is_set():
            try:
                async with asyncio.timeout(_GOODBYE_S):
                    await self._link.send(Goodbye(reason=self._stop_reason or "cancelled"))
            except TimeoutError:
                log.warning("the trainer does not take a Goodbye")
        await asyncio.to_thread(self._grader.close)
        await self._engine.close()
        self._link.close()

    # --- talking with the trainer ------------------------------------------------------------------------------------

    async def _saying_hello(self) -> None:
        """Says Hello until it is answered, at the start and whenever `_say_hello_again` asks for it.

        consumes    -
        produces    Hello
        waits for   a reason (without limit); then Welcome, at most `rollout.connect_timeout_s`
        """
        while True:
            await self._hello_wanted.wait()
            limit = self._config.rollout.connect_timeout_s
            try:
                async with asyncio.timeout(limit):
                    while not await self._welcome_within(self._heartbeat_s):
                        await self._link.send(self._hello)
            except TimeoutError:
                raise UserError(
                    f"no trainer answered within {limit:g} s (rollout.connect_timeout_s): is one running, and listening "
                    "on the address that this server was given (--trainer)?"
                ) from None
            self._hello_wanted.clear()

    async def _welcome_within(self, seconds: float) -> bool:
        """Whether the server is welcome; waits for it only after the first Hello has been sent."""
        if not self._welcomed.is_set() and self._hello_sent():
            await _within(seconds, self._welcomed.wait())
        return self._welcomed.is_set()

    def _hello_sent(self) -> bool:
        sent, self._sent_hello = getattr(self, "_sent_hello", False), True
        return sent
