"""From rewards and values to returns and advantages, on packed responses of unequal length.

Everything is vectorised over the T tokens and computed in float64; results come back in the dtype of the input. No
function looks across the border of two responses, except `whiten` (all tokens) and `group_normalized` (the responses
of a group).
"""

from __future__ import annotations

import math

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


def token_rewards(rewards: Tensor, lengths: Tensor, step_rewards: Tensor | None = None) -> Tensor:
    """What each token earned: the response's reward at its last token, and process rewards where steps end.

        r_t = step_t + [t is the last token of its response n] · reward_n

    Args:
        rewards: [N], one final reward per response, in units of reward.
        lengths: int64 [N], tokens per response, all >= 1, sum T.
        step_rewards: [T] or None: a process reward on the token where a step (a line, a span) ends, 0 elsewhere. None
            is the sparse case, 0 everywhere.

    Returns:
        [T], in units of reward, the dtype of `rewards`.

    Raises:
        ValueError: shapes that do not fit, a length below 1.
        TypeError: a wrong dtype.

    Paper: AsyPPO, arXiv 2510.01656, Table 2 (sparse against dense rewards).
    """
    check_lengths(lengths)
    check_tensor("rewards", rewards, (lengths.numel(),), FLOAT)
    tokens = int(lengths.sum())
    if step_rewards is None:
        step_rewards = rewards.new_zeros(tokens)
    check_tensor("step_rewards", step_rewards, (tokens,), FLOAT)
    earned = step_rewards.double()
    return earned.index_add(0, lengths.cumsum(0) - 1, rewards.double()).to(rewards.dtype)


def returns(rewards: Tensor, lengths: Tensor, *, gamma: float) -> Tensor:
    """Monte-Carlo returns, what the critics regress on.

        R_t = r_t + γ R_{t+1},    R after the last token = 0

    R_t is the target of V_t. A truncated response that is to be bootstrapped has γ · bootstrap added to its last
    reward by the caller. The TD(λ) target is `lambda_returns`, not this.

    Args:
        rewards: [T], r_t is what token t earned; see `token_rewards`.
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
    lam: float | Tensor,
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
        lam: λ in [0, 1]: one number, or [N] with one for each response, such as `length_adaptive_lambda`.
        bootstrap: [N] or None, the value after the last token (undiscounted); 0 for a response that ended by itself.

    Returns:
        [T], in units of reward, the dtype of `values`.

    Raises:
        ValueError: shapes that do not fit, gamma or lam outside [0, 1].
        TypeError: a wrong dtype.

    Paper: GAE, arXiv 1506.02438, equation 16.
    """
    per_token = _check_td(rewards, values, lengths, gamma, lam)
    next_values = _shifted(values, lengths, bootstrap)
    deltas = rewards.double() + gamma * next_values - values.double()
    return _discounted_sums(deltas, lengths, gamma * per_token).to(values.dtype)


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """TD(λ) targets, what the critics regress on where their λ is below 1.

        G_t = r_t + γ ((1−λ) V_{t+1} + λ G_{t+1}) = A_t(λ) + V_t        G and V after the last token: bootstrap, or 0

    The first form is what is computed: it has no V_t to cancel, so λ = 1 gives `returns` bit by bit (with γ · bootstrap
    in the last reward) whatever the values, and λ = 0 the one-step target r_t + γ V_{t+1}.

    Arguments, result and errors as for `gae`. The values are to be detached: a target has no gradient.

    Paper: GAE, arXiv 1506.02438, section 3; VAPO, arXiv 2504.05118 (a λ for the critics apart from the actor's).
    """
    per_token = _check_td(rewards, values, lengths, gamma, lam)
    next_values = _shifted(values, lengths, bootstrap)
    last = lengths.cumsum(0) - 1
    carried = (1.0 - per_token) * next_values
    carried[last] = next_values[last]  # nothing follows: the whole of the state's value, not a (1−λ) part of it
    return _discounted_sums(rewards.double() + gamma * carried, lengths, gamma * per_token).to(values.dtype)


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """VAPO's λ of the actor: the longer the response, the nearer to 1.

        λ_n = 1 − 1 / (α |o_n|),    at least 0

    The weights λ^l of the TD errors sum to about 1 / (1 − λ) = α |o|: the horizon is the same share of every
    response, where a fixed λ would forget the end of a long one. Below 1/α tokens λ is 0.

    Args:
        lengths: int64 [N], tokens per response, all >= 1.
        alpha: α > 0, the horizon as a share of the response; 0.05 in the paper.

    Returns:
        float64 [N], in [0, 1], for `gae`.

    Raises:
        ValueError: a wrong shape, a length below 1, alpha not above 0 or not finite.
        TypeError: lengths that are not int64.

    Paper: VAPO, arXiv 2504.05118, length-adaptive GAE.
    """
    check_lengths(lengths)
    if not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha: expected a finite number above 0, got {alpha}")
    return (1.0 - 1.0 / (alpha * lengths.double())).clamp(0.0, 1.0)


