"""The two masks: exact counts, ties by position, nothing masked where the signal says nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from decimal import ROUND_FLOOR, Decimal
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncppo.algorithm import highest, keep_for_entropy, keep_for_policy, lowest, random_signal, value_std

pytestmark = pytest.mark.unit

FRACTIONS = ["0", "0.01", "0.07", "0.1", "0.2", "0.25", "0.29", "0.3", "0.333", "0.57", "0.58", "0.7", "0.99"]


def floor_of_product(fraction: str, tokens: int) -> int:
    """As on paper: the decimal number times the count, rounded down."""
    return int((Decimal(fraction) * tokens).to_integral_value(ROUND_FLOOR))


def distinct(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)).float()


# --- lowest and highest ----------------------------------------------------------------------------------------------


def test_lowest_and_highest_pick_the_extremes() -> None:
    signal = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])  # ⌊.4 · 5⌋ = 2
    assert lowest(signal, 0.4).tolist() == [False, True, False, True, False]
    assert highest(signal, 0.4).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_counts_are_the_floor_of_the_decimal_product_for_every_size(fraction: str) -> None:
    for tokens in range(1, 201):
        signal, count = distinct(tokens, seed=tokens), floor_of_product(fraction, tokens)
        # ranks 0..count-1 are exactly the lowest, the last `count` exactly the highest
        assert torch.equal(lowest(signal, float(fraction)), signal < count)
        assert torch.equal(highest(signal, float(fraction)), signal >= tokens - count)


@pytest.mark.parametrize(
    ("fraction", "tokens", "count"), [(0.2, 5, 1), (0.29, 100, 29), (0.57, 100, 57), (0.07, 100, 7)]
)
def test_counts_do_not_lose_a_token_to_binary_fractions(fraction: float, tokens: int, count: int) -> None:
    # in binary .29 · 100 = 28.999999999999996 and .57 · 100 = 56.99999999999999
    assert int(lowest(distinct(tokens), fraction).sum()) == count
    assert int(highest(torch.zeros(tokens), fraction).sum()) == count


@pytest.mark.parametrize("take", [lowest, highest])
def test_ties_go_to_the_earlier_tokens(take: object) -> None:
    assert callable(take)
    assert take(torch.full((6,), 0.5), 0.5).tolist() == [True, True, True, False, False, False]


def test_ties_at_the_border_go_to_the_earlier_tokens() -> None:
    # ⌊.5 · 6⌋ = 3: lowest are the 0 and the first two of the three 1s; highest are both 2s and the first of the 1s
    signal = torch.tensor([1.0, 2.0, 1.0, 0.0, 2.0, 1.0])
    assert lowest(signal, 0.5).tolist() == [True, False, True, True, False, False]
    assert highest(signal, 0.5).tolist() == [True, True, False, False, True, False]


def test_many_ties_in_a_large_batch_still_go_by_position() -> None:
    signal = torch.randint(0, 3, (20_000,), generator=torch.Generator().manual_seed(0)).float()
    zeros = (signal == 0).nonzero().flatten()
    assert torch.equal(lowest(signal, 0.2).nonzero().flatten(), zeros[:4000])  # about 6667 zeros for 4000 places
    twos = (signal == 2).nonzero().flatten()
    assert torch.equal(highest(signal, 0.2).nonzero().flatten(), twos[:4000])


def test_infinities_are_ordinary_extremes() -> None:
    signal = torch.tensor([0.0, math.inf, 1.0, -math.inf])
    assert lowest(signal, 0.25).tolist() == [False, False, False, True]
    assert highest(signal, 0.25).tolist() == [False, True, False, False]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, math.nan])
def test_a_fraction_outside_zero_to_one_is_refused(fraction: float) -> None:
    for take in (lowest, highest):
        with pytest.raises(ValueError, match=r"fraction: expected a number in \[0, 1\), got"):
            take(torch.zeros(3), fraction)
    for keep in (keep_for_policy, keep_for_entropy):
        with pytest.raises(ValueError, match=r"fraction: expected a number in \[0, 1\), got"):
            keep(torch.zeros(3), fraction, torch.tensor([3]), "batch")


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_nan_is_refused(scope: str) -> None:
    signal = torch.tensor([0.0, math.nan, 1.0])
    for take in (lowest, highest):
        with pytest.raises(ValueError, match=r"signal: expected no NaN, got 1 in 3 tokens"):
            take(signal, 0.2)
    for keep in (keep_for_policy, keep_for_entropy):
        with pytest.raises(ValueError, match=r"signal: expected no NaN"):
            keep(signal, 0.2, torch.tensor([3]), scope)


def test_no_token_gives_an_empty_mask() -> None:
    assert lowest(torch.zeros(0), 0.2).shape == (0,)
    assert keep_for_policy(torch.zeros(0), 0.2, torch.zeros(0, dtype=torch.int64), "sequence").shape == (0,)


# --- keep_for_policy and keep_for_entropy ----------------------------------------------------------------------------


def test_policy_drops_the_lowest_and_entropy_drops_the_highest() -> None:
    std, lengths = torch.tensor([0.5, 0.1, 0.4, 0.2, 0.3]), torch.tensor([2, 3])  # ⌊.2 · 5⌋ = 1
    assert keep_for_policy(std, 0.2, lengths, "batch").tolist() == [True, False, True, True, True]
    assert keep_for_entropy(std, 0.2, lengths, "batch").tolist() == [False, True, True, True, True]


def test_batch_scope_ignores_where_responses_begin() -> None:
    std = distinct(100)
    one = keep_for_policy(std, 0.2, torch.tensor([100]), "batch")
    many = keep_for_policy(std, 0.2, torch.tensor([1, 60, 9, 30]), "batch")
    assert torch.equal(one, many)
    assert int((~many).sum()) == 20


def test_sequence_scope_takes_the_floor_in_every_response() -> None:
    # responses of 4, 2 and 5 tokens, k = .5: 2, 1 and 2 tokens out
    std = torch.tensor([4.0, 1.0, 3.0, 2.0, 9.0, 8.0, 5.0, 1.0, 2.0, 3.0, 4.0])
    lengths = torch.tensor([4, 2, 5])
    policy = [True, False, True, False, True, False, True, False, False, True, True]
    entropy = [False, True, False, True, False, True, False, True, True, True, False]
    assert keep_for_policy(std, 0.5, lengths, "sequence").tolist() == policy
    assert keep_for_entropy(std, 0.5, lengths, "sequence").tolist() == entropy


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=10),
    fraction=st.sampled_from(FRACTIONS),
    seed=st.integers(0, 1000),
    levels=st.integers(1, 5),
)
def test_sequence_scope_equals_batch_scope_on_each_response_alone(
    lengths: list[int], fraction: str, seed: int, levels: int
) -> None:
    # few levels, so that ties are the rule and some responses have one level only
    std = torch.randint(0, levels, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).double()
    for keep in (keep_for_policy, keep_for_entropy):
        together = keep(std, float(fraction), torch.tensor(lengths), "sequence").split(lengths)
        for mask, signal in zip(together, std.split(lengths), strict=True):
            assert torch.equal(mask, keep(signal, float(fraction), torch.tensor([signal.numel()]), "batch"))
            equal = bool((signal == signal[0]).all())
            assert int((~mask).sum()) == (0 if equal else floor_of_product(fraction, signal.numel()))


@settings(deadline=None, max_examples=200)
@given(
    responses=st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, math.inf]), min_size=1, max_size=30), min_size=1),
    fraction=st.decimals("0", "0.9999", places=4),
    scope=st.sampled_from(["batch", "sequence"]),
)
def test_exactly_the_floor_is_masked_for_every_size_fraction_and_tie_pattern(
    responses: list[list[float]], fraction: Decimal, scope: str
) -> None:
    packed = [level for response in responses for level in response]
    signal, lengths = torch.tensor(packed), torch.tensor([len(response) for response in responses])
    units = responses if scope == "sequence" else [packed]
    for keep, sign in ((keep_for_policy, 1.0), (keep_for_entropy, -1.0)):
        kept = keep(signal, float(fraction), lengths, scope)
        for unit, mask in zip(units, kept.split([len(unit) for unit in units]), strict=True):
            # one by one: the most extreme first, among equals the earlier
            order = sorted(range(len(unit)), key=lambda t: (sign * unit[t], t))
            masked = order[: floor_of_product(str(fraction), len(unit))] if len(set(unit)) > 1 else []
            assert (~mask).nonzero().flatten().tolist() == sorted(masked)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    fraction=st.sampled_from(FRACTIONS),
    scope=st.sampled_from(["batch", "sequence"]),
    order=st.randoms(use_true_random=False),
)
def test_the_masks_do_not_depend_on_the_order_of_the_responses(
    lengths: list[int], fraction: str, scope: str, order: Random
) -> None:
    # distinct signals: between equal ones of different responses, position has to decide
    signal = distinct(sum(lengths)).split(lengths)
    permutation = list(range(len(lengths)))
    order.shuffle(permutation)
    permuted = torch.cat([signal[n] for n in permutation]), torch.tensor([lengths[n] for n in permutation])
    for keep in (keep_for_policy, keep_for_entropy):
        expected = keep(torch.cat(signal), float(fraction), torch.tensor(lengths), scope).split(lengths)
        actual = keep(permuted[0], float(fraction), permuted[1], scope).split(permuted[1].tolist())
        assert all(torch.equal(actual[i], expected[n]) for i, n in enumerate(permutation))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("critics", [1, 2, 3])
def test_identical_critics_or_a_single_one_mask_nothing(critics: int, scope: str) -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).expand(critics, -1)
    std, lengths = value_std(values), torch.tensor([20, 29, 1])
    assert bool(keep_for_policy(std, 0.2, lengths, scope).all())
    assert bool(keep_for_entropy(std, 0.2, lengths, scope).all())


@pytest.mark.parametrize("level", [0.0, 0.25])
def test_an_equal_signal_masks_nothing_whatever_its_level(level: float) -> None:
    assert bool(keep_for_policy(torch.full((10,), level), 0.2, torch.tensor([10]), "batch").all())


def test_one_token_that_differs_ends_the_exception() -> None:
    # nine equal, one higher: the signal says something again, and 2 of 10 go; ties by position
    std = torch.tensor([0.0] * 9 + [1.0])
    assert (~keep_for_policy(std, 0.2, torch.tensor([10]), "batch")).nonzero().flatten().tolist() == [0, 1]
    assert (~keep_for_entropy(std, 0.2, torch.tensor([10]), "batch")).nonzero().flatten().tolist() == [0, 9]


def test_a_response_of_one_token_is_never_masked_in_sequence_scope() -> None:
    assert bool(keep_for_policy(torch.tensor([1.0, 2.0]), 0.99, torch.tensor([1, 1]), "sequence").all())


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_a_batch_of_one_token_is_kept(scope: str) -> None:
    assert keep_for_policy(torch.tensor([0.3]), 0.99, torch.tensor([1]), scope).tolist() == [True]
    assert keep_for_entropy(torch.tensor([0.3]), 0.99, torch.tensor([1]), scope).tolist() == [True]


# --- the random control ----------------------------------------------------------------------------------------------


def test_the_random_signal_is_pinned() -> None:
    # If this changes, a resumed run with random masks is no longer the run that it resumes. 2^-53 is the unit.
    assert (random_signal(3, (7, 2)) * 2.0**53).long().tolist() == [
        5398394032589540,
        2768685472500856,
        2173087421119439,
    ]


def test_the_random_signal_is_the_same_in_another_process() -> None:
    code = "from asyncppo.algorithm import random_signal; print(random_signal(3, (7, 2)).tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(random_signal(3, (7, 2)).tolist())


def test_a_longer_random_signal_begins_like_a_shorter_one() -> None:
    assert torch.equal(random_signal(100, (0,))[:30], random_signal(30, (0,)))


@pytest.mark.parametrize("other", [(1, 3), (2, 2), (1, 2, 0), (12,), (1,), (-1, 2)])
def test_every_seed_has_a_signal_of_its_own(other: tuple[int, ...]) -> None:
    assert not torch.equal(random_signal(20, (1, 2)), random_signal(20, other))


def test_the_random_signal_is_uniform_and_without_ties() -> None:
    signal = random_signal(100_000, (0, 0))
    assert signal.dtype == torch.float64
    assert signal.unique().numel() == 100_000
    assert 0.0 <= signal.min().item() < 1e-3
    assert 1.0 - 1e-3 < signal.max().item() < 1.0
    counts = torch.histc(signal, 10, 0.0, 1.0)
    assert bool(((counts - 10_000).abs() < 5 * 95).all())  # 95 = sqrt(100000 · .1 · .9)
    # no memory from one token to the next: a correlation of 0, standard deviation 1 / sqrt(100000)
    assert abs(torch.corrcoef(torch.stack([signal[1:], signal[:-1]]))[0, 1].item()) < 5 * 0.0032


def test_random_masks_take_as_many_tokens_and_every_token_equally_often() -> None:
    lengths = torch.tensor([4, 6])
    masks = torch.stack([~keep_for_policy(random_signal(10, (0, step)), 0.2, lengths) for step in range(2000)])
    assert bool((masks.sum(dim=1) == 2).all())
    # 400 of 2000 expected for each token, standard deviation sqrt(2000 · .2 · .8) = 18
    assert bool(((masks.sum(dim=0) - 400).abs() < 5 * 18).all())


def test_the_random_signal_refuses_what_is_no_seed() -> None:
    assert random_signal(0, (1,)).shape == (0,)
    with pytest.raises(ValueError, match=r"tokens: expected at least 0, got -1"):
        random_signal(-1, (1,))
    with pytest.raises(ValueError, match=r"seed: expected at least one integer, got none"):
        random_signal(3, ())
    with pytest.raises(TypeError, match=r"float"):
        random_signal(3, (1.0,))  # type: ignore[arg-type]


def test_wrong_arguments_say_what_was_expected_and_what_came() -> None:
    with pytest.raises(ValueError, match=r"scope: expected one of 'batch', 'sequence', got 'token'"):
        keep_for_policy(torch.zeros(3), 0.2, torch.tensor([3]), "token")
    with pytest.raises(ValueError, match=r"lengths: expected a sum of 3, .* got 4"):
        keep_for_entropy(torch.zeros(3), 0.2, torch.tensor([4]), "batch")
    with pytest.raises(ValueError, match=r"signal: expected shape \[T\], got \[2, 3\]"):
        lowest(torch.zeros(2, 3), 0.2)
    with pytest.raises(TypeError, match=r"signal: expected float32 or float64, got int64"):
        highest(torch.zeros(3, dtype=torch.int64), 0.2)
