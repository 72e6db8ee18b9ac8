"""Ensemble mean, minimum and spread: numbers small enough to redo by hand."""

from __future__ import annotations

import math

import pytest
import torch

from asyncppo.algorithm import aggregate, value_std

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


def test_the_order_of_the_critics_does_not_matter() -> None:
    values = torch.randn(3, 100, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(value_std(values), value_std(values.flip(0)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(aggregate(values), aggregate(values.flip(0)), rtol=1e-6, atol=1e-7)


def test_an_unknown_aggregate_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"how: expected one of 'mean', 'min', got 'median'"):
        aggregate(torch.zeros(2, 3), "median")


def test_wrong_shapes_and_dtypes_say_what_was_expected_and_what_came() -> None:
    with pytest.raises(ValueError, match=r"values: expected shape \[M, T\], got \[3\]"):
        value_std(torch.zeros(3))
    with pytest.raises(ValueError, match=r"at least one critic in \[M, T\], got M = 0"):
        aggregate(torch.zeros(0, 3))
    with pytest.raises(TypeError, match=r"values: expected float32 or float64, got bfloat16"):
        aggregate(torch.zeros(2, 3, dtype=torch.bfloat16))
