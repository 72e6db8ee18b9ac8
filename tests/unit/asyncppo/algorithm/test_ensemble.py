"""Ensemble values, the critics' errors and spread: numbers small enough to redo by hand, limits that must coincide."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncppo.algorithm import aggregate, critic_errors, running, separation, value_std

pytestmark = pytest.mark.unit


def test_mean_and_min_are_over_critics_not_tokens() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [3.0, -2.0, 3.0]])
    assert aggregate(values).tolist() == [2.0, 0.0, 3.0]
    assert aggregate(values, "mean").tolist() == [2.0, 0.0, 3.0]
    assert aggregate(values, "min").tolist() == [1.0, -2.0, 3.0]


def test_std_of_two_critics_is_half_their_distance() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [3.0, -2.0, 3.0]])
    assert value_std(values).tolist() == [1.0, 2.0, 0.0]


def test_std_is_the_population_std() -> None:
    # mean of 0, 1, 5 is 2; squared deviations 4, 1, 9; mean 14/3 (the sample std would be sqrt(7))
    std = value_std(torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64))
    assert std.item() == pytest.approx(math.sqrt(14 / 3), rel=1e-15)


def test_one_critic_has_std_zero_and_is_its_own_mean() -> None:
    values = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(value_std(values), torch.zeros(50))
    assert torch.equal(aggregate(values), values[0])
    assert torch.equal(aggregate(values, "min"), values[0])


@pytest.mark.parametrize("critics", [2, 3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_critics_have_std_exactly_zero(critics: int, dtype: torch.dtype) -> None:
    one = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=dtype)
    assert torch.equal(value_std(one.expand(critics, -1)), torch.zeros(1000, dtype=dtype))


@pytest.mark.parametrize("critics", [2, 3, 5, 7])
def test_the_mean_of_identical_critics_is_the_critic_bit_by_bit(critics: int) -> None:
    one = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(aggregate(one.expand(critics, -1)), one)
    assert torch.equal(aggregate(one.expand(critics, -1), "confidence", 0.1 + torch.arange(critics) / 3), one)


def test_the_order_of_the_critics_does_not_matter() -> None:
    values = torch.randn(3, 100, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(value_std(values), value_std(values.flip(0)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(aggregate(values), aggregate(values.flip(0)), rtol=1e-6, atol=1e-7)


def test_an_unknown_aggregate_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"how: expected one of 'mean', 'min', 'confidence', got 'median'"):
        aggregate(torch.zeros(2, 3), "median")


def test_wrong_shapes_and_dtypes_say_what_was_expected_and_what_came() -> None:
    with pytest.raises(ValueError, match=r"values: expected shape \[M, T\], got \[3\]"):
        value_std(torch.zeros(3))
    with pytest.raises(ValueError, match=r"at least one critic in \[M, T\], got M = 0"):
        aggregate(torch.zeros(0, 3))
    with pytest.raises(TypeError, match=r"values: expected float32 or float64, got bfloat16"):
        aggregate(torch.zeros(2, 3, dtype=torch.bfloat16))


# --- confidence ------------------------------------------------------------------------------------------------------


def test_confidence_weighs_by_the_inverse_error() -> None:
    # 1/e = 1, 4, 1: a = 1/6, 4/6, 1/6
    values = torch.tensor([[6.0, 0.0], [12.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    errors = torch.tensor([1.0, 0.25, 1.0])
    assert aggregate(values, "confidence", errors).tolist() == [9.0, 2.0]


@settings(deadline=None, max_examples=80)
@given(critics=st.integers(1, 7), error=st.floats(0.0, 1e6, width=32), seed=st.integers(0, 1000))
def test_confidence_with_equal_errors_is_the_mean_bit_by_bit(critics: int, error: float, seed: int) -> None:
    values = torch.randn(critics, 40, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(aggregate(values, "confidence", torch.full((critics,), error)), aggregate(values, "mean"))


def test_only_the_ratio_of_the_errors_counts() -> None:
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = torch.tensor([0.1, 0.4, 0.2])
    once, scaled = (aggregate(values, "confidence", scale * errors) for scale in (1.0, 1e4))
    torch.testing.assert_close(once, scaled, rtol=1e-6, atol=1e-7)


def test_confidence_lies_between_the_critics_and_nearer_to_the_better_one() -> None:
    values = torch.tensor([[0.0], [1.0]])
    assert 0.5 < aggregate(values, "confidence", torch.tensor([2.0, 1.0])).item() < 1.0


def test_a_critic_that_was_never_wrong_counts_as_wrong_by_the_floor() -> None:
    # floor 1e-8: a = (1/1e-8, 1/3e-8) / sum = 3/4, 1/4
    values = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    errors = torch.tensor([0.0, 3e-8], dtype=torch.float64)
    assert aggregate(values, "confidence", errors).item() == pytest.approx(0.25, rel=1e-12)
    assert aggregate(values, "confidence", torch.zeros(2)).item() == 0.5


@pytest.mark.parametrize("how", ["mean", "min"])
def test_errors_do_not_touch_the_other_aggregates(how: str) -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
    assert torch.equal(aggregate(values, how, torch.tensor([0.1, 9.0])), aggregate(values, how))


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_errors_that_cannot_be_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"errors: expected finite mean squared errors >= 0, got \[1.0, "):
        aggregate(torch.zeros(2, 3), "confidence", torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match=r"new: expected finite mean squared errors >= 0"):
        running(None, torch.tensor([bad]), 0.9)


def test_confidence_without_errors_or_with_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match=r'errors: expected \[M\] for how = "confidence", got None'):
        aggregate(torch.zeros(2, 3), "confidence")
    with pytest.raises(ValueError, match=r"errors: expected shape \[2\], got \[3\]"):
        aggregate(torch.zeros(2, 3), "confidence", torch.ones(3))


# --- the critics' errors ---------------------------------------------------------------------------------------------


def test_critic_errors_are_over_the_tokens_not_learned_from() -> None:
    # critic 0 learned from tokens 0, 1: on 2, 3 it is off by 1, 3 -> 5.   critic 1 from 2, 3: off by 2, 0 -> 2
    values = torch.tensor([[9.0, 9.0, 2.0, 4.0], [3.0, 1.0, 9.0, 9.0]])
    learned = torch.tensor([[True, True, False, False], [False, False, True, True]])
    assert critic_errors(values, torch.ones(4), learned).tolist() == [5.0, 2.0]


def test_a_critic_that_learned_from_everything_is_measured_over_everything() -> None:
    # both learned from all: 1, 3 -> 5 and 0, 2 -> 2; the second, with one token left, over that token: 4
    values, returns = torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.zeros(2)
    assert critic_errors(values, returns, torch.ones(2, 2, dtype=torch.bool)).tolist() == [5.0, 2.0]
    assert critic_errors(values, returns, torch.tensor([[True, True], [True, False]])).tolist() == [5.0, 4.0]


def test_what_a_critic_learned_from_does_not_enter_its_error_even_when_it_is_nan() -> None:
    values = torch.tensor([[math.nan, 2.0]])
    assert critic_errors(values, torch.zeros(2), torch.tensor([[True, False]])).tolist() == [4.0]


def test_critic_errors_refuse_no_token() -> None:
    with pytest.raises(ValueError, match=r"at least one token in \[M, T\], got T = 0"):
        critic_errors(torch.zeros(2, 0), torch.zeros(0), torch.zeros(2, 0, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"learned_from: expected shape \[2, 3\], got \[3\]"):
        critic_errors(torch.zeros(2, 3), torch.zeros(3), torch.zeros(3, dtype=torch.bool))


def test_running_begins_with_the_first_and_forgets_by_its_decay() -> None:
    first = running(None, torch.tensor([4.0, 1.0]), 0.75)
    assert first.tolist() == [4.0, 1.0]
    assert running(first, torch.tensor([0.0, 5.0]), 0.75).tolist() == [3.0, 2.0]  # .75·4, .75·1 + .25·5


def test_running_refuses_another_number_of_critics_and_a_decay_above_one() -> None:
    with pytest.raises(ValueError, match=r"previous: expected shape \[2\], got \[3\]"):
        running(torch.ones(3), torch.ones(2), 0.9)
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\], got 1.5"):
        running(None, torch.ones(2), 1.5)


# --- separation ------------------------------------------------------------------------------------------------------


def test_separation_is_the_spread_over_critics_against_that_over_tokens() -> None:
    # std over critics 1, 1, 1; means 0, 3, 6 with population std sqrt(6)
    values = torch.tensor([[1.0, 4.0, 7.0], [-1.0, 2.0, 5.0]])
    assert separation(values) == pytest.approx(1.0 / math.sqrt(6.0), rel=1e-7)


@pytest.mark.parametrize("critics", [2, 3])
def test_identical_critics_have_no_separation(critics: int) -> None:
    one = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert separation(one.expand(critics, -1)) == 0.0


@pytest.mark.parametrize(("scale", "shift"), [(100.0, 0.0), (0.01, 5.0), (-1.0, -3.0)])
def test_separation_has_no_unit(scale: float, shift: float) -> None:
    values = torch.randn(3, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert separation(scale * values + shift) == pytest.approx(separation(values), rel=1e-10)


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(0, 5),
        torch.arange(5.0)[None],
        torch.tensor([[1.0], [2.0]]),
        torch.zeros(2, 0),
        torch.tensor([[0.1] * 7, [0.7] * 7]),
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
    ],
    ids=["no critic", "one critic", "one token", "no token", "constant critics", "constant mean"],
)
def test_separation_is_nan_where_it_is_not_defined(values: torch.Tensor) -> None:
    assert math.isnan(separation(values))
