"""Every switch of the policy loss: numbers worked by hand, limits that must coincide, a reference in plain loops that
finite differences are taken of, poison, and independence of micro-batches and of the order of responses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyncppo.algorithm import Objective, interpolated_proximal, policy_loss

pytestmark = pytest.mark.unit

MODES = ["mask", "clamp", "none"]
FORMS = list(product(["token", "sequence", "prefix-min"], ["clip", "divergence"]))
# every value of every switch, once at least
VARIANTS: list[dict[str, Any]] = [
    *({"ratio": ratio, "trust": trust, "divergence_limit": 0.05} for ratio, trust in FORMS),
    {"dual_clip": 1.5},
    {"behaviour_level": "sequence", "behaviour_cap": 1.5},
    {"behaviour_level": "sequence", "behaviour_cap": 1.5, "behaviour_mode": "clamp"},
    {"behaviour_mode": "none", "trust": "divergence", "divergence_limit": 0.05},
    {"kl_coef": 0.3, "entropy_coef": 0.1},
    {"ratio": "sequence", "behaviour_level": "sequence", "dual_clip": 1.2, "kl_coef": 0.1},
]


@dataclass(frozen=True)
class Batch:
    """The tensor arguments of `policy_loss`, in its order, with the lengths of whole responses."""

    logprobs: Tensor
    proximal: Tensor
    behaviour: Tensor
    advantages: Tensor
    entropy: Tensor
    keep_policy: Tensor
    keep_entropy: Tensor
    weights: Tensor
    reference: Tensor
    lengths: Tensor

    def fields(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())[:-1]

    def take(self, responses: list[int]) -> Batch:
        """These responses, in this order."""
        index = self.tokens(responses)
        return Batch(*(tensor[index] for tensor in self.fields()), lengths=self.lengths[responses])

    def tokens(self, responses: list[int]) -> Tensor:
        ends = [0, *self.lengths.cumsum(0).tolist()]
        ranges = [torch.arange(start, end) for start, end in pairwise(ends)]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *(ranges[n] for n in responses)])


def wide(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch_of(
    ratios: list[float],
    advantages: list[float],
    *,
    lengths: list[int] | None = None,
    proximal: list[float] | None = None,
    behaviour_weights: list[float] | None = None,
    reference_ratios: list[float] | None = None,
) -> Batch:
    """One response, unless lengths are given, with these ρ, A, π_proximal, w and π_reference / π_current; c = 1."""
    ones = torch.ones(len(ratios), dtype=torch.float64)
    log_proximal = wide(proximal).log() if proximal else -4 * ones
    logprobs = log_proximal + wide(ratios).log()
    return Batch(
        logprobs=logprobs.requires_grad_(),
        proximal=log_proximal,
        behaviour=log_proximal - (wide(behaviour_weights).log() if behaviour_weights else 0.0),
        advantages=wide(advantages),
        entropy=ones,
        keep_policy=ones.bool(),
        keep_entropy=ones.bool(),
        weights=ones,
        reference=logprobs.detach() + (wide(reference_ratios).log() if reference_ratios else 0.0),
        lengths=torch.tensor(lengths or [len(ratios)]),
    )


def random_batch(lengths: list[int], seed: int, *, spread: float = 0.5) -> Batch:
    """Log-ratios wide enough that clips, caps and limits bind for some tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal() -> Tensor:
        return torch.randn(tokens, generator=generator, dtype=torch.float64)

    proximal = -normal().abs() - 0.7
    return Batch(
        logprobs=(proximal + spread * normal()).requires_grad_(),
        proximal=proximal,
        behaviour=proximal + spread * normal(),
        advantages=normal(),
        entropy=normal().abs(),
        keep_policy=normal() > -0.8,
        keep_entropy=normal() < 0.8,
        weights=torch.where(normal() > -1.5, normal().abs(), 0.0),
        reference=proximal + spread * normal(),
        lengths=torch.tensor(lengths, dtype=torch.int64),
    )


