"""Claims about the groups that are refused: without signal, or with responses that could not be graded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from asyncppo.errors import StallError
from asyncppo.messages import Group
from tests.stream_maker import a_config, a_group
from trainer.stream import dynamic_sampling
from trainer.stream.dynamic_sampling import DynamicSampling
from trainer.stream.ledger import NO_SIGNAL, NOT_GRADED

pytestmark = pytest.mark.unit


def sampling(on_error: str, *, drop_equal: bool = False) -> DynamicSampling:
    stream = {"drop_equal_rewards": drop_equal}
    return DynamicSampling(a_config(reward={"on_error": on_error}, stream=stream, batch=2, group_size=3))


def graded(rewards: Sequence[float], errors: Sequence[int]) -> Group:
    return a_group(1, [[(0, 1)]] * len(rewards), rewards=rewards, reward_errors=np.array(errors, np.uint8))


@pytest.mark.parametrize(
    ("on_error", "errors", "refusal"),
    [
        ("mask", (0, 1, 0), None),
        ("mask", (1, 1, 1), NOT_GRADED),
        ("zero", (1, 1, 1), None),
        ("drop", (0, 1, 0), NOT_GRADED),
        ("drop", (0, 0, 0), None),
    ],
)
def test_reward_errors_refuse_a_group_as_the_policy_says(
    on_error: str, errors: tuple[int, ...], refusal: str | None
) -> None:
    assert sampling(on_error).refusal(graded((1, 0, 0), errors)) == refusal


def test_equal_rewards_are_those_of_the_responses_that_are_trained_on() -> None:
    differs_by_its_error = graded((1, 0, 1), (0, 1, 0))
    assert sampling("mask", drop_equal=True).refusal(differs_by_its_error) == NO_SIGNAL
    assert sampling("zero", drop_equal=True).refusal(differs_by_its_error) is None
    assert sampling("mask").refusal(differs_by_its_error) is None


def test_a_grader_that_grades_nothing_ends_the_run_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_sampling, "_BATCHES_WITHOUT_SIGNAL", 2)
    refuses, failed = sampling("mask"), graded((0, 0, 0), (1, 1, 1))
    for _ in range(3):
        assert refuses.refusal(failed) == NOT_GRADED
    assert refuses.refusal(graded((1, 0, 0), (0, 0, 0))) is None  # it starts again
    for _ in range(3):
        assert refuses.refusal(failed) == NOT_GRADED
    with pytest.raises(StallError, match=r"the last 4 groups were refused.*does the reward function fail"):
        refuses.refusal(failed)
