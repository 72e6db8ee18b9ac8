"""Claims about targets, with numbers that can be redone on paper.

Two groups of two responses with 2, 1, 2 and 1 tokens; rewards 1, 0, 0.5, 0.5; the third response is truncated.
"""

import math

import pytest
import torch

from asyncppo.config import AlgorithmConfig
from tests.model_maker import a_batch
from trainer.stream.batch import Batch
from trainer.targets import Targets, build_targets, returns

pytestmark = pytest.mark.unit

LENGTHS = (2, 1, 2, 1)


def batch(truncated: tuple[int, ...] = (0, 0, 1, 0)) -> Batch:
    return a_batch(
        prompts=(2, 3), responses=LENGTHS, rewards=(1.0, 0.0, 0.5, 0.5), truncated=truncated, shard=(0, 1, 1, 0)
    )


def targets(values: list[list[float]], **settings: object) -> Targets:
    given = torch.tensor(values) if values else torch.zeros((0, 0))
    return build_targets(batch(), given, AlgorithmConfig(critics=len(values), **settings))


def numbers(tensor: torch.Tensor) -> object:
    return pytest.approx(tensor.tolist(), abs=1e-5)


def test_the_return_is_the_reward_discounted_from_the_end_of_the_response() -> None:
    assert returns(batch(), AlgorithmConfig()).tolist() == [1.0, 1.0, 0.0, 0.5, 0.5, 0.5]
    assert returns(batch(), AlgorithmConfig(gamma=0.5)).tolist() == [0.5, 1.0, 0.0, 0.25, 0.5, 0.5]


def test_without_critics_the_advantage_is_grpos_and_nothing_is_masked() -> None:
    result = targets([])
    # group 1: mean 0.5, std 0.5, so +1 and -1 for all tokens of the response; group 2: all equal, so 0
    assert result.advantages.tolist() == pytest.approx([1, 1, -1, 0, 0, 0], abs=1e-5)
    assert result.keep_policy.all()
    assert result.keep_entropy.all()
    assert not result.value.any()
    assert not result.value_std.any()


def test_one_critic_gives_return_minus_value_and_no_masks() -> None:
    result = targets([[0.5, 0.75, 0.5, 0.25, 0.0, 1.0]])
    assert result.advantages.tolist() == pytest.approx([0.5, 0.25, -0.5, 0.25, 0.5, -0.5])
    assert result.value.tolist() == [0.5, 0.75, 0.5, 0.25, 0.0, 1.0]
    assert not result.value_std.any()
    assert result.keep_policy.all()
    assert result.keep_entropy.all()


def test_lambda_and_gamma_enter_the_advantages() -> None:
    result = targets([[0.5, 0.75, 0.5, 0.25, 0.0, 1.0]], gamma=0.5, lam=0.5)
    # first response: δ_2 = 1 − 0.75 = 0.25; δ_1 = 0.5·0.75 − 0.5 = −0.125; A_1 = δ_1 + 0.25 δ_2 = −0.0625
    assert result.advantages[:2].tolist() == pytest.approx([-0.0625, 0.25])


TWO = [
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
    [0.2, 0.2, 0.8, 0.6, 0.0, 0.4],  # std is half the distance: 0.1, 0, 0.2, 0, 0.4, 0.3
]


def test_two_critics_by_hand() -> None:
    result = targets(TWO, mask_fraction=0.5, entropy_filter=0.34)
    assert result.value.tolist() == pytest.approx([0.1, 0.2, 0.6, 0.6, 0.4, 0.7])
    assert result.value_std.tolist() == pytest.approx([0.1, 0.0, 0.2, 0.0, 0.4, 0.3])
    assert result.advantages.tolist() == pytest.approx([0.9, 0.8, -0.6, -0.1, 0.1, -0.2])
    # ⌊0.5·6⌋ = 3 of lowest std leave the policy term, ⌊0.34·6⌋ = 2 of highest leave the bonus
    assert result.keep_policy.tolist() == [False, False, True, False, True, True]
    assert result.keep_entropy.tolist() == [True, True, True, True, False, False]


def test_the_lower_of_two_critics_when_the_aggregation_is_min() -> None:
    result = targets(TWO, aggregation="min")
    assert result.value.tolist() == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.0, 0.4])
    assert result.advantages.tolist() == pytest.approx([1.0, 0.8, -0.4, -0.1, 0.5, 0.1])


def test_masks_can_be_of_each_response_instead_of_the_batch() -> None:
    result = targets(TWO, mask_fraction=0.5, entropy_filter=0.5, mask_scope="sequence")
    assert result.keep_policy.tolist() == [True, False, True, False, True, True]
    assert result.keep_entropy.tolist() == [False, True, True, True, False, True]


def test_identical_critics_keep_every_token() -> None:
    result = targets([TWO[0], TWO[0]], mask_fraction=0.5, entropy_filter=0.5)
    assert result.keep_policy.all()
    assert result.keep_entropy.all()


def test_a_truncated_response_ends_with_value_zero_when_truncated_is_zero() -> None:
    result = targets([[0.0, 0.0, 0.0, 0.25, 0.75, 0.0]], truncated="zero")
    assert result.advantages[3:5].tolist() == pytest.approx([0.25, -0.25])
    assert result.keep_policy.all()


def test_a_truncated_response_bootstraps_from_its_last_value_when_truncated_is_bootstrap() -> None:
    result = targets([[0.5, 0.5, 0.0, 0.25, 0.75, 0.0]], truncated="bootstrap")
    # the last value known is 0.75: δ_2 = 0.5 + 0.75 − 0.75, δ_1 = 0.75 − 0.25; finished responses end with 0
    assert result.advantages[3:5].tolist() == pytest.approx([1.0, 0.5])
    assert result.advantages[:2].tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("values", [[], TWO[:1], TWO])
def test_a_truncated_response_leaves_both_losses_when_truncated_is_mask(values: list[list[float]]) -> None:
    kept, masked = targets(values), targets(values, truncated="mask")
    outside = torch.tensor([False, False, False, True, True, False])
    assert torch.equal(masked.keep_policy, kept.keep_policy & ~outside)
    assert torch.equal(masked.keep_entropy, kept.keep_entropy & ~outside)
    assert torch.equal(masked.advantages, kept.advantages)


def test_whitening_gives_the_batchs_advantages_mean_0_and_std_1() -> None:
    plain, white = targets(TWO), targets(TWO, whiten_advantages=True)
    assert float(white.advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(white.advantages.std(correction=0)) == pytest.approx(1, abs=1e-6)
    centred = plain.advantages - plain.advantages.mean()
    assert white.advantages.tolist() == numbers(centred / centred.square().mean().sqrt())
    assert torch.equal(white.keep_policy, plain.keep_policy)


def test_targets_have_one_entry_for_each_response_token_whatever_the_switches() -> None:
    for values in ([], TWO[:1], TWO, [*TWO, TWO[0]]):
        result = targets(values)
        assert {part.shape for part in (result.advantages, result.value, result.value_std)} == {(sum(LENGTHS),)}
        assert {part.dtype for part in (result.keep_policy, result.keep_entropy)} == {torch.bool}
        assert all(math.isfinite(number) for number in result.advantages.tolist())
