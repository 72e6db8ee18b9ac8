"""The learner's view of all critics: a batch out, values [M, T] back. It alone knows that they run elsewhere.

A critic may die and be started again. Its new process says CriticReady with a new session; it then gets what brings it
to the state of the lost one, bit by bit: what that one began with or was saved as last, every batch since then, and
what was asked last. Until it has caught up the learner waits: no step is made with fewer critics.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch

from asyncppo.config import Config
from asyncppo.errors import CheckpointError, EngineError, MessageError, StallError
from asyncppo.messages import (
    CriticFailed,
    CriticReady,
    Done,
    ExportCritic,
    ForCritic,
    FromCritic,
    Learn,
    Learned,
    LoadCritic,
    SaveCritic,
    StartCritic,
    Stop,
)
from asyncppo.transport.base import Channel
from asyncppo.waits import waiting
from trainer.stream.batch import Batch

log = logging.getLogger("asyncppo.critics")

_POLL_S = 1.0
"""A message that could not be sent is tried again this often."""


@dataclass(frozen=True, slots=True)
class Values:
    """What the critics of a step say."""

    values: torch.Tensor  # [M, T] after learning: what the targets are made of
    fresh: torch.Tensor  # [M, T] before learning, or [0, 0] where nobody asked (`critic.fresh_values`)
    metrics: dict[str, float]
    """As `critic/m/name`."""


NO_VALUES = Values(torch.zeros((0, 0)), torch.zeros((0, 0)), {})
"""Of no critics."""


def _stack(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values) if values else torch.zeros((0, 0))


class Lessons:
    """The batches that the critics have learned from since their last checkpoint, up to a size.

    The critics' messages of one batch share its arrays, which count once.
    """

    def __init__(self, limit_mb: int) -> None:
        self._limit = limit_mb << 20
        self._kept: deque[tuple[int, list[Learn]]] = deque()
        self._bytes = 0
        self._forgotten: list[int] = []

    def add(self, messages: list[Learn]) -> None:
        """Keep a batch; the oldest ones go where there is no room. The newest always stays."""
        if not messages:
            return
        size = _bytes(messages)
        self._kept.append((size, messages))
        self._bytes += size
        while self._bytes > self._limit and len(self._kept) > 1:
            if not self._forgotten:
                log.warning(
                    "batches since the critics' last checkpoint take more than %d MB: from now on a critic that is "
                    "started again misses the oldest of them (critic.recovery_mb, run.save_every)",
                    self._limit >> 20,
                )
            dropped, oldest = self._kept.popleft()
            self._bytes -= dropped
            self._forgotten.append(oldest[0].step)

    def remove_before(self, version: int) -> None:
        """Versions below this one are in a checkpoint."""
        while self._kept and self._kept[0][1][0].step < version:
            self._bytes -= self._kept.popleft()[0]
        self._forgotten = [step for step in self._forgotten if step >= version]

    def clear(self) -> None:
        """The critics have begun from somewhere else."""
        self._kept.clear()
        self._bytes, self._forgotten = 0, []

    def of(self, index: int) -> list[Learn]:
        """A critic's lessons, in their order."""
        return [messages[index] for _, messages in self._kept]

    @property
    def missed(self) -> int:
        """How many steps since the last checkpoint are no longer kept."""
        return len(self._forgotten)


def _bytes(messages: list[Learn]) -> int:
    first = messages[0]
    shared = (first.input_ids, first.sequence_lengths, first.response_lengths, first.rewards, first.group_index)
    return sum(array.nbytes for array in shared) + sum(message.shard.nbytes for message in messages)


@dataclass(slots=True)
class _Line:
    """The line to one critic."""

    channel: Channel
    session: str = ""
    """Of the process that is up; empty before the first."""
    base: ForCritic | None = None
    """What a new process begins from; None: from what its config says, as the first one did."""
    asked: ForCritic | None = None
    """What was asked last, while it has no answer."""
    unsent: deque[ForCritic] = field(default_factory=deque)
    unanswered: deque[ForCritic] = field(default_factory=deque)
    """Sent to this session, or about to be; each gets one answer, in this order."""
    restarts: int = 0


