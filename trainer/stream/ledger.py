"""The ledger: what became of every prompt that was leased, and the only owner of those counts.

A lease is one prompt on its way through the house: in flight at a server, buffered here, and at last consumed or
dropped. It is consumed when it leaves for good after one use or more: all `utd` uses are made, or what is left of them
lapses because it has grown too old. It is dropped when it goes unused; the prompt is then leased again under a new
lease, so no prompt is lost, and each (epoch, prompt) is consumed once; only one whose group has no signal is done.
At all times: admitted = in flight + buffered + consumed + dropped.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from asyncppo.errors import ConservationError
from trainer.stream.prompts import Prompt, Prompts

log = logging.getLogger("asyncppo.ledger")

K = TypeVar("K")

NOT_COMPLETED = "not completed"
"""Reason of a drop: a server said that it failed, or did not answer in time."""
NO_SIGNAL = "no signal"
"""Reason of a drop: all responses have the same reward (`stream.drop_equal_rewards`); the prompt is done."""
_HOPELESS = 5


@dataclass(slots=True)
class LeaseRecord:
    """One prompt, leased."""

    lease: int
    position: int
    """Place of the prompt in the run's endless sequence of prompts: says epoch and prompt."""
    epoch: int
    prompt: Prompt
    peer: bytes
    leased_at: float
    oldest_version: int
    """Oldest version that a token may have: the server's at the time of the lease, later the group's own."""
    buffered: bool = False
    uses: int = 0
    """How often its group was trained on."""


