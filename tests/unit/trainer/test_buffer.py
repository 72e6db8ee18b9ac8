"""The buffer: earliest due first, nothing too stale, wait for the slow ones that are due, and never in vain."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stream_maker import a_buffered, a_group
from trainer.stream.buffer import Buffer

pytestmark = pytest.mark.unit


def a_buffer(*groups: tuple[int, int], bound: int = 1, batch: int = 2) -> Buffer:
    """A buffer with groups of (lease, version)."""
    buffer = Buffer(bound, batch)
    for lease, version in groups:
        buffer.add(a_buffered(version, lease))
    return buffer


def taken(buffer: Buffer, version: int, due: dict[int, int]) -> list[int] | None:
    groups = buffer.take(version, due)
    return None if groups is None else [group.lease for group in groups]


def test_the_oldest_token_of_any_response_is_the_groups_age() -> None:
    assert a_buffered(0, 1, group=a_group(1, [[(5, 1), (6, 1)], [(3, 2), (7, 1)]])).oldest_version == 3


def test_a_batch_waits_until_there_are_enough_groups() -> None:
    buffer = a_buffer((1, 0))
    assert taken(buffer, 0, {1: 1}) is None
    assert len(buffer) == 1


def test_the_earliest_due_come_first_and_ties_in_order_of_their_prompts() -> None:
    buffer = a_buffer((4, 1), (3, 1), (2, 0), (1, 1))
    assert taken(buffer, 1, {1: 1, 2: 3}) == [2, 1]
    assert taken(buffer, 2, {2: 2}) == [3, 4]
    assert len(buffer) == 0


@given(order=st.permutations(range(6)), leases=st.permutations(range(6)))
def test_neither_arrival_nor_lease_numbers_change_a_batch(order: list[int], leases: list[int]) -> None:
    buffer = Buffer(0, 6)
    for position in order:
        buffer.add(replace(a_buffered(3, leases[position]), position=position))
    assert [group.position for group in buffer.take(3, {3: 6}) or []] == list(range(6))


def test_what_is_too_stale_is_taken_out_and_what_is_just_in_time_stays() -> None:
    buffer = a_buffer((1, 0), (2, 1), (3, 2), bound=1)
    assert [group.lease for group in buffer.remove_stale(2)] == [1]
    assert buffer.remove_stale(2) == []
    assert len(buffer) == 2


def test_a_slow_group_that_is_due_is_not_overtaken() -> None:
    # the docstring's example at v = 1: one buffered and one in flight are due now, two have overtaken them
    due = Counter({1: 2, 2: 2})
    buffer = a_buffer((1, 0), (3, 1), (4, 1))
    assert taken(buffer, 1, due) is None
    assert len(buffer) == 3
    buffer.add(a_buffered(0, 2))
    assert taken(buffer, 1, due) == [1, 2]


def test_a_slow_group_that_is_not_due_yet_is_overtaken() -> None:
    assert taken(a_buffer((1, 0), (3, 0)), 0, {1: 3}) == [1, 3]


def test_nothing_waits_when_waiting_does_not_help() -> None:
    # Four have come for two places, all due now (an engine fell back to an older version): two are trained on, and the
    # other two will be dropped.
    buffer = a_buffer((1, 0), (2, 0), (3, 0), (4, 0))
    assert taken(buffer, 1, {1: 4}) == [1, 2]
    assert [group.lease for group in buffer.remove_stale(2)] == [3, 4]


def test_nothing_waits_for_a_group_that_is_too_old_already() -> None:
    assert taken(a_buffer((1, 2), (2, 2)), 2, {1: 1, 3: 2}) == [1, 2]
    assert taken(a_buffer((1, 1), (2, 1), (3, 1)), 2, {1: 1, 2: 3}) == [1, 2]


def test_of_those_due_at_once_the_least_used_come_first() -> None:
    buffer = Buffer(1, 2)
    for lease, version, uses in [(1, 1, 2), (2, 1, 1), (3, 1, 0), (4, 0, 3)]:
        buffer.add(a_buffered(version, lease, uses=uses))
    assert taken(buffer, 1, {2: 1}) == [4, 3]
    assert taken(buffer, 1, {}) == [2, 1]


def test_a_group_comes_back_with_its_uses_and_not_at_the_same_version() -> None:
    buffer = a_buffer((1, 0), bound=2, batch=1)
    for version in range(2):
        (group,) = buffer.take(version, {}) or []
        assert group.uses == version
        buffer.return_used(group, version)
        assert buffer.take(version, {}) is None
    assert len(buffer) == 1


def test_a_group_never_used_goes_before_a_further_use_that_would_make_it_too_late() -> None:
    # 2 may be used once more, at 1; then 3 fits into the batch at 2, but not 3 and 4
    buffer = Buffer(1, 1)
    for lease, version, uses in [(2, 0, 1), (3, 1, 0)]:
        buffer.add(a_buffered(version, lease, uses=uses))
    assert taken(buffer, 1, {2: 1}) == [2]
    buffer.add(a_buffered(0, 2, uses=1))
    buffer.add(a_buffered(1, 4))
    assert taken(buffer, 1, {2: 2}) == [3]


def test_a_batch_with_a_further_use_in_it_waits_for_a_first_one_that_is_due() -> None:
    # 3 is in flight and due at 1: the place of 2, that was used before, is for it, though 2 is not due later
    buffer = a_buffer((1, 0), batch=2)
    buffer.add(a_buffered(0, 2, uses=1))
    due = Counter({1: 2})
    assert taken(buffer, 1, due) is None
    buffer.add(a_buffered(0, 3))
    assert taken(buffer, 1, due) == [1, 3]


def test_a_first_use_that_is_not_due_is_overtaken_by_a_further_one() -> None:
    buffer = a_buffer((1, 0), batch=2)
    buffer.add(a_buffered(0, 2, uses=1))
    assert taken(buffer, 0, {1: 2}) == [1, 2]


def test_a_bound_of_zero_takes_only_the_version_that_is_about_to_be_trained() -> None:
    buffer = a_buffer((1, 0), (2, 1), (3, 1), bound=0)
    assert [group.lease for group in buffer.remove_stale(1)] == [1]
    assert taken(buffer, 1, {1: 2}) == [2, 3]
