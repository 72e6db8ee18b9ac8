"""Groups that there is nothing to learn from, and that are therefore not trained on.

Dynamic sampling (DAPO, arXiv 2503.14476): all responses have the same reward. And reward errors: no response could be
graded, or `reward.on_error` is `drop` and one could not.
"""

from __future__ import annotations

import numpy as np

from asyncppo.config import Config
from asyncppo.errors import StallError
from asyncppo.messages import Group
from trainer.stream.ledger import NO_SIGNAL, NOT_GRADED

_BATCHES_WITHOUT_SIGNAL = 50
"""So many batches of groups in a row that are refused end the run."""


class DynamicSampling:
    """Which groups are refused, and how many in a row."""

    def __init__(self, config: Config) -> None:
        self._equal_rewards = config.stream.drop_equal_rewards
        self._on_error = config.reward.on_error
        self._most = _BATCHES_WITHOUT_SIGNAL * config.stream.prompts_per_batch
        self._in_a_row = 0

    def refusal(self, group: Group) -> str | None:
        """Why the group is dropped, as the ledger calls it; None for one to train on.

        `NO_SIGNAL`: all responses, reward errors that are masked apart, have one reward and no process rewards, so
        every advantage is 0. `NOT_GRADED`: see the module.

        Raises:
            StallError: so have the last groups all: a batch would never come.
        """
        reason = self._reason(group)
        if reason is None:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        if self._in_a_row >= self._most and reason == NOT_GRADED:
            raise StallError(
                f"waited for a group that is graded: the last {self._in_a_row} groups were refused, the last one for "
                "its reward errors: does the reward function fail, or do the workers lack time or memory? (reward)"
            )
        if self._in_a_row >= self._most:
            raise StallError(
                f"waited for a group whose responses differ in reward: the last {self._in_a_row} groups had one reward "
                f"each, {group.rewards[0]:g} in the last one; are the problems all too hard or all too easy, or does "
                "the reward function fail? (stream.drop_equal_rewards)"
            )
        return reason

    def _reason(self, group: Group) -> str | None:
        graded = group.reward_errors == 0
        if self._on_error == "drop" and not graded.all():
            return NOT_GRADED
        if self._on_error == "mask" and not graded.any():
            return NOT_GRADED
        rewards = group.rewards[graded] if self._on_error == "mask" else group.rewards
        if self._equal_rewards and np.ptp(rewards) == 0 and not group.step_rewards.any():
            return NO_SIGNAL
        return None
