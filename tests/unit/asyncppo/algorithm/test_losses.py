"""The losses: numbers worked by hand, limits that must coincide, finite differences, poison, any cut of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from asyncppo.algorithm import Objective, explained_variance, policy_loss, returns, token_weights, value_loss

pytestmark = pytest.mark.unit

MODES = ["mask", "clamp", "none"]
SETTINGS: dict[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.28,
    "behaviour_cap": 5.0,
    "behaviour_mode": "mask",
    "entropy_coef": 0.1,
}


@dataclass(frozen=True)
class Tokens:
    """The tensor arguments of `policy_loss`, in its order."""

    logprobs: Tensor
    proximal: Tensor
    behaviour: Tensor
    advantages: Tensor
    entropy: Tensor
    keep_policy: Tensor
    keep_entropy: Tensor
    weights: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())

    def __getitem__(self, index: slice) -> Tokens:
        return Tokens(*(tensor[index] for tensor in self.args()))


def two_tokens() -> Tokens:
    """Token 0: ρ = .5/.25 = 2, w = .25/.125 = 2, A = 1.  Token 1: ρ = .25/.5 = .5, w = .5/1 = .5, A = −1."""
    return Tokens(
        logprobs=torch.tensor([0.5, 0.25], dtype=torch.float64).log().requires_grad_(),
        proximal=torch.tensor([0.25, 0.5], dtype=torch.float64).log(),
        behaviour=torch.tensor([0.125, 1.0], dtype=torch.float64).log(),
        advantages=torch.tensor([1.0, -1.0], dtype=torch.float64),
        entropy=torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True),
        keep_policy=torch.tensor([True, True]),
        keep_entropy=torch.tensor([True, True]),
        weights=torch.tensor([0.25, 0.75], dtype=torch.float64),
    )


def random_tokens(tokens: int, seed: int, *, spread: float = 0.5) -> Tokens:
    """Log-ratios wide enough that clips and caps bind for some tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(tokens, generator=generator, dtype=torch.float64)

    proximal = -normal().abs() - 1.0
    return Tokens(
        logprobs=(proximal + spread * normal()).requires_grad_(),
        proximal=proximal,
        behaviour=proximal + 2.0 * spread * normal(),
        advantages=normal(),
        entropy=normal().abs().requires_grad_(),
        keep_policy=normal() > -0.8,
        keep_entropy=normal() < 0.8,
        weights=normal().abs(),
    )


def loss_of(tokens: Tokens, **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """With every token a response of its own: the default objective does not look across tokens."""
    ones = torch.ones(tokens.weights.numel(), dtype=torch.int64)
    return policy_loss(*tokens.args(), lengths=ones, objective=Objective(**(SETTINGS | changes)))


def gradients(tokens: Tokens, **changes: Any) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss_of(tokens, **changes)[0], (tokens.logprobs, tokens.entropy))


# --- policy loss: numbers worked by hand ------------------------------------------------------------------------------


def test_policy_loss_equals_numbers_worked_by_hand() -> None:
    # token 0: w min(ρA, clip(ρ)A) = 2 · min(2, 1.28) = 2.56, H = 1;  token 1: .5 · min(−.5, −.8) = −.4, H = 3
    # L = −[.25 (2.56 + .1) + .75 (−.4 + .3)] = −[.665 − .075] = −.59
    loss, metrics = loss_of(two_tokens())
    assert loss.item() == pytest.approx(-0.59, rel=1e-12)
    # policy part −[.64 − .3] = −.34, entropy part .25 · 1 + .75 · 3 = 2.5
    assert metrics["policy_loss"].item() == pytest.approx(-0.34, rel=1e-12)
    assert metrics["entropy_bonus"].item() == pytest.approx(2.5, rel=1e-12)