def loss_of(batch: Batch, **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
    *args, reference = batch.fields()
    objective = Objective(**({"clip_high": 0.28} | changes))
    return policy_loss(*args, lengths=batch.lengths, objective=objective, reference_logprobs=reference)


def gradient(batch: Batch, **changes: Any) -> Tensor:
    return torch.autograd.grad(loss_of(batch, **changes)[0], batch.logprobs)[0]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


# --- numbers worked by hand -------------------------------------------------------------------------------------------


def test_sequence_ratio_equals_numbers_worked_by_hand() -> None:
    # ρ = 8, 1, 1: s = 8^(1/3) = 2.  A = 1, −1, 1: min(2, 1.28) + min(−2, −1.28) + 1.28 = 1.28 − 2 + 1.28 = .56
    # gradient of J: clipped 0; s A = −2; clipped 0
    batch = batch_of([8, 1, 1], [1, -1, 1])
    loss, metrics = loss_of(batch, ratio="sequence")
    assert loss.item() == pytest.approx(-0.56, rel=1e-12)
    assert metrics["clipped"].item() == 2
    close(gradient(batch, ratio="sequence"), wide([0, 2, 0]))


def test_sequence_ratio_does_not_cross_responses() -> None:
    # s = (4 · 1)^(1/2) = 2 and .25^1 = .25.  A = −1: −2 − 2, and min(−.25, −.8) = −.8
    assert loss_of(batch_of([4, 1, 0.25], [-1, -1, -1], lengths=[2, 1]), ratio="sequence")[0].item() == pytest.approx(
        4.8, rel=1e-12
    )


def test_minimum_prefix_ratio_equals_numbers_worked_by_hand() -> None:
    # ρ = .5, 2, 1.5, 1: m = 1 (empty), .5, .5, .5; m ρ = .5, 1, .75, .5; clipped to .8, 1, .8, .8
    # A = 1, −1, 1, −1: .8 − 1 + .8 − .8 = −.2; the clip is soft, so the gradient of J is clip(m ρ) A everywhere
    batch = batch_of([0.5, 2, 1.5, 1], [1, -1, 1, -1])
    loss, metrics = loss_of(batch, ratio="prefix-min")
    assert loss.item() == pytest.approx(0.2, rel=1e-12)
    assert metrics["clipped"].item() == 3
    close(gradient(batch, ratio="prefix-min"), -wide([0.8, -1, 0.8, -0.8]))


def test_minimum_prefix_ratio_looks_back_over_its_own_response_only() -> None:
    # ρ = .9 | 1.2, 1.1, 1.05: m = 1 | 1, 1.2, 1.1; m ρ = .9 | 1.2, 1.32 -> 1.28, 1.155
    loss = loss_of(batch_of([0.9, 1.2, 1.1, 1.05], [1, 1, 1, 1], lengths=[1, 3]), ratio="prefix-min")[0]
    assert loss.item() == pytest.approx(-(0.9 + 1.2 + 1.28 + 1.155), rel=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 17])
