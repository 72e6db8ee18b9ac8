"""The ledger: what became of every prompt that was leased, and the only owner of those counts.

A lease is one prompt on its way through the house: in flight at a server, buffered here, and at last consumed or
dropped. It is consumed when it leaves for good after one use or more: all `utd` uses are made, or what is left of them
lapses because it has grown too old. It is dropped when it goes unused; the prompt is then leased again under a new
lease, so no prompt is lost, and each (epoch, prompt) is consumed once; only one whose group has no signal is done.
At all times, of leases: admitted = in flight + buffered + consumed + dropped. And of prompts, each of them in one
place: begun = in flight + buffered + waiting to be leased again + consumed + done without use.

What became of each is written as a line of `ledger.jsonl`, where the counts change:

    {"version": 3, "groups": [[epoch, prompt_id, use], …]}                 a batch (or with "warm_start": true)
    {"dropped": reason, "again": true, "lease": …, "epoch": …, "prompt_id": …} (or it is done)
    {"lapsed": uses that were left, "lease": …, "epoch": …, "prompt_id": …}

A `use` is 1 for the first. **After a restart** from version k a trainer goes on from what the checkpoint of k says;
what was in flight is leased again first. Tokens that earlier processes' versions up to k drew still count; newer
versions of theirs are rolled back: `history` says up to which version each process (`Welcome.trainer`) counts. A server
may still hold a finished group of a lease from before: it is *adopted* in the place of a new lease if its prompt waits
for one.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from asyncppo.errors import ConservationError, ResumeError
from trainer.stream.prompts import Prompt, Prompts

log = logging.getLogger("asyncppo.ledger")

K = TypeVar("K")

NOT_COMPLETED = "not completed"
"""Reason of a drop: a server said that it failed, or did not answer in time."""
NOT_GRADED = "reward errors"
"""Reason of a drop: no response could be graded, or, with `reward.on_error: drop`, one could not."""
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


class BufferedState(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint's ledger says of a group that was buffered; the group itself is in the part `stream`."""

    position: int
    epoch: int
    prompt_id: str
    oldest_version: int
    uses: int


