"""The learner's view of all critics: a batch out, values [M, T] back. It alone knows that they run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asyncppo.config import Config
from asyncppo.errors import EngineError, StallError
from asyncppo.messages import (
    CriticFailed,
    CriticReady,
    Done,
    ExportCritic,
    Learn,
    Learned,
    LoadCritic,
    Message,
    SaveCritic,
    StartCritic,
    Stop,
)
from asyncppo.transport.base import Channel
from trainer.stream.batch import Batch


@dataclass(frozen=True, slots=True)
class Values:
    """What the critics of a step say."""

    values: torch.Tensor  # [M, T] after learning: what the targets are made of
    fresh: torch.Tensor  # [M, T] before learning, or [0, 0] where nobody asked (`critic.fresh_values`)
    metrics: dict[str, float]
    """As `critic/m/name`."""


NO_VALUES = Values(torch.zeros((0, 0)), torch.zeros((0, 0)), {})
"""Of no critics."""


def _stack(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values) if values else torch.zeros((0, 0))


class Critics:
    """M critics, each behind a channel; M may be 0. Only rank 0 of the learner has one."""

    def __init__(self, config: Config, channels: Sequence[Channel]) -> None:
        self._config = config
        self._channels = channels
        self._step = -1

    def wait_until_ready(self) -> None:
        """Raises EngineError or StallError when a critic does not come up."""
        for index in range(len(self._channels)):
            self._answer(index, CriticReady, "come up")

    def learn(self, batch: Batch, rewards: torch.Tensor, step: int) -> None:
        """Send the batch to all critics; each begins at once and `values` waits for them.

        Args:
            batch: N responses with T tokens.
            rewards: [T], `targets.rewards`.
            step: the version that is trained, or below 0 in the warm start.

        A response of truncated length teaches nothing where `algorithm.truncated` masks it or bootstraps it.
        """
        self._step = step
        settings = self._config.algorithm
        usable = np.ones(len(batch.rewards), dtype=bool) if settings.truncated == "zero" else batch.truncated == 0
        for index, channel in enumerate(self._channels):
            own = usable & batch.learned_by(index, settings.shards)
            channel.send(
                Learn(
                    step=step,
                    input_ids=batch.input_ids,
                    sequence_lengths=batch.sequence_lengths,
                    response_lengths=batch.response_lengths,
                    rewards=rewards.numpy(),
                    shard=own.astype(np.uint8),
                    group_index=batch.group_index,
                )
            )

    def values(self) -> Values:
        """What `learn` asked for.

        Raises:
            EngineError: a critic failed.
            StallError: a critic did not answer within `critic.timeout_s`.
        """
        values: list[torch.Tensor] = []
        fresh: list[torch.Tensor] = []
        metrics: dict[str, float] = {}
        for index in range(len(self._channels)):
            learned = self._answer(index, Learned, "learn and give its values")
            values.append(torch.from_numpy(np.array(learned.values)))
            if len(learned.fresh_values):
                fresh.append(torch.from_numpy(np.array(learned.fresh_values)))
            metrics |= {f"critic/{index}/{name}": value for name, value in learned.metrics.items()}
            metrics[f"critic/{index}/seconds"] = learned.seconds
        whole = len(fresh) == len(values)
        return Values(_stack(values), _stack(fresh) if whole else torch.zeros((0, 0)), metrics)

    def save(self, directory: Path) -> None:
        """Every critic writes `critic_m` under the directory, all at the same time."""
        self._all(lambda index: SaveCritic(directory=str(directory / f"critic_{index}")), "save its state")

    def load(self, directory: Path) -> None:
        """Every critic goes on from `critic_m`."""
        self._all(lambda index: LoadCritic(directory=str(directory / f"critic_{index}")), "load its state")

    def export(self, directory: Path) -> None:
        """Every critic writes `critic_m` under the directory, an ordinary Hugging Face model with a scalar head."""
        self._all(lambda index: ExportCritic(directory=str(directory / f"critic_{index}")), "export its weights")

    def start(self, directory: Path) -> None:
        """Every critic begins anew from the `critic_m` that `export` wrote."""
        self._all(lambda index: StartCritic(directory=str(directory / f"critic_{index}")), "begin anew")

    def stop(self, reason: str) -> None:
        """The critics' processes end."""
        for channel in self._channels:
            channel.send(Stop(reason=reason))
            channel.close()

    def _all(self, message: Any, what: str) -> None:
        for index, channel in enumerate(self._channels):
            channel.send(message(index))
        for index in range(len(self._channels)):
            self._answer(index, Done, what)

    def _answer(self, index: int, kind: type[Message], what: str) -> Any:
        limit = self._config.critic.timeout_s
        deadline = time.monotonic() + limit
        while (left := deadline - time.monotonic()) > 0:
            message = self._channels[index].receive(left)
            if isinstance(message, CriticFailed):
                raise EngineError(f"critic {index} failed: {message.reason}")
            if isinstance(message, kind) and getattr(message, "step", self._step) == self._step:
                return message
        raise StallError(f"waited {limit:.0f} s for critic {index} to {what} (critic.timeout_s)")
