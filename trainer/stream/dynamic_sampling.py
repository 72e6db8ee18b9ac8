"""Dynamic sampling (DAPO, arXiv 2503.14476): a group whose responses all have the same reward is not trained on."""

from __future__ import annotations

import numpy as np

from asyncppo.config import Config
from asyncppo.errors import StallError
from asyncppo.messages import Group

_BATCHES_WITHOUT_SIGNAL = 50
"""So many batches of groups in a row that have no signal end the run."""


class DynamicSampling:
    """Which groups are refused (`stream.drop_equal_rewards`), and how many in a row."""

    def __init__(self, config: Config) -> None:
        self._asked_for = config.stream.drop_equal_rewards
        self._most = _BATCHES_WITHOUT_SIGNAL * config.stream.prompts_per_batch
        self._in_a_row = 0

    def refuses(self, group: Group) -> bool:
        """Whether the group has no signal: all responses one reward and no process rewards, so every advantage is 0.

        Raises:
            StallError: so have the last groups all: a batch would never come.
        """
        if not self._asked_for or np.ptp(group.rewards) > 0 or group.step_rewards.any():
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        if self._in_a_row >= self._most:
            raise StallError(
                f"waited for a group whose responses differ in reward: the last {self._in_a_row} groups had one reward "
                f"each, {group.rewards[0]:g} in the last one; are the problems all too hard or all too easy, or does "
                "the reward function fail? (stream.drop_equal_rewards)"
            )
        return True