def test_minimum_prefix_ratio_is_the_minimum_of_all_before_at_any_length(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    ratios = (0.02 * torch.randn(length, generator=generator, dtype=torch.float64)).exp().tolist()
    batch = batch_of([0.5, *ratios, 2.0], [0, *[1.0] * length, 0], lengths=[1, length, 1])
    expected = sum(rho * min(ratios[:t], default=1.0) for t, rho in enumerate(ratios))
    assert loss_of(batch, ratio="prefix-min")[0].item() == pytest.approx(-expected, rel=1e-12)


def test_divergence_equals_numbers_worked_by_hand() -> None:
    # π = .5, .25, .6, .02, .5 and π_behaviour = .25, .5, .5, .01, .25, limit .2; A = 1, −1, 1, 1, −1:
    #   +.25 and A > 0: out;  −.25 and A < 0: out;  +.1: 1.2;  +.01: 2, which a clip would cut;
    #   +.25 but A < 0 pulls back: −2
    mu = [0.25, 0.5, 0.5, 0.01, 0.25]
    batch = batch_of([2, 0.5, 1.2, 2, 2], [1, -1, 1, 1, -1], proximal=mu)
    changes = {"trust": "divergence", "divergence_limit": 0.2}
    loss, metrics = loss_of(batch, **changes)
    assert loss.item() == pytest.approx(-(1.2 + 2 - 2), rel=1e-12)
    assert (metrics["divergence_masked"].item(), metrics["clipped"].item(), metrics["active"].item()) == (2, 0, 5)
    close(gradient(batch, **changes), -wide([0, 0, 1.2, 2, -2]))


def test_a_token_over_the_cap_is_not_counted_as_beyond_the_divergence() -> None:
    batch = batch_of([2, 2], [1, 1], proximal=[0.25, 0.25], behaviour_weights=[9, 1])
    metrics = loss_of(batch, trust="divergence", divergence_limit=0.2)[1]
    assert (metrics["capped"].item(), metrics["active"].item(), metrics["divergence_masked"].item()) == (1, 1, 1)


@pytest.mark.parametrize("ratio", ["token", "sequence", "prefix-min"])
def test_an_infinite_advantage_beyond_the_divergence_changes_nothing(ratio: str) -> None:
    batch = batch_of([2, 1], [math.inf, 1], proximal=[0.25, 0.25])
    changes = {"ratio": ratio, "trust": "divergence", "divergence_limit": 0.2}
    finite = replace(batch, advantages=wide([1, 1]))
    assert torch.equal(loss_of(batch, **changes)[0], loss_of(finite, **changes)[0])
    assert torch.equal(gradient(batch, **changes), gradient(finite, **changes))


def test_a_divergence_equal_to_the_limit_is_not_over_it() -> None:
    batch = batch_of([2, 0.5], [1, -1], proximal=[0.5, 1.0])  # to 1 from .5 and to .5 from 1
    assert loss_of(batch, trust="divergence", divergence_limit=0.5)[1]["divergence_masked"].item() == 0
    assert loss_of(batch, trust="divergence", divergence_limit=0.499)[1]["divergence_masked"].item() == 2


@pytest.mark.parametrize(("mode", "masked"), [("mask", 1), ("clamp", 1), ("none", 0)])
def test_divergence_is_from_the_policy_that_the_ratio_is_weighed_to(mode: str, masked: int) -> None:
    # π = .5, proximal .4, behaviour .2: .3 from the behaviour, .1 from the proximal
    batch = batch_of([1.25], [1], proximal=[0.4], behaviour_weights=[2])
    changes = {"trust": "divergence", "divergence_limit": 0.2, "behaviour_mode": mode}
    assert loss_of(batch, **changes)[1]["divergence_masked"].item() == masked


def test_dual_clip_bounds_the_objective_of_negative_advantages_only() -> None:
    # A = −1: ρ = 4: max(−4, −3) = −3, no gradient; ρ = 2: −2; ρ = .5: min(−.5, −.8) = −.8, clipped;
    # A = 1: ρ = 4: 1.28, clipped
    batch = batch_of([4, 2, 0.5, 4], [-1, -1, -1, 1])
    loss, metrics = loss_of(batch, dual_clip=3.0)
    assert loss.item() == pytest.approx(3 + 2 + 0.8 - 1.28, rel=1e-12)
    assert (metrics["dual_clipped"].item(), metrics["clipped"].item()) == (1, 2)
    close(gradient(batch, dual_clip=3.0), wide([0, 2, 0, 0]))


@pytest.mark.parametrize(
    ("mode", "loss", "capped", "active"),
    [
        ("mask", -0.5, 2, 1),  # the first response is out whole: .5 · 1
        ("clamp", -6.5, 2, 3),  # 3 · (1 + 1) + .5
        ("none", -3.0, 0, 3),
    ],
)
def test_behaviour_weight_of_whole_responses_equals_numbers_worked_by_hand(
    mode: str, loss: float, capped: int, active: int
) -> None:
    # token weights 8, .5 | .5: the responses' are 4 and .5, at a cap of 3
    batch = batch_of([1, 1, 1], [1, 1, 1], lengths=[2, 1], behaviour_weights=[8, 0.5, 0.5])
    got, metrics = loss_of(batch, behaviour_level="sequence", behaviour_cap=3.0, behaviour_mode=mode)
    assert got.item() == pytest.approx(loss, rel=1e-12)
    assert (metrics["capped"].item(), metrics["active"].item()) == (capped, active)
    # before the cap, in every mode: 2 · (4 − 1)² + (.5 − 1)²
    assert metrics["chi2_sum"].item() == pytest.approx(18.25, rel=1e-12)


def test_kl_to_the_reference_equals_numbers_worked_by_hand() -> None:
    # x = 2 and .5, c = 1 and 3, A = 0: k3 = 1 − ln 2 and −.5 + ln 2; dL/d logp = coef · c (1 − x) = coef (−1, 1.5)
    batch = replace(batch_of([1, 1], [0, 0], reference_ratios=[2, 0.5]), weights=wide([1, 3]))
    loss, metrics = loss_of(batch, kl_coef=0.1)
    assert loss.item() == pytest.approx(0.1 * ((1 - math.log(2)) + 3 * (-0.5 + math.log(2))), rel=1e-12)
    assert metrics["kl_reference_sum"].item() == pytest.approx(0.5, rel=1e-12)
    assert metrics["policy_loss"].item() == 0
    close(gradient(batch, kl_coef=0.1), wide([-0.1, 0.15]))


def test_the_kl_term_is_on_every_weighted_token_whatever_the_masks() -> None:
    batch = batch_of([1, 1, 1], [1, 1, 1], behaviour_weights=[9, 1, 1], reference_ratios=[2, 2, 2])
    batch = replace(batch, keep_policy=torch.tensor([True, False, False]), weights=wide([1, 1, 0]))
    loss, metrics = loss_of(batch, kl_coef=1.0)
    assert loss.item() == pytest.approx(2 * (1 - math.log(2)), rel=1e-12)
    assert metrics["kl_reference_sum"].item() == pytest.approx(3 * (1 - math.log(2)), rel=1e-12)  # of all tokens


def test_chi2_is_of_kept_tokens_before_the_cap() -> None:
    batch = batch_of([1, 1, 1, 1], [1, 1, 1, 1], behaviour_weights=[9, 0.5, 2, 2])
    batch = replace(batch, keep_policy=torch.tensor([True, True, False, True]), weights=wide([1, 1, 1, 0]))
    for mode in MODES:
        assert loss_of(batch, behaviour_mode=mode)[1]["chi2_sum"].item() == pytest.approx(64.25, rel=1e-12)


# --- limits that must coincide ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS[:6])
def test_one_pass_on_the_policy_that_drew_gives_the_plain_policy_gradient(changes: dict[str, Any]) -> None:
    batch = random_batch([3, 5, 1], seed=0)
    same = batch.logprobs.detach().clone()
    batch = replace(batch, proximal=same, behaviour=same)
    loss, metrics = loss_of(batch, **changes)
    chosen = torch.where(batch.keep_policy, batch.weights * batch.advantages, 0.0)
    close(loss.detach(), -chosen.sum())
    close(gradient(batch, **changes), -chosen)
    assert all(metrics[name].item() == 0 for name in ("clipped", "divergence_masked", "capped", "chi2_sum"))


@pytest.mark.parametrize("changes", VARIANTS)
def test_proximal_equal_to_behaviour_is_the_loss_without_a_behaviour_weight(changes: dict[str, Any]) -> None:
    batch = random_batch([3, 5, 1], seed=1)
    batch = replace(batch, behaviour=batch.proximal)
    assert torch.equal(loss_of(batch, **changes)[0], loss_of(batch, **(changes | {"behaviour_mode": "none"}))[0])


@pytest.mark.parametrize(
    "changes", [{"ratio": "sequence"}, {"behaviour_level": "sequence"}, {"ratio": "prefix-min", "trust": "divergence"}]
)
def test_responses_of_one_token_know_no_sequence(changes: dict[str, Any]) -> None:
    batch = random_batch([1] * 30, seed=2)
    plain = {name: value for name, value in changes.items() if name == "trust"}
    assert torch.equal(loss_of(batch, **changes)[0], loss_of(batch, **plain)[0])
    close(gradient(batch, **changes), gradient(batch, **plain))


def test_minimum_prefix_ratio_of_one_token_is_the_token_ratio_inside_the_clip() -> None:
    batch = random_batch([1] * 30, seed=3, spread=0.05)
    changes = {"clip_low": 0.9, "clip_high": 9.0}
    close(loss_of(batch, ratio="prefix-min", **changes)[0], loss_of(batch, **changes)[0])
    close(gradient(batch, ratio="prefix-min", **changes), gradient(batch, **changes))


@pytest.mark.parametrize("ratio", ["token", "sequence", "prefix-min"])
def test_a_dual_clip_that_never_binds_changes_nothing(ratio: str) -> None:
    batch = random_batch([7, 4, 9], seed=4)
    assert torch.equal(loss_of(batch, ratio=ratio, dual_clip=1e9)[0], loss_of(batch, ratio=ratio)[0])


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_divergence_limit_of_one_never_binds_and_is_the_loss_without_a_clip(ratio: str) -> None:
    batch = random_batch([7, 4, 9], seed=5)
    loss, metrics = loss_of(batch, ratio=ratio, trust="divergence", divergence_limit=1.0)
    assert metrics["divergence_masked"].item() == 0
    unclipped = {"clip_low": 1.0, "clip_high": math.inf}
    close(loss, loss_of(batch, ratio=ratio, **unclipped)[0])


def test_a_reference_equal_to_the_current_policy_gives_no_loss_and_no_gradient() -> None:
    batch = replace(random_batch([7, 4], seed=6), advantages=torch.zeros(11, dtype=torch.float64))
    batch = replace(batch, reference=batch.logprobs.detach().clone())
    assert loss_of(batch, kl_coef=5.0)[0].item() == 0
    assert torch.equal(gradient(batch, kl_coef=5.0), torch.zeros(11, dtype=torch.float64))


def test_without_a_coefficient_the_reference_only_feeds_its_metric() -> None:
    batch = random_batch([7, 4], seed=7)
    blind = replace(batch, reference=torch.full((11,), math.nan, dtype=torch.float64))
    loss, metrics = loss_of(blind)
    assert torch.equal(loss, loss_of(batch)[0])
    assert metrics["kl_reference_sum"].isnan()
    *args, _ = batch.fields()
    none = policy_loss(*args, lengths=batch.lengths, objective=Objective())[1]
    assert none["kl_reference_sum"].item() == 0


def test_with_one_advantage_per_response_the_token_form_is_gspo() -> None:
    # GSPO: J = mean over n of min(s A, clip(s) A) with s differentiated as it stands
    lengths = [4, 1, 6, 3]
    batch = random_batch(lengths, seed=8, spread=0.4)
    per_response = wide([1.0, -1.0, -0.5, 2.0])
    repeated = torch.tensor(lengths)
    batch = replace(
        batch,
        behaviour=batch.proximal,
        keep_policy=torch.ones(14).bool(),
        advantages=per_response.repeat_interleave(repeated),
        weights=(1.0 / (4 * repeated.double())).repeat_interleave(repeated),
    )
    log_ratios = (batch.logprobs - batch.proximal).split(lengths)
    s = torch.stack([part.mean() for part in log_ratios]).exp()
    clipped = s.clamp(0.8, 1.28)
    assert 0 < int((s != clipped).sum()) < 4
    gspo = -torch.minimum(s * per_response, clipped * per_response).mean()
    close(loss_of(batch, ratio="sequence")[0], gspo)
    close(gradient(batch, ratio="sequence"), torch.autograd.grad(gspo, batch.logprobs)[0])


# --- against plain loops, and finite differences of them --------------------------------------------------------------


def plain(batch: Batch, at: Tensor, objective: Objective) -> float:
    """The objective as its docstring has it, one token after the other. What carries a stop-gradient, and every choice
    of a branch, is taken at the batch's own log-probs; the rest at `at`: so differences of this in `at` are the
    gradient."""
    here, there = batch.logprobs.tolist(), at.tolist()
    prox, behaviour, reference = batch.proximal.tolist(), batch.behaviour.tolist(), batch.reference.tolist()
    advantages, weights, keep = batch.advantages.tolist(), batch.weights.tolist(), batch.keep_policy.tolist()
    total, start = 0.0, 0
    for length in batch.lengths.tolist():
        members = [t for t in range(start, start + length) if weights[t] != 0]
        start += length
        rho = {t: math.exp(here[t] - prox[t]) for t in members}
        of_response = math.prod(math.exp(prox[t] - behaviour[t]) for t in members)
        for place, t in enumerate(members):
            if objective.kl_coef:
                x = math.exp(reference[t] - there[t])
                total += weights[t] * objective.kl_coef * (x - 1 - math.log(x))
            w = of_response if objective.behaviour_level == "sequence" else math.exp(prox[t] - behaviour[t])
            if objective.behaviour_mode == "none":
                w = 1.0
            over = w > objective.behaviour_cap
            if not keep[t] or (over and objective.behaviour_mode == "mask"):
                continue
            w, a = min(w, objective.behaviour_cap), advantages[t]
            moved = math.exp(there[t] - here[t])
            if objective.ratio == "token":
                value = rho[t]
            elif objective.ratio == "sequence":
                value = math.prod(rho.values()) ** (1 / len(members))
            else:
                value = rho[t] * min((rho[i] for i in members[:place]), default=1.0)
            low, high = 1 - objective.clip_low, 1 + objective.clip_high
            if objective.trust == "divergence":
                anchor = prox[t] if objective.behaviour_mode == "none" else behaviour[t]
                shift = math.exp(here[t]) - math.exp(anchor)
                gone = abs(shift) > objective.divergence_limit and shift * a > 0
                term, moves = (0.0, False) if gone else (value * a, True)
            elif objective.ratio == "prefix-min":
                term, moves = min(max(value, low), high) * a, True
            elif min(max(value, low), high) * a < value * a:
                term, moves = min(max(value, low), high) * a, False
            else:
                term, moves = value * a, True
            if objective.dual_clip is not None and a < 0 and term < objective.dual_clip * a:
                term, moves = objective.dual_clip * a, False
            total -= weights[t] * w * term * (moved if moves else 1.0)
    return total


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dual_clip", [None, 1.03])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ratio", "trust"), FORMS)
def test_loss_and_gradient_equal_plain_loops_and_their_finite_differences(
    ratio: str, trust: str, mode: str, dual_clip: float | None, level: str
) -> None:
    batch = random_batch([9, 1, 14, 6, 2], seed=18, spread=0.15)
    changes: dict[str, Any] = {
        "ratio": ratio,
        "trust": trust,
        "divergence_limit": 0.05,
        "behaviour_mode": mode,
        "behaviour_cap": 1.3,
        "behaviour_level": level,
        "dual_clip": dual_clip,
        "clip_high": 0.06,
        "clip_low": 0.06,
        "kl_coef": 0.2,
    }
    objective = Objective(**changes)
    loss, metrics = loss_of(batch, **changes)
    binds = "divergence_masked" if trust == "divergence" else "clipped"
    assert 0 < metrics[binds].item() < metrics["active"].item()  # both branches are tried
    assert (metrics["capped"].item() > 0) == (mode != "none")
    assert (metrics["dual_clipped"].item() > 0) == (dual_clip is not None)
    here = batch.logprobs.detach()
    assert loss.item() == pytest.approx(plain(batch, here, objective), rel=1e-11)
    step, numeric = 1e-6, torch.zeros_like(here)
    for t in range(here.numel()):
        shift = torch.zeros_like(here)
        shift[t] = step
        numeric[t] = (plain(batch, here + shift, objective) - plain(batch, here - shift, objective)) / (2 * step)
    torch.testing.assert_close(gradient(batch, **changes), numeric, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("changes", [{"kl_coef": 0.4, "dual_clip": 1.2}, {"trust": "divergence", "kl_coef": 0.4}])
def test_forms_without_a_stop_gradient_pass_gradcheck(changes: dict[str, Any]) -> None:
    batch = random_batch([12, 8], seed=10)
    assert torch.autograd.gradcheck(
        lambda logprobs: loss_of(replace(batch, logprobs=logprobs), **changes)[0], (batch.logprobs,)
    )


# --- what is left out cannot hurt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("which", ["some tokens", "a whole response"])
def test_poison_on_a_token_of_weight_zero_changes_nothing(poison: float, changes: dict[str, Any], which: str) -> None:
    clean = random_batch([4, 3, 5], seed=11)
    out = torch.zeros(12, dtype=torch.bool)
    out[[0, 2, 5] if which == "some tokens" else [4, 5, 6]] = True
    clean = replace(clean, weights=clean.weights.masked_fill(out, 0.0))
    fields = {"proximal": clean.proximal, "behaviour": clean.behaviour, "reference": clean.reference}
    fields |= {"advantages": clean.advantages, "entropy": clean.entropy, "logprobs": clean.logprobs.detach()}
    for name, tensor in fields.items():
        poisoned = replace(clean, **{name: tensor.masked_fill(out, poison).requires_grad_(name == "logprobs")})
        assert torch.equal(loss_of(poisoned, **changes)[0], loss_of(clean, **changes)[0]), name
        assert torch.equal(gradient(poisoned, **changes), gradient(clean, **changes)), name


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("ratio", "trust"), FORMS)
def test_poison_on_masked_advantages_changes_nothing(poison: float, ratio: str, trust: str) -> None:
    clean = random_batch([4, 3, 5], seed=12)
    poisoned = replace(clean, advantages=clean.advantages.masked_fill(~clean.keep_policy, poison))
    changes = {"ratio": ratio, "trust": trust, "dual_clip": 1.2}
    assert torch.equal(loss_of(poisoned, **changes)[0], loss_of(clean, **changes)[0])
    assert torch.equal(gradient(poisoned, **changes), gradient(clean, **changes))


