"""The policy loss with AsyPPO's masks and all its variants, the critics' loss, and the weights that aggregate tokens.

Losses here are plain weighted sums over whatever tokens are given. The denominators are those of the *global* batch
and sit in `token_weights`, computed once; so the losses (and gradients, and metrics) of micro-batches and ranks add
up to those of the batch, however it is cut. Metrics are detached float64 sums, to be added up the same way and
divided once at the end.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from asyncppo.algorithm._checks import BOOL, FLOAT, check_choice, check_lengths, check_tensor
from asyncppo.algorithm.objective import Objective
from asyncppo.algorithm.ratios import clamp_log, exp_ratio, prefix_minima, response_sums

AGGREGATIONS = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "constant")


class Loss(NamedTuple):
    """What a loss function returns; unpacks as `loss, metrics`."""

    loss: Tensor  # scalar, with gradient: this part of the batch's share of the global loss
    metrics: dict[str, Tensor]  # scalars, float64, detached: sums over the tokens given


def policy_loss(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    entropy: Tensor,
    keep_policy: Tensor,
    keep_entropy: Tensor,
    token_weights: Tensor,
    *,
    lengths: Tensor,
    objective: Objective,
    reference_logprobs: Tensor | None = None,
) -> Loss:
    """The policy's objective with AsyPPO's masks, to be minimised: every variant is a switch of `objective`.

        L = − Σ_t c_t [ I^A_t w_t J_t + entropy_coef I^H_t H_t − kl_coef k3_t ]
        J_t  = min(r_t A_t, clip(r_t, 1 − clip_low, 1 + clip_high) A_t)        decoupled PPO, the default
        w_t  = sg(π_proximal / π_behaviour)    corrects for the policy that drew the token
        k3_t = x − 1 − ln x                    x = π_reference / π_current, with gradient; estimates
                                               KL(current ‖ reference)
        c_t  = token_weights

    **ratio** says what r is, with ρ_t = π_current / π_proximal of the token drawn at t, which carries the gradient:

        "token"       r_t = ρ_t                                               PPO
        "sequence"    r_t = sg(s) ρ_t / sg(ρ_t),   s = (Π_i ρ_i)^(1/n)        GSPO in its token form: r has the value
                                                                              s of the response, t the gradient of ρ_t;
                                                                              with one A per response it is GSPO
        "prefix-min"  r_t = sg(m_t) ρ_t,           m_t = min_{i<t} ρ_i        MinPRO; m = 1 at a response's first token

    MinPRO clips softly: J_t = sg(clip(m_t ρ_t)) A_t ρ_t / sg(ρ_t), whose gradient is that of sg(clip(m_t ρ_t)) A_t
    log π_current: what is clipped weighs less but keeps its gradient. The papers of "sequence" and "prefix-min" know
    two policies only: with proximal = behaviour this is their objective.

    **trust** = "divergence" is DPPO in place of the clip, by the binary total variation |π_current − π_behaviour| of
    the token drawn:

        J_t = 0     where A_t > 0 and π_current − π_behaviour > divergence_limit,
                    or    A_t < 0 and π_behaviour − π_current > divergence_limit
        J_t = r_t A_t   elsewhere: w r = π_current / π_behaviour under "token", as in the paper

    The behaviour policy is what DPPO's authors anchor it to. With behaviour_mode "none", where J is not weighed by w
    and the behaviour log-probs are not to be looked at, the anchor is the proximal policy.

    **dual_clip** = c: where A_t < 0, J_t = max(J_t, c A_t), without gradient where the bound is larger.

    **behaviour_mode** says what becomes of w where it exceeds behaviour_cap:

        "mask"    the token gives nothing to the policy term (it keeps its entropy and KL terms)
        "clamp"   w = cap
        "none"     w = 1 everywhere, behaviour_logprobs only feed kl_behaviour_sum and chi2_sum

    **behaviour_level** = "sequence": w is the product Π_i π_proximal / π_behaviour over the response, the same for all
    its tokens; so the cap takes out, or clamps, whole responses.

    *Which tokens make up a response*, in s (n is their number), m and the product: those with c ≠ 0, also where I^A = 0
    or the cap binds. A token with c = 0 is no part of it, whatever its log-probs are.

    Log-ratios of tokens, and sums of them, are clamped to ±20 before exp; beyond, no gradient. A token that a mask,
    the cap, the divergence or a zero weight takes out of a term is selected away, never multiplied by 0: whatever its
    log-probs, advantage or entropy are, infinite and NaN included, neither the loss nor a gradient sees them. The one
    exception is meant: under "sequence" (of either kind) and "prefix-min" a NaN log-prob of a token with c ≠ 0 shows in
    the tokens whose r or w it is a part of, also where its own I^A = 0.

    With entropy_coef = 0 the entropy is not looked at, with kl_coef = 0 the reference. The KL term is on every token
    with c ≠ 0. Advantages, proximal, behaviour and reference log-probs are constants: no gradient.

    Args:
        logprobs: [t], log π_current of the token drawn, in nats, with gradient.
        proximal_logprobs: [t], the same under the actor when this batch's update began.
        behaviour_logprobs: [t], the same under the policy that drew the token, as the engine reported it.
        advantages: [t], in units of reward (or whitened).
        entropy: [t], H_t >= 0, of the full vocabulary before token t, in nats, with gradient.
        keep_policy: bool [t], I^A from `keep_for_policy`.
        keep_entropy: bool [t], I^H from `keep_for_entropy`.
        token_weights: [t], c_t >= 0 from the function of that name; 0 leaves the token out of all terms.
        lengths: int64 [n] on the device of the others, tokens of each response given, all >= 1, sum t: a micro-batch
            holds whole responses.
        objective: the switches.
        reference_logprobs: [t] or None, log π_reference of the token drawn; needed with kl_coef above 0, else it
            feeds kl_reference_sum only.

    Returns:
        Loss(loss, metrics). *Kept* tokens have I^A = 1 and c > 0, *active* ones are kept and not masked by the cap.

        tokens             t
        policy_kept        Σ I^A                                      / tokens: about 1 − k
        entropy_kept       Σ I^H                                      / tokens: about 1 − h
        capped             kept tokens with w > cap (0 if "none")      / policy_kept
        active             tokens in the policy term                  / tokens
        clipped            active tokens where the clip is the min    / active
                           (so without gradient; under "prefix-min" those whose weight the clip changes: they keep
                           theirs; 0 under "divergence")
        divergence_masked  active tokens beyond the divergence limit  / active; without gradient; 0 under "clip"
        dual_clipped       active tokens where c A is the max         / active; without gradient
        weight_sum         Σ w over active tokens, after the cap      / active: mean w
        weight_sq_sum      Σ w² likewise                              weight_sum² / it: effective sample size, tokens
        chi2_sum           Σ (w − 1)² over kept tokens, before the    / policy_kept: χ²(proximal ‖ behaviour), if the
                           cap (w of the response at level            mask is independent of w
                           "sequence"; also if "none")
        ratio_sum          Σ ρ over all tokens                        / tokens: mean ρ, near 1
        kl_behaviour_sum   Σ (x − 1 − ln x), x = current / behaviour  / tokens: KL(behaviour ‖ current), nats, k3
        kl_proximal_sum    Σ (x − 1 − ln x), x = current / proximal   / tokens: KL(proximal ‖ current), nats, if the
                                                                      tokens were drawn from about the proximal
        kl_reference_sum   Σ (x − 1 − ln x), x = reference / current  / tokens: KL(current ‖ reference), nats, if the
                           (0 without a reference)                    tokens were drawn from about the current
        entropy_sum        Σ H over all tokens                        / tokens: mean entropy, nats
        policy_loss        −Σ c I^A w J, a part of L                  already weighted: add, do not divide
        entropy_bonus      Σ c I^H H                                  likewise; it enters L times −entropy_coef

        The sums over *all* tokens include masked ones, so a NaN among them shows there and nowhere else.

    Raises:
        ValueError: shapes that differ, lengths that do not fit, a reference that is missing.
        TypeError: a wrong dtype (half precision is refused: a difference of log-probs in bfloat16 is noise).

    Papers: PPO, arXiv 1707.06347; decoupled PPO, arXiv 2505.24298 (and 2110.00641); AsyPPO, arXiv 2510.01656;
    clip_high above clip_low: DAPO, arXiv 2503.14476; dual clip: arXiv 1912.09729; GSPO-token: arXiv
    2507.18071, section 4.3; MinPRO: arXiv 2601.22718; DPPO: arXiv 2602.04879, equations 11 to 13; the KL term: GRPO,
    arXiv 2402.03300, equation 4; k3: http://joschu.net/blog/kl-approx.html.
    """
    check_tensor("logprobs", logprobs, ("t",), FLOAT)
    shape = (logprobs.numel(),)
    check_tensor("proximal_logprobs", proximal_logprobs, shape, FLOAT)
    check_tensor("behaviour_logprobs", behaviour_logprobs, shape, FLOAT)
    check_tensor("advantages", advantages, shape, FLOAT)
    check_tensor("entropy", entropy, shape, FLOAT)
    check_tensor("keep_policy", keep_policy, shape, BOOL)
    check_tensor("keep_entropy", keep_entropy, shape, BOOL)
    check_tensor("token_weights", token_weights, shape, FLOAT)
    check_lengths(lengths, logprobs.numel())
    if reference_logprobs is not None:
        check_tensor("reference_logprobs", reference_logprobs, shape, FLOAT)
    elif objective.kl_coef > 0.0:
        raise ValueError(f"reference_logprobs: expected a tensor [t], because kl_coef is {objective.kl_coef}, got None")

    proximal, behaviour, advantages = proximal_logprobs.detach(), behaviour_logprobs.detach(), advantages.detach()
    weighted = token_weights != 0
    kept = keep_policy & weighted
    none = torch.zeros_like(kept)

    # w, and who is left after the cap. Inputs are selected before any arithmetic, so that what is left out meets none.
    if objective.behaviour_level == "token":
        log_weight = torch.where(kept, proximal - behaviour, 0.0)
    else:
        of_tokens = clamp_log(torch.where(weighted, proximal - behaviour, 0.0))
        log_weight = torch.where(kept, response_sums(of_tokens, lengths).to(proximal.dtype), 0.0)
    if objective.behaviour_mode == "none":
        behaviour_weight, over_cap = torch.ones_like(proximal), none
    else:
        behaviour_weight = exp_ratio(log_weight)
        over_cap = kept & (behaviour_weight > objective.behaviour_cap)
        behaviour_weight = behaviour_weight.clamp(max=objective.behaviour_cap)
    active = kept & ~over_cap if objective.behaviour_mode == "mask" else kept

    outside = none
    if objective.trust == "divergence":
        anchor = proximal if objective.behaviour_mode == "none" else behaviour
        outside = active & _beyond(logprobs.detach(), anchor, advantages, objective.divergence_limit)

    # The policy term: r = ρ = 1 and A = 0, exactly and with gradient 0, where a token is not active.
    ratio = exp_ratio(torch.where(active, logprobs - proximal, 0.0))
    chosen_advantages = torch.where(active & ~outside, advantages, 0.0)
    low, high = 1.0 - objective.clip_low, 1.0 + objective.clip_high
    clip_binds = dual_binds = none
    if objective.ratio != "token":
        value = _response_ratio(logprobs.detach() - proximal, weighted, lengths, objective.ratio)
        value = torch.where(active, value, 1.0)
        if objective.ratio == "prefix-min" and objective.trust == "clip":
            clip_binds = active & ((value < low) | (value > high))
            value = value.clamp(low, high)
        ratio = value * (ratio / ratio.detach())  # the value of the first factor, the gradient of log π_current
    surrogate = ratio * chosen_advantages
    if objective.trust == "clip" and objective.ratio != "prefix-min":
        clipped = ratio.clamp(low, high) * chosen_advantages
        clip_binds = active & (clipped < surrogate)
        surrogate = torch.minimum(surrogate, clipped)
    if objective.dual_clip is not None:
        bound = objective.dual_clip * chosen_advantages
        dual_binds = (chosen_advantages < 0.0) & (surrogate < bound)
        surrogate = torch.where(dual_binds, bound, surrogate)
    loss = -(token_weights * behaviour_weight * surrogate).sum()

    total = loss
    entropy_term = torch.zeros_like(loss.detach())
    if objective.entropy_coef != 0.0:
        entropy_term = (token_weights * torch.where(keep_entropy & weighted, entropy, 0.0)).sum()
        total = total - objective.entropy_coef * entropy_term
    if objective.kl_coef != 0.0 and reference_logprobs is not None:
        log_x = clamp_log(torch.where(weighted, reference_logprobs.detach() - logprobs, 0.0))
        total = total + objective.kl_coef * (token_weights * (log_x.expm1() - log_x)).sum()

    with torch.no_grad():
        used = torch.where(active, behaviour_weight, 0.0).double()
        metrics = {
            "tokens": _count(torch.ones_like(active)),
            "policy_kept": _count(keep_policy),
            "entropy_kept": _count(keep_entropy),
            "capped": _count(over_cap),
            "active": _count(active),
            "clipped": _count(clip_binds),
            "divergence_masked": _count(outside),
            "dual_clipped": _count(dual_binds),
            "weight_sum": used.sum(),
            "weight_sq_sum": used.square().sum(),
            "chi2_sum": clamp_log(log_weight.double()).expm1().square().sum(),
            "ratio_sum": exp_ratio(logprobs - proximal).double().sum(),
            "kl_behaviour_sum": _k3(logprobs - behaviour).sum(),
            "kl_proximal_sum": _k3(logprobs - proximal).sum(),
            "kl_reference_sum": used.new_zeros(())
            if reference_logprobs is None
            else _k3(reference_logprobs - logprobs).sum(),
            "entropy_sum": entropy.double().sum(),
            "policy_loss": loss.detach().to(torch.float64, copy=True),
            "entropy_bonus": entropy_term.detach().to(torch.float64, copy=True),
        }
    return Loss(total, metrics)


def value_loss(
    values: Tensor,
    returns: Tensor,
    token_weights: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
) -> Loss:
    """A critic's squared error, to be minimised, with PPO's value clip as an option.

        L = Σ_t c_t ½ (V_t − R_t)²                                                          c_t = token_weights
        L = Σ_t c_t ½ max( (V_t − R_t)², (V_t^old + clamp(V_t − V_t^old, ±clip) − R_t)² )   with a clip

    A token of weight 0 is selected away, not multiplied by 0.

    Args:
        values: [t], V_t in units of return, with gradient.
        returns: [t], R_t in units of return; a constant: no gradient.
        token_weights: [t], c_t >= 0, with the denominators of the critic's whole shard of the global batch.
        old_values: [t] or None, the values when this batch's update began; needed with a clip, else not read.
        clip: > 0 in units of return, or None for no clip (AsyPPO).

    Returns:
        Loss(loss, metrics). The sums are over all tokens given; divide by `tokens` once they are added up.

        tokens         t
        clipped        tokens where the clipped error is the max (their gradient is 0)
        value_sum      Σ V
        return_sum     Σ R
        return_sq_sum  Σ R²
        error_sum      Σ (R − V)
        error_sq_sum   Σ (R − V)²

        Explained variance of all parts: 1 − Var(R − V) / Var(R), with Var x = x_sq_sum / tokens − (x_sum / tokens)².

    Raises:
        ValueError: shapes that differ, a clip that is not above 0 or comes without old_values.
        TypeError: a wrong dtype.

    Papers: AsyPPO, arXiv 2510.01656, Algorithm 1; the clip: PPO's reference code, see arXiv 2005.12729, section 3.
    """
    check_tensor("values", values, ("t",), FLOAT)
    shape = (values.numel(),)
    check_tensor("returns", returns, shape, FLOAT)
    check_tensor("token_weights", token_weights, shape, FLOAT)
    if clip is not None:
        if not clip > 0.0:
            raise ValueError(f"clip: expected a number above 0 or None, got {clip}")
        if old_values is None:
            raise ValueError(f"old_values: expected a tensor [t], because clip is {clip}, got None")
        check_tensor("old_values", old_values, shape, FLOAT)

    weighted = token_weights != 0
    chosen_values = torch.where(weighted, values, 0.0)
    targets = torch.where(weighted, returns.detach(), 0.0)
    error_sq = (chosen_values - targets).square()
    clip_binds = torch.zeros_like(weighted)
    if clip is not None and old_values is not None:
        old = torch.where(weighted, old_values.detach(), 0.0)
        clipped_sq = (old + (chosen_values - old).clamp(-clip, clip) - targets).square()
        clip_binds = clipped_sq > error_sq
        error_sq = torch.maximum(error_sq, clipped_sq)
    loss = (token_weights * 0.5 * error_sq).sum()

    with torch.no_grad():
        wide, errors = returns.double(), returns.double() - values.double()
        metrics = {
            "tokens": _count(torch.ones_like(weighted)),
            "clipped": _count(clip_binds),
            "value_sum": values.double().sum(),
            "return_sum": wide.sum(),
            "return_sq_sum": wide.square().sum(),
            "error_sum": errors.sum(),
            "error_sq_sum": errors.square().sum(),
        }
    return Loss(loss, metrics)


def token_weights(lengths: Tensor, how: str, *, constant: float | None = None) -> Tensor:
    """What each token counts for in a loss. The denominators are of the N responses given: give the global batch.

        "seq-mean-token-mean"   c_t = 1 / (N |o|)     every response counts the same (AsyPPO, GRPO)
        "token-mean"            c_t = 1 / T           every token counts the same (DAPO)
        "seq-mean-token-sum"    c_t = 1 / N           long responses count more
        "constant"              c_t = 1 / constant    Dr. GRPO, with constant = N · longest response allowed

    |o| counts all response tokens of o: the masks do not reduce it.

    Args:
        lengths: int64 [N], tokens |o| per response, all >= 1, T their sum.
        how: one of the four above.
        constant: > 0, tokens; needed by "constant", not read by the others.

    Returns:
        float32 [T], on the device of `lengths`.

    Raises:
        ValueError: an unknown `how`, a wrong shape, a length below 1, a constant that is missing or not above 0.
        TypeError: lengths that are not int64.

    Papers: AsyPPO, arXiv 2510.01656; DAPO, arXiv 2503.14476; Dr. GRPO, arXiv 2503.20783.
    """
    check_choice("how", how, AGGREGATIONS)
    check_lengths(lengths)
    per_response = torch.ones_like(lengths, dtype=torch.float64)
    if how == "seq-mean-token-mean":
        per_response /= lengths * lengths.numel()
    elif how == "token-mean":
        per_response /= lengths.sum()
    elif how == "seq-mean-token-sum":
        per_response /= lengths.numel()
    elif constant is None or not constant > 0.0:
        raise ValueError(f"constant: expected a number above 0, because how is 'constant', got {constant}")
    else:
        per_response /= constant
    return torch.repeat_interleave(per_response, lengths).float()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """How much of the returns' variance over tokens the values explain, a constant offset aside.

        EV = 1 − Var(R − V) / Var(R)

    1: perfect up to an offset; 0: no better than a constant; below 0: worse. NaN where all returns are equal (or
    there are none).

    Args:
        values: [T], in units of return.
        returns: [T], likewise.

    Returns:
        A Python float, without unit.

    Raises:
        ValueError: shapes that differ.
        TypeError: a wrong dtype.
    """
    check_tensor("values", values, ("T",), FLOAT)
    check_tensor("returns", returns, (values.numel(),), FLOAT)
    if returns.numel() == 0 or bool(returns.max() == returns.min()):
        return math.nan
    wide = returns.double()
    return 1.0 - float((wide - values.double()).var(correction=0) / wide.var(correction=0))


def _response_ratio(log_ratio: Tensor, belongs: Tensor, lengths: Tensor, how: str) -> Tensor:
    """The value of r [t] under "sequence" or "prefix-min", from detached log ρ and the tokens that belong.

    NaN in a response that none belongs to: there is no active token there to see it.
    """
    logs = clamp_log(torch.where(belongs, log_ratio, 0.0))
    if how == "sequence":
        return exp_ratio((response_sums(logs, lengths) / response_sums(belongs, lengths)).to(logs.dtype))
    minima = prefix_minima(torch.where(belongs, logs, torch.inf), lengths)
    return exp_ratio(torch.where(minima == torch.inf, 0.0, minima) + logs)


def _beyond(logprobs: Tensor, anchor: Tensor, advantages: Tensor, limit: float) -> Tensor:
    """DPPO's constraint: where the probability has moved from the anchor's by more than the limit, the way A pulls."""
    shift = logprobs.double().exp() - anchor.double().exp()
    return ((advantages > 0.0) & (shift > limit)) | ((advantages < 0.0) & (shift < -limit))


def _k3(log_ratio: Tensor) -> Tensor:
    """x − 1 − ln x >= 0 for x = exp(log_ratio clamped to ±20), in float64."""
    clamped = clamp_log(log_ratio.double())
    return clamped.expm1() - clamped


def _count(flags: Tensor) -> Tensor:
    return flags.sum(dtype=torch.float64)
