"""The ledger: every lease ends in one way, the counts add up, and a resume loses and repeats no prompt."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncppo.errors import ConservationError, ResumeError
from tests.stream_maker import some_prompts
from trainer.stream.ledger import NO_SIGNAL, NOT_COMPLETED, BufferedState, Ledger, LedgerState
from trainer.stream.prompts import Prompts

pytestmark = pytest.mark.unit

BOUND = 2


def a_ledger(prompts: int = 5, utd: int = 1) -> Ledger:
    return Ledger(some_prompts(prompts), BOUND, utd)


def counts(ledger: Ledger) -> tuple[int, int, int, int, int]:
    """Admitted, in flight, buffered, consumed, dropped."""
    ledger.check()
    return ledger.admitted, ledger.in_flight, ledger.buffered, ledger.consumed, ledger.dropped.total()


def lease(ledger: Ledger, peer: bytes = b"alice", version: int = 0) -> int:
    return ledger.lease(peer, version, now=0.0).lease


def test_the_life_of_a_lease() -> None:
    ledger = a_ledger()
    first, second = lease(ledger), lease(ledger)
    assert counts(ledger) == (2, 2, 0, 0, 0)
    ledger.receive(first, 0)
    assert counts(ledger) == (2, 1, 1, 0, 0)
    ledger.use(first)
    assert counts(ledger) == (2, 1, 0, 1, 0)
    ledger.drop(second, "server left")
    assert counts(ledger) == (2, 0, 0, 1, 1)
    assert ledger.unconsumed == 0


def test_the_life_of_a_lease_with_replay() -> None:
    ledger = a_ledger(utd=3)
    first, second = lease(ledger), lease(ledger, version=1)
    ledger.receive(first, 0)
    ledger.receive(second, 1)
    assert ledger.use(first)
    assert counts(ledger) == (2, 0, 2, 0, 0)
    assert (ledger.due, ledger.reusable) == ({1 + BOUND: 1}, {(BOUND, 2): 1})
    assert ledger.use(first)
    assert ledger.use(second)
    assert (ledger.due, ledger.reusable) == ({}, {(BOUND, 1): 1, (1 + BOUND, 2): 1})
    assert not ledger.use(first)  # the third and last
    assert counts(ledger) == (2, 0, 1, 1, 0)
    ledger.lapse(second)
    assert counts(ledger) == (2, 0, 0, 2, 0)
    assert (ledger.used, ledger.lapsed, ledger.reusable) == (4, 2, {})


def test_a_group_whose_last_use_was_said_to_be_the_last_is_consumed_and_nothing_lapses() -> None:
    ledger = a_ledger(utd=3)
    first = lease(ledger)
    ledger.receive(first, 0)
    assert not ledger.use(first, last=True)
    assert counts(ledger) == (1, 0, 0, 1, 0)
    assert (ledger.used, ledger.lapsed) == (1, 0)


def test_a_group_that_was_used_is_never_dropped() -> None:
    ledger = a_ledger(utd=2)
    first = lease(ledger)
    ledger.receive(first, 0)
    ledger.use(first)
    with pytest.raises(AssertionError, match="was used 1 times: it lapses"):
        ledger.drop(first, "too stale")


def test_a_prompt_without_signal_is_dropped_and_never_leased_again() -> None:
    ledger = a_ledger(prompts=3)
    ledger.drop(lease(ledger), NO_SIGNAL)
    assert counts(ledger) == (1, 0, 0, 0, 1)
    assert ledger.dropped == {"no signal": 1}
    assert ledger.state().unconsumed == []
    assert [ledger.lease(b"alice", 0, now=0.0).position for _ in range(2)] == [1, 2]


def test_a_lease_is_due_by_its_servers_version_and_then_by_its_own_tokens() -> None:
    ledger = a_ledger()
    first, second = lease(ledger, version=3), lease(ledger, version=3)
    assert ledger.due == {3 + BOUND: 2}
    ledger.receive(first, 4)  # the server had swapped before it began
    assert ledger.due == {3 + BOUND: 1, 4 + BOUND: 1}
    ledger.use(first)
    ledger.drop(second, "failed")
    assert ledger.due == {}


def test_prompts_come_in_their_order_and_dropped_ones_first() -> None:
    ledger = a_ledger(prompts=3)
    leased = [ledger.lease(b"alice", 0, now=0.0) for _ in range(3)]
    assert [record.prompt.prompt_id for record in leased] == ["p0", "p1", "p2"]
    ledger.drop(leased[2].lease, "malformed")
    ledger.drop(leased[0].lease, "malformed")
    again = [ledger.lease(b"bob", 1, now=0.0) for _ in range(3)]
    assert [(record.epoch, record.prompt.prompt_id) for record in again] == [(0, "p2"), (0, "p0"), (1, "p0")]
    assert ledger.dropped == {"malformed": 2}


def test_lease_numbers_are_new_in_every_ledger() -> None:
    numbers = [lease(ledger) for ledger in (a_ledger(), a_ledger()) for _ in range(3)]
    assert len(set(numbers)) == 6
    assert max(numbers) < 2**63  # fits into the message
    ledger = a_ledger()
    assert ledger.lease_number() != lease(ledger)


def test_a_server_holds_what_is_in_flight_there_and_not_what_has_arrived() -> None:
    ledger = a_ledger()
    first, second, third = lease(ledger), lease(ledger, b"bob"), lease(ledger)
    assert ledger.held_by(b"alice") == [first, third]
    ledger.receive(first, 0)
    assert ledger.held_by(b"alice") == [third]
    assert ledger.held_by(b"bob") == [second]
    assert ledger.held_by(b"carol") == []


@pytest.mark.parametrize("count", ["admitted", "consumed", "buffered"])
def test_counts_that_do_not_add_up_are_a_conservation_error(count: str) -> None:
    ledger = a_ledger()
    ledger.receive(lease(ledger), 0)
    setattr(ledger, count, getattr(ledger, count) + 1)
    with pytest.raises(ConservationError, match=r"admitted \d, in flight -?\d, buffered \d, consumed \d, dropped \d"):
        ledger.check()


def test_a_prompt_in_two_places_is_a_conservation_error() -> None:
    ledger = a_ledger()
    record = ledger.records[lease(ledger)]
    ledger.check()
    ledger._again[record.epoch, record.prompt.prompt_id] = (record.position, record.prompt)
    with pytest.raises(ConservationError, match="prompts: one is in two places"):
        ledger.check()
    ledger._again.clear()
    lease(ledger)
    second = ledger.records[max(ledger.records)]
    second.position = record.position
    with pytest.raises(ConservationError, match="prompts: one is in two places"):
        ledger.check()


@pytest.mark.parametrize("wrong", ["lost", "twice", "signal"])
def test_a_prompt_that_is_nowhere_or_was_consumed_twice_is_a_conservation_error(wrong: str) -> None:
    ledger = a_ledger()
    first, second = lease(ledger), lease(ledger)
    ledger.drop(first, "failed")
    ledger.drop(second, NO_SIGNAL)
    ledger.check()
    match wrong:
        case "lost":
            ledger._again.clear()
        case "twice":  # as many leases as uses, but of one prompt
            again = dict(ledger._again)
            ledger.receive(lease(ledger), 0)
            ledger.use(next(iter(ledger.records)))
            ledger._again.update(again)
        case _:
            ledger.dropped[NO_SIGNAL] -= 1
            ledger.dropped["failed"] += 1
    with pytest.raises(ConservationError, match=r"prompts: begun != .*prompts begun 2"):
        ledger.check()


@pytest.mark.parametrize("wrong", ["due", "reusable"])
def test_due_versions_that_do_not_match_the_leases_are_a_conservation_error(wrong: str) -> None:
    ledger = a_ledger(utd=2)
    for _ in range(2):
        ledger.receive(lease(ledger), 0)
    ledger.use(next(iter(ledger.records)))
    ledger.check()
    if wrong == "due":
        ledger.due[9] += 1
    else:
        ledger.reusable[9, 1] += 1
    with pytest.raises(ConservationError):
        ledger.check()


# --- resume ----------------------------------------------------------------------------------------------------------


def a_ledger_in_the_middle() -> Ledger:
    """p0 consumed, p1 dropped and waiting, p2 in flight, p3 buffered."""
    ledger = a_ledger()
    first, second, _, fourth = (lease(ledger) for _ in range(4))
    ledger.receive(first, 0)
    ledger.use(first)
    ledger.drop(second, "failed")
    ledger.receive(fourth, 0)
    return ledger


def test_a_state_names_what_is_not_consumed_and_has_nothing_in_flight() -> None:
    assert a_ledger_in_the_middle().state() == LedgerState(
        next_position=4,
        unconsumed=[1, 2],
        admitted=3,
        consumed=1,
        dropped={"failed": 1},
        used=1,
        buffered=[BufferedState(position=3, epoch=0, prompt_id="p3", oldest_version=0, uses=0)],
        dataset=some_prompts(5).digest,
    )


def restored(ledger: Ledger, prompts: int = 5, utd: int = 1) -> Ledger:
    """As the next process has it."""
    state = msgspec.json.decode(msgspec.json.encode(ledger.state()), type=LedgerState)
    fresh = a_ledger(prompts, utd)
    fresh.restore(state)
    return fresh


def test_a_restored_ledger_leases_what_was_in_flight_first_and_holds_what_was_buffered() -> None:
    ledger = restored(a_ledger_in_the_middle())
    ledger.check()
    assert counts(ledger) == (3, 0, 1, 1, 1)
    assert ledger.due == {BOUND: 1}
    leased = [ledger.lease(b"alice", 0, now=0.0).prompt.prompt_id for _ in range(4)]
    assert leased == ["p1", "p2", "p4", "p0"]
    assert counts(ledger) == (7, 4, 1, 1, 1)
    assert ledger.held_by(b"") == []


def test_further_uses_outlive_a_resume() -> None:
    ledger = a_ledger(utd=3)
    first, second = lease(ledger), lease(ledger)
    ledger.receive(first, 0)
    ledger.receive(second, 0)
    ledger.use(first)
    ledger = restored(ledger, utd=3)
    assert counts(ledger) == (2, 0, 2, 0, 0)
    assert (ledger.due, ledger.reusable) == ({BOUND: 1}, {(BOUND, 2): 1})
    (used,) = [record for record in ledger.records.values() if record.uses]
    assert ledger.use(used.lease)
    assert not ledger.use(used.lease)
    assert (ledger.used, ledger.consumed, ledger.lapsed) == (3, 1, 0)
    ledger.check()


def test_how_often_a_prompt_failed_outlives_a_resume_until_it_is_given_up() -> None:
    ledger = a_ledger(prompts=3)
    for _ in range(4):
        ledger.drop(lease(ledger), NOT_COMPLETED)
    ledger = restored(ledger, prompts=3)
    ledger.drop(lease(ledger), NOT_COMPLETED)
    assert ledger.lease(b"alice", 0, now=0.0).position == 1
    assert ledger.given_up == 1
    restored(ledger, prompts=3).check()


def test_another_dataset_is_refused_at_a_resume() -> None:
    ledger = a_ledger_in_the_middle()
    one = some_prompts(5)
    others = [some_prompts(6), some_prompts(5, seed=1, shuffle=True)]
    for change in ({"answer": "other"}, {"prompt_ids": np.array([9], np.int32)}, {"prompt_id": "other"}):
        changed = [prompt for _, prompt in itertools.islice(one.after(0), 5)]
        changed[2] = msgspec.structs.replace(changed[2], **change)
        others.append(Prompts(changed, 0, shuffle=False))
    for other in others:
        with pytest.raises(ResumeError, match="made with other prompts, answers, or another order"):
            Ledger(other, BOUND).restore(ledger.state())


def test_groups_that_were_drawn_by_other_settings_are_made_anew_and_further_uses_lapse() -> None:
    ledger = a_ledger(utd=2)
    for _ in range(3):
        ledger.receive(lease(ledger), 0)
    ledger.use(next(iter(ledger.records)))
    fresh = a_ledger(utd=2)
    assert fresh.restore(ledger.state(), keep_groups=False) == []
    fresh.check()
    assert (fresh.consumed, fresh.lapsed, fresh.buffered, fresh.admitted) == (1, 1, 0, 1)
    assert [fresh.lease(b"a", 0, now=0.0).position for _ in range(3)] == [1, 2, 3]
    assert fresh.history == {}


# --- groups of leases from before ------------------------------------------------------------------------------------


def a_ledger_after_a_resume() -> Ledger:
    """Of version 3 by the process "old"; p0 consumed, p1 and p2 waiting, p3 buffered."""
    ledger = a_ledger_in_the_middle()
    ledger.history["old"] = 3
    return restored(ledger)


def test_a_group_of_a_lease_from_before_is_adopted_once_in_the_place_of_a_new_lease() -> None:
    ledger = a_ledger_after_a_resume()
    assert ledger.objection("old", 3, 0, "p2") is None
    record = ledger.adopt(0, "p2", b"alice", 1, now=0.0)
    ledger.check()
    assert ledger.objection("old", 3, 0, "p2") == "not wanted"
    ledger.receive(record.lease, 1)
    assert counts(ledger) == (4, 0, 2, 1, 1)
    assert [ledger.lease(b"bob", 3, now=0.0).prompt.prompt_id for _ in range(2)] == ["p1", "p4"]
    ledger.check()


@pytest.mark.parametrize(
    ("trainer", "newest", "epoch", "prompt_id", "objection"),
    [
        ("old", 3, 0, "p0", "not wanted"),  # consumed
        ("old", 3, 0, "p3", "not wanted"),  # buffered
        ("old", 3, 0, "p4", "not wanted"),  # its turn has not come
        ("old", 3, 1, "p1", "not wanted"),  # of another epoch
        ("old", 4, 0, "p1", "rolled back"),
        ("other", 0, 0, "p1", "another run's"),
        ("", 0, 0, "p1", "another run's"),
    ],
)
def test_what_is_not_waited_for_or_was_rolled_back_is_not_adopted(
    trainer: str, newest: int, epoch: int, prompt_id: str, objection: str
) -> None:
    assert a_ledger_after_a_resume().objection(trainer, newest, epoch, prompt_id) == objection


def test_what_a_process_published_counts_for_itself_and_up_to_the_checkpoint_for_the_next() -> None:
    ledger = a_ledger_after_a_resume()
    ledger.history["new"] = 5
    assert ledger.objection("new", 5, 0, "p1") is None
    assert restored(ledger).history == {"old": 3, "new": 5}


# --- ledger.jsonl ----------------------------------------------------------------------------------------------------


def test_every_change_of_the_counts_is_a_line() -> None:
    lines: list[dict[str, Any]] = []
    ledger = a_ledger(utd=3)
    ledger.write = lambda **line: lines.append(line)
    first, second, third, fourth = (lease(ledger) for _ in range(4))
    for each in (first, second):
        ledger.receive(each, 0)
        ledger.use(each)
    ledger.end_batch(7)
    ledger.use(first)
    ledger.end_batch(8, warm_start=True)
    ledger.lapse(second)
    ledger.drop(third, "server left")
    ledger.drop(fourth, NO_SIGNAL)
    assert lines == [
        {"version": 7, "groups": [(0, "p0", 1), (0, "p1", 1)]},
        {"version": 8, "groups": [(0, "p0", 2)], "warm_start": True},
        {"lapsed": 2, "lease": second, "epoch": 0, "prompt_id": "p1"},
        {"dropped": "server left", "again": True, "lease": third, "epoch": 0, "prompt_id": "p2"},
        {"dropped": "no signal", "again": False, "lease": fourth, "epoch": 0, "prompt_id": "p3"},
    ]


class RunWithResumes(RuleBasedStateMachine):
    """Any order of leases, arrivals, batches, drops and restarts: each (epoch, prompt) is consumed exactly once, after
    three uses at most, and every use that it could have had was made, lapsed or is left to it."""

    UTD = 3

    def __init__(self) -> None:
        super().__init__()
        self.ledger = a_ledger(4, self.UTD)
        self.uses: Counter[tuple[int, str]] = Counter()
        self.forgone = 0
        """Uses that a group had left when it was used for the last time on purpose."""

    def arrived(self, wanted: bool) -> list[int]:
        return [record.lease for record in self.ledger.records.values() if record.buffered == wanted]

    def which(self, used: bool) -> list[int]:
        return [record.lease for record in self.ledger.records.values() if (record.uses > 0) == used]

    @rule(version=st.integers(0, 4))
    def lease(self, version: int) -> None:
        lease(self.ledger, version=version)

    @precondition(lambda self: self.arrived(False))
    @rule(data=st.data(), version=st.integers(0, 4))
    def receive(self, data: st.DataObject, version: int) -> None:
        self.ledger.receive(data.draw(st.sampled_from(self.arrived(False))), version)

    @precondition(lambda self: self.arrived(True))
    @rule(data=st.data(), last=st.booleans())
    def use(self, data: st.DataObject, last: bool) -> None:
        record = self.ledger.records[data.draw(st.sampled_from(self.arrived(True)))]
        uses = record.uses + 1
        stays = self.ledger.use(record.lease, last=last)
        assert stays == (uses < self.UTD and not last) == (record.lease in self.ledger.records)
        self.uses[record.epoch, record.prompt.prompt_id] += 1
        self.forgone += 0 if stays else self.UTD - uses

    @precondition(lambda self: self.which(used=True))
    @rule(data=st.data())
    def lapse(self, data: st.DataObject) -> None:
        self.ledger.lapse(data.draw(st.sampled_from(self.which(used=True))))

    @precondition(lambda self: self.which(used=False))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.ledger.drop(data.draw(st.sampled_from(self.which(used=False))), "somehow")

    @rule()
    def resume(self) -> None:
        state = self.ledger.state()
        self.ledger = restored(self.ledger, 4, self.UTD)
        assert self.ledger.state() == state

    @invariant()
    def it_adds_up(self) -> None:
        self.ledger.check()

    @invariant()
    def every_prompt_is_consumed_once_or_will_be(self) -> None:
        state = self.ledger.state()
        sequence = self.ledger.prompts.after(0)
        before = [next(sequence) for _ in range(state.next_position)]
        never_used = [held.position for held in state.buffered if not held.uses]
        left = [before[position] for position in [*state.unconsumed, *never_used]]
        names = sorted([*self.uses, *((epoch, prompt.prompt_id) for epoch, prompt in left)])
        assert names == sorted((epoch, prompt.prompt_id) for epoch, prompt in before)
        assert state.consumed + sum(held.uses > 0 for held in state.buffered) == len(self.uses)

    @invariant()
    def every_use_is_counted(self) -> None:
        state = self.ledger.state()
        assert state.used == self.ledger.used == self.uses.total()
        assert all(uses <= self.UTD for uses in self.uses.values())
        left = sum(self.UTD - held.uses for held in state.buffered if held.uses)
        assert state.used + state.lapsed + left + self.forgone == self.UTD * len(self.uses)


TestRunWithResumes = RunWithResumes.TestCase
TestRunWithResumes.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_prompt_that_no_server_completes_is_given_up_after_five_times() -> None:
    ledger = a_ledger(prompts=3)
    tried = []
    for _ in range(5):
        record = ledger.lease(b"alice", 0, now=0.0)
        tried.append(record.position)
        ledger.drop(record.lease, NOT_COMPLETED)
    assert tried == [0] * 5
    assert ledger.lease(b"alice", 0, now=0.0).position == 1
    assert counts(ledger) == (6, 1, 0, 0, 5)


def test_a_prompt_that_was_lost_with_its_servers_is_never_given_up() -> None:
    ledger = a_ledger(prompts=3)
    for _ in range(20):
        record = ledger.lease(b"alice", 0, now=0.0)
        assert record.position == 0
        ledger.drop(record.lease, "server left")