def test_a_token_of_weight_zero_is_no_part_of_its_response() -> None:
    # without the middle token s = (4 · 1)^(1/2) = 2, m of the last = 4, the product of w = 2 · .25 = .5
    batch = batch_of([4, 0.01, 1], [-1, -1, -1], behaviour_weights=[2, 50, 0.25])
    batch = replace(batch, weights=wide([1, 0, 1]))
    assert loss_of(batch, ratio="sequence", behaviour_mode="none")[0].item() == pytest.approx(4, rel=1e-12)
    # clip(1 · 4) = 1.28 and clip(4 · 1) = 1.28
    assert loss_of(batch, ratio="prefix-min", behaviour_mode="none")[0].item() == pytest.approx(2.56, rel=1e-12)
    # .5 · (4 + 1)
    assert loss_of(batch, behaviour_level="sequence")[0].item() == pytest.approx(2.5, rel=1e-12)


def test_a_masked_token_of_some_weight_is_a_part_of_its_response() -> None:
    # s = (8 · 1)^(1/2) = 2.83; m = 8 -> 1.28; the product of w = 3: only the second token is in the policy term
    batch = batch_of([8, 1], [-1, -1], behaviour_weights=[3, 1])
    batch = replace(batch, keep_policy=torch.tensor([False, True]))
    assert loss_of(batch, ratio="sequence")[0].item() == pytest.approx(math.sqrt(8), rel=1e-12)
    assert loss_of(batch, ratio="prefix-min")[0].item() == pytest.approx(1.28, rel=1e-12)
    assert loss_of(batch, behaviour_level="sequence")[0].item() == pytest.approx(3, rel=1e-12)
    nan = replace(batch, logprobs=wide([math.nan, -4.0]).requires_grad_())
    assert loss_of(nan, ratio="sequence")[0].isnan()
    assert loss_of(nan, ratio="prefix-min")[0].isnan()
    assert not loss_of(nan)[0].isnan()


