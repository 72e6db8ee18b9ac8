"""The mathematics of AsyPPO (arXiv 2510.01656) and decoupled PPO (arXiv 2505.24298): tensors in, tensors out.

Nothing here knows of configs, processes, devices, models or files, and nothing keeps state. The trainer calls it in
this order:

    sharding     which critic learns from which response of a group    once per group, when it is leased
    advantages   token_rewards; returns or lambda_returns:             before the critics' update
                 what the critics regress on
    losses       value_loss                                            in the critics' update
    ensemble     mean (or min, or by confidence) and standard          [M, T] -> [T], [T]
                 deviation over critics
    advantages   gae on that value (no critic: group_normalized)       [T]
    masks        which tokens drive the policy, and the entropy bonus  [T], [T]
    ratios       interpolated_proximal: A-3PO, in place of a pass      in the actor's update
    losses       policy_loss, every variant by its Objective           in the actor's update

Words and shapes, the same in every module:

    N        responses of the global batch
    T        response tokens of the global batch, packed one response after the other; no prompt token, no padding
    n, t     responses and tokens of a micro-batch: any whole responses of the N (`value_loss`: any of the T tokens)
    M        critics
    lengths  int64 [N], the tokens |o| of each response, all >= 1, sum T
    V_t      the value of the state *before* token t: the prompt and the response tokens before t

Floating tensors are float32 or float64. A wrong shape or value is a ValueError and a wrong dtype a TypeError; both
say what was expected and what came.
"""

from asyncppo.algorithm.advantages import (
    gae,
    group_normalized,
    lambda_returns,
    length_adaptive_lambda,
    returns,
    segment_ids,
    token_rewards,
    whiten,
)
from asyncppo.algorithm.ensemble import aggregate, critic_errors, running, separation, value_std
from asyncppo.algorithm.losses import Loss, explained_variance, policy_loss, token_weights, value_loss
from asyncppo.algorithm.masks import highest, keep_for_entropy, keep_for_policy, lowest, random_signal
from asyncppo.algorithm.objective import Objective
from asyncppo.algorithm.ratios import interpolated_proximal
from asyncppo.algorithm.sharding import assign_shards

__all__ = [
    "Loss",
    "Objective",
    "aggregate",
    "assign_shards",
    "critic_errors",
    "explained_variance",
    "gae",
    "group_normalized",
    "highest",
    "interpolated_proximal",
    "keep_for_entropy",
    "keep_for_policy",
    "lambda_returns",
    "length_adaptive_lambda",
    "lowest",
    "policy_loss",
    "random_signal",
    "returns",
    "running",
    "segment_ids",
    "separation",
    "token_rewards",
    "token_weights",
    "value_loss",
    "value_std",
    "whiten",
]
