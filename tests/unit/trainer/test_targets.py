"""Claims about targets, with numbers that can be redone on paper.

Two groups of two responses with 2, 1, 2 and 1 tokens; rewards 1, 0, 0.5, 0.5; the third response is truncated.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from asyncppo.config import ActorConfig, AlgorithmConfig, Config, DataConfig, RunConfig
from tests.model_maker import a_batch
from tests.stream_maker import a_buffered, a_group
from trainer.stream.batch import Batch, pack
from trainer.targets import TargetBuilder, Targets, returns, rewards

pytestmark = pytest.mark.unit

LENGTHS = (2, 1, 2, 1)


def batch(truncated: tuple[int, ...] = (0, 0, 1, 0)) -> Batch:
    return a_batch(
        prompts=(2, 3), responses=LENGTHS, rewards=(1.0, 0.0, 0.5, 0.5), truncated=truncated, shard=(0, 1, 1, 0)
    )


def a_config(seed: int = 7, **settings: object) -> Config:
    algorithm = AlgorithmConfig(**settings)
    return Config(run=RunConfig(seed=seed), data=DataConfig(train=""), actor=ActorConfig(path=""), algorithm=algorithm)


def targets(
    values: list[list[float]], *, of: Batch | None = None, entropy: list[float] | None = None, **settings: object
) -> Targets:
    given = torch.tensor(values) if values else torch.zeros((0, 0))
    signal = None if entropy is None else torch.tensor(entropy)
    return TargetBuilder(a_config(critics=len(values), **settings)).build(of or batch(), given, signal)


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


# --- dense rewards ---------------------------------------------------------------------------------------------------


def a_batch_with_steps() -> Batch:
    """The first response's first token earns 0.25, the third response's first token 1."""
    return replace(batch(), step_rewards=np.array([0.25, 0, 0, 1, 0, 0], dtype=np.float32))


def test_step_rewards_are_added_to_the_final_reward_of_the_last_token() -> None:
    assert rewards(batch()).tolist() == [0.0, 1.0, 0.0, 0.0, 0.5, 0.5]
    assert rewards(a_batch_with_steps()).tolist() == [0.25, 1.0, 0.0, 1.0, 0.5, 0.5]


def test_step_rewards_enter_the_returns_from_their_token_backward() -> None:
    assert returns(a_batch_with_steps(), AlgorithmConfig()).tolist() == [1.25, 1.0, 0.0, 1.5, 0.5, 0.5]
    assert returns(a_batch_with_steps(), AlgorithmConfig(gamma=0.5)).tolist() == [0.75, 1.0, 0.0, 1.25, 0.5, 0.5]


def test_step_rewards_enter_the_advantages_of_critics() -> None:
    result = targets([[0.5, 0.75, 0.5, 0.25, 0.0, 1.0]], of=a_batch_with_steps(), gamma=0.5, lam=0.5)
    # first response: δ_2 = 1 − 0.75, δ_1 = 0.25 + 0.5·0.75 − 0.5 = 0.125, A_1 = δ_1 + 0.25 δ_2; third response:
    # δ_2 = 0.5, δ_1 = 1 + 0 − 0.25, A_1 = 0.75 + 0.25·0.5
    assert result.advantages.tolist() == pytest.approx([0.1875, 0.25, -0.5, 0.875, 0.5, -0.5])


def test_without_critics_a_responses_step_rewards_count_with_its_final_one() -> None:
    result = targets([], of=a_batch_with_steps(), group_std=False)
    # in all 1.25 and 0, 1.5 and 0.5
    assert result.advantages.tolist() == pytest.approx([0.625, 0.625, -0.625, 0.5, 0.5, -0.5])


# --- switches of the advantages --------------------------------------------------------------------------------------


def test_without_group_std_the_advantage_is_the_reward_less_the_groups_mean() -> None:
    result = targets([], group_std=False)
    assert result.advantages.tolist() == pytest.approx([0.5, 0.5, -0.5, 0.0, 0.0, 0.0])


def test_the_length_adaptive_lambda_is_that_of_each_response_and_takes_lams_place() -> None:
    values = [[0.5, 0.75, 0.5, 0.25, 0.0, 1.0]]
    # alpha 1: 1 − 1/2 for responses of two tokens, 1 − 1/1 for those of one
    result = targets(values, lam_length_alpha=1.0, lam=0.125)
    # first: δ = 0.25, 0.25, so A_1 = 0.25 + 0.5·0.25; third: δ = −0.25, 0.5, so A_1 = −0.25 + 0.5·0.5
    assert result.advantages.tolist() == pytest.approx([0.375, 0.25, -0.5, 0.0, 0.5, -0.5])
    assert torch.equal(targets(values, lam=0.5).advantages, result.advantages)  # one token has nothing to discount


# --- what orders the tokens, and when --------------------------------------------------------------------------------


def test_masks_by_entropy_follow_the_entropy_and_not_the_critics() -> None:
    entropy = [0.5, 0.1, 0.6, 0.2, 0.3, 0.4]
    for values in ([], TWO[:1], TWO):
        result = targets(values, entropy=entropy, mask_signal="entropy", mask_fraction=0.5, entropy_filter=0.34)
        assert result.keep_policy.tolist() == [True, False, True, False, False, True]
        assert result.keep_entropy.tolist() == [False, True, False, True, True, True]


def test_random_masks_take_exactly_their_fractions_and_no_token_twice() -> None:
    result = targets(TWO, mask_signal="random", mask_fraction=0.5, entropy_filter=0.34)
    assert (int((~result.keep_policy).sum()), int((~result.keep_entropy).sum())) == (3, 2)
    assert (result.keep_policy | result.keep_entropy).all()  # one order: the lowest half and the highest third


def random_masks(seed: int, version: int) -> list[list[bool]]:
    given = torch.zeros((2, sum(LENGTHS) * 20))
    long = a_batch(
        prompts=(2, 3),
        responses=tuple(20 * n for n in LENGTHS),
        rewards=(1, 0, 1, 0),
        truncated=(0,) * 4,
        shard=(0, 1, 1, 0),
        version=version,
    )
    result = TargetBuilder(a_config(seed, mask_signal="random")).build(long, given, None)
    return [result.keep_policy.tolist(), result.keep_entropy.tolist()]


def test_random_masks_are_the_same_after_a_resume_and_others_at_other_versions_and_seeds() -> None:
    assert random_masks(7, 4) == random_masks(7, 4)
    assert random_masks(7, 4) != random_masks(7, 5)
    assert random_masks(7, 4) != random_masks(8, 4)


@pytest.mark.parametrize(("version", "policy", "entropy"), [(0, 0, 3), (2, 1, 3), (4, 3, 3), (9, 3, 0)])
def test_scheduled_fractions_are_those_of_the_batchs_version(version: int, policy: int, entropy: int) -> None:
    result = targets(
        [[0.1 * n for n in range(6)], [0.0] * 6],
        of=replace(batch(), version=version),
        mask_fraction=[(0, 0.0), (4, 0.5)],
        entropy_filter=[(4, 0.5), (8, 0.0)],
    )
    assert int((~result.keep_policy).sum()) == policy  # ⌊6k⌋ for k = 0, 0.25, 0.5, 0.5
    assert int((~result.keep_entropy).sum()) == entropy


# --- confidence ------------------------------------------------------------------------------------------------------


def test_confidence_weighs_critics_by_the_inverse_of_their_error_where_they_did_not_learn() -> None:
    # returns 1, 1, 0, 0.5, 0.5, 0.5; critic 0 learned from responses 1 and 4, critic 1 from responses 2 and 3
    values = [[9.0, 9.0, 0.5, 1.0, 0.0, 9.0], [1.5, 0.0, 9.0, 9.0, 9.0, 0.5]]
    # critic 0 is judged on responses 2 and 3: 3·0.25/3; critic 1 on responses 1 and 4: (0.25 + 1 + 0)/3
    first, second = 0.25, 1.25 / 3
    builder = TargetBuilder(a_config(aggregation="confidence"))
    result = builder.build(batch(), torch.tensor(values), None)
    assert builder.errors == pytest.approx([first, second])
    share = (1 / first) / (1 / first + 1 / second)
    expected = [share * one + (1 - share) * two for one, two in zip(*values, strict=True)]
    assert result.value.tolist() == pytest.approx(expected)
    builder.build(batch(), torch.zeros((2, 6)), None)  # errors: (0 + 2·0.25)/3 and (1 + 1 + 0.25)/3
    assert builder.errors == pytest.approx([0.9 * first + 0.1 * 0.5 / 3, 0.9 * second + 0.1 * 0.75])


def test_with_shared_shards_confidence_judges_critics_on_all_tokens() -> None:
    builder = TargetBuilder(a_config(aggregation="confidence", shards="shared"))
    builder.build(batch(), torch.zeros((2, 6)), None)
    assert builder.errors == pytest.approx([2.75 / 6] * 2)  # 1, 1, 0 and 0.25 three times


def test_confidence_goes_on_from_the_errors_of_a_checkpoint() -> None:
    first, config = torch.tensor(TWO), a_config(aggregation="confidence")
    whole = TargetBuilder(config)
    whole.build(batch(), first, None)
    resumed = TargetBuilder(config, whole.errors)
    assert resumed.errors == whole.errors
    expected, found = (builder.build(batch(), first.flip(1), None) for builder in (whole, resumed))
    assert torch.equal(found.value, expected.value)
    assert resumed.errors == whole.errors
    fresh = TargetBuilder(config).build(batch(), first.flip(1), None)
    assert not torch.equal(fresh.value, expected.value)


def test_other_aggregations_remember_nothing() -> None:
    builder = TargetBuilder(a_config())
    builder.build(batch(), torch.tensor(TWO), None)
    assert builder.errors == []


# --- reward errors ---------------------------------------------------------------------------------------------------


def graded(mask_errors: bool) -> Batch:
    """A group of three with rewards 1, an error and 0.5, and a group of two with rewards 0 and an error."""
    first = a_group(1, [[(4, 2)], [(4, 1)], [(4, 1)]], rewards=[1, 0, 0.5], reward_errors=np.array([0, 1, 0], np.uint8))
    second = a_group(2, [[(4, 1)], [(4, 2)]], rewards=[0, 0], reward_errors=np.array([0, 1], np.uint8))
    held = [a_buffered(4, 1, group=first), a_buffered(4, 2, group=second)]
    return pack(held, [(0, 1, 1), (0, 1)], version=4, mask_errors=mask_errors)


def test_a_masked_reward_error_is_no_part_of_its_groups_baseline() -> None:
    masked, zero = (targets([], of=graded(mask_errors=mask), group_std=False) for mask in (True, False))
    # of 1 and 0.5 the mean is 0.75; of 0 alone it is 0
    assert masked.advantages.tolist() == pytest.approx([0.25, 0.25, -0.25, 0])
    # of 1, 0 and 0.5 it is 0.5
    assert zero.advantages.tolist() == pytest.approx([0.5, 0.5, -0.5, 0, 0, 0, 0])
    std = targets([], of=graded(mask_errors=True))
    assert std.advantages.tolist() == pytest.approx([1, 1, -1, 0], abs=1e-4)


def test_a_masked_reward_error_is_in_no_critics_shard_and_not_in_the_masks_counts() -> None:
    batch = graded(mask_errors=True)
    assert [batch.learned_by(m, "disjoint").tolist() for m in (0, 1)] == [[True, False, True], [False, True, False]]
    signal = [[0.0, 0.2, 0.4, 0.6], [0.2, 0.2, 0.8, 0.6]]
    result = targets(signal, of=batch, mask_fraction=0.25, entropy_filter=0.5)
    assert (int((~result.keep_policy).sum()), int((~result.keep_entropy).sum())) == (1, 2)  # of 4 tokens, not of 7
    assert returns(batch, AlgorithmConfig()).tolist() == [1, 1, 0.5, 0]