def test_a_masked_nan_shows_only_in_the_tokens_whose_ratio_it_belongs_to() -> None:
    # after it under "prefix-min", nowhere where all of its response is masked
    batch = batch_of([1, 1, 1], [1, 1, 1], lengths=[2, 1])
    nan = replace(batch, logprobs=wide([-4.0, math.nan, -4.0]).requires_grad_())
    last = replace(nan, keep_policy=torch.tensor([True, False, True]))
    assert loss_of(last, ratio="prefix-min")[0].item() == -2
    assert torch.equal(gradient(last, ratio="prefix-min"), -wide([1, 0, 1]))
    whole = replace(nan, keep_policy=torch.tensor([False, False, True]))
    assert loss_of(whole, ratio="sequence")[0].item() == -1
    assert torch.equal(gradient(whole, ratio="sequence"), -wide([0, 0, 1]))


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("gap", [1e4, -1e4, math.inf, -math.inf])
def test_enormous_log_ratios_stay_finite_in_float32(changes: dict[str, Any], gap: float) -> None:
    batch = random_batch([3, 2], seed=13)
    fields = [tensor.detach().float() if tensor.is_floating_point() else tensor for tensor in batch.fields()]
    batch = replace(Batch(*fields, lengths=batch.lengths), weights=torch.ones(5), keep_policy=torch.ones(5).bool())
    extreme = torch.tensor([gap, 0.0, -gap, 0.0, 0.0])
    for name in ("logprobs", "proximal", "behaviour", "reference"):
        hit = replace(batch, **{name: extreme})
        hit = replace(hit, logprobs=hit.logprobs.clone().requires_grad_())
        loss, metrics = loss_of(hit, **changes)
        assert bool(loss.isfinite()), name
        assert all(bool(value.isfinite()) for value in metrics.values()), name
        assert bool(gradient(hit, **changes).isfinite().all()), name