class Critics:
    """M critics, each behind a channel; M may be 0. Only rank 0 of the learner has one, and one thread uses it.

    Args:
        config: of the run.
        channels: one for each critic.
        event: writes an event (`Journal.event`).
        come_back: whether somebody starts a critic again that has died: the supervisor (`critic.restarts`), or whoever
            started it by hand (`critic.addresses`). Without, a critic that fails ends the run.
    """

    def __init__(
        self,
        config: Config,
        channels: Sequence[Channel],
        event: Callable[..., None] | None = None,
        *,
        come_back: bool = False,
    ) -> None:
        self._config = config
        self._lines = [_Line(channel) for channel in channels]
        self._lessons = Lessons(config.critic.recovery_mb)
        self._event = event
        self._come_back = come_back
        self._lock = threading.Lock()
        """Over the lines' bases and the lessons: `saved` comes from the thread that writes checkpoints."""

    def wait_until_ready(self) -> None:
        """Raises EngineError or StallError when a critic does not come up."""
        for index in range(len(self._lines)):
            self._settle(index, "come up", until_ready=True)

    def learn(self, batch: Batch, rewards: torch.Tensor, step: int) -> None:
        """Send the batch to all critics; each begins at once and `values` waits for them.

        Args:
            batch: N responses with T tokens.
            rewards: [T], `targets.rewards`.
            step: the version that is trained, or below 0 in the warm start.

        A response of truncated length teaches nothing where `algorithm.truncated` masks it or bootstraps it.
        """
        settings = self._config.algorithm
        usable = np.ones(len(batch.rewards), dtype=bool) if settings.truncated == "zero" else batch.truncated == 0
        messages = [
            Learn(
                step=step,
                input_ids=batch.input_ids,
                sequence_lengths=batch.sequence_lengths,
                response_lengths=batch.response_lengths,
                rewards=rewards.numpy(),
                shard=(usable & batch.learned_by(index, settings.shards)).astype(np.uint8),
                group_index=batch.group_index,
            )
            for index in range(len(self._lines))
        ]
        if self._come_back:
            with self._lock:
                self._lessons.add(messages)
        for index, message in enumerate(messages):
            self._ask(index, message)

    def values(self) -> Values:
        """What `learn` asked for.

        Raises:
            EngineError: a critic failed, and nobody starts it again.
            StallError: a critic did not answer within `critic.timeout_s`.
        """
        values: list[torch.Tensor] = []
        fresh: list[torch.Tensor] = []
        metrics: dict[str, float] = {}
        for index in range(len(self._lines)):
            learned = self._settle(index, "learn and give its values")
            assert isinstance(learned, Learned)
            values.append(torch.from_numpy(np.array(learned.values)))
            if len(learned.fresh_values):
                fresh.append(torch.from_numpy(np.array(learned.fresh_values)))
            metrics |= {f"critic/{index}/{name}": value for name, value in learned.metrics.items()}
            metrics[f"critic/{index}/seconds"] = learned.seconds
        whole = len(fresh) == len(values)
        return Values(_stack(values), _stack(fresh) if whole else torch.zeros((0, 0)), metrics)

    def save(self, directory: Path) -> None:
        """Every critic writes `critic_m` under the directory, all at the same time.

        One that dies meanwhile writes it anew. Tell `saved` when the checkpoint is whole and in its place.

        Raises:
            CheckpointError: one could not; all of them live, and are as they were.
        """
        self._all(lambda index: SaveCritic(directory=str(directory / f"critic_{index}")), "save its state")

    def saved(self, directory: Path, version: int) -> None:
        """A whole checkpoint of this version is in this directory: what a critic that comes back begins from.

        Any thread may call it; before it returns, the checkpoint of the last call must not go.

        Args:
            directory: where it stays; has `critic_m` in it.
            version: the critics had learned from the batches of all versions below it, and from no other.
        """
        with self._lock:
            for index, line in enumerate(self._lines):
                line.base = LoadCritic(directory=str(directory / f"critic_{index}"))
            self._lessons.remove_before(version)

    def load(self, directory: Path) -> None:
        """Every critic goes on from `critic_m`."""
        self._begin(lambda index: LoadCritic(directory=str(directory / f"critic_{index}")), "load its state")

    def export(self, directory: Path) -> None:
        """Every critic writes `critic_m` under the directory, an ordinary Hugging Face model with a scalar head."""
        self._all(lambda index: ExportCritic(directory=str(directory / f"critic_{index}")), "export its weights")

    def start(self, directory: Path) -> None:
        """Every critic begins anew from the `critic_m` that `export` wrote."""
        self._begin(lambda index: StartCritic(directory=str(directory / f"critic_{index}")), "begin anew")

    def stop(self, reason: str) -> None:
        """The critics' processes end."""
        for line in self._lines:
            line.channel.send(Stop(reason=reason))
            line.channel.close()

    def _begin(self, message: Callable[[int], ForCritic], what: str) -> None:
        """What came before does not count any more, for one that comes back either."""
        messages = [message(index) for index in range(len(self._lines))]
        with self._lock:
            self._lessons.clear()
            for line, base in zip(self._lines, messages, strict=True):
                line.base = base
        for index, base in enumerate(messages):
            self._ask(index, base)
        self._settle_all(what)

    def _all(self, message: Callable[[int], ForCritic], what: str) -> None:
        for index in range(len(self._lines)):
            self._ask(index, message(index))
        self._settle_all(what)

    def _settle_all(self, what: str) -> None:
        failures = []
        for index in range(len(self._lines)):
            done = self._settle(index, what)
            assert isinstance(done, Done)
            if done.failure:
                failures.append(f"critic {index} could not {what}: {done.failure}")
        if failures:
            raise CheckpointError("; ".join(failures))

    # --- one critic --------------------------------------------------------------------------------------------------

    def _ask(self, index: int, message: ForCritic) -> None:
        line = self._lines[index]
        line.asked = message
        line.unsent.append(message)
        line.unanswered.append(message)
        self._send(line)

    def _send(self, line: _Line) -> None:
        while line.unsent:
            if not line.channel.send(msgspec.structs.replace(line.unsent[0], session=line.session)):
                return  # nobody is there; `_settle` tries again
            line.unsent.popleft()

    def _settle(self, index: int, what: str, *, until_ready: bool = False) -> FromCritic | None:
        """Wait until everything that was asked is answered; returns the last answer.

        The limit, `critic.timeout_s`, counts from the last thing that came of this critic.
        """
        line, limit = self._lines[index], self._config.critic.timeout_s
        answer: FromCritic | None = None
        lost = ""
        deadline = time.monotonic() + limit
        with waiting(f"critic {index} to {what}", limit) as wait:
            while line.unanswered or (until_ready and not line.session):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise StallError(
                        f"waited {limit:.0f} s for critic {index} to {what} (critic.timeout_s){lost}; "
                        f"{line.channel.hint or 'its log says what it does'}"
                    )
                self._send(line)
                message = self._receive(index, min(left, _POLL_S))
                came = True
                if isinstance(message, CriticReady):
                    if came := message.session != line.session or not line.session:
                        self._greet(index, message)
                elif message is None or message.session != line.session:
                    came = False  # nothing, or what a process said that is no more
                elif isinstance(message, CriticFailed):
                    if not self._come_back:
                        raise EngineError(f"critic {index} failed: {message.reason}")
                    lost = f"; it failed: {message.reason}"
                    log.error("critic %d failed, and is waited for to come back: %s", index, message.reason)
                    wait.renew(f"critic {index} to come back and {what}")
                elif came := bool(line.unanswered) and _answers(message, line.unanswered[0]):
                    answer = message
                    line.unanswered.popleft()
                if came:
                    deadline = time.monotonic() + limit
                    wait.renew()
        line.asked = None
        return answer

    def _receive(self, index: int, timeout_s: float) -> FromCritic | None:
        try:
            message: FromCritic | None = self._lines[index].channel.receive(timeout_s)
        except MessageError as error:
            log.warning("dropped: a message of critic %d %s", index, error)
            return None
        return message

    def _greet(self, index: int, ready: CriticReady) -> None:
        """A process is up. One that takes another's place gets what that one had, and what it did not answer."""
        line = self._lines[index]
        is_first, line.session = not line.session, ready.session
        if is_first:  # what was sent before was for nobody
            if ready.used and line.base is None:  # by a learner that is no more: that does not count in this run
                log.warning("critic %d has been used by an earlier process of the learner: it begins anew", index)
                line.unanswered.appendleft(StartCritic(directory=""))
            line.unsent = deque(line.unanswered)
            return
        if not self._come_back:
            raise EngineError(
                f"critic {index} is another process than before, and nothing was kept for it to catch up with "
                "(critic.restarts is 0)"
            )
        with self._lock:
            lessons, base, missed = self._lessons.of(index), line.base, self._lessons.missed
        if base is None and lessons and lessons[0].step < 0:  # in the warm start: it begins as that began
            base = StartCritic(directory="")
        messages: list[ForCritic] = [*([] if base is None else [base]), *lessons]
        if line.asked is not None and not any(line.asked is message for message in messages):
            messages.append(line.asked)
        line.unsent, line.unanswered = deque(messages), deque(messages)
        line.restarts += 1
        log.warning(
            "critic %d was started again (%d so far): it learns %d batches again%s",
            index,
            line.restarts,
            len(lessons),
            f", and misses {missed} that were no longer kept (critic.recovery_mb)" if missed else "",
        )
        if self._event:
            self._event("critic_restarted", critic=index, restarts=line.restarts, again=len(lessons), missed=missed)


def _answers(message: FromCritic, asked: ForCritic) -> bool:
    if isinstance(asked, Learn):
        return isinstance(message, Learned) and message.step == asked.step
    return isinstance(message, Done)
