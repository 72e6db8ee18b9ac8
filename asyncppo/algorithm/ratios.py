"""Ratios of two policies over tokens and over whole responses, and A-3PO's stand-in for the proximal policy.

Log-ratios of single tokens are clamped to ±20 before anything else is done with them, and so are sums of them before
exp. So an infinite log-prob gives a finite ratio; NaN stays NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncppo.algorithm._checks import FLOAT, INT, check_tensor
from asyncppo.algorithm.advantages import segment_ids

LOG_RATIO_LIMIT = 20.0  # e^20 is about 5e8: far beyond any clip, and its products stay finite in float32


def interpolated_proximal(behaviour_logprobs: Tensor, current_logprobs: Tensor, staleness: Tensor) -> Tensor:
    """A-3PO's approximation of the proximal log-probs, without a forward pass of their own.

        log π_proximal = α log π_behaviour + (1 − α) log π_current        α = 1 if d = 0, else 1/d

    d is the token's staleness: versions between the policy that is trained and the one that drew the token. For d <= 1
    the proximal is the behaviour policy, exactly; the older the token, the nearer it is to the current policy. The
    ratios that follow are powers of x = current / behaviour: ρ = x^α and w = x^(1 − α).

    "Current" moves from optimiser step to optimiser step, and the interpolation is meant to be made anew with it.

    Args:
        behaviour_logprobs: [t], in nats, under the policy that drew the token.
        current_logprobs: [t], likewise under the actor as it is now; a constant: no gradient.
        staleness: int64 [t], d >= 0 of each token.

    Returns:
        [t], no gradient. Where d <= 1 the current log-prob is not looked at.

    Raises:
        ValueError: shapes that differ, a staleness below 0.
        TypeError: a wrong dtype.

    Paper: A-3PO, arXiv 2512.06547, log-linear interpolation with the staleness-aware α.
    """
    check_tensor("behaviour_logprobs", behaviour_logprobs, ("t",), FLOAT)
    shape = (behaviour_logprobs.numel(),)
    check_tensor("current_logprobs", current_logprobs, shape, FLOAT)
    check_tensor("staleness", staleness, shape, INT)
    if staleness.numel() and int(staleness.min()) < 0:
        raise ValueError(f"staleness: expected every token's to be >= 0, got {int(staleness.min())}")
    behaviour, current = behaviour_logprobs.detach(), current_logprobs.detach()
    alpha = 1.0 / staleness.clamp(min=1).to(behaviour.dtype)
    return torch.where(staleness <= 1, behaviour, alpha * behaviour + (1.0 - alpha) * current)


def clamp_log(log_ratio: Tensor) -> Tensor:
    """To ±20."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def exp_ratio(log_ratio: Tensor) -> Tensor:
    """exp, after a clamp to ±20."""
    return clamp_log(log_ratio).exp()


def response_sums(x: Tensor, lengths: Tensor) -> Tensor:
    """For each of the t tokens the sum over its response, added up in float64: [1, 2, 3] -> [3, 3, 3] for 2 + 1."""
    response = segment_ids(lengths)
    sums = torch.zeros(lengths.numel(), dtype=torch.float64, device=x.device)
    return sums.index_add(0, response, x.double())[response]


def prefix_minima(x: Tensor, lengths: Tensor) -> Tensor:
    """For each of the t tokens the smallest x before it in its response, +inf at the first; NaN spreads to the right.

    A segmented scan by doubling: after k steps the minimum over the last 2^k tokens is known.
    """
    if x.numel() == 0:
        return x
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    position = torch.arange(x.numel(), device=x.device) - starts
    minima = torch.where(position >= 1, x.roll(1), torch.inf)
    step, longest = 1, int(lengths.max())
    while step < longest:
        minima = torch.minimum(minima, torch.where(position >= step, minima.roll(step), torch.inf))
        step *= 2
    return minima