@pytest.mark.parametrize("changes", VARIANTS)
def test_constants_get_no_gradient(changes: dict[str, Any]) -> None:
    batch = random_batch([3, 2], seed=14)
    for name in ("proximal", "behaviour", "advantages", "reference"):
        constant = getattr(batch, name).clone().requires_grad_()
        loss_of(replace(batch, **{name: constant}), **changes)[0].backward()
        assert constant.grad is None, name


@pytest.mark.parametrize("changes", VARIANTS)
def test_an_empty_micro_batch_gives_zero_with_a_gradient(changes: dict[str, Any]) -> None:
    loss, metrics = loss_of(random_batch([3, 2], seed=15).take([]), **changes)
    loss.backward()
    assert loss.item() == 0
    assert all(value.item() == 0 for value in metrics.values())


# --- any cut of the batch, any order of responses ---------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    seed=st.integers(0, 2**16),
    changes=st.sampled_from(VARIANTS),
    mode=st.sampled_from(MODES),
    data=st.data(),
)
def test_loss_gradient_and_metrics_depend_on_neither_micro_batches_nor_order(
    lengths: list[int], seed: int, changes: dict[str, Any], mode: str, data: st.DataObject
) -> None:
    batch = random_batch(lengths, seed)
    changes = {"behaviour_mode": mode} | changes
    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(0, len(lengths)))
    parts = [loss_of(batch.take(order[:cut]), **changes), loss_of(batch.take(order[cut:]), **changes)]
    whole, metrics = loss_of(batch, **changes)
    total = parts[0][0] + parts[1][0]
    close(total, whole)
    close(torch.autograd.grad(total, batch.logprobs)[0], torch.autograd.grad(whole, batch.logprobs)[0])
    for name, value in metrics.items():
        close(parts[0][1][name] + parts[1][1][name], value)