def group_normalized(
    rewards: Tensor, group_ids: Tensor, lengths: Tensor, *, eps: float = 1e-6, scale: bool = True
) -> Tensor:
    """GRPO's advantage: each response's reward against the others of its group, the same for all its tokens.

        A_t = (r_n − mean of the group) / (std of the group + ε)      t a token of response n; population std
        A_t = r_n − mean of the group                                 scale = False (Dr. GRPO)

    A group of equal rewards, or of one response, has advantage 0.

    Args:
        rewards: [N], one reward per response.
        group_ids: int64 [N], equal for the responses of one prompt; any integers, in any order.
        lengths: int64 [N], tokens per response, all >= 1.
        eps: ε > 0, in units of reward; of no effect where scale is False.
        scale: False leaves the division out: it makes groups that are nearly all right or all wrong weigh more.

    Returns:
        [T], without unit (scale = False: in units of reward), the dtype of `rewards`.

    Raises:
        ValueError: shapes that do not fit, eps not above 0.
        TypeError: a wrong dtype.

    Paper: GRPO, arXiv 2402.03300, section 4.1.2; Dr. GRPO, arXiv 2503.20783.
    """
    check_lengths(lengths)
    check_tensor("rewards", rewards, (lengths.numel(),), FLOAT)
    check_tensor("group_ids", group_ids, (lengths.numel(),), INT)
    if not eps > 0.0:
        raise ValueError(f"eps: expected a number above 0, got {eps}")

    group, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)[1:]
    zeros = torch.zeros(sizes.numel(), dtype=torch.float64, device=rewards.device)
    centred = rewards.double() - (zeros.index_add(0, group, rewards.double()) / sizes)[group]
    if scale:
        centred = centred / ((zeros.index_add(0, group, centred.square()) / sizes).sqrt()[group] + eps)
    return torch.repeat_interleave(centred, lengths).to(rewards.dtype)


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


def _check_td(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float | Tensor) -> float | Tensor:
    """What `gae` and `lambda_returns` ask of their arguments; gives λ back, as float64 [T] where it was [N]."""
    check_tensor("values", values, ("T",), FLOAT)
    check_tensor("rewards", rewards, (values.numel(),), FLOAT)
    check_lengths(lengths, values.numel())
    check_unit("gamma", gamma)
    if not isinstance(lam, Tensor):
        check_unit("lam", lam)
        return lam
    check_tensor("lam", lam, (lengths.numel(),), FLOAT)
    if not bool(((lam >= 0.0) & (lam <= 1.0)).all()):
        raise ValueError(f"lam: expected numbers in [0, 1], got {lam.tolist()}")
    return torch.repeat_interleave(lam.double(), lengths)


def _shifted(values: Tensor, lengths: Tensor, bootstrap: Tensor | None) -> Tensor:
    """V_{t+1} in float64 [T]; after the last token of a response its bootstrap, or 0."""
    if bootstrap is None:
        bootstrap = values.new_zeros(lengths.numel())
    check_tensor("bootstrap", bootstrap, (lengths.numel(),), FLOAT)
    shifted = values.double().roll(-1)
    shifted[lengths.cumsum(0) - 1] = bootstrap.double()
    return shifted


def _discounted_sums(x: Tensor, lengths: Tensor, factor: float | Tensor) -> Tensor:
    """S_t = Σ_{l >= 0} factor^l x_{t+l} within the response of t, for x float64 [T].

    The factor is one number, or float64 [T] that is constant within each response. A segmented scan by doubling. After
    k steps S_t holds the first 2^k terms of its sum, so one more step is

        S_t <- S_t + factor^(2^k) · S_{t+2^k}      where t + 2^k lies in the same response

    and ⌈log2(longest response)⌉ steps are enough. It only ever multiplies by powers of a factor in [0, 1]: nothing is
    divided, and a power too small for float64 becomes 0, as it should. The powers come by squaring, which is the same
    to the last bit for a number and for a tensor, and wherever in the batch a response lies.
    """
    if x.numel() == 0:
        return x
    ends = torch.repeat_interleave(lengths.cumsum(0), lengths)
    left = ends - torch.arange(x.numel(), device=x.device)  # tokens from t to the end of its response, t included
    longest = int(lengths.max())
    sums, step, power = x, 1, factor
    while step < longest:
        ahead = torch.where(left > step, sums.roll(-step), 0.0)
        sums = sums + power * ahead
        step *= 2
        power = power * power
    return sums
