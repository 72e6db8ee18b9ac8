"""From rewards and values to returns and advantages, on packed responses of unequal length.

Everything is vectorised over the T tokens and computed in float64; results come back in the dtype of the input. No
function looks across the border of two responses, except `whiten` (all tokens) and `group_normalized` (the responses
of a group).
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncppo.algorithm._checks import FLOAT, INT, check_lengths, check_tensor, check_unit


def segment_ids(lengths: Tensor) -> Tensor:
    """The response that each token belongs to: [2, 3] -> [0, 0, 1, 1, 1].

    Args:
        lengths: int64 [N], tokens per response, all >= 1.

    Returns:
        int64 [T], the index n in 0..N-1 of the response.

    Raises:
        ValueError: a wrong shape, a length below 1.
        TypeError: lengths that are not int64.
    """
    check_lengths(lengths)
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)


def final_rewards(rewards_per_response: Tensor, lengths: Tensor) -> Tensor:
    """One reward per response, given at its last token: r_t = reward of n where t is the last token of n, else 0.

    Args:
        rewards_per_response: [N], in units of reward.
        lengths: int64 [N], tokens per response, all >= 1.

    Returns:
        [T], the dtype of `rewards_per_response`.

    Raises:
        ValueError: shapes that do not fit, a length below 1.
        TypeError: a wrong dtype.
    """
    check_lengths(lengths)
    check_tensor("rewards_per_response", rewards_per_response, (lengths.numel(),), FLOAT)
    rewards = rewards_per_response.new_zeros(int(lengths.sum()))
    rewards[lengths.cumsum(0) - 1] = rewards_per_response
    return rewards


def returns(rewards: Tensor, lengths: Tensor, *, gamma: float) -> Tensor:
    """Monte-Carlo returns, what the critics regress on.

        R_t = r_t + γ R_{t+1},    R after the last token = 0

    R_t is the target of V_t. A truncated response that is to be bootstrapped has γ · bootstrap added to its last
    reward by the caller. The TD(λ) target is `gae(...) + values`, not this.

    Args:
        rewards: [T], r_t is what token t earned; see `final_rewards` for one reward per response.
        lengths: int64 [N], tokens per response, all >= 1, sum T.
        gamma: discount per token, in [0, 1].

    Returns:
        [T], in units of reward, the dtype of `rewards`.

    Raises:
        ValueError: shapes that do not fit, gamma outside [0, 1].
        TypeError: a wrong dtype.

    Paper: AsyPPO, arXiv 2510.01656, Algorithm 1 (γ = 1).
    """
    check_tensor("rewards", rewards, ("T",), FLOAT)
    check_lengths(lengths, rewards.numel())
    check_unit("gamma", gamma)
    return _discounted_sums(rewards.double(), lengths, gamma).to(rewards.dtype)


def gae(
    rewards: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimates.

        δ_t = r_t + γ V_{t+1} − V_t
        A_t = Σ_{l >= 0} (γλ)^l δ_{t+l}      the sum ends with the response of token t

    V_t is the value of the state before token t, so V_{t+1} has seen token t. After the last token of response n it
    is 0, or bootstrap[n]: the value of the whole response, for an answer that was cut off. γ = λ = 1 gives R_t − V_t;
    λ = 0 gives δ_t.

    Args:
        rewards: [T], r_t is what token t earned.
        values: [T], in units of reward; for an ensemble the aggregate.
        lengths: int64 [N], tokens per response, all >= 1, sum T.
        gamma: discount per token, in [0, 1].
        lam: λ in [0, 1].
        bootstrap: [N] or None, the value after the last token (undiscounted); 0 for a response that ended by itself.

    Returns:
        [T], in units of reward, the dtype of `values`.

    Raises:
        ValueError: shapes that do not fit, gamma or lam outside [0, 1].
        TypeError: a wrong dtype.

    Paper: GAE, arXiv 1506.02438, equation 16.
    """
    check_tensor("values", values, ("T",), FLOAT)
    check_tensor("rewards", rewards, (values.numel(),), FLOAT)
    check_lengths(lengths, values.numel())
    check_unit("gamma", gamma)
    check_unit("lam", lam)
    if bootstrap is None:
        bootstrap = values.new_zeros(lengths.numel())
    check_tensor("bootstrap", bootstrap, (lengths.numel(),), FLOAT)

    next_values = values.double().roll(-1)
    next_values[lengths.cumsum(0) - 1] = bootstrap.double()
    deltas = rewards.double() + gamma * next_values - values.double()
    return _discounted_sums(deltas, lengths, gamma * lam).to(values.dtype)