class LedgerState(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint keeps of the ledger."""

    next_position: int
    unconsumed: list[int]
    """Positions before `next_position` that were never used: to be leased again after a resume."""
    admitted: int
    consumed: int
    """With the groups that have uses left, which lapse with the process that buffered them."""
    dropped: dict[str, int]
    used: int = 0
    lapsed: int = 0


@dataclass
class Ledger:
    """Who holds which prompt. Not thread-safe: the intake guards it."""

    prompts: Prompts
    max_staleness: int
    utd: int = 1
    """How often a group comes out of the buffer at most: more than once with `algorithm.reuse: replay`."""
    records: dict[int, LeaseRecord] = field(default_factory=dict)
    """In flight and buffered, by lease."""
    due: Counter[int] = field(default_factory=Counter)
    """Due version to number of records that were never used (asyncppo/staleness.py)."""
    reusable: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(due version, uses left) to number of records that were used and may be used again."""
    admitted: int = 0
    consumed: int = 0
    buffered: int = 0
    used: int = 0
    """Uses of all groups."""
    lapsed: int = 0
    """Uses that were left to groups of at least one use when they had grown too old."""
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    _next_lease: int = field(default_factory=lambda: secrets.randbits(30) << 32)
    _next_position: int = 0
    _fresh: Iterator[tuple[int, Prompt]] | None = None
    _failures: Counter[int] = field(default_factory=Counter)
    _again: deque[tuple[int, int, Prompt]] = field(default_factory=deque)

    @property
    def in_flight(self) -> int:
        """Leased and not yet received."""
        return len(self.records) - self.buffered

    @property
    def unconsumed(self) -> int:
        """In flight or buffered."""
        return len(self.records)

    def lease_number(self) -> int:
        """A number that no other lease has, of an earlier process of this run neither: its groups may still come."""
        self._next_lease += 1
        return self._next_lease

    def lease(self, peer: bytes, oldest_version: int, now: float) -> LeaseRecord:
        """Admit the next prompt: one that has to be leased again first, else the next of the sequence."""
        if self._again:
            position, epoch, prompt = self._again.popleft()
        else:
            if self._fresh is None:
                self._fresh = self.prompts.after(self._next_position)
            position = self._next_position
            epoch, prompt = next(self._fresh)
            self._next_position += 1
        record = LeaseRecord(self.lease_number(), position, epoch, prompt, peer, now, oldest_version)
        self.records[record.lease] = record
        self.admitted += 1
        self.due[oldest_version + self.max_staleness] += 1
        return record

    def receive(self, lease: int, oldest_version: int) -> None:
        """The group of a lease is buffered; its tokens say how old it is."""
        record = self.records[lease]
        self._undue(record)
        record.oldest_version, record.buffered = oldest_version, True
        self.due[oldest_version + self.max_staleness] += 1
        self.buffered += 1

    def use(self, lease: int, *, last: bool = False) -> bool:
        """This group is in a batch. Whether it stays buffered for another use.

        Args:
            lease: of a buffered group.
            last: it shall not be used again, whatever is left.
        """
        record = self.records[lease]
        self._undue(record)
        record.uses += 1
        self.used += 1
        if record.uses < self.utd and not last:
            self.reusable[self._reusable_key(record)] += 1
            return True
        self._consume(record)
        return False

    def lapse(self, lease: int) -> None:
        """This group was used, and has grown too old for the uses that are left to it."""
        record = self.records[lease]
        self._undue(record)
        self.lapsed += self.utd - record.uses
        self._consume(record)

    def drop(self, lease: int, reason: str) -> None:
        """This lease ends without having been used; its prompt will be leased again, unless that is in vain.

        A prompt whose group has no signal has been tried, and one that `_HOPELESS` servers in a row could not complete
        is given up: it would be tried for ever.
        """
        record = self.records.pop(lease)
        assert not record.uses, f"lease {lease} was used {record.uses} times: it lapses"
        self._undue(record)
        self.buffered -= record.buffered
        self.dropped[reason] += 1
        if reason == NO_SIGNAL:
            return
        self._failures[record.position] += reason == NOT_COMPLETED
        if self._failures[record.position] < _HOPELESS:
            self._again.append((record.position, record.epoch, record.prompt))
        else:
            log.error("prompt %s is given up: %d times no server completed it", record.prompt.prompt_id, _HOPELESS)

    def held_by(self, peer: bytes) -> list[int]:
        """Leases in flight at a server."""
        return [record.lease for record in self.records.values() if record.peer == peer and not record.buffered]

    def check(self) -> None:
        """Raises ConservationError when the counts do not add up."""
        dropped = sum(self.dropped.values())
        if (
            self.admitted != self.in_flight + self.buffered + self.consumed + dropped
            or self.buffered != sum(record.buffered for record in self.records.values())
            or self.due.total() != sum(not record.uses for record in self.records.values())
            or self.due.total() + self.reusable.total() != len(self.records)
        ):
            raise ConservationError(
                f"admitted {self.admitted} != in flight {self.in_flight} + buffered {self.buffered} + consumed "
                f"{self.consumed} + dropped {dropped}: this is a bug; the run stops before it trains on wrong counts"
            )

    def state(self) -> LedgerState:
        """For a checkpoint."""
        waiting = [position for position, _, _ in self._again]
        never_used = [record.position for record in self.records.values() if not record.uses]
        left = [self.utd - record.uses for record in self.records.values() if record.uses]
        consumed = self.consumed + len(left)
        return LedgerState(
            next_position=self._next_position,
            unconsumed=sorted([*waiting, *never_used]),
            admitted=consumed + sum(self.dropped.values()),
            consumed=consumed,
            dropped=dict(self.dropped),
            used=self.used,
            lapsed=self.lapsed + sum(left),
        )

    def restore(self, state: LedgerState) -> None:
        """Go on from a checkpoint: what was in flight, or buffered and never used, is leased again first."""
        self._next_position = state.next_position
        self.admitted, self.consumed, self.dropped = state.admitted, state.consumed, Counter(state.dropped)
        self.used, self.lapsed = state.used, state.lapsed
        for position in state.unconsumed:
            epoch, prompt = next(self.prompts.after(position))
            self._again.append((position, epoch, prompt))

    def _consume(self, record: LeaseRecord) -> None:
        del self.records[record.lease]
        self.buffered -= 1
        self.consumed += 1

    def _reusable_key(self, record: LeaseRecord) -> tuple[int, int]:
        return record.oldest_version + self.max_staleness, self.utd - record.uses

    def _undue(self, record: LeaseRecord) -> None:
        """Out of the counts by due version, where it stands for the uses that it has."""
        if record.uses:
            _take_one(self.reusable, self._reusable_key(record))
        else:
            _take_one(self.due, record.oldest_version + self.max_staleness)


def _take_one(counts: Counter[K], key: K) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
