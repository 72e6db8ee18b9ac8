"""The ledger: every lease ends in one way, the counts add up, and a resume loses and repeats no prompt."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncppo.errors import ConservationError
from tests.stream_maker import some_prompts
from trainer.stream.ledger import NOT_COMPLETED, Ledger, LedgerState

pytestmark = pytest.mark.unit

BOUND = 2


def a_ledger(prompts: int = 5) -> Ledger:
    return Ledger(some_prompts(prompts), BOUND)


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
    ledger.consume([first])
    assert counts(ledger) == (2, 1, 0, 1, 0)
    ledger.drop(second, "server left")
    assert counts(ledger) == (2, 0, 0, 1, 1)
    assert ledger.unconsumed == 0


def test_a_lease_is_due_by_its_servers_version_and_then_by_its_own_tokens() -> None:
    ledger = a_ledger()
    first, second = lease(ledger, version=3), lease(ledger, version=3)
    assert ledger.due == {3 + BOUND: 2}
    ledger.receive(first, 4)  # the server had swapped before it began
    assert ledger.due == {3 + BOUND: 1, 4 + BOUND: 1}
    ledger.consume([first])
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


def test_due_versions_that_do_not_match_the_leases_are_a_conservation_error() -> None:
    ledger = a_ledger()
    lease(ledger)
    ledger.due[9] += 1
    with pytest.raises(ConservationError):
        ledger.check()


# --- resume ----------------------------------------------------------------------------------------------------------


def a_ledger_in_the_middle() -> Ledger:
    """p0 consumed, p1 dropped and waiting, p2 in flight, p3 buffered."""
    ledger = a_ledger()
    first, second, _, fourth = (lease(ledger) for _ in range(4))
    ledger.receive(first, 0)
    ledger.consume([first])
    ledger.drop(second, "failed")
    ledger.receive(fourth, 0)
    return ledger


def test_a_state_names_what_is_not_consumed() -> None:
    assert a_ledger_in_the_middle().state() == LedgerState(
        next_position=4, unconsumed=[1, 2, 3], admitted=2, consumed=1, dropped={"failed": 1}
    )


def test_a_restored_ledger_leases_what_was_not_consumed_first_and_adds_up() -> None:
    state = msgspec.json.decode(msgspec.json.encode(a_ledger_in_the_middle().state()), type=LedgerState)
    ledger = a_ledger()
    ledger.restore(state)
    assert counts(ledger) == (2, 0, 0, 1, 1)
    leased = [ledger.lease(b"alice", 0, now=0.0).prompt.prompt_id for _ in range(5)]
    assert leased == ["p1", "p2", "p3", "p4", "p0"]
    assert counts(ledger) == (7, 5, 0, 1, 1)


class RunWithResumes(RuleBasedStateMachine):
    """Any order of leases, arrivals, batches, drops and restarts: each (epoch, prompt) is consumed exactly once."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = a_ledger(prompts=4)
        self.consumed: list[tuple[int, str]] = []

    def arrived(self, wanted: bool) -> list[int]:
        return [record.lease for record in self.ledger.records.values() if record.buffered == wanted]

    @rule(version=st.integers(0, 4))
    def lease(self, version: int) -> None:
        lease(self.ledger, version=version)

    @precondition(lambda self: self.arrived(False))
    @rule(data=st.data(), version=st.integers(0, 4))
    def receive(self, data: st.DataObject, version: int) -> None:
        self.ledger.receive(data.draw(st.sampled_from(self.arrived(False))), version)

    @precondition(lambda self: self.arrived(True))
    @rule(data=st.data())
    def consume(self, data: st.DataObject) -> None:
        leases = data.draw(st.lists(st.sampled_from(self.arrived(True)), unique=True, min_size=1))
        self.consumed += [(self.ledger.records[n].epoch, self.ledger.records[n].prompt.prompt_id) for n in leases]
        self.ledger.consume(leases)

    @precondition(lambda self: self.ledger.records)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.ledger.drop(data.draw(st.sampled_from(list(self.ledger.records))), "somehow")

    @rule()
    def resume(self) -> None:
        state = self.ledger.state()
        self.ledger = a_ledger(prompts=4)
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
        names = sorted([*self.consumed, *((epoch, prompt.prompt_id) for epoch, prompt in left)])
        assert names == sorted((epoch, prompt.prompt_id) for epoch, prompt in before)


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
