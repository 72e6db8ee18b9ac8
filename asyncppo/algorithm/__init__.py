"""The mathematics of AsyPPO (arXiv 2510.01656) and decoupled PPO (arXiv 2505.24298): tensors in, tensors out.

Nothing here knows of configs, processes, devices, models or files, and nothing keeps state. The trainer calls it in
this order:

    sharding     which critic learns from which response of a group    once per group, when it is leased
    advantages   returns: what the critics regress on                  before the critics' update
    losses       value_loss                                            in the critics' update
    ensemble     mean (or min) and standard deviation over critics     [M, T] -> [T], [T]
    advantages   gae on the mean value                                 [T]
    masks        which tokens drive the policy, and the entropy bonus  [T], [T]
    losses       policy_loss                                           in the actor's update

Words and shapes, the same in every module:

    N        responses of the global batch
    T        response tokens of the global batch, packed one response after the other; no prompt token, no padding
    t        tokens of a micro-batch: any subset of the T
    M        critics
    lengths  int64 [N], the tokens |o| of each response, all >= 1, sum T
    V_t      the value of the state *before* token t: the prompt and the response tokens before t

Floating tensors are float32 or float64. A wrong shape or value is a ValueError and a wrong dtype a TypeError; both
say what was expected and what came.
"""

from asyncppo.algorithm.advantages import final_rewards, gae, group_normalized, returns, segment_ids, whiten
from asyncppo.algorithm.ensemble import aggregate, value_std
from asyncppo.algorithm.losses import Loss, explained_variance, policy_loss, token_weights, value_loss
from asyncppo.algorithm.masks import highest, keep_for_entropy, keep_for_policy, lowest
from asyncppo.algorithm.sharding import assign_shards

__all__ = [
    "Loss",
    "aggregate",
    "assign_shards",
    "explained_variance",
    "final_rewards",
    "gae",
    "group_normalized",
    "highest",
    "keep_for_entropy",
    "keep_for_policy",
    "lowest",
    "policy_loss",
    "returns",
    "segment_ids",
    "token_weights",
    "value_loss",
    "value_std",
    "whiten",
]