def group_normalized(rewards: Tensor, group_ids: Tensor, lengths: Tensor, *, eps: float = 1e-6) -> Tensor:
    """GRPO's advantage: each response's reward against the others of its group, the same for all its tokens.

        A_t = (r_n − mean of the group) / (std of the group + ε)      t a token of response n; population std

    A group of equal rewards, or of one response, has advantage 0.

    Args:
        rewards: [N], one reward per response.
        group_ids: int64 [N], equal for the responses of one prompt; any integers, in any order.
        lengths: int64 [N], tokens per response, all >= 1.
        eps: ε > 0, in units of reward.

    Returns:
        [T], without unit, the dtype of `rewards`.

    Raises:
        ValueError: shapes that do not fit, eps not above 0.
        TypeError: a wrong dtype.

    Paper: GRPO, arXiv 2402.03300, section 4.1.2.
    """
    check_lengths(lengths)
    check_tensor("rewards", rewards, (lengths.numel(),), FLOAT)
    check_tensor("group_ids", group_ids, (lengths.numel(),), INT)
    if not eps > 0.0:
        raise ValueError(f"eps: expected a number above 0, got {eps}")

    group, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)[1:]
    zeros = torch.zeros(sizes.numel(), dtype=torch.float64, device=rewards.device)
    centred = rewards.double() - (zeros.index_add(0, group, rewards.double()) / sizes)[group]
    std = (zeros.index_add(0, group, centred.square()) / sizes).sqrt()[group]
    return torch.repeat_interleave(centred / (std + eps), lengths).to(rewards.dtype)


def whiten(x: Tensor) -> Tensor:
    """Shift to mean 0 and scale to standard deviation 1 over all the tokens given.

        (x_t − mean) / std      population std; x_t − mean = 0 where all x are equal

    Args:
        x: [T], the advantages of the global batch: whitening a rank's or a micro-batch's part gives another result.

    Returns:
        [T], the dtype of `x`.

    Raises:
        ValueError: a wrong shape.
        TypeError: a wrong dtype.

    Paper: off in AsyPPO; usual in PPO, see arXiv 2005.12729, section 3.
    """
    check_tensor("x", x, ("T",), FLOAT)
    if x.numel() == 0 or bool(x.max() == x.min()):
        return torch.zeros_like(x)
    wide = x.double()
    centred = wide - wide.mean()
    return (centred / centred.square().mean().sqrt()).to(x.dtype)


def _discounted_sums(x: Tensor, lengths: Tensor, factor: float) -> Tensor:
    """S_t = Σ_{l >= 0} factor^l x_{t+l} within the response of t, for x float64 [T].

    A segmented scan by doubling. After k steps S_t holds the first 2^k terms of its sum, so one more step is

        S_t <- S_t + factor^(2^k) · S_{t+2^k}      where t + 2^k lies in the same response

    and ⌈log2(longest response)⌉ steps are enough. It only ever multiplies by powers of a factor in [0, 1]: nothing is
    divided, and a power too small for float64 becomes 0, as it should.
    """
    if x.numel() == 0:
        return x
    ends = torch.repeat_interleave(lengths.cumsum(0), lengths)
    left = ends - torch.arange(x.numel(), device=x.device)  # tokens from t to the end of its response, t included
    longest = int(lengths.max())
    sums, step = x, 1
    while step < longest:
        ahead = torch.where(left > step, sums.roll(-step), 0.0)
        sums = sums + factor**step * ahead
        step *= 2
    return sums
