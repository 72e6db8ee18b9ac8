"""The ledger: every lease ends in one way, the counts add up, and a resume loses and repeats no prompt."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncppo.errors import ConservationError
from tests.stream_maker import some_prompts
from trainer.stream.ledger import NO_SIGNAL, NOT_COMPLETED, Ledger, LedgerState

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
    with pytest.raises(ConservationError, match=r"admitted \d != in flight"):
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


def test_a_state_names_what_is_not_consumed() -> None:
    assert a_ledger_in_the_middle().state() == LedgerState(
        next_position=4, unconsumed=[1, 2, 3], admitted=2, consumed=1, dropped={"failed": 1}, used=1
    )


def test_a_restored_ledger_leases_what_was_not_consumed_first_and_adds_up() -> None:
    state = msgspec.json.decode(msgspec.json.encode(a_ledger_in_the_middle().state()), type=LedgerState)
    ledger = a_ledger()
    ledger.restore(state)
    assert counts(ledger) == (2, 0, 0, 1, 1)
    leased = [ledger.lease(b"alice", 0, now=0.0).prompt.prompt_id for _ in range(5)]
    assert leased == ["p1", "p2", "p3", "p4", "p0"]
    assert counts(ledger) == (7, 5, 0, 1, 1)


def test_a_group_that_was_used_is_not_leased_again_after_a_resume_and_its_other_uses_lapse() -> None:
    ledger = a_ledger(utd=3)
    first, second = lease(ledger), lease(ledger)
    ledger.receive(first, 0)
    ledger.receive(second, 0)
    ledger.use(first)
    state = ledger.state()
    assert state == LedgerState(next_position=2, unconsumed=[1], admitted=1, consumed=1, dropped={}, used=1, lapsed=2)
    ledger = a_ledger(utd=3)
    ledger.restore(state)
    assert counts(ledger) == (1, 0, 0, 1, 0)
    assert (ledger.used, ledger.lapsed) == (1, 2)
    assert [ledger.lease(b"alice", 0, now=0.0).prompt.prompt_id for _ in range(2)] == ["p1", "p2"]


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
        self.ledger = a_ledger(4, self.UTD)
        self.ledger.restore(state)
        assert self.ledger.state() == state

    @invariant()
    def it_adds_up(self) -> None:
        self.ledger.check()

    @invariant()
    def every_prompt_is_consumed_once_or_will_be(self) -> None:
        state = self.ledger.state()
        sequence = self.ledger.prompts.after(0)
        before = [next(sequence) for _ in range(state.next_position)]
        left = [before[position] for position in state.unconsumed]
        names = sorted([*self.uses, *((epoch, prompt.prompt_id) for epoch, prompt in left)])
        assert names == sorted((epoch, prompt.prompt_id) for epoch, prompt in before)
        assert state.consumed == len(self.uses)

    @invariant()
    def every_use_is_counted(self) -> None:
        state = self.ledger.state()
        assert state.used == self.ledger.used == self.uses.total()
        assert all(uses <= self.UTD for uses in self.uses.values())
        assert state.used + state.lapsed + self.forgone == self.UTD * len(self.uses)


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
