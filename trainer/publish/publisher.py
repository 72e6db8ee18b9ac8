"""The publisher: new versions leave the learner beside training, in a thread of its own.

    consumes      versions (`publish`); of those that wait the newest wins
    produces      bytes where the servers find them (`Transport`), then the announcement
    waits for     a version; for room, where one cannot be written
    unblocked by  the learner; `close` ends it

A failure in the thread is raised in the learner, by the next call of any public method.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import torch

from asyncppo.config import Config
from asyncppo.errors import WeightsError
from asyncppo.messages import Float32, Int32, WeightsReady
from asyncppo.metrics import Journal
from asyncppo.waits import phase, waiting
from asyncppo.weights import Tensor, checksum_of

log = logging.getLogger("asyncppo.publish")

RETRY_S = 300.0
"""A version that cannot be written is tried again for so long; a newer one takes its place meanwhile."""
PAUSE_S = 5.0
_WRITE_S = 600.0
"""What one attempt may take."""
_TICK_S = 0.5
_CLOSE_S = 10.0
"""The thread ends within this time, or is left behind."""

Weights = Mapping[str, torch.Tensor]


class Transport(Protocol):
    """How a version's bytes reach the servers. Used by the publisher's thread; `close` by its owner."""

    name: str
    """As `publish.transport` has it."""

    def put(self, version: int, weights: Weights, model: Any) -> WeightsReady:
        """Have a version ready for every server that prepares for it from now on.

        Args:
            version: its number.
            weights: from `Policy.weights`, in `rollout.dtype`, on the CPU. They are the transport's now.
            model: the Hugging Face model that they are of, which says how they are saved.

        Returns:
            What to announce, without a probe.

        Raises:
            WeightsError: it could not; it may be tried again.
        """

    def remove_before(self, version: int) -> None:
        """Forget versions below this one: nobody serves, loads or wants them."""

    def close(self) -> None:
        """Forget all versions. Ends within seconds."""


@dataclass(frozen=True, slots=True)
class _Version:
    number: int
    weights: Weights
    probe_logprobs: Float32  # [P-1], or [0]
    handed_over: float


class Publisher:
    """See the module.

    Args:
        config: the run's.
        transport: takes the bytes; it stays its owner's to close.
        model: the Hugging Face model whose weights are published.
        announce: tells the servers (`Intake.announce`).
        oldest_wanted: given the newest announced version, the oldest that somebody may still load
            (`Feed.oldest_wanted_version`).
        probe_ids: [P] what the engines are probed with; [0] for no probe.
        journal: gets an event for each version.
    """

    def __init__(
        self,
        config: Config,
        transport: Transport,
        model: Any,
        announce: Callable[[WeightsReady], None],
        oldest_wanted: Callable[[int], int],
        probe_ids: Int32,
        journal: Journal | None = None,
    ) -> None:
        self._transport = transport
        self._model = model
        self._announce = announce
        self._oldest_wanted = oldest_wanted
        self._probe_ids = probe_ids
        self._tolerance = tolerance(config)
        self._journal = journal
        self._changed = threading.Condition()
        self._next: _Version | None = None
        self._busy = self._closing = False
        self._failure: BaseException | None = None
        self.skipped = 0
        """Versions that a newer one has overtaken before they were out."""
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    # --- the learner's side ------------------------------------------------------------------------------------------

    def publish(self, version: int, weights: Weights, probe_logprobs: torch.Tensor) -> None:
        """Take a version over; returns at once. One that still waits is overtaken by it, and never published.

        Args:
            version: its number, above all before.
            weights: from `Policy.weights`, in `rollout.dtype`; nobody may change them from now on.
            probe_logprobs: [P-1] of `Policy.probe`, by these weights.
        """
        logprobs = np.asarray(probe_logprobs.numpy(), dtype=np.float32)
        with self._changed:
            self.raise_failure()
            if self._next is not None:
                self._skip(self._next.number, version)
            self._next = _Version(version, weights, logprobs, time.monotonic())
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until the newest version is announced.

        Raises:
            WeightsError: it cannot be written.
        """
        limit_s = RETRY_S + _WRITE_S
        give_up_at = time.monotonic() + limit_s
        with waiting("the newest version to be published", limit_s), self._changed:
            while self._next is not None or self._busy:
                self.raise_failure()
                if time.monotonic() > give_up_at:
                    raise WeightsError(f"the newest version is not published after {limit_s:.0f} s")
                self._changed.wait(_TICK_S)
            self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what ended the thread, if anything did: asked wherever the learner waits for what only a new version
        brings."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the thread; what waits is not published any more. It does not raise, and ends within seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("a version is still being written after %.0f s: it is left behind", _CLOSE_S)

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (version := self._take()) is not None:
                with phase(f"publishing version {version.number}"):
                    self._publish(version)
                del version  # its weights are the transport's now
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        except BaseException as error:  # raised again in the learner by `raise_failure`
            log.exception("the publisher failed")
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _take(self) -> _Version | None:
        """The next version; None to end."""
        with self._changed:
            while self._next is None and not self._closing:
                self._changed.wait(_TICK_S)
            version, self._next = self._next, None
            self._busy = version is not None
            return None if self._closing else version

    def _publish(self, version: _Version) -> None:
        began = time.monotonic()
        ready = self._put(version)
        if ready is None:
            return
        if len(version.probe_logprobs):
            ready = msgspec.structs.replace(
                ready,
                probe_ids=self._probe_ids,
                probe_logprobs=version.probe_logprobs,
                tolerance=self._tolerance,
            )
        self._announce(ready)
        if self._journal:
            self._journal.event(
                "published",
                policy_version=version.number,
                transport=self._transport.name,
                bytes=sum(tensor.nbytes for tensor in version.weights.values()),
                waited_s=began - version.handed_over,
                put_s=time.monotonic() - began,
                skipped=self.skipped,
            )
        self._transport.remove_before(self._oldest_wanted(version.number))

    def _put(self, version: _Version) -> WeightsReady | None:
        """None when it was overtaken, or the run ends, before it could be written."""
        deadline = time.monotonic() + RETRY_S
        while True:
            try:
                return self._transport.put(version.number, version.weights, self._model)
            except WeightsError as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise WeightsError(f"{error} (tried for {RETRY_S:.0f} s)") from error
                log.warning("version %d is not published yet, trying for %.0f s more: %s", version.number, left, error)
            with waiting(f"room for version {version.number}", PAUSE_S), self._changed:
                self._changed.wait_for(lambda: self._closing or self._next is not None, min(PAUSE_S, left))
                if self._closing:
                    return None
                if self._next is not None:
                    self._skip(version.number, self._next.number)
                    return None

    def _skip(self, version: int, newer: int) -> None:
        self.skipped += 1
        log.info("version %d is not published: version %d has overtaken it", version, newer)


def is_published(config: Config, version: int) -> bool:
    """Whether the learner publishes a version that it has just made: every k-th, and the last of the run."""
    return version % config.publish.every == 0 or version == config.run.steps


def tolerance(config: Config) -> float:
    """How far the probe's log-probs may differ, mean |difference| in nats."""
    if config.publish.tolerance is not None:
        return config.publish.tolerance
    return 0.001 if config.actor.dtype == config.rollout.dtype == "float32" else 0.05


def entries(weights: Weights) -> dict[str, Tensor]:
    """What the manifest says of each tensor."""
    return {
        name: Tensor(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            xxh3=checksum_of(bytes_of(tensor).numpy().data),
        )
        for name, tensor in weights.items()
    }


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, [n] uint8; a view where it is contiguous."""
    return tensor.detach().flatten().view(torch.uint8)