class LedgerState(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint keeps of the ledger. Nothing is in flight in it."""

    next_position: int
    unconsumed: list[int]
    """Positions before `next_position` that were in flight or waited to be leased again: a resume leases them first."""
    admitted: int
    consumed: int
    dropped: dict[str, int]
    used: int = 0
    lapsed: int = 0
    given_up: int = 0
    buffered: list[BufferedState] = msgspec.field(default_factory=list)
    """By position."""
    failures: dict[int, int] = msgspec.field(default_factory=dict)
    """Position to how often servers could not complete it."""
    history: dict[str, int] = msgspec.field(default_factory=dict)
    """`Ledger.history`."""
    dataset: str = ""
    """`Prompts.digest`: with another one, positions would be other prompts."""
    agreement: str = ""
    """`Config.agreement_hash`: with another one, groups were drawn or graded otherwise."""
    version: int = 0
    """The version about to be trained."""
    metrics_bytes: int = 0
    """Length of `metrics.jsonl`: what comes after it is rolled back at a resume."""
    ledger_bytes: int = 0
    """Length of `ledger.jsonl`, likewise."""


def _nowhere(**_: Any) -> None:
    """Lines of a ledger that nobody keeps."""


@dataclass
class Ledger:
    """Who holds which prompt. Not thread-safe: the intake guards it."""

    prompts: Prompts
    max_staleness: int
    utd: int = 1
    """How often a group comes out of the buffer at most: more than once with `algorithm.reuse: replay`."""
    write: Callable[..., None] = _nowhere
    """Appends a line to `ledger.jsonl` (`Journal.ledger`)."""
    history: dict[str, int] = field(default_factory=dict)
    """Each trainer process of this run (`Welcome.trainer`) to the newest version of its that counts."""
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
    given_up: int = 0
    """Prompts that no server could complete."""
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    _next_lease: int = field(default_factory=lambda: secrets.randbits(30) << 32)
    _next_position: int = 0
    _fresh: Iterator[tuple[int, Prompt]] | None = None
    _failures: Counter[int] = field(default_factory=Counter)
    _again: OrderedDict[tuple[int, str], tuple[int, Prompt]] = field(default_factory=OrderedDict)
    """What waits to be leased again: (epoch, prompt id) to (position, prompt)."""
    _batch: list[tuple[int, str, int]] = field(default_factory=list)
    """(epoch, prompt id, use) of the groups of the batch that is being taken."""

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
            (epoch, _), (position, prompt) = self._again.popitem(last=False)
        else:
            if self._fresh is None:
                self._fresh = self.prompts.after(self._next_position)
            position = self._next_position
            epoch, prompt = next(self._fresh)
            self._next_position += 1
        return self._admit(position, epoch, prompt, peer, oldest_version, now)

    def next_again(self) -> tuple[int, str] | None:
        """(epoch, prompt id) of the prompt that is leased next, if it was leased before."""
        return next(iter(self._again), None)

    def objection(self, trainer: str, newest_version: int, epoch: int, prompt_id: str) -> str | None:
        """Why a finished group of a lease that is not in flight may not be adopted; None if it may.

        Args:
            trainer: the process that leased it (`Group.trainer`).
            newest_version: of any token of it.
            epoch: of its prompt.
            prompt_id: likewise.
        """
        if trainer not in self.history:
            return "another run's"
        if newest_version > self.history[trainer]:
            return "rolled back"
        if (epoch, prompt_id) not in self._again:
            return "not wanted"
        return None

    def adopt(self, epoch: int, prompt_id: str, peer: bytes, oldest_version: int, now: float) -> LeaseRecord:
        """Admit a prompt that waits to be leased again, to the server that has answered it before; `receive` follows.

        Only where there is no `objection`.
        """
        position, prompt = self._again.pop((epoch, prompt_id))
        return self._admit(position, epoch, prompt, peer, oldest_version, now)

    def _admit(
        self, position: int, epoch: int, prompt: Prompt, peer: bytes, oldest_version: int, now: float
    ) -> LeaseRecord:
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
        self._batch.append((record.epoch, record.prompt.prompt_id, record.uses))
        if record.uses < self.utd and not last:
            self.reusable[self._reusable_key(record)] += 1
            return True
        self._consume(record)
        return False

    def end_batch(self, version: int, *, warm_start: bool = False) -> None:
        """The groups used since the last call are the batch that trains this version, or the critics alone."""
        self.write(version=version, groups=self._batch, **({"warm_start": True} if warm_start else {}))
        self._batch = []

    def lapse(self, lease: int) -> None:
        """This group was used, and has grown too old for the uses that are left to it."""
        record = self.records[lease]
        self._undue(record)
        self.lapsed += self.utd - record.uses
        self.write(lapsed=self.utd - record.uses, lease=lease, epoch=record.epoch, prompt_id=record.prompt.prompt_id)
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
        prompt_id = record.prompt.prompt_id
        self._failures[record.position] += reason in (NOT_COMPLETED, NOT_GRADED)
        again = reason != NO_SIGNAL and self._failures[record.position] < _HOPELESS
        self.write(dropped=reason, lease=lease, epoch=record.epoch, prompt_id=prompt_id, again=again)
        if again:
            self._again[record.epoch, prompt_id] = (record.position, record.prompt)
            return
        del self._failures[record.position]
        if reason != NO_SIGNAL:
            self.given_up += 1
            log.error("prompt %s is given up: %d times no server completed it", prompt_id, _HOPELESS)

    def held_by(self, peer: bytes) -> list[int]:
        """Leases in flight at a server."""
        return [record.lease for record in self.records.values() if record.peer == peer and not record.buffered]

    def check(self) -> None:
        """Raises ConservationError when the counts of leases or of prompts do not add up."""
        dropped = sum(self.dropped.values())
        done = self.dropped[NO_SIGNAL] + self.given_up
        held = {record.position for record in self.records.values()}
        unused = sum(not record.uses for record in self.records.values())
        if (
            self.admitted != self.in_flight + self.buffered + self.consumed + dropped
            or self.buffered != sum(record.buffered for record in self.records.values())
            or self.due.total() != unused
            or self.due.total() + self.reusable.total() != len(self.records)
        ):
            problem = "leases: admitted != in flight + buffered + consumed + dropped, or not each is due once"
        elif len(held) != len(self.records) or not held.isdisjoint(position for position, _ in self._again.values()):
            problem = "prompts: one is in two places"
        elif self._next_position != len(held) + len(self._again) + self.consumed + done:
            problem = "prompts: begun != in flight + buffered + waiting + consumed + done without use"
        else:
            return
        raise ConservationError(
            f"{problem}: admitted {self.admitted}, in flight {self.in_flight}, buffered {self.buffered}, consumed "
            f"{self.consumed}, dropped {dropped}; due {self.due.total()} of {unused} never used, "
            f"{self.reusable.total()} with uses left; prompts begun {self._next_position}, in {len(held)} leases, "
            f"{len(self._again)} waiting, {done} done without use: this is a bug; the run stops before it trains on "
            "wrong counts"
        )

    def state(self) -> LedgerState:
        """For a checkpoint."""
        waiting = [position for position, _ in self._again.values()]
        in_flight = [record.position for record in self.records.values() if not record.buffered]
        buffered = sorted((r for r in self.records.values() if r.buffered), key=lambda record: record.position)
        return LedgerState(
            next_position=self._next_position,
            unconsumed=sorted([*waiting, *in_flight]),
            admitted=self.admitted - self.in_flight,
            consumed=self.consumed,
            dropped=dict(self.dropped),
            used=self.used,
            lapsed=self.lapsed,
            given_up=self.given_up,
            buffered=[
                BufferedState(
                    position=record.position,
                    epoch=record.epoch,
                    prompt_id=record.prompt.prompt_id,
                    oldest_version=record.oldest_version,
                    uses=record.uses,
                )
                for record in buffered
            ],
            failures=dict(+self._failures),
            history=dict(self.history),
            dataset=self.prompts.digest,
        )

    def restore(self, state: LedgerState, *, keep_groups: bool = True) -> list[LeaseRecord]:
        """Go on from a checkpoint: what was in flight is leased again first, what was buffered is buffered.

        Args:
            state: of the checkpoint.
            keep_groups: whether the buffered groups are restored too. Without, those never used are leased again, the
                uses that others had left lapse, and nothing of earlier processes is adopted.

        Returns:
            The records of `state.buffered`, in its order, under new lease numbers.

        Raises:
            ResumeError: it was made with another dataset.
        """
        if state.dataset not in ("", self.prompts.digest):
            raise ResumeError(
                "the checkpoint was made with other prompts, answers, or another order of them, and nobody could say "
                "which were consumed: give the same data.train, template, tokenizer, data.shuffle and run.seed, or "
                "choose another run.name"
            )
        self._next_position = state.next_position
        self.admitted, self.consumed, self.dropped = state.admitted, state.consumed, Counter(state.dropped)
        self.used, self.lapsed, self.given_up = state.used, state.lapsed, state.given_up
        self._failures = Counter(state.failures)
        for position in state.unconsumed:
            epoch, prompt = self.prompts.at(position)
            self._again[epoch, prompt.prompt_id] = (position, prompt)
        if keep_groups:
            self.history = dict(state.history)
            return [self._restore_buffered(held) for held in state.buffered]
        for held in state.buffered:
            if held.uses:
                self.consumed += 1
                self.lapsed += self.utd - held.uses
                self.write(lapsed=self.utd - held.uses, lease=0, epoch=held.epoch, prompt_id=held.prompt_id)
            else:
                self.admitted -= 1
                epoch, prompt = self.prompts.at(held.position)
                self._again[epoch, prompt.prompt_id] = (held.position, prompt)
        return []

    def _restore_buffered(self, held: BufferedState) -> LeaseRecord:
        epoch, prompt = self.prompts.at(held.position)
        if (epoch, prompt.prompt_id) != (held.epoch, held.prompt_id):
            raise ResumeError(
                f"the checkpoint holds a group of prompt {held.prompt_id!r} of epoch {held.epoch}; the dataset has in "
                f"its place {prompt.prompt_id!r} of epoch {epoch}: give the same data.train and run.seed, or choose "
                "another run.name"
            )
        record = LeaseRecord(
            self.lease_number(),
            held.position,
            epoch,
            prompt,
            peer=b"",
            leased_at=0.0,
            oldest_version=held.oldest_version,
            buffered=True,
            uses=held.uses,
        )
        self.records[record.lease] = record
        self.buffered += 1
        if record.uses:
            self.reusable[self._reusable_key(record)] += 1
        else:
            self.due[record.oldest_version + self.max_staleness] += 1
        return record

    def _consume(self, record: LeaseRecord) -> None:
        del self.records[record.lease]
        self._failures.pop(record.position, None)
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