# --- A-3PO ------------------------------------------------------------------------------------------------------------


def test_interpolated_proximal_equals_numbers_worked_by_hand() -> None:
    # α = 1, 1, 1/2, 1/4 at d = 0, 1, 2, 4:  −2, −2, .5 · −2 + .5 · −1, .25 · −2 + .75 · −1
    staleness = torch.tensor([0, 1, 2, 4])
    current = torch.full((4,), -1.0, requires_grad=True)
    got = interpolated_proximal(torch.full((4,), -2.0), current, staleness)
    assert got.tolist() == [-2.0, -2.0, -1.5, -1.25]
    assert got.dtype == torch.float32
    assert not got.requires_grad


def test_interpolated_proximal_lies_between_and_makes_ratios_powers_of_the_whole_one() -> None:
    behaviour, current = wide([-2.0, -1.0, -3.0]), wide([-1.0, -2.5, -3.0])
    proximal = interpolated_proximal(behaviour, current, torch.full((3,), 5))
    x = (current - behaviour).exp()
    close((current - proximal).exp(), x**0.2)
    close((proximal - behaviour).exp(), x**0.8)


def test_interpolated_proximal_of_a_fresh_token_is_the_behaviour_policy_whatever_the_current_is() -> None:
    behaviour = torch.tensor([-2.0, -0.3])
    got = interpolated_proximal(behaviour, torch.tensor([math.nan, -math.inf]), torch.tensor([0, 1]))
    assert torch.equal(got, behaviour)


def test_wrong_interpolation_arguments_say_what_was_expected_and_what_came() -> None:
    two = torch.zeros(2)
    with pytest.raises(ValueError, match=r"staleness: expected every token's to be >= 0, got -1"):
        interpolated_proximal(two, two, torch.tensor([0, -1]))
    with pytest.raises(TypeError, match=r"staleness: expected int64, got float32"):
        interpolated_proximal(two, two, two)
    with pytest.raises(ValueError, match=r"current_logprobs: expected shape \[2\], got \[1\]"):
        interpolated_proximal(two, torch.zeros(1), torch.tensor([0, 1]))
