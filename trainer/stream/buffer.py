"""The buffer: groups that have arrived and wait for a batch; bounded in age by rule (1) of asyncppo/staleness.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from asyncppo.messages import Group
from asyncppo.staleness import may_take, staleness
from trainer.stream.prompts import Prompt


@dataclass(frozen=True, slots=True)
class BufferedGroup:
    """A group with what the trainer knows about it."""

    lease: int
    epoch: int
    prompt: Prompt
    group: Group

    @property
    def oldest_version(self) -> int:
        """Oldest version of any token in the group."""
        return int(self.group.span_versions.min())


class Buffer:
    """Groups by lease. Not thread-safe: the intake guards it."""

    def __init__(self, max_staleness: int, batch: int) -> None:
        self._groups: dict[int, BufferedGroup] = {}
        self._max_staleness = max_staleness
        self._batch = batch

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, group: BufferedGroup) -> None:
        """Hold a group until it is taken or has grown too old."""
        self._groups[group.lease] = group

    def remove_stale(self, version: int) -> list[BufferedGroup]:
        """Take out what no batch may hold any more when `version` is about to be trained."""
        stale = [g for g in self._groups.values() if staleness(version, g.oldest_version) > self._max_staleness]
        for group in stale:
            del self._groups[group.lease]
        return stale

    def take(self, version: int, due: Mapping[int, int]) -> list[BufferedGroup] | None:
        """The next batch, earliest due first, or None while it has to wait for more groups, or for slow ones.

        Args:
            version: the version about to be trained.
            due: the ledger's due versions of everything unconsumed.
        """
        if len(self._groups) < self._batch:
            return None
        oldest_first = sorted(self._groups.values(), key=lambda group: (group.oldest_version, group.lease))
        chosen = oldest_first[: self._batch]
        deadlines = [group.oldest_version + self._max_staleness for group in chosen]
        in_flight = Counter(due)
        in_flight.subtract(group.oldest_version + self._max_staleness for group in self._groups.values())
        worth_waiting = any(count and version <= deadline < max(deadlines) for deadline, count in in_flight.items())
        if worth_waiting and not may_take(due, deadlines, version=version, batch=self._batch):
            return None
        for group in chosen:
            del self._groups[group.lease]
        return chosen