def test_masks_select_terms_and_leave_the_denominators_alone() -> None:
    # I^A = 0, 1 and I^H = 1, 0:  L = −[.25 · .1 · 1 + .75 · (−.4)] = −[.025 − .3] = .275
    tokens = replace(two_tokens(), keep_policy=torch.tensor([False, True]), keep_entropy=torch.tensor([True, False]))
    assert loss_of(tokens)[0].item() == pytest.approx(0.275, rel=1e-12)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("mask", 0.3),  # w_0 = 2 > 1: token 0 out, −[.75 · (−.4)]
        ("clamp", -0.02),  # w_0 = 1: −[.25 · 1.28 − .3]
        ("none", 0.28),  # w = 1 for both: −[.25 · 1.28 + .75 · (−.8)]
    ],
)
def test_behaviour_modes_at_a_cap_of_one(mode: str, expected: float) -> None:
    changes = {"behaviour_cap": 1.0, "behaviour_mode": mode}
    assert loss_of(two_tokens(), entropy_coef=0.0, **changes)[0].item() == pytest.approx(expected, rel=1e-12)
    # the entropy term, −.1 · (.25 · 1 + .75 · 3) = −.25, is the same in every mode: the cap does not touch it
    assert loss_of(two_tokens(), **changes)[0].item() == pytest.approx(expected - 0.25, rel=1e-12)


def test_a_weight_equal_to_the_cap_is_not_over_it() -> None:
    tokens = replace(two_tokens(), proximal=torch.zeros(2).double(), behaviour=torch.zeros(2).double())
    assert loss_of(tokens, behaviour_cap=1.0)[1]["capped"].item() == 0.0


def test_metrics_equal_numbers_worked_by_hand() -> None:
    # k3 of current/behaviour: x = 4 and 1/4: (4 − 1 − ln 4) + (1/4 − 1 + ln 4) = 2.25
    # k3 of current/proximal:  x = 2 and 1/2: (2 − 1 − ln 2) + (1/2 − 1 + ln 2) = .5
    metrics = loss_of(two_tokens())[1]
    assert {name: round(value.item(), 12) for name, value in metrics.items()} == {
        "tokens": 2.0,
        "policy_kept": 2.0,
        "entropy_kept": 2.0,
        "capped": 0.0,
        "active": 2.0,
        "clipped": 2.0,
        "divergence_masked": 0.0,
        "dual_clipped": 0.0,
        "weight_sum": 2.5,
        "weight_sq_sum": 4.25,
        "chi2_sum": 1.25,  # (2 − 1)² + (.5 − 1)²
        "ratio_sum": 2.5,
        "kl_behaviour_sum": 2.25,
        "kl_proximal_sum": 0.5,
        "kl_reference_sum": 0.0,
        "entropy_sum": 4.0,
        "policy_loss": -0.34,
        "entropy_bonus": 2.5,
    }
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in metrics.values())


def test_kl_estimates_of_a_single_token() -> None:
    # in the sum over both tokens the logarithms cancel; here they do not: 4 − 1 − ln 4 and 2 − 1 − ln 2
    metrics = loss_of(two_tokens()[0:1])[1]
    assert metrics["kl_behaviour_sum"].item() == pytest.approx(3 - math.log(4), rel=1e-12)
    assert metrics["kl_proximal_sum"].item() == pytest.approx(1 - math.log(2), rel=1e-12)


@pytest.mark.parametrize(
    ("mode", "capped", "active", "weight_sum", "weight_sq_sum"),
    [("mask", 1, 1, 0.5, 0.25), ("clamp", 1, 2, 1.5, 1.25), ("none", 0, 2, 2.0, 2.0)],
)
def test_capped_and_weights_follow_the_mode(
    mode: str, capped: int, active: int, weight_sum: float, weight_sq_sum: float
) -> None:
    metrics = loss_of(two_tokens(), behaviour_cap=1.0, behaviour_mode=mode)[1]
    assert (metrics["capped"].item(), metrics["active"].item()) == (capped, active)
    assert metrics["policy_kept"].item() == 2  # I^A as given, whatever the cap does
    assert metrics["weight_sum"].item() == pytest.approx(weight_sum, rel=1e-12)
    assert metrics["weight_sq_sum"].item() == pytest.approx(weight_sq_sum, rel=1e-12)


