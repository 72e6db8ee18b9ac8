"""The rollout server: leases in, graded groups out, new weights in between.

    task            consumes                    produces                            waits for
    receiving       messages of the trainer     leases' tasks, announcements, acks  the link
    hello           -                           Hello, until Welcome                a reason to say it
    spilling        groups without a trainer    their files                         a kick, by heartbeats and leases
    a lease's task  one Lease                   one Group, or Failed                weights, engine, grading workers
    swapping        WeightsReady, Swap          Prepared; Swapped or SwapFailed     an announcement, its turn
    engine watch    the engine's health         a restarted engine                  Welcome; its interval, a suspicion
    heartbeats      the counts                  Status; groups again; a new Hello   its interval

All of them share one event loop and one `asyncio.TaskGroup`: the first that fails ends the server with its error. A
finished group stays in the outbox until the trainer acknowledges it, and is sent again when it does not. While the
trainer is away, leases in progress go on and their groups wait, on disk (`outbox`); a new trainer's Welcome voids what
is still in progress, and is answered with what has been finished.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from asyncppo import fingerprints
from asyncppo.config import Config
from asyncppo.errors import EngineError, MessageError, RefusedError, UserError
from asyncppo.messages import (
    PROTOCOL,
    Ack,
    Cancel,
    Failed,
    Float32,
    Goodbye,
    Group,
    Hello,
    Lease,
    Message,
    Prepared,
    Pulse,
    Refused,
    ServerState,
    Status,
    Stop,
    Swap,
    SwapFailed,
    Swapped,
    UInt8,
    Unknown,
    WeightsReady,
    Welcome,
    brief,
)
from asyncppo.rewards import Grade, overlong_penalty, step_rewards
from asyncppo.transport.base import Link
from asyncppo.waits import note, waiting
from rollout_server.engine import UNLOADED, Engine, Response
from rollout_server.hot_swap import HotSwap, TakenBackError
from rollout_server.outbox import Outbox, size_of
from rollout_server.reward import Grader
from rollout_server.self_test import self_test

log = logging.getLogger("rollout_server")

MISSED_PULSES = 10
"""Heartbeats without a message from the trainer after which the server says Hello again."""
_ATTEMPTS = 2
"""Generations tried for one lease: the second after the engine has been looked at, and restarted if need be."""
_RESTARTS_IN_A_ROW = 3
"""Restarts of the engine without a completed generation in between; one more ends the server."""
_GOODBYE_S = 1.0
_HEADER_BYTES = 1 << 16
"""More than a group takes beside its arrays."""


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
        self._model = model
        self._swap = HotSwap(engine, config.rollout.swap_timeout_s)
        self._hello = Hello(
            protocol=PROTOCOL,
            server=name,
            incarnation=incarnation or uuid.uuid4().hex,
            started=time.time(),
            capacity=config.rollout.max_groups,
            agreement=config.agreement_hash(),
            model=fingerprints.model_fingerprint(model),
            tokenizer=fingerprints.tokenizer_fingerprint(model),
            engine=engine.description,
            ranks=engine.ranks,
        )
        self._heartbeat_s = config.stream.heartbeat_s
        self._trainer: str | None = None
        self._last_heard = time.monotonic()
        self._welcomed = asyncio.Event()
        self._hello_wanted = asyncio.Event()
        self._hello_wanted.set()
        self._spill_wanted = asyncio.Event()
        self._engine_started = asyncio.Event()
        self._suspicion = asyncio.Event()  # somebody saw the engine fail
        self._looked_at = asyncio.Condition()  # the engine's watch has looked at it
        self._stopping = asyncio.Event()
        self._stop_reason = ""
        self._tasks: asyncio.TaskGroup
        self._leases: dict[int, asyncio.Task[None]] = {}
        self._leases_are_void = False  # at the next Welcome
        spill = config.run_directory / "spill" / name
        self._outbox = Outbox(spill, config.rollout.spill_mb << 20, config.rollout.max_groups)
        self._outbox_has_room = asyncio.Event()
        self._note_outbox()
        self._generating = 0
        self._idle_since: float | None = None
        self._idle_s = 0.0
        self._responses = self._tokens = self._reward_errors = 0
        self._restarts = self._restarts_in_a_row = self._looks = self.malformed = 0

    async def run(self) -> None:
        """Serve until `stop`, the trainer's Stop, or the first failure. Then, in this order: end the leases' tasks and
        the others, say Goodbye, end the grading workers, end the engine, close the link.

        Raises:
            RefusedError: the trainer turned this server away.
            UserError: no trainer answered within `rollout.connect_timeout_s`.
            EngineError: the engine does not start, or its swaps are not clean.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:
                background = [
                    self._tasks.create_task(coroutine, name=name)
                    for name, coroutine in (
                        ("receiving", self._receiving()),
                        ("hello", self._saying_hello()),
                        ("spilling", self._spilling()),
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
        async with AsyncExitStack() as leaving:  # from the last to the first, whatever fails
            leaving.callback(self._link.close)
            leaving.callback(self._outbox.close)
            leaving.push_async_callback(self._engine.close)
            leaving.push_async_callback(asyncio.to_thread, self._grader.close)
            leaving.push_async_callback(self._say_goodbye)

    async def _say_goodbye(self) -> None:
        if self._welcomed.is_set():
            try:
                async with asyncio.timeout(_GOODBYE_S):
                    await self._link.send(Goodbye(reason=brief(self._stop_reason or "cancelled")))
            except TimeoutError:
                log.warning("the trainer does not take a Goodbye")

    # --- talking with the trainer ------------------------------------------------------------------------------------

    async def _saying_hello(self) -> None:
        """Says Hello until it is answered, at the start and whenever `_say_hello_again` asks for it.

        consumes    -
        produces    Hello, every heartbeat
        waits for   a reason, without limit; then Welcome, at most `rollout.connect_timeout_s`
        """
        limit = self._config.rollout.connect_timeout_s
        while True:
            await self._hello_wanted.wait()
            self._hello_wanted.clear()
            try:
                with waiting("the trainer to answer Hello", limit):
                    async with asyncio.timeout(limit):
                        while not self._welcomed.is_set():
                            self._hello = msgspec.structs.replace(self._hello, engine=self._engine.description)
                            await self._link.send(self._hello)
                            await _wait(self._welcomed, self._heartbeat_s)
            except TimeoutError:
                raise UserError(
                    f"no trainer answered within {limit:g} s (rollout.connect_timeout_s): is one running, and does it "
                    "listen on the address that this server was given (--trainer)?"
                    + (f" {self._link.hint}" if self._link.hint else "")
                ) from None

    def _say_hello_again(self, why: str) -> None:
        if self._welcomed.is_set():
            log.warning("saying Hello again: %s", why)
            self._welcomed.clear()
            self._hello_wanted.set()

    async def _receiving(self) -> None:
        """Does what the trainer says.

        consumes    every message of the trainer
        produces    leases' tasks, announcements of weights, acknowledged groups
        waits for   the link, without limit; silence is noticed by the heartbeats
        """
        while True:
            try:
                message = await self._link.receive()
            except MessageError as error:
                self.malformed += 1
                log.warning("dropped: a message of the trainer %s (%d so far)", error, self.malformed)
                continue
            self._last_heard = time.monotonic()
            await self._receive(message)

    async def _receive(self, message: Message) -> None:
        match message:
            case Welcome():
                await self._receive_welcome(message)
            case Lease():
                self._receive_lease(message)
            case Ack():
                self._forget([message.lease])
                await self._send_groups()  # the next may go
            case Cancel():
                self._forget(message.leases)
                await self._send_groups()
            case WeightsReady():
                self._swap.announce(message)
            case Swap():
                self._swap.tell(message)
            case Pulse():
                if message.policy_version not in (UNLOADED, self._swap.announced_version):
                    # It was announced before this pulse was sent, so the announcement was lost.
                    self._say_hello_again(f"version {message.policy_version} is out, and was never announced here")
            case Unknown():
                if self._welcomed.is_set():
                    self._leases_are_void = True
                    self._say_hello_again("the trainer does not know this server")
            case Refused():
                raise RefusedError(f"the trainer refused this server: {brief(message.reason)}")
            case Stop():
                self.stop(f"the trainer says: {brief(message.reason)}")
            case _:
                log.warning("ignored: %s", type(message).__name__)

    async def _receive_welcome(self, welcome: Welcome) -> None:
        if self._leases_are_void or self._trainer not in (None, welcome.trainer):
            self._void_leases()
        self._trainer, self._heartbeat_s, self._leases_are_void = welcome.trainer, welcome.heartbeat_s, False
        if not self._welcomed.is_set():
            self._welcomed.set()
            log.info("welcome in run %s; %d unacknowledged groups", brief(welcome.run), len(self._outbox))
            self._outbox.begin_again()
            await self._send_groups()

    def _receive_lease(self, lease: Lease) -> None:
        if lease.lease in self._leases:
            log.warning("lease %d came twice: ignored", lease.lease)
            return
        self._forget([lease.lease])  # its number has come again: that group is no longer wanted
        self._leases[lease.lease] = self._tasks.create_task(self._answer(lease), name=f"lease {lease.lease}")

    def _forget(self, leases: Iterable[int]) -> None:
        for lease in leases:
            self._outbox.forget(lease)
            task = self._leases.pop(lease, None)
            if task is not None:
                task.cancel()
        self._note_outbox()

    def _void_leases(self) -> None:
        """A trainer that does not know this server waits for none of its leases, and may use their numbers again."""
        if self._leases:
            log.warning("%d leases in progress are void", len(self._leases))
        self._forget(list(self._leases))

    async def _send_groups(self) -> None:
        """Send what waits for its turn, and again what has stayed unacknowledged for long."""
        if self._welcomed.is_set():
            for group in self._outbox.to_send(MISSED_PULSES * self._heartbeat_s):
                await self._link.send(group)

    def _note_outbox(self) -> None:
        """Call when `_outbox` has changed."""
        if self._outbox.full and self._outbox_has_room.is_set():
            log.warning(
                "generation pauses: %d finished groups wait for the trainer (rollout.spill_mb)", len(self._outbox)
            )
            self._outbox_has_room.clear()
        elif not self._outbox.full and not self._outbox_has_room.is_set():
            self._outbox_has_room.set()

    async def _spilling(self) -> None:
        """Writes groups to disk while no trainer is there. A task of its own: a disk may be slow, or hang.

        consumes    groups in the outbox
        produces    their files
        waits for   a kick, by every heartbeat without a trainer; then the disk, without limit: nobody waits for it
        """
        while True:
            await self._spill_wanted.wait()
            self._spill_wanted.clear()
            await self._outbox.spill(self._welcomed.is_set)

    async def _heartbeats(self) -> None:
        """Tells the trainer that this server lives, and notices when the trainer no longer does.

        consumes    the counts
        produces    Status; groups that stay unacknowledged, again; a new Hello after `MISSED_PULSES` silent intervals
        waits for   its interval, the trainer's `stream.heartbeat_s`
        """
        while True:
            await asyncio.sleep(self._heartbeat_s)
            if not self._welcomed.is_set():
                self._spill_wanted.set()
                continue
            patience = MISSED_PULSES * self._heartbeat_s
            if time.monotonic() - self._last_heard > patience:
                self._say_hello_again(f"nothing heard of the trainer for {patience:g} s")
                continue
            status = self.status()
            note(policy_version=status.policy_version, state=status.state, leases=status.groups_in_flight)
            await self._link.send(status)
            await self._send_groups()

    def status(self) -> Status:
        """What this server does now."""
        self._note_idle()
        return Status(
            policy_version=self._engine.policy_version if self._swap.serving else UNLOADED,
            groups_in_flight=len(self._leases),
            unacknowledged=len(self._outbox),
            responses=self._responses,
            tokens=self._tokens,
            idle_s=self._idle_s,
            reward_errors=self._reward_errors,
            engine_restarts=self._restarts,
            state=self._state(),
        )

    def _state(self) -> ServerState:
        if self._stopping.is_set():
            return "stopping"
        if self._swap.quarantined:
            return "quarantined"
        if self._swap.swapping:
            return "swapping"
        if not self._swap.serving:
            return "engine down" if self._restarts else "starting"
        if self._outbox.full:
            return "outbox full"
        return "generating" if self._generating else "waiting for leases"

    def _note_idle(self) -> None:
        """Call when the engine begins or ceases to serve or to generate, and before `_idle_s` is read."""
        now = time.monotonic()
        if self._idle_since is not None:
            self._idle_s += now - self._idle_since
        self._idle_since = now if self._swap.serving and not self._generating else None

    # --- leases ------------------------------------------------------------------------------------------------------

    async def _answer(self, lease: Lease) -> None:
        """One lease, from its prompt to its group.

        consumes    the Lease
        produces    its Group, kept in the outbox until Ack; or Failed
        waits for   room in the outbox, an engine with weights, the generation, the grading: each with its own limit
        """
        trainer = self._trainer or ""
        try:
            responses, generate_s = await self._generate(lease)
            started = time.monotonic()
            grades = await self._grader.grade([response.text for response in responses], lease.answer)
            rewards = await self._rewards(lease, responses, grades)
            group = make_group(lease, trainer, responses, rewards, generate_s, time.monotonic() - started)
            self._check_size(group)
        except EngineError as error:
            log.warning("lease %d failed: %s", lease.lease, error)
            await self._link.send(Failed(lease=lease.lease, reason=brief(str(error))))
            return
        finally:
            if self._leases.get(lease.lease) is asyncio.current_task():
                del self._leases[lease.lease]
        self._responses += len(responses)
        self._tokens += int(group.response_ids.size)
        self._reward_errors += int(group.reward_errors.sum())
        self._outbox.add(group)
        self._note_outbox()
        if self._welcomed.is_set():
            await self._send_groups()
        else:
            self._spill_wanted.set()

    def _check_size(self, group: Group) -> None:
        """Raises EngineError for a group that the trainer would not let in."""
        size, limit = size_of(group) + _HEADER_BYTES, self._config.stream.max_message_mb << 20
        if size > limit:
            raise EngineError(f"a group of {size >> 20} MB: at most stream.max_message_mb ({limit >> 20}) can be sent")

    async def _generate(self, lease: Lease) -> tuple[list[Response], float]:
        """The responses and the seconds they took; after a failure tried again, once the engine was looked at.

        Nothing is returned that may have tokens of weights whose probe is not passed: see `HotSwap.generation`.
        """
        if lease.group_size < 1:
            raise EngineError(f"a lease of {lease.group_size} responses: expected at least 1")
        if not await _wait(self._outbox_has_room, self._config.stream.lease_timeout_s):
            raise EngineError(f"{len(self._outbox)} finished groups wait for the trainer (rollout.spill_mb)")
        failures = 0
        while True:
            await self._swap.until_serving(self._recovery_s)
            started = time.monotonic()
            try:
                # the engine's own limit, and that of taking the request back
                limit = self._config.rollout.request_timeout_s + self._config.rollout.swap_timeout_s
                async with self._swap.generation():
                    with self._busy(), waiting(f"the engine's responses to lease {lease.lease}", limit):
                        responses = await self._engine.generate(
                            lease.prompt_ids, lease.group_size, self._config.sampling
                        )
            except TakenBackError as error:
                log.warning("lease %d is generated again: %s", lease.lease, error)
            except EngineError as error:
                failures += 1
                if failures == _ATTEMPTS:
                    raise
                log.warning("lease %d is tried again: %s", lease.lease, error)
                await self._engine_looked_at()
            else:
                self._restarts_in_a_row = 0
                return responses, time.monotonic() - started

    async def _rewards(self, lease: Lease, responses: Sequence[Response], grades: Sequence[Grade]) -> Rewards:
        """What training makes of the grades; an evaluation is of the final reward alone."""
        if lease.purpose == "eval":
            return plain_rewards(grades)
        if any(grade.steps for grade in grades):
            # beside the event loop: it takes milliseconds, or longer for thousands of tokens
            rewards = await asyncio.to_thread(dense_rewards, responses, grades, self._engine.decode)
        else:
            rewards = plain_rewards(grades)
        lengths = [response.ids.size for response in responses]
        reward, limit = self._config.reward, self._config.sampling.max_response_tokens
        penalty = overlong_penalty(lengths, limit, reward.overlong_buffer, reward.overlong_penalty)
        return replace(rewards, final=rewards.final + penalty)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._generating += 1
        self._note_idle()
        try:
            yield
        finally:
            self._generating -= 1
            self._note_idle()

    async def _engine_looked_at(self) -> None:
        looks = self._looks
        self._suspicion.set()
        try:
            async with asyncio.timeout(self._recovery_s), self._looked_at:
                await self._looked_at.wait_for(lambda: self._looks > looks)
        except TimeoutError:
            raise EngineError(f"waited {self._recovery_s:g} s for the engine to recover") from None

    @property
    def _recovery_s(self) -> float:
        """An engine is restarted and has weights again within this time."""
        return self._config.rollout.start_timeout_s + self._config.rollout.swap_timeout_s

    # --- the engine --------------------------------------------------------------------------------------------------

    async def _swapping(self) -> None:
        """Gives the engine the weights that are announced.

        consumes    announcements, and the trainer's word that it is this server's turn, by way of `HotSwap`
        produces    Prepared, Swapped or SwapFailed; an engine that may serve
        waits for   the engine's start, then an announcement, both without limit; each phase: `rollout.swap_timeout_s`
        """
        await self._engine_started.wait()
        while True:
            with waiting("new weights, and the engine to take them", math.inf):  # its phases: rollout.swap_timeout_s
                outcome = await self._swap.next()
            self._note_idle()
            match outcome:
                case Prepared():
                    log.info("version %d is prepared: %.3f s", outcome.policy_version, outcome.prepare_s)
                case Swapped():
                    log.info("version %d serves: %s", outcome.policy_version, _phases(outcome))
                case SwapFailed():
                    self._suspicion.set()
                    log.warning("version %d was not loaded: %s", outcome.policy_version, outcome.reason)
            await self._link.send(outcome)

    async def _watching_engine(self) -> None:
        """Starts the engine once the trainer has said Welcome, and restarts it when it fails.

        consumes    the engine's health, and the suspicion of those who saw it fail
        produces    an engine that lives; `HotSwap` gives it its weights back
        waits for   Welcome, as long as `_saying_hello` does; the engine's start and its self-test, each with its
                    limit; then an interval or a suspicion
        """
        await self._welcomed.wait()
        await self._bring_up(self._engine.start)
        await self._self_test()
        self._engine_started.set()
        while True:
            await _wait(self._suspicion, self._heartbeat_s)
            self._suspicion.clear()
            async with self._swap.engine_lock:
                if self._swap.needs_restart or not await self._engine.healthy():
                    await self._restart_engine()
            async with self._looked_at:
                self._looks += 1
                self._looked_at.notify_all()

    async def _self_test(self) -> None:
        """Prove once that a swap in the middle of an answer leaves nothing of the old weights behind.

        Raises:
            EngineError: it does, however it is swapped.
        """
        if not self._config.rollout.self_test or self._engine.self_tested:
            return
        limit = self._recovery_s
        try:
            with waiting("the engine's self-test", limit):
                async with asyncio.timeout(limit):
                    await self_test(self._engine, self._model, self._config)
        except TimeoutError:
            raise EngineError(
                f"waited {limit:g} s for the self-test of {self._engine.description} (rollout.start_timeout_s, "
                "rollout.swap_timeout_s): its log may say why; rollout.self_test=false starts without it"
            ) from None
        if self._engine.description != self._hello.engine:
            self._say_hello_again(f"its engine is now {self._engine.description}")

    async def _restart_engine(self) -> None:
        self._swap.engine_lost()
        self._note_idle()
        self._restarts += 1
        if self._swap.quarantined:
            log.warning("the engine answers wrongly: restarting it (%d restarts so far)", self._restarts)
        else:
            self._count_failure("it is down")
            log.warning("the engine is down: restarting it (%d so far)", self._restarts)
        await self._bring_up(self._engine.restart)
        self._swap.engine_restarted()

    async def _bring_up(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Start or restart the engine; one that fails to come up is tried again, with another port."""
        while True:
            try:
                with waiting("the engine to come up", self._recovery_s):
                    await attempt()
            except EngineError as error:
                self._count_failure(str(error))
                log.warning("the engine did not come up and is tried again: %s", error)
                attempt = self._engine.restart
            else:
                return

    def _count_failure(self, why: str) -> None:
        self._restarts_in_a_row += 1
        if self._restarts_in_a_row > _RESTARTS_IN_A_ROW:
            raise EngineError(
                f"{self._engine.description} failed {self._restarts_in_a_row} times and answered nothing in between: "
                f"its log says why; the last time: {why}"
            )


@dataclass(frozen=True)
class Rewards:
    """The rewards of N responses with T tokens."""

    final: Float32  # [N]
    steps: Float32  # [T], or [0] where there are no process rewards
    errors: UInt8  # [N]


def plain_rewards(grades: Sequence[Grade]) -> Rewards:
    """The final rewards alone."""
    return Rewards(
        final=np.array([grade.reward for grade in grades], np.float32),
        steps=np.empty(0, np.float32),
        errors=np.array([grade.error for grade in grades], np.uint8),
    )


def dense_rewards(
    responses: Sequence[Response], grades: Sequence[Grade], decode: Callable[[Sequence[int]], str]
) -> Rewards:
    """The final rewards, and the steps' on the tokens that complete them.

    A response whose tokens are not what its text says is a reward error, without rewards.
    """
    settled, steps = [], []
    for response, grade in zip(responses, grades, strict=True):
        try:
            steps.append(step_rewards(grade.steps, response.ids, response.text, decode))
            settled.append(grade)
        except ValueError as error:
            log.warning("process rewards have no tokens to stand on: %s", error)
            steps.append(np.zeros(response.ids.size, np.float32))
            settled.append(Grade(0.0, error=True))
    return replace(plain_rewards(settled), steps=np.concatenate(steps))


def make_group(
    lease: Lease, trainer: str, responses: Sequence[Response], rewards: Rewards, generate_s: float, grade_s: float
) -> Group:
    """The message for one lease's responses and their rewards; `trainer` is the process that leased it."""
    spans = [span for response in responses for span in response.spans]
    return Group(
        lease=lease.lease,
        trainer=trainer,
        epoch=lease.epoch,
        prompt_id=lease.prompt_id,
        response_ids=np.concatenate([response.ids for response in responses]).astype(np.int32),
        lengths=np.array([response.ids.size for response in responses], np.int32),
        behaviour_logprobs=np.concatenate([response.logprobs for response in responses]).astype(np.float32),
        span_versions=np.array([version for version, _ in spans], np.int32),
        span_lengths=np.array([tokens for _, tokens in spans], np.int32),
        span_counts=np.array([len(response.spans) for response in responses], np.int32),
        rewards=rewards.final,
        step_rewards=rewards.steps,
        truncated=np.array([response.truncated for response in responses], np.uint8),
        reward_errors=rewards.errors,
        generate_s=generate_s,
        grade_s=grade_s,
    )


def _phases(swapped: Swapped) -> str:
    """For the log."""
    phases = (
        f"prepare {swapped.prepare_s:.3f} s, wait {swapped.wait_s:.3f} s, pause {swapped.pause_s:.3f} s, "
        f"load {swapped.load_s:.3f} s, resume {swapped.resume_s:.3f} s"
    )
    if swapped.probe_gap is not None:
        phases += f", probe {swapped.probe_s:.3f} s, {swapped.probe_gap:.2g} nats from the trainer"
    return phases


async def _wait(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, for so long at most; whether it is set."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
    return event.is_set()
