"""Targets: a batch and the critics' values in; advantages and masks out. AsyPPO's steps 3 to 5, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asyncppo import algorithm
from asyncppo.config import AlgorithmConfig, Config, at
from trainer.stream.batch import Batch

_ERROR_DECAY = 0.9
"""Of the critics' running squared errors: about ten steps are remembered."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What the policy update needs beside the batch; all over the T response tokens of the global batch."""

    advantages: torch.Tensor  # [T] float32
    keep_policy: torch.Tensor  # [T] bool, I^A
    keep_entropy: torch.Tensor  # [T] bool, I^H
    value: torch.Tensor  # [T] float32, the aggregated value; zeros without critics
    value_std: torch.Tensor  # [T] float32; zeros with fewer than two critics


def rewards(batch: Batch) -> torch.Tensor:
    """r_t: the final reward at each response's last token, process rewards where steps end: [T] float32."""
    return algorithm.token_rewards(
        torch.from_numpy(batch.rewards), _lengths(batch), torch.from_numpy(batch.step_rewards)
    )


def returns(batch: Batch, settings: AlgorithmConfig) -> torch.Tensor:
    """R_t, the Monte-Carlo return: [T] float32."""
    return algorithm.returns(rewards(batch), _lengths(batch), gamma=settings.gamma)


class TargetBuilder:
    """Makes the targets of each step; remembers only how wrong each critic has been of late (`confidence`).

    Args:
        config: the sections `algorithm` and `run.seed`.
        errors: running squared error of each critic, from a checkpoint; empty at the start.
    """

    def __init__(self, config: Config, errors: Sequence[float] = ()) -> None:
        self._config = config
        self._errors = torch.tensor(list(errors)) if errors else None

    @property
    def errors(self) -> list[float]:
        """For the checkpoint."""
        return [] if self._errors is None else self._errors.tolist()

    def build(self, batch: Batch, values: torch.Tensor, entropy: torch.Tensor | None) -> Targets:
        """Advantages of the aggregated value by GAE (or of the group's rewards without critics), and both masks.

        Args:
            batch: T response tokens.
            values: [M, T] of the critics; M may be 0.
            entropy: [T] before each token, needed where it is the masks' signal.
        """
        settings = self._config.algorithm
        lengths = _lengths(batch)
        tokens = int(lengths.sum())
        value = value_std = torch.zeros(tokens)
        if settings.critics == 0:
            in_all = torch.segment_reduce(rewards(batch), "sum", lengths=lengths)
            group = torch.from_numpy(batch.group_index).long()
            advantages = algorithm.group_normalized(in_all, group, lengths, scale=settings.group_std)
        else:
            value = algorithm.aggregate(values, settings.aggregation, self._updated_errors(batch, values))
            value_std = algorithm.value_std(values)
            adaptive = settings.lam_length_alpha
            advantages = algorithm.gae(
                rewards(batch),
                value,
                lengths,
                gamma=settings.gamma,
                lam=settings.lam if adaptive is None else algorithm.length_adaptive_lambda(lengths, adaptive),
                bootstrap=_last_values(value, lengths, batch) if settings.truncated == "bootstrap" else None,
            )
        signal = self._signal(batch, value_std, entropy)
        fraction, scope = at(settings.mask_fraction, batch.version), settings.mask_scope
        keep_policy = algorithm.keep_for_policy(signal, fraction, lengths, scope)
        fraction = at(settings.entropy_filter, batch.version)
        keep_entropy = algorithm.keep_for_entropy(signal, fraction, lengths, scope)
        if settings.whiten_advantages:
            advantages = algorithm.whiten(advantages)
        if settings.truncated == "mask":
            whole = (torch.from_numpy(batch.truncated) == 0).repeat_interleave(lengths)
            keep_policy, keep_entropy = keep_policy & whole, keep_entropy & whole
        return Targets(advantages, keep_policy, keep_entropy, value, value_std)

    def _signal(self, batch: Batch, value_std: torch.Tensor, entropy: torch.Tensor | None) -> torch.Tensor:
        """[T]: what orders the tokens for the masks. A value std of fewer than two critics is 0: it masks nothing."""
        match self._config.algorithm.mask_signal:
            case "entropy":
                assert entropy is not None, "the config refuses this signal without a proximal pass"
                return entropy
            case "random":
                return algorithm.random_signal(len(value_std), (self._config.run.seed, batch.version))
            case _:
                return value_std

    def _updated_errors(self, batch: Batch, values: torch.Tensor) -> torch.Tensor | None:
        settings = self._config.algorithm
        if settings.aggregation != "confidence":
            return None
        learned = [torch.from_numpy(batch.learned_by(m, settings.shards)) for m in range(settings.critics)]
        learned_from = torch.stack(learned).repeat_interleave(_lengths(batch), dim=1)
        new = algorithm.critic_errors(values, returns(batch, settings), learned_from)
        self._errors = algorithm.running(self._errors, new, _ERROR_DECAY)
        return self._errors


def _lengths(batch: Batch) -> torch.Tensor:
    return torch.from_numpy(batch.response_lengths).long()


def _last_values(value: torch.Tensor, lengths: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[N]: for a truncated response the value before its last token, the last that is known; 0 for a finished one."""
    last = value[lengths.cumsum(0) - 1]
    return torch.where(torch.from_numpy(batch.truncated) == 1, last, torch.zeros_like(last))
