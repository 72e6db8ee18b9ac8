"""What was dropped against what was consumed: whether drops favour short answers, or those of a certain reward."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import numpy as np

from asyncppo.messages import Group

log = logging.getLogger("asyncppo.intake")

_FAR_ABOVE = 1.5
"""Dropped groups whose mean length is so many times the consumed ones' are a bias."""
_FEW = 20
"""No verdict on fewer groups than this on either side."""


@dataclass(slots=True)
class Means:
    """Running means over groups: tokens of a response, and reward."""

    groups: int = 0
    length: float = math.nan
    reward: float = math.nan

    def add(self, group: Group) -> None:
        """Count one more group."""
        self.groups += 1
        length, reward = float(group.lengths.mean()), float(group.rewards.mean(dtype=np.float64))
        if self.groups == 1:
            self.length, self.reward = length, reward
        else:
            self.length += (length - self.length) / self.groups
            self.reward += (reward - self.reward) / self.groups


@dataclass(slots=True)
class Drops:
    """Of this process. Those without a group (it never came) have no length and count in neither mean."""

    consumed: Means = field(default_factory=Means)
    dropped: Means = field(default_factory=Means)
    _warned_at: int = _FEW // 2

    def drop(self, group: Group) -> None:
        """A group that had come was dropped; warns of a bias, again when there are twice as many."""
        self.dropped.add(group)
        if self.consumed.groups < _FEW or self.dropped.groups < 2 * self._warned_at:
            return
        if self.dropped.length > _FAR_ABOVE * self.consumed.length:
            self._warned_at = self.dropped.groups
            log.warning(
                "drops are biased: the %d dropped groups have %.0f tokens a response on average, the %d consumed ones "
                "%.0f, so the trainer sees too few long answers; stream.slow=wait, a larger stream.max_staleness or "
                "more rollout servers would keep them",
                self.dropped.groups,
                self.dropped.length,
                self.consumed.groups,
                self.consumed.length,
            )
