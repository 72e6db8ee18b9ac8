"""Returns and advantages: numbers worked by hand, a slow readable twin, limits that must coincide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyncppo.algorithm import (
    gae,
    group_normalized,
    lambda_returns,
    length_adaptive_lambda,
    returns,
    segment_ids,
    token_rewards,
    whiten,
)

pytestmark = pytest.mark.unit


def gae_by_hand(
    rewards: list[float],
    values: list[float],
    lengths: list[int],
    gamma: float,
    lam: float,
    bootstrap: list[float] | None = None,
) -> list[float]:
    """The textbook: for each response walk back from its last token, A_t = δ_t + γλ A_{t+1}."""
    advantages = [0.0] * len(values)
    start = 0
    for n, length in enumerate(lengths):
        next_value = bootstrap[n] if bootstrap is not None else 0.0
        next_advantage = 0.0
        for t in reversed(range(start, start + length)):
            delta = rewards[t] + gamma * next_value - values[t]
            next_advantage = delta + gamma * lam * next_advantage
            next_value = values[t]
            advantages[t] = next_advantage
        start += length
    return advantages


@dataclass
class Ragged:
    rewards: Tensor
    values: Tensor
    lengths: Tensor
    bootstrap: Tensor


def ragged(lengths: list[int], seed: int, dtype: torch.dtype = torch.float64) -> Ragged:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    return Ragged(
        rewards=torch.randn(tokens, generator=generator, dtype=dtype),
        values=torch.randn(tokens, generator=generator, dtype=dtype),
        lengths=torch.tensor(lengths),
        bootstrap=torch.randn(len(lengths), generator=generator, dtype=dtype),
    )


unit = st.one_of(st.sampled_from([0.0, 0.5, 0.95, 0.999, 1.0]), st.floats(0.0, 1.0))


# --- segments and rewards --------------------------------------------------------------------------------------------


def test_segment_ids_repeat_each_response_for_its_tokens() -> None:
    assert segment_ids(torch.tensor([2, 3, 1])).tolist() == [0, 0, 1, 1, 1, 2]


def test_rewards_of_responses_sit_on_last_tokens_only() -> None:
    rewards = token_rewards(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2, 3, 1]))
    assert rewards.tolist() == [0.0, 1.0, 0.0, 0.0, -2.0, 0.5]


def test_step_rewards_are_added_where_steps_end_also_on_the_last_token() -> None:
    steps = torch.tensor([0.25, 0.0, 0.0, -0.5, 0.125, 0.0])
    rewards = token_rewards(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2, 3, 1]), steps)
    assert rewards.tolist() == [0.25, 1.0, 0.0, -0.5, -1.875, 0.5]
    assert steps.tolist() == [0.25, 0.0, 0.0, -0.5, 0.125, 0.0]


def test_no_step_rewards_are_step_rewards_of_zero() -> None:
    batch = ragged([3, 1, 4], seed=1)
    zeros = torch.zeros(8, dtype=torch.float64)
    assert torch.equal(
        token_rewards(batch.bootstrap, batch.lengths), token_rewards(batch.bootstrap, batch.lengths, zeros)
    )


def test_step_rewards_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"step_rewards: expected shape \[5\], got \[2\]"):
        token_rewards(torch.zeros(2), torch.tensor([2, 3]), torch.zeros(2))


# --- returns ---------------------------------------------------------------------------------------------------------


def test_returns_are_discounted_within_each_response() -> None:
    # first:  R_2 = 4, R_1 = 2 + .5·4 = 4, R_0 = 1 + .5·4 = 3;   second: R_1 = 8, R_0 = 0 + .5·8 = 4
    rewards = torch.tensor([1.0, 2.0, 4.0, 0.0, 8.0])
    assert returns(rewards, torch.tensor([3, 2]), gamma=0.5).tolist() == [3.0, 4.0, 4.0, 4.0, 8.0]


def test_undiscounted_return_of_a_final_reward_is_that_reward_at_every_token() -> None:
    lengths = torch.tensor([1, 5, 8192, 3])
    per_response = torch.tensor([0.1, -0.7, 0.3, 1.0])
    rewards = token_rewards(per_response, lengths)
    assert torch.equal(returns(rewards, lengths, gamma=1.0), per_response[segment_ids(lengths)])


def test_gamma_zero_returns_the_reward_itself() -> None:
    batch = ragged([3, 1, 4], seed=0)
    assert torch.equal(returns(batch.rewards, batch.lengths, gamma=0.0), batch.rewards)


# --- gae -------------------------------------------------------------------------------------------------------------


def test_gae_equals_numbers_worked_by_hand() -> None:
    # γ = λ = .5, so γλ = .25. First response:
    # δ_0 = 0 + .5·.25 − .5 = −.375, δ_1 = 0 + .5·.5 − .25 = 0, δ_2 = 1 − .5 = .5
    # A_2 = .5, A_1 = 0 + .25·.5 = .125, A_0 = −.375 + .25·.125 = −.34375.   Second: A_0 = 2 − 1 = 1
    rewards = torch.tensor([0.0, 0.0, 1.0, 2.0])
    values = torch.tensor([0.5, 0.25, 0.5, 1.0])
    lengths = torch.tensor([3, 1])
    assert gae(rewards, values, lengths, gamma=0.5, lam=0.5).tolist() == [-0.34375, 0.125, 0.5, 1.0]


def test_bootstrap_is_the_discounted_value_after_the_last_token() -> None:
    # First: δ_2 = 1 + .5·2 − .5 = 1.5, A_1 = .25·1.5 = .375, A_0 = −.375 + .25·.375 = −.28125
    # Second: 2 + .5·4 − 1 = 3
    rewards = torch.tensor([0.0, 0.0, 1.0, 2.0])
    values = torch.tensor([0.5, 0.25, 0.5, 1.0])
    bootstrap = torch.tensor([2.0, 4.0])
    advantages = gae(rewards, values, torch.tensor([3, 1]), gamma=0.5, lam=0.5, bootstrap=bootstrap)
    assert advantages.tolist() == [-0.28125, 0.375, 1.5, 3.0]


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
    gamma=unit,
    lam=unit,
    with_bootstrap=st.booleans(),
)
def test_gae_equals_the_backward_loop_on_ragged_batches(
    lengths: list[int], seed: int, gamma: float, lam: float, with_bootstrap: bool
) -> None:
    batch = ragged(lengths, seed)
    bootstrap = batch.bootstrap if with_bootstrap else None
    expected = gae_by_hand(
        batch.rewards.tolist(),
        batch.values.tolist(),
        lengths,
        gamma,
        lam,
        bootstrap.tolist() if bootstrap is not None else None,
    )
    actual = gae(batch.rewards, batch.values, batch.lengths, gamma=gamma, lam=lam, bootstrap=bootstrap)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.999, 0.95), (1.0, 1.0), (1.0, 0.1), (0.99, 1.0)])
def test_gae_is_accurate_on_8192_tokens(gamma: float, lam: float) -> None:
    lengths = [8192, 1, 8191, 4097]
    batch = ragged(lengths, seed=3, dtype=torch.float32)
    # λ = .1: .1^8192 underflows to 0, as it should; nothing may be divided by it
    actual = gae(batch.rewards, batch.values, batch.lengths, gamma=gamma, lam=lam)
    expected = gae_by_hand(batch.rewards.tolist(), batch.values.tolist(), lengths, gamma, lam)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected).float(), rtol=2e-7, atol=1e-6)


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
    gamma=unit,
    data=st.data(),
    with_bootstrap=st.booleans(),
)
def test_a_lambda_for_each_response_is_that_lambda_on_the_response_alone(
    lengths: list[int], seed: int, gamma: float, data: st.DataObject, with_bootstrap: bool
) -> None:
    batch = ragged(lengths, seed)
    lam = torch.tensor([data.draw(unit) for _ in lengths], dtype=torch.float64)
    bootstrap = batch.bootstrap if with_bootstrap else None
    for estimate in (gae, lambda_returns):
        together = estimate(batch.rewards, batch.values, batch.lengths, gamma=gamma, lam=lam, bootstrap=bootstrap)
        alone = [
            estimate(
                rewards,
                values,
                torch.tensor([length]),
                gamma=gamma,
                lam=lam[n].item(),
                bootstrap=batch.bootstrap[n : n + 1] if with_bootstrap else None,
            )
            for n, (length, rewards, values) in enumerate(
                zip(lengths, batch.rewards.split(lengths), batch.values.split(lengths), strict=True)
            )
        ]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.95, 1.0])
def test_equal_lambdas_for_each_response_are_the_one_lambda_bit_by_bit(lam: float) -> None:
    batch = ragged([8192, 1, 100], seed=9)
    for estimate in (gae, lambda_returns):
        one = estimate(batch.rewards, batch.values, batch.lengths, gamma=0.999, lam=lam)
        each = torch.full((3,), lam, dtype=torch.float64)
        assert torch.equal(estimate(batch.rewards, batch.values, batch.lengths, gamma=0.999, lam=each), one)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
    order=st.randoms(use_true_random=False),
)
def test_nothing_depends_on_the_order_of_the_responses(lengths: list[int], seed: int, order: Random) -> None:
    batch = ragged(lengths, seed)
    permutation = list(range(len(lengths)))
    order.shuffle(permutation)

    def permuted(packed: Tensor) -> Tensor:
        return torch.cat([packed.split(lengths)[n] for n in permutation])

    rewards, values, turned = permuted(batch.rewards), permuted(batch.values), batch.lengths[permutation]
    bootstrap = batch.bootstrap[permutation]
    for estimate in (gae, lambda_returns):
        expected = estimate(
            batch.rewards,
            batch.values,
            batch.lengths,
            gamma=0.9,
            lam=length_adaptive_lambda(batch.lengths, 0.5),
            bootstrap=batch.bootstrap,
        )
        lam = length_adaptive_lambda(turned, 0.5)
        assert torch.equal(
            estimate(rewards, values, turned, gamma=0.9, lam=lam, bootstrap=bootstrap), permuted(expected)
        )
    expected = token_rewards(batch.bootstrap, batch.lengths, batch.rewards)
    assert torch.equal(token_rewards(bootstrap, turned, rewards), permuted(expected))
    groups = torch.arange(len(lengths)) // 2
    expected = group_normalized(batch.bootstrap, groups, batch.lengths)
    torch.testing.assert_close(
        group_normalized(bootstrap, groups[permutation], turned), permuted(expected), rtol=1e-9, atol=1e-9
    )


def test_gamma_and_lambda_one_give_return_minus_value() -> None:
    batch = ragged([5, 1, 17, 2], seed=4)
    advantages = gae(batch.rewards, batch.values, batch.lengths, gamma=1.0, lam=1.0)
    expected = returns(batch.rewards, batch.lengths, gamma=1.0) - batch.values
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)


def test_lambda_one_gives_discounted_return_minus_value() -> None:
    batch = ragged([5, 1, 17, 2], seed=4)
    advantages = gae(batch.rewards, batch.values, batch.lengths, gamma=0.9, lam=1.0)
    expected = returns(batch.rewards, batch.lengths, gamma=0.9) - batch.values
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)


def test_lambda_zero_gives_the_one_step_error() -> None:
    # δ_0 = 1 + .5·4 − 2 = 1, δ_1 = 3 − 4 = −1
    rewards, values = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])
    assert gae(rewards, values, torch.tensor([2]), gamma=0.5, lam=0.0).tolist() == [1.0, -1.0]


def test_perfect_values_leave_no_advantage() -> None:
    batch = ragged([9, 1, 30], seed=5)
    values = returns(batch.rewards, batch.lengths, gamma=0.9)
    advantages = gae(batch.rewards, values, batch.lengths, gamma=0.9, lam=0.7)
    torch.testing.assert_close(advantages, torch.zeros(40, dtype=torch.float64), rtol=0.0, atol=1e-12)


def test_one_response_of_one_token_is_reward_minus_value() -> None:
    advantage = gae(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([1]), gamma=0.5, lam=0.5)
    assert advantage.tolist() == [2.0]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("lam", [0.8, torch.tensor([0.5, 0.8, 1.0], dtype=torch.float64)], ids=["one", "each"])
def test_a_response_does_not_see_its_neighbours_even_when_they_are_nan(lam: float | Tensor, poison: float) -> None:
    batch = ragged([4, 6, 5], seed=6)
    own = slice(4, 10)
    rewards, values, bootstrap = batch.rewards.clone(), batch.values.clone(), batch.bootstrap.clone()
    rewards[:4] = values[:4] = rewards[10:] = values[10:] = poison
    bootstrap[0] = bootstrap[2] = poison
    for estimate in (gae, lambda_returns):
        alone = estimate(
            batch.rewards[own],
            batch.values[own],
            torch.tensor([6]),
            gamma=0.9,
            lam=0.8,
            bootstrap=batch.bootstrap[1:2],
        )
        together = estimate(rewards, values, batch.lengths, gamma=0.9, lam=lam, bootstrap=bootstrap)
        assert torch.equal(together[own], alone)
    assert torch.equal(
        returns(rewards, batch.lengths, gamma=0.9)[own], returns(batch.rewards, batch.lengths, gamma=0.9)[own]
    )
    earned = token_rewards(bootstrap, batch.lengths, rewards)
    assert torch.equal(earned[own], token_rewards(batch.bootstrap, batch.lengths, batch.rewards)[own])


def test_a_constant_added_to_reward_moves_earlier_tokens_not_later_ones() -> None:
    batch = ragged([6], seed=7)
    bumped = batch.rewards.clone()
    bumped[3] += 1.0
    before = gae(batch.rewards, batch.values, batch.lengths, gamma=0.5, lam=0.5)
    after = gae(bumped, batch.values, batch.lengths, gamma=0.5, lam=0.5)
    # (γλ)^l = .25^l for the tokens l steps before the bump, nothing after it
    expected = torch.tensor([1 / 64, 1 / 16, 1 / 4, 1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(after - before, expected, rtol=1e-12, atol=1e-12)


def test_inputs_are_left_as_they_were() -> None:
    batch = ragged([3, 4], seed=8)
    copies = batch.rewards.clone(), batch.values.clone(), batch.bootstrap.clone()
    gae(batch.rewards, batch.values, batch.lengths, gamma=0.9, lam=0.9, bootstrap=batch.bootstrap)
    returns(batch.rewards, batch.lengths, gamma=0.9)
    whiten(batch.values)
    assert all(torch.equal(a, b) for a, b in zip(copies, (batch.rewards, batch.values, batch.bootstrap), strict=True))


def test_wrong_arguments_say_what_was_expected_and_what_came() -> None:
    ok, lengths = torch.zeros(5), torch.tensor([2, 3])
    with pytest.raises(ValueError, match=r"lengths: expected a sum of 5, .* got 6"):
        gae(ok, ok, torch.tensor([3, 3]), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"lengths: expected every response to have at least 1 token, got 0"):
        returns(ok, torch.tensor([5, 0]), gamma=1.0)
    with pytest.raises(ValueError, match=r"rewards: expected shape \[5\], got \[4\]"):
        gae(torch.zeros(4), ok, lengths, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"bootstrap: expected shape \[2\], got \[5\]"):
        gae(ok, ok, lengths, gamma=1.0, lam=1.0, bootstrap=ok)
    with pytest.raises(ValueError, match=r"lam: expected a number in \[0, 1\], got 1.01"):
        gae(ok, ok, lengths, gamma=1.0, lam=1.01)
    with pytest.raises(ValueError, match=r"lam: expected numbers in \[0, 1\], got \[0.5, 1.5\]"):
        gae(ok, ok, lengths, gamma=1.0, lam=torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match=r"lam: expected numbers in \[0, 1\], got \[0.5, nan\]"):
        lambda_returns(ok, ok, lengths, gamma=1.0, lam=torch.tensor([0.5, math.nan]))
    with pytest.raises(ValueError, match=r"lam: expected shape \[2\], got \[5\]"):
        lambda_returns(ok, ok, lengths, gamma=1.0, lam=ok)
    with pytest.raises(ValueError, match=r"gamma: expected a number in \[0, 1\], got nan"):
        returns(ok, lengths, gamma=math.nan)
    with pytest.raises(TypeError, match=r"lengths: expected int64, got int32"):
        returns(ok, lengths.int(), gamma=1.0)
    with pytest.raises(TypeError, match=r"values: expected float32 or float64, got float16"):
        gae(ok, ok.half(), lengths, gamma=1.0, lam=1.0)


# --- length-adaptive lambda ------------------------------------------------------------------------------------------


def test_the_longer_the_response_the_nearer_its_lambda_is_to_one() -> None:
    # alpha .05: 1 − 1 / (.05 · 100) = .8, 1 − 1 / (.05 · 1000) = .98; at 20 tokens and below 0
    lengths = torch.tensor([1, 10, 20, 100, 1000])
    assert length_adaptive_lambda(lengths, 0.05).tolist() == pytest.approx([0.0, 0.0, 0.0, 0.8, 0.98], abs=1e-15)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_an_alpha_that_is_no_share_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha: expected a finite number above 0, got"):
        length_adaptive_lambda(torch.tensor([3]), alpha)


# --- lambda returns (TD) ---------------------------------------------------------------------------------------------


def test_lambda_returns_equal_numbers_worked_by_hand() -> None:
    # γ = λ = .5. First: G_2 = 1, G_1 = 0 + .5 (.5·.5 + .5·1) = .375, G_0 = 0 + .5 (.5·.25 + .5·.375) = .15625
    # Second, bootstrap 4: G = 2 + .5·4 = 4
    rewards = torch.tensor([0.0, 0.0, 1.0, 2.0])
    values = torch.tensor([0.5, 0.25, 0.5, 1.0])
    bootstrap = torch.tensor([0.0, 4.0])
    targets = lambda_returns(rewards, values, torch.tensor([3, 1]), gamma=0.5, lam=0.5, bootstrap=bootstrap)
    assert targets.tolist() == [0.15625, 0.375, 1.0, 4.0]


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
    gamma=unit,
    lam=unit,
    with_bootstrap=st.booleans(),
)
def test_lambda_returns_are_advantage_plus_value(
    lengths: list[int], seed: int, gamma: float, lam: float, with_bootstrap: bool
) -> None:
    batch = ragged(lengths, seed)
    bootstrap = batch.bootstrap if with_bootstrap else None
    advantages = gae(batch.rewards, batch.values, batch.lengths, gamma=gamma, lam=lam, bootstrap=bootstrap)
    targets = lambda_returns(batch.rewards, batch.values, batch.lengths, gamma=gamma, lam=lam, bootstrap=bootstrap)
    torch.testing.assert_close(targets, advantages + batch.values, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    gamma=unit,
    scale=st.floats(-1e9, 1e9),
)
def test_lambda_one_gives_the_monte_carlo_return_bit_by_bit_whatever_the_values(
    lengths: list[int], seed: int, gamma: float, scale: float
) -> None:
    batch = ragged(lengths, seed, dtype=torch.float32)
    targets = lambda_returns(batch.rewards, scale * batch.values, batch.lengths, gamma=gamma, lam=1.0)
    assert torch.equal(targets, returns(batch.rewards, batch.lengths, gamma=gamma))


def test_a_bootstrapped_return_has_the_discounted_value_in_its_last_reward() -> None:
    batch = ragged([3, 5], seed=2)
    targets = lambda_returns(batch.rewards, batch.values, batch.lengths, gamma=0.9, lam=1.0, bootstrap=batch.bootstrap)
    expected = returns(token_rewards(0.9 * batch.bootstrap, batch.lengths, batch.rewards), batch.lengths, gamma=0.9)
    torch.testing.assert_close(targets, expected, rtol=1e-14, atol=1e-14)


def test_lambda_zero_gives_the_one_step_target() -> None:
    # 1 + .5·4 = 3; 3
    rewards, values = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])
    assert lambda_returns(rewards, values, torch.tensor([2]), gamma=0.5, lam=0.0).tolist() == [3.0, 3.0]


# --- group-normalised (GRPO) -----------------------------------------------------------------------------------------


def test_group_normalized_equals_numbers_worked_by_hand() -> None:
    # group 7: rewards 1, 0, 0, 1: mean .5, std .5 -> ±1.   group 3: 4, 1: mean 2.5, std 1.5 -> ±1.  ids in any order
    rewards = torch.tensor([1.0, 4.0, 0.0, 0.0, 1.0, 1.0])
    group_ids = torch.tensor([7, 3, 7, 7, 3, 7])
    lengths = torch.tensor([1, 2, 1, 1, 1, 3])
    advantages = group_normalized(rewards, group_ids, lengths)
    expected = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(advantages, expected, rtol=3e-6, atol=0.0)


def test_group_normalized_divides_by_the_population_std_plus_eps() -> None:
    # rewards 0, 0, 3: mean 1, population std sqrt((1 + 1 + 4) / 3) = sqrt(2); eps = .5
    rewards = torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64)
    advantages = group_normalized(rewards, torch.zeros(3, dtype=torch.int64), torch.tensor([1, 1, 1]), eps=0.5)
    scale = math.sqrt(2.0) + 0.5
    assert advantages.tolist() == pytest.approx([-1 / scale, -1 / scale, 2 / scale], rel=1e-14)


def test_without_scale_the_group_mean_is_all_that_is_taken_off() -> None:
    # mean 1 of 0, 0, 3, the single one is its own mean
    rewards, groups = torch.tensor([0.0, 0.0, 3.0, 9.0]), torch.tensor([5, 5, 5, 2])
    advantages = group_normalized(rewards, groups, torch.tensor([1, 2, 1, 1]), scale=False)
    assert advantages.tolist() == [-1.0, -1.0, -1.0, 2.0, 0.0]


@pytest.mark.parametrize("scale", [True, False])
def test_a_group_does_not_see_another_even_when_it_is_nan(scale: bool) -> None:
    groups, lengths = torch.tensor([0, 1, 0, 1]), torch.tensor([1, 2, 1, 1])
    clean = group_normalized(torch.tensor([1.0, 3.0, 0.0, 2.0]), groups, lengths, scale=scale)
    poisoned = group_normalized(torch.tensor([1.0, math.nan, 0.0, 2.0]), groups, lengths, scale=scale)
    assert torch.equal(poisoned[[0, 3]], clean[[0, 3]])
    assert bool(poisoned[[1, 2, 4]].isnan().all())


def test_equal_rewards_and_single_responses_have_no_group_advantage() -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7])
    advantages = group_normalized(rewards, torch.tensor([0, 0, 0, 1]), torch.tensor([2, 1, 1, 3]))
    assert torch.equal(advantages, torch.zeros(7))


def test_group_normalized_refuses_eps_zero() -> None:
    with pytest.raises(ValueError, match=r"eps: expected a number above 0, got 0.0"):
        group_normalized(torch.zeros(1), torch.tensor([0]), torch.tensor([1]), eps=0.0)


# --- whiten ----------------------------------------------------------------------------------------------------------


def test_whiten_equals_numbers_worked_by_hand() -> None:
    # mean 2, population std sqrt((4 + 0 + 4 + 0) / 4) = sqrt(2)
    whitened = whiten(torch.tensor([0.0, 2.0, 4.0, 2.0], dtype=torch.float64))
    assert whitened.tolist() == pytest.approx([-math.sqrt(2), 0.0, math.sqrt(2), 0.0], rel=1e-14)


def test_whitened_tokens_have_mean_zero_and_std_one() -> None:
    x = 1000.0 + 1e-2 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    whitened = whiten(x).double()
    assert abs(whitened.mean().item()) < 1e-6
    assert whitened.std(correction=0).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3])
def test_whitening_equal_numbers_gives_zeros_not_nan(value: float) -> None:
    assert torch.equal(whiten(torch.full((7,), value)), torch.zeros(7))
    assert torch.equal(whiten(torch.tensor([value])), torch.zeros(1))
