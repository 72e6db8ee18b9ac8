"""The policy loss of decoupled PPO with AsyPPO's masks, the critics' loss, and the weights that aggregate tokens.

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

AGGREGATIONS = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "constant")
BEHAVIOUR_MODES = ("mask", "clamp", "off")
LOG_RATIO_LIMIT = 20.0  # e^20 is about 5e8: far beyond any clip, and its products stay finite in float32


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
    clip_low: float,
    clip_high: float,
    behaviour_cap: float,
    behaviour_mode: str,
    entropy_coef: float,
) -> Loss:
    """Decoupled PPO's clipped objective with AsyPPO's masks, to be minimised.

        L = − Σ_t c_t [ I^A_t w_t min(ρ_t A_t, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_t) + entropy_coef I^H_t H_t ]
        ρ_t = π_current / π_proximal           of the token drawn at t; carries the gradient
        w_t = sg(π_proximal / π_behaviour)     corrects for the policy that drew the token
        c_t = token_weights

    Both log-ratios are clamped to ±20 before exp. behaviour_mode says what becomes of w where it exceeds the cap:

        "mask"    the token gives nothing to the policy term (it keeps its entropy term)
        "clamp"   w = cap
        "off"     w = 1 everywhere, behaviour_logprobs only feed kl_behaviour_sum

    A token that a mask, the cap or a zero weight takes out of a term is selected away, never multiplied by 0:
    whatever its log-probs, advantage or entropy are, infinite and NaN included, neither the loss nor a gradient sees
    them. With entropy_coef = 0 the entropy is not looked at. Advantages, proximal and behaviour log-probs are
    constants: no gradient.

    Args:
        logprobs: [t], log π_current of the token drawn, in nats, with gradient.
        proximal_logprobs: [t], the same under the actor when this batch's update began.
        behaviour_logprobs: [t], the same under the policy that drew the token, as the engine reported it.
        advantages: [t], in units of reward (or whitened).
        entropy: [t], H_t >= 0, of the full vocabulary before token t, in nats, with gradient.
        keep_policy: bool [t], I^A from `keep_for_policy`.
        keep_entropy: bool [t], I^H from `keep_for_entropy`.
        token_weights: [t], c_t >= 0 from the function of that name; 0 leaves the token out of both terms.
        clip_low: ε_lo in [0, 1].
        clip_high: ε_hi >= 0.
        behaviour_cap: the largest w, > 0.
        behaviour_mode: "mask", "clamp" or "off".
        entropy_coef: β >= 0.

    Returns:
        Loss(loss, metrics). *Kept* tokens have I^A = 1 and c > 0, *active* ones are kept and not masked by the cap.

        tokens             t
        policy_kept        Σ I^A                                      / tokens: about 1 − k
        entropy_kept       Σ I^H                                      / tokens: about 1 − h
        capped             kept tokens with w > cap (0 if "off")      / policy_kept
        active             tokens in the policy term                  / tokens
        clipped            active tokens where the clip is the min    / active
        weight_sum         Σ w over active tokens, after the cap      / active: mean w
        weight_sq_sum      Σ w² likewise                              weight_sum² / it: effective sample size, tokens
        ratio_sum          Σ ρ over all tokens                        / tokens: mean ρ, near 1
        kl_behaviour_sum   Σ (x − 1 − ln x), x = current / behaviour  / tokens: KL(behaviour ‖ current), nats, k3
        kl_proximal_sum    Σ (x − 1 − ln x), x = current / proximal   / tokens: KL(proximal ‖ current), nats, if the
                                                                      tokens were drawn from about the proximal
        entropy_sum        Σ H over all tokens                        / tokens: mean entropy, nats
        policy_loss        the policy term's part of L                already weighted: add, do not divide
        entropy_bonus      Σ c I^H H                                  likewise; L = policy_loss − β · entropy_bonus

        The sums over *all* tokens include masked ones, so a NaN among them shows there and nowhere else.

    Raises:
        ValueError: shapes that differ, an unknown mode, a number out of its range.
        TypeError: a wrong dtype (half precision is refused: a difference of log-probs in bfloat16 is noise).

    Papers: PPO, arXiv 1707.06347; decoupled PPO, arXiv 2505.24298 (and 2110.00641); AsyPPO, arXiv 2510.01656;
    clip_high above clip_low: DAPO, arXiv 2503.14476; k3: http://joschu.net/blog/kl-approx.html.
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
    check_choice("behaviour_mode", behaviour_mode, BEHAVIOUR_MODES)
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clip_low: expected a number in [0, 1], got {clip_low}")
    if not clip_high >= 0.0:
        raise ValueError(f"clip_high: expected a number >= 0, got {clip_high}")
    if not behaviour_cap > 0.0:
        raise ValueError(f"behaviour_cap: expected a number above 0, got {behaviour_cap}")
    if not entropy_coef >= 0.0:
        raise ValueError(f"entropy_coef: expected a number >= 0, got {entropy_coef}")

    proximal, behaviour, advantages = proximal_logprobs.detach(), behaviour_logprobs.detach(), advantages.detach()
    weighted = token_weights != 0
    kept = keep_policy & weighted

    # w, and who is left after the cap. Inputs are selected before any arithmetic, so that what is left out meets none.
    if behaviour_mode == "off":
        behaviour_weight = torch.ones_like(proximal)
        over_cap = torch.zeros_like(kept)
    else:
        behaviour_weight = _ratio(torch.where(kept, proximal - behaviour, 0.0))
        over_cap = kept & (behaviour_weight > behaviour_cap)
        behaviour_weight = behaviour_weight.clamp(max=behaviour_cap)
    active = kept & ~over_cap if behaviour_mode == "mask" else kept

    # The policy term: ρ = 1 and A = 0, exactly and with gradient 0, where a token is not active.
    ratio = _ratio(torch.where(active, logprobs - proximal, 0.0))
    chosen_advantages = torch.where(active, advantages, 0.0)
    unclipped = ratio * chosen_advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * chosen_advantages
    loss = -(token_weights * behaviour_weight * torch.minimum(unclipped, clipped)).sum()

    entropy_term = torch.zeros_like(loss.detach())
    if entropy_coef != 0.0:
        entropy_term = (token_weights * torch.where(keep_entropy & weighted, entropy, 0.0)).sum()

    with torch.no_grad():
        used = torch.where(active, behaviour_weight, 0.0).double()
        metrics = {
            "tokens": _count(torch.ones_like(active)),
            "policy_kept": _count(keep_policy),
            "entropy_kept": _count(keep_entropy),
            "capped": _count(over_cap),
            "active": _count(active),
            "clipped": _count(active & (clipped < unclipped)),
            "weight_sum": used.sum(),
            "weight_sq_sum": used.square().sum(),
            "ratio_sum": _ratio(logprobs - proximal).double().sum(),
            "kl_behaviour_sum": _k3(logprobs - behaviour).sum(),
            "kl_proximal_sum": _k3(logprobs - proximal).sum(),
            "entropy_sum": entropy.double().sum(),
            "policy_loss": loss.detach().to(torch.float64, copy=True),
            "entropy_bonus": entropy_term.detach().to(torch.float64, copy=True),
        }
    return Loss(loss - entropy_coef * entropy_term if entropy_coef != 0.0 else loss, metrics)


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


def _ratio(log_ratio: Tensor) -> Tensor:
    """exp, after a clamp to ±20."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _k3(log_ratio: Tensor) -> Tensor:
    """x − 1 − ln x >= 0 for x = exp(log_ratio clamped to ±20), in float64."""
    clamped = log_ratio.double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return clamped.expm1() - clamped


def _count(flags: Tensor) -> Tensor:
    return flags.sum(dtype=torch.float64)