def test_clip_binds_only_where_it_lowers_the_objective() -> None:
    # ρ = 2, .5, 2, .5 with A = 1, −1, −1, 1: PPO's clip binds for the first two and leaves the gradient of the last two
    ratios = torch.tensor([2.0, 0.5, 2.0, 0.5], dtype=torch.float64)
    zeros, ones = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    tokens = Tokens(
        logprobs=ratios.log().requires_grad_(),
        proximal=zeros,
        behaviour=zeros,
        advantages=torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64),
        entropy=zeros.clone().requires_grad_(),
        keep_policy=ones.bool(),
        keep_entropy=ones.bool(),
        weights=ones,
    )
    assert loss_of(tokens)[1]["clipped"].item() == 2.0
    # dL/d logp = −ρ A where the clip does not bind
    torch.testing.assert_close(gradients(tokens)[0], torch.tensor([0.0, 0.0, 2.0, -0.5], dtype=torch.float64))


# --- policy loss: gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_gradient_on_policy_is_the_plain_policy_gradient(mode: str) -> None:
    tokens = random_tokens(50, seed=0)
    same = tokens.logprobs.detach()
    tokens = replace(tokens, proximal=same, behaviour=same)
    by_logprob, by_entropy = gradients(tokens, behaviour_mode=mode)
    # d/d logp of −Σ c I^A A logp, and of −β Σ c I^H H
    torch.testing.assert_close(by_logprob, -tokens.weights * tokens.advantages * tokens.keep_policy)
    torch.testing.assert_close(by_entropy, -0.1 * tokens.weights * tokens.keep_entropy)


def test_off_policy_gradient_carries_the_behaviour_weight_but_no_gradient_through_it() -> None:
    # current = proximal = e^-1, behaviour = e^-2: w = e, ρ = 1, so dL/d logp = −c e A
    one = torch.ones(1, dtype=torch.float64)
    logprobs = (-one).requires_grad_()
    keep, length = one.bool(), torch.ones(1, dtype=torch.int64)
    # proximal and behaviour share the graph of logprobs here: if they were not cut, the gradient would be 0 or doubled
    constants = (logprobs, 2 * logprobs, 3 * one, one, keep, keep, one)
    loss, _ = policy_loss(logprobs, *constants, lengths=length, objective=Objective(**SETTINGS))
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-3 * math.e, rel=1e-12)


@pytest.mark.parametrize("field", ["proximal", "behaviour", "advantages"])
def test_constants_get_no_gradient(field: str) -> None:
    # for the proximal a leaf must be looked at: where nothing clips, w ρ = current / behaviour and its gradient cancels
    tokens = two_tokens()
    constant = getattr(tokens, field).clone().requires_grad_()
    loss_of(replace(tokens, **{field: constant}))[0].backward()
    assert constant.grad is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cap", [0.9, 5.0])
def test_gradient_equals_finite_differences(mode: str, cap: float) -> None:
    tokens = random_tokens(60, seed=1)
    changes = {"behaviour_mode": mode, "behaviour_cap": cap}

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return loss_of(replace(tokens, logprobs=logprobs, entropy=entropy), **changes)[0]

    metrics = loss_of(tokens, **changes)[1]
    assert 0 < metrics["clipped"].item() < metrics["active"].item()  # both branches of the clip are tried
    assert torch.autograd.gradcheck(loss, (tokens.logprobs, tokens.entropy), eps=1e-6, atol=1e-7, rtol=1e-6)


