"""The buffer: groups that have arrived and wait for a batch, their first or, with `algorithm.reuse: replay`, a further
one; bounded in age by rule (1) of asyncppo/staleness.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from asyncppo.messages import Group
from asyncppo.staleness import may_take, staleness
from trainer.stream.prompts import Prompt


@dataclass(frozen=True, slots=True)
class BufferedGroup:
    """A group with what the trainer knows about it."""

    lease: int
    position: int
    """Of its prompt in the run's sequence of prompts (`LeaseRecord`): ties are broken by it, the same in every run."""
    epoch: int
    prompt: Prompt
    group: Group
    uses: int = 0
    """How often it was in a batch before."""
    used_at: int = -1
    """Version of its last use: its next one is at another."""

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

    def by_position(self) -> list[BufferedGroup]:
        """All groups, in the order of their prompts."""
        return sorted(self._groups.values(), key=lambda group: group.position)

    def add(self, group: BufferedGroup) -> None:
        """Hold a group until it is taken or has grown too old."""
        self._groups[group.lease] = group

    def return_used(self, group: BufferedGroup, version: int) -> None:
        """Hold a group that was used at `version` for another use, at a later one."""
        self.add(replace(group, uses=group.uses + 1, used_at=version))

    def remove_stale(self, version: int, limit: int | None = None) -> list[BufferedGroup]:
        """Take out what no batch may hold any more when `version` is about to be trained.

        Args:
            version: the version about to be trained.
            limit: bound for groups that were used before, where it is lower than `max_staleness`.
        """
        bounds = self._max_staleness, self._max_staleness if limit is None else limit
        stale = [g for g in self._groups.values() if staleness(version, g.oldest_version) > bounds[g.uses > 0]]
        for group in stale:
            del self._groups[group.lease]
        return stale

    def take(self, version: int, due: Mapping[int, int], *, wait_for_slow: bool = True) -> list[BufferedGroup] | None:
        """The next batch, earliest due first, or None while it has to wait for more groups, or for slow ones.

        Those due at once are in the order of their prompts, not of their arrival: where the bound is 0 a batch is then
        the same whoever answered first, and whatever was restarted meanwhile.

        Args:
            version: the version about to be trained.
            due: the ledger's due versions of everything that was never used.
            wait_for_slow: whether those in flight that would be too old for the next batch are waited for
                (`stream.slow`).
        """
        available = [group for group in self._groups.values() if group.used_at != version]
        if len(available) < self._batch:
            return None
        available.sort(key=lambda group: (group.oldest_version, group.uses, group.position))
        chosen = available[: self._batch]
        if not may_take(due, self._due(chosen), version=version, batch=self._batch):
            available.sort(key=lambda group: group.uses > 0)  # first uses are mandatory
            chosen = available[: self._batch]
            if (
                wait_for_slow
                and self._in_flight_is_more_urgent(chosen, version, due)
                and not may_take(due, self._due(chosen), version=version, batch=self._batch)
            ):
                return None
        for group in chosen:
            del self._groups[group.lease]
        return chosen

    def _due(self, groups: Iterable[BufferedGroup]) -> list[int]:
        """Due versions of those never used."""
        return [group.oldest_version + self._max_staleness for group in groups if not group.uses]

    def _in_flight_is_more_urgent(self, chosen: list[BufferedGroup], version: int, due: Mapping[int, int]) -> bool:
        """Whether a group in flight may still come in time for a place that one of these has: it is worth waiting."""
        in_flight = Counter(due)
        in_flight.subtract(self._due(self._groups.values()))
        latest = max(self._due(chosen)) if not chosen[-1].uses else math.inf
        return any(count and version <= deadline < latest for deadline, count in in_flight.items())
