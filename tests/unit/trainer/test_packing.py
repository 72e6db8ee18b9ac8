"""Claims about packing: which sequences go into which forward pass, and the tensors of one pass."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.model.packing import gather, minibatches, plan

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")

LENGTHS = st.lists(st.integers(1, 60), max_size=24).map(lambda lengths: np.array(lengths, dtype=np.int32))
BUDGETS = st.integers(1, 70)
RANKS = st.integers(1, 4)


def everything(lengths: np.ndarray) -> np.ndarray:
    return np.arange(len(lengths))


def loads(rounds: list[list[np.ndarray]], lengths: np.ndarray) -> list[int]:
    return [int(lengths[micro].sum()) for micros in rounds for micro in micros]


@given(LENGTHS, BUDGETS, RANKS)
def test_every_sequence_is_planned_exactly_once(lengths: np.ndarray, budget: int, ranks: int) -> None:
    rounds = plan(lengths, everything(lengths), budget=budget, ranks=ranks)
    planned = sorted(int(index) for micros in rounds for micro in micros for index in micro)
    assert planned == list(range(len(lengths)))


@given(LENGTHS, BUDGETS, RANKS)
def test_every_rank_has_the_same_number_of_micro_batches_and_at_least_one(
    lengths: np.ndarray, budget: int, ranks: int
) -> None:
    rounds = plan(lengths, everything(lengths), budget=budget, ranks=ranks)
    assert rounds
    assert {len(micros) for micros in rounds} == {ranks}


@given(LENGTHS, BUDGETS, RANKS)
def test_only_a_sequence_that_goes_alone_exceeds_the_budget(lengths: np.ndarray, budget: int, ranks: int) -> None:
    for micros in plan(lengths, everything(lengths), budget=budget, ranks=ranks):
        for micro in micros:
            assert len(micro) == 1 or lengths[micro].sum() <= budget


@given(LENGTHS, BUDGETS, RANKS)
def test_micro_batches_differ_by_at_most_the_longest_sequence(lengths: np.ndarray, budget: int, ranks: int) -> None:
    sizes = loads(plan(lengths, everything(lengths), budget=budget, ranks=ranks), lengths)
    assert max(sizes) - min(sizes) <= lengths.max(initial=0)


@given(LENGTHS, BUDGETS, RANKS)
def test_no_round_is_empty_on_all_ranks(lengths: np.ndarray, budget: int, ranks: int) -> None:
    rounds = plan(lengths, everything(lengths), budget=budget, ranks=ranks)
    if len(lengths):
        assert all(any(len(micro) for micro in micros) for micros in rounds)


def test_sequences_are_balanced_over_ranks() -> None:
    lengths = np.array([9, 1, 5, 5], dtype=np.int32)
    rounds = plan(lengths, everything(lengths), budget=10, ranks=2)
    assert [[micro.tolist() for micro in micros] for micros in rounds] == [[[0, 1], [2, 3]]]


def test_a_sequence_longer_than_the_budget_costs_one_pass_and_not_several() -> None:
    lengths = np.array([100, 4, 5], dtype=np.int32)
    rounds = plan(lengths, everything(lengths), budget=10, ranks=1)
    assert [micro.tolist() for micros in rounds for micro in micros] == [[0], [1, 2]]


def test_only_the_sequences_asked_for_are_planned() -> None:
    lengths = np.array([7, 8, 9, 10], dtype=np.int32)
    rounds = plan(lengths, np.array([1, 3]), budget=100, ranks=1)
    assert [micro.tolist() for micro in rounds[0]] == [[1, 3]]


def test_no_sequences_are_one_empty_micro_batch_for_each_rank() -> None:
    rounds = plan(np.array([3, 4], dtype=np.int32), np.array([], dtype=np.int64), budget=10, ranks=3)
    assert [[len(micro) for micro in micros] for micros in rounds] == [[0, 0, 0]]


def test_gather_takes_the_chosen_sequences_in_the_order_asked_for() -> None:
    input_ids = np.array([1, 2, 3, 4, 5, 10, 11, 12, 20, 21, 22, 23], dtype=np.int32)
    lengths, responses = np.array([5, 3, 4], dtype=np.int32), np.array([2, 1, 3], dtype=np.int32)
    packed = gather(input_ids, lengths, responses, [2, 0], CPU)
    assert packed.input_ids.tolist() == [[20, 21, 22, 23, 1, 2, 3, 4, 5]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert packed.boundaries.tolist() == [0, 4, 9]
    assert packed.predict.tolist() == [0, 1, 2, 6, 7]  # each response token from the position before it
    assert packed.labels.tolist() == [21, 22, 23, 4, 5]
    assert packed.tokens.tolist() == [3, 4, 5, 0, 1]  # their places among 2 + 1 + 3 response tokens


def test_gather_of_nothing_is_one_dummy_token_without_results() -> None:
    packed = gather(np.array([1, 2], dtype=np.int32), np.array([2]), np.array([1]), [], CPU)
    assert packed.input_ids.shape == (1, 1)
    assert packed.boundaries.tolist() == [0, 1]
    assert len(packed.predict) == len(packed.labels) == len(packed.tokens) == 0


@given(LENGTHS, BUDGETS, RANKS)
def test_the_passes_of_a_plan_hold_every_response_token_once(lengths: np.ndarray, budget: int, ranks: int) -> None:
    lengths = lengths + 1  # a prompt token and at least one of the response
    responses = lengths - 1
    input_ids = np.arange(lengths.sum(), dtype=np.int32)
    found = [
        int(token)
        for micros in plan(lengths, everything(lengths), budget=budget, ranks=ranks)
        for micro in micros
        for token in gather(input_ids, lengths, responses, micro, CPU).tokens
    ]
    assert sorted(found) == list(range(int(responses.sum())))


@given(st.integers(0, 40), st.integers(1, 8), st.integers(0, 2**32))
def test_minibatches_are_disjoint_cover_everything_and_are_even(count: int, parts: int, seed: int) -> None:
    sets = minibatches(count, parts, np.random.default_rng(seed))
    assert sorted(int(index) for part in sets for index in part) == list(range(count))
    assert len(sets) == min(count, parts)
    sizes = [len(part) for part in sets]
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_minibatches_are_random_and_follow_the_generator() -> None:
    def draw(seed: int) -> list[list[int]]:
        return [part.tolist() for part in minibatches(12, 3, np.random.default_rng(seed))]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