# --- policy loss: what is masked cannot hurt --------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["logprobs", "proximal", "behaviour", "advantages", "entropy"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["masks", "weight"])
def test_poison_on_a_token_left_out_changes_nothing(poison: float, field: str, mode: str, way: str) -> None:
    clean = random_tokens(20, seed=2)
    out = torch.zeros(20, dtype=torch.bool)
    out[[0, 7, 19]] = True
    if way == "masks":
        clean = replace(clean, keep_policy=clean.keep_policy & ~out, keep_entropy=clean.keep_entropy & ~out)
    else:
        clean = replace(clean, weights=clean.weights.masked_fill(out, 0.0))
    tensor: Tensor = getattr(clean, field).detach().masked_fill(out, poison)
    poisoned = replace(clean, **{field: tensor.requires_grad_(field in ("logprobs", "entropy"))})

    assert torch.equal(loss_of(poisoned, behaviour_mode=mode)[0], loss_of(clean, behaviour_mode=mode)[0])
    for got, want in zip(gradients(poisoned, behaviour_mode=mode), gradients(clean, behaviour_mode=mode), strict=True):
        assert torch.equal(got, want)
        assert torch.equal(got[out], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("field", ["logprobs", "advantages"])
def test_poison_on_a_token_over_the_cap_changes_nothing_in_mask_mode(poison: float, field: str) -> None:
    clean = two_tokens()
    tensor = getattr(clean, field).detach().clone()
    tensor[0] = poison  # w_0 = 2 > 1
    poisoned = replace(clean, **{field: tensor.requires_grad_(field == "logprobs")})
    assert torch.equal(loss_of(poisoned, behaviour_cap=1.0)[0], loss_of(clean, behaviour_cap=1.0)[0])
    assert gradients(poisoned, behaviour_cap=1.0)[0][0].item() == 0.0


def test_poison_on_a_token_that_is_kept_shows() -> None:
    for field in ("logprobs", "proximal", "behaviour", "advantages", "entropy"):
        tokens = two_tokens()
        tensor = getattr(tokens, field).detach().clone()
        tensor[0] = math.nan
        assert loss_of(replace(tokens, **{field: tensor}))[0].isnan(), field


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gap", [1e4, -1e4, math.inf, -math.inf])
def test_enormous_log_ratios_stay_finite_in_float32(mode: str, gap: float) -> None:
    zeros, ones = torch.zeros(2), torch.ones(2)
    tokens = Tokens(
        logprobs=torch.tensor([gap, 0.0]).requires_grad_(),
        proximal=zeros,
        behaviour=torch.tensor([0.0, gap]),
        advantages=-ones,
        entropy=ones.clone().requires_grad_(),
        keep_policy=ones.bool(),
        keep_entropy=ones.bool(),
        weights=ones,
    )
    loss, metrics = loss_of(tokens, behaviour_mode=mode)
    assert bool(loss.isfinite())
    assert all(bool(value.isfinite()) for value in metrics.values())
    assert all(bool(g.isfinite().all()) for g in gradients(tokens, behaviour_mode=mode))


def test_entropy_is_not_looked_at_when_its_coefficient_is_zero() -> None:
    tokens = replace(two_tokens(), entropy=torch.full((2,), math.nan, dtype=torch.float64))
    assert loss_of(tokens, entropy_coef=0.0)[0].item() == pytest.approx(-0.34, rel=1e-12)


def test_behaviour_is_not_looked_at_by_the_loss_when_off() -> None:
    tokens = two_tokens()
    blind = replace(tokens, behaviour=torch.full((2,), math.nan, dtype=torch.float64))
    assert torch.equal(loss_of(blind, behaviour_mode="none")[0], loss_of(tokens, behaviour_mode="none")[0])


def test_everything_masked_gives_loss_and_gradient_zero() -> None:
    tokens = replace(random_tokens(5, seed=3), keep_policy=torch.zeros(5).bool(), keep_entropy=torch.zeros(5).bool())
    assert loss_of(tokens)[0].item() == 0.0
    assert all(torch.equal(g, torch.zeros(5, dtype=torch.float64)) for g in gradients(tokens))


def test_an_empty_micro_batch_gives_zero_with_a_gradient() -> None:
    tokens = random_tokens(4, seed=3)[0:0]
    loss, metrics = loss_of(tokens)
    loss.backward()
    assert loss.item() == 0.0
    assert all(value.item() == 0.0 for value in metrics.values())


# --- policy loss: any cut of the batch --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_loss_gradient_and_metrics_add_up_over_micro_batches(mode: str) -> None:
    tokens = random_tokens(101, seed=4)
    whole, metrics = loss_of(tokens, behaviour_mode=mode, behaviour_cap=1.5)
    by_whole = torch.autograd.grad(whole, (tokens.logprobs, tokens.entropy))
    assert metrics["capped"].item() > 0 or mode == "none"

    parts = [loss_of(tokens[cut], behaviour_mode=mode, behaviour_cap=1.5) for cut in (slice(0, 37), slice(37, 101))]
    total = parts[0][0] + parts[1][0]
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    by_parts = torch.autograd.grad(total, (tokens.logprobs, tokens.entropy))
    for got, want in zip(by_parts, by_whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for name, value in metrics.items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value, rtol=1e-12, atol=1e-12)


def test_order_of_tokens_does_not_matter() -> None:
    tokens = random_tokens(30, seed=5)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    shuffled = Tokens(*(tensor[order] for tensor in tokens.args()))
    torch.testing.assert_close(loss_of(shuffled)[0], loss_of(tokens)[0], rtol=1e-12, atol=1e-12)


def test_wrong_policy_loss_arguments_say_what_was_expected_and_what_came() -> None:
    tokens = two_tokens()
    with pytest.raises(ValueError, match=r"entropy: expected shape \[2\], got \[3\]"):
        loss_of(replace(tokens, entropy=torch.zeros(3)))
    with pytest.raises(TypeError, match=r"keep_policy: expected bool, got float32"):
        loss_of(replace(tokens, keep_policy=torch.ones(2)))
    with pytest.raises(TypeError, match=r"logprobs: expected float32 or float64, got bfloat16"):
        loss_of(replace(tokens, logprobs=tokens.logprobs.bfloat16()))
    objective = Objective(kl_coef=0.1)
    with pytest.raises(ValueError, match=r"reference_logprobs: expected a tensor \[t\], .* kl_coef is 0.1, got None"):
        policy_loss(*tokens.args(), lengths=torch.tensor([2]), objective=objective)
    with pytest.raises(ValueError, match=r"reference_logprobs: expected shape \[2\], got \[1\]"):
        policy_loss(*tokens.args(), lengths=torch.tensor([2]), objective=objective, reference_logprobs=torch.zeros(1))
    with pytest.raises(ValueError, match=r"lengths: expected a sum of 2, the number of tokens given, got 3"):
        policy_loss(*tokens.args(), lengths=torch.tensor([1, 2]), objective=objective)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("behaviour_mode", "tis", "'mask', 'clamp', 'none'"),
        ("behaviour_level", "word", "'token', 'sequence'"),
        ("ratio", "gspo", "'token', 'sequence', 'prefix-min'"),
        ("trust", "kl", "'clip', 'divergence'"),
    ],
)
def test_an_unknown_choice_of_the_objective_is_named_with_those_there_are(name: str, value: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected one of {allowed}, got '{value}'"):
        Objective(**{name: value})


@pytest.mark.parametrize("bad", [math.nan, -0.1])
@pytest.mark.parametrize(
    "name", ["clip_low", "clip_high", "dual_clip", "divergence_limit", "behaviour_cap", "entropy_coef", "kl_coef"]
)
def test_a_number_out_of_its_range_is_named(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected a number .* got {bad}"):
        Objective(**{name: bad})


@pytest.mark.parametrize(
    ("name", "bad"), [("clip_low", 1.1), ("dual_clip", 1.0), ("divergence_limit", 0.0), ("behaviour_cap", 0.0)]
)
def test_the_border_of_a_range_is_outside_where_it_means_nothing(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected a number .* got {bad}"):
        Objective(**{name: bad})


# --- value loss -------------------------------------------------------------------------------------------------------


def test_value_loss_and_its_gradient_equal_numbers_worked_by_hand() -> None:
    # .5 · .5 · (1 − 3)² + 2 · .5 · (0 − 1)² = 1 + 1 = 2;  gradient c (V − R): .5 · (−2), 2 · (−1)
    values = torch.tensor([1.0, 0.0], requires_grad=True)
    loss, metrics = value_loss(values, torch.tensor([3.0, 1.0]), torch.tensor([0.5, 2.0]))
    loss.backward()
    assert loss.item() == 2.0
    assert values.grad is not None
    assert values.grad.tolist() == [-1.0, -2.0]
    assert {name: value.item() for name, value in metrics.items()} == {
        "tokens": 2.0,
        "clipped": 0.0,
        "value_sum": 1.0,
        "return_sum": 4.0,
        "return_sq_sum": 10.0,
        "error_sum": 3.0,
        "error_sq_sum": 5.0,
    }


def test_value_clip_takes_the_larger_error() -> None:
    # old = 0, clip = .5.  V = 2, R = 2: clipped .5, error max(0, 1.5²) = 2.25, the clip binds, no gradient
    #                      V = 2, R = −1: clipped .5, error max(9, 2.25) = 9, gradient V − R = 3
    #                      V = .25, R = 1: inside, error .5625, gradient −.75
    values = torch.tensor([2.0, 2.0, 0.25], requires_grad=True)
    targets, ones = torch.tensor([2.0, -1.0, 1.0]), torch.ones(3)
    loss, metrics = value_loss(values, targets, ones, old_values=torch.zeros(3), clip=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (2.25 + 9.0 + 0.5625), rel=1e-6)
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 3.0, -0.75]
    assert metrics["clipped"].item() == 1.0


def test_a_value_clip_that_never_binds_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    values, targets, weights = torch.randn(3, 40, generator=generator, dtype=torch.float64).unbind()
    plain = value_loss(values, targets, weights)[0]
    assert torch.equal(value_loss(values, targets, weights, old_values=values + 0.1, clip=1e3)[0], plain)
    assert torch.equal(value_loss(values, targets, weights, old_values=values + 0.1)[0], plain)


def test_value_loss_gradient_equals_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    values, targets, weights, old = torch.randn(4, 40, generator=generator, dtype=torch.float64).unbind()
    values = values.clone().requires_grad_()
    for clip in (None, 0.5):
        assert torch.autograd.gradcheck(
            lambda v, clip=clip: value_loss(v, targets, weights.abs(), old_values=old, clip=clip)[0], (values,)
        )


def test_value_loss_and_metrics_add_up_over_micro_batches() -> None:
    generator = torch.Generator().manual_seed(2)
    values, targets, weights, old = torch.randn(4, 41, generator=generator, dtype=torch.float64).unbind()

    def part(cut: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return value_loss(values[cut], targets[cut], weights[cut], old_values=old[cut], clip=0.3)

    whole, metrics = part(slice(None))
    (first, first_metrics), (second, second_metrics) = part(slice(0, 13)), part(slice(13, None))
    torch.testing.assert_close(first + second, whole, rtol=1e-12, atol=1e-12)
    for name, value in metrics.items():
        torch.testing.assert_close(first_metrics[name] + second_metrics[name], value, rtol=1e-12, atol=1e-12)


def test_summed_value_metrics_give_the_explained_variance() -> None:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(500, generator=generator)
    values = 0.5 * targets + 0.1 * torch.randn(500, generator=generator) + 3.0
    sums = {name: value.item() for name, value in value_loss(values, targets, torch.ones(500))[1].items()}
    n = sums["tokens"]
    error_var = sums["error_sq_sum"] / n - (sums["error_sum"] / n) ** 2
    return_var = sums["return_sq_sum"] / n - (sums["return_sum"] / n) ** 2
    assert 1 - error_var / return_var == pytest.approx(explained_variance(values, targets), rel=1e-9)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_value_of_weight_zero_cannot_poison_the_loss(poison: float) -> None:
    values = torch.tensor([1.0, poison], requires_grad=True)
    weights = torch.tensor([1.0, 0.0])
    bad = torch.tensor([3.0, poison])
    loss = value_loss(values, bad, weights, old_values=bad, clip=10.0)[0]
    loss.backward()
    assert loss.item() == 2.0
    assert values.grad is not None
    assert values.grad.tolist() == [-2.0, 0.0]


def test_returns_and_old_values_get_no_gradient() -> None:
    values, targets, old = (torch.ones(2, requires_grad=True) for _ in range(3))
    value_loss(values, targets * 2, torch.ones(2), old_values=old * 1, clip=0.1)[0].backward()
    assert targets.grad is None
    assert old.grad is None


def test_wrong_value_loss_arguments_say_what_was_expected_and_what_came() -> None:
    two = torch.zeros(2)
    with pytest.raises(ValueError, match=r"returns: expected shape \[2\], got \[3\]"):
        value_loss(two, torch.zeros(3), two)
    with pytest.raises(ValueError, match=r"old_values: expected a tensor \[t\], because clip is 0.2, got None"):
        value_loss(two, two, two, clip=0.2)
    with pytest.raises(ValueError, match=r"clip: expected a number above 0 or None, got 0.0"):
        value_loss(two, two, two, old_values=two, clip=0.0)


# --- token weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "constant", "expected"),
    [
        ("seq-mean-token-mean", None, [0.5, 0.125, 0.125, 0.125, 0.125]),  # 1/(2·1), 1/(2·4)
        ("token-mean", None, [0.2] * 5),
        ("seq-mean-token-sum", None, [0.5] * 5),
        ("constant", 8.0, [0.125] * 5),
    ],
)
def test_token_weights_equal_numbers_worked_by_hand(how: str, constant: float | None, expected: list[float]) -> None:
    weights = token_weights(torch.tensor([1, 4]), how, constant=constant)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("how", ["seq-mean-token-mean", "token-mean"])
def test_means_have_weights_that_sum_to_one(how: str) -> None:
    lengths = torch.tensor([1, 8192, 17, 300])
    assert token_weights(lengths, how).double().sum().item() == pytest.approx(1.0, rel=1e-6)


def test_one_response_of_one_token_weighs_one_in_every_mean() -> None:
    for how in ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum"):
        assert token_weights(torch.tensor([1]), how).tolist() == [1.0]


def test_no_response_gives_no_weights() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for how in ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum"):
        assert token_weights(none, how).shape == (0,)


def test_wrong_token_weight_arguments_say_what_was_expected_and_what_came() -> None:
    lengths = torch.tensor([1, 4])
    with pytest.raises(ValueError, match=r"how: expected one of 'seq-mean-token-mean', .* got 'mean'"):
        token_weights(lengths, "mean")
    for constant in (None, 0.0):
        with pytest.raises(ValueError, match=rf"constant: expected a number above 0, .* got {constant}"):
            token_weights(lengths, "constant", constant=constant)
    with pytest.raises(ValueError, match=r"lengths: expected every response to have at least 1 token, got 0"):
        token_weights(torch.tensor([1, 0]), "token-mean")


# --- explained variance -----------------------------------------------------------------------------------------------


def test_explained_variance_equals_numbers_worked_by_hand() -> None:
    # R = 0, 2, 4: Var 8/3.  R − V = −1, 1, 0 + shift: Var 2/3.  1 − (2/3)/(8/3) = .75
    targets = torch.tensor([0.0, 2.0, 4.0])
    assert explained_variance(torch.tensor([1.0, 1.0, 4.0]), targets) == pytest.approx(0.75, rel=1e-12)
    assert explained_variance(torch.tensor([6.0, 6.0, 9.0]), targets) == pytest.approx(0.75, rel=1e-12)


def test_explained_variance_is_one_for_perfect_zero_for_constant_negative_for_wrong_values() -> None:
    targets = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert explained_variance(targets, targets) == 1.0
    assert explained_variance(torch.full((4,), 0.3), targets) == pytest.approx(0.0, abs=1e-12)
    assert explained_variance(1 - targets, targets) == pytest.approx(-3.0, rel=1e-12)


def test_explained_variance_of_equal_returns_is_nan() -> None:
    assert math.isnan(explained_variance(torch.randn(5), torch.full((5,), 0.1)))
    assert math.isnan(explained_variance(torch.zeros(0), torch.zeros(0)))


# --- the parts together -----------------------------------------------------------------------------------------------


def test_a_critic_at_its_returns_has_no_loss_and_explains_everything() -> None:
    lengths = torch.tensor([3, 5])
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = returns(rewards, lengths, gamma=0.9)
    weights = token_weights(lengths, "seq-mean-token-mean").double()
    assert value_loss(targets, targets, weights)[0].item() == 0.0
    assert explained_variance(targets, targets) == 1.0
