"""Admission: may one more prompt be leased? Rule (1) of asyncppo/staleness.py, with the run's numbers."""

from __future__ import annotations

from collections import Counter

from asyncppo.config import Config
from asyncppo.staleness import demands, may_admit
from trainer.stream.buffer import Buffer
from trainer.stream.ledger import Ledger


class Admission:
    """Looks at ledger and buffer, changes neither. Not thread-safe: the intake guards it."""

    def __init__(self, config: Config, ledger: Ledger, buffer: Buffer) -> None:
        self._ledger = ledger
        self._buffer = buffer
        self._batch = config.stream.prompts_per_batch
        self._ready = config.stream.ready_batches * self._batch
        self._max_staleness = config.stream.max_staleness
        self._last = config.run.steps - 1
        self.version = 0
        """The version about to be trained."""
        self.limit = self._max_staleness
        """The bound that counts here, lower than `stream.max_staleness` while the brake is on."""

    def limit_staleness(self, bound: int) -> None:
        """Admit by this bound from now on.

        Raises:
            ValueError: below 0 or above `stream.max_staleness`.
        """
        if not 0 <= bound <= self._max_staleness:
            raise ValueError(f"expected a bound from 0 to stream.max_staleness ({self._max_staleness}), got {bound}")
        self.limit = bound

    def allows(self, served: int) -> bool:
        """Whether a server that serves this version may have one more prompt."""
        return len(self._buffer) < self._ready and self.allows_finished(served)

    def allows_finished(self, oldest_version: int) -> bool:
        """Whether a group that is generated already may come in, with this oldest version: rule (1) alone.

        `stream.ready_batches` only paces what is still to be generated.
        """
        return may_admit(
            demands(self._groups(), version=self.version),
            oldest_version=oldest_version,
            max_staleness=min(self.limit, self._last - oldest_version),
            version=self.version,
            batch=self._batch,
            utd=self._ledger.utd,
        )

    def _groups(self) -> Counter[tuple[int, int]]:
        """(due version, uses left) of everything unconsumed, by the limit and the run's last version."""
        sooner = self._max_staleness - self.limit
        groups: Counter[tuple[int, int]] = Counter()
        for deadline, count in self._ledger.due.items():
            if deadline >= self.version:  # the limit makes it urgent, only the bound drops it
                groups[min(max(deadline - sooner, self.version), self._last), self._ledger.utd] += count
        for (deadline, left), count in self._ledger.reusable.items():
            groups[min(deadline - sooner, self._last), left] += count
        return groups
