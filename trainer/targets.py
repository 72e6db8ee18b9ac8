"""Targets: a batch and the critics' values in; advantages, returns and masks out. AsyPPO's steps 3 to 5, in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asyncppo import algorithm
from asyncppo.config import AlgorithmConfig
from trainer.stream.batch import Batch


@dataclass(frozen=True, slots=True)
class Targets:
    """What the policy update needs beside the batch; all over the T response tokens of the global batch."""

    advantages: torch.Tensor  # [T] float32
    keep_policy: torch.Tensor  # [T] bool, I^A
    keep_entropy: torch.Tensor  # [T] bool, I^H
    value: torch.Tensor  # [T] float32, the aggregated value; zeros without critics
    value_std: torch.Tensor  # [T] float32; zeros with fewer than two critics


def returns(batch: Batch, settings: AlgorithmConfig) -> torch.Tensor:
    """R_t, the Monte-Carlo return that critics learn: [T] float32."""
    lengths = torch.from_numpy(batch.response_lengths).long()
    rewards = algorithm.final_rewards(torch.from_numpy(batch.rewards), lengths)
    return algorithm.returns(rewards, lengths, gamma=settings.gamma)


def build_targets(batch: Batch, values: torch.Tensor, settings: AlgorithmConfig) -> Targets:
    """Advantages of the mean value by GAE (or of the group's rewards without critics), and the masks of the value std.

    Args:
        batch: T response tokens.
        values: [M, T] of the critics; M may be 0.
        settings: the section `algorithm`.
    """
    lengths = torch.from_numpy(batch.response_lengths).long()
    rewards = torch.from_numpy(batch.rewards)
    tokens = int(lengths.sum())
    everything = torch.ones(tokens, dtype=torch.bool)
    value = value_std = torch.zeros(tokens)
    keep_policy = keep_entropy = everything
    if settings.critics == 0:
        advantages = algorithm.group_normalized(rewards, torch.from_numpy(batch.group_index).long(), lengths)
    else:
        value = algorithm.aggregate(values, settings.aggregation)
        value_std = algorithm.value_std(values)
        advantages = algorithm.gae(
            algorithm.final_rewards(rewards, lengths),
            value,
            lengths,
            gamma=settings.gamma,
            lam=settings.lam,
            bootstrap=_last_values(value, lengths, batch) if settings.truncated == "bootstrap" else None,
        )
    if settings.critics >= 2:
        scope = settings.mask_scope
        keep_policy = algorithm.keep_for_policy(value_std, settings.mask_fraction, lengths, scope)
        keep_entropy = algorithm.keep_for_entropy(value_std, settings.entropy_filter, lengths, scope)
    if settings.whiten_advantages:
        advantages = algorithm.whiten(advantages)
    if settings.truncated == "mask":
        whole = (torch.from_numpy(batch.truncated) == 0).repeat_interleave(lengths)
        keep_policy, keep_entropy = keep_policy & whole, keep_entropy & whole
    return Targets(advantages, keep_policy, keep_entropy, value, value_std)


def _last_values(value: torch.Tensor, lengths: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[N]: for a truncated response the value before its last token, the last that is known; 0 for a finished one."""
    last = value[lengths.cumsum(0) - 1]
    return torch.where(torch.from_numpy(batch.truncated) == 1, last, torch.zeros_like(last))
