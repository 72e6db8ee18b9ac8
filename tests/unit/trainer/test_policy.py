"""Claims about the actor: its update is the batch's, however that is cut, ordered or masked. Plain engine, float32."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.model_maker import a_batch, a_config, a_model, a_world, largest_difference, reorder, weights_of
from trainer.model.policy import Policy
from trainer.stream.batch import Batch
from trainer.targets import Targets, build_targets

pytestmark = pytest.mark.unit


STEP = 1e-5
"""Learning rate where weights are compared. Adam's first step is about ± this for every weight: a wrong gradient
differs by up to twice as much, and rounding, where a gradient is almost 0, by far less."""


def some_values(batch: Batch) -> torch.Tensor:
    """[2, T], different at every token."""
    tokens = len(batch.response_ids)
    return torch.stack((torch.linspace(-0.5, 0.5, tokens), torch.linspace(0.4, -0.1, tokens).square()))


def updated(
    directory: Path, *overrides: str, batch: Batch | None = None, targets: Targets | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights and metrics after one pass of a new policy."""
    config = a_config(directory, *overrides)
    policy = Policy(config, a_world())
    batch = batch or a_batch()
    targets = targets or build_targets(batch, some_values(batch), config.algorithm)
    metrics = policy.update(batch, policy.logprobs(batch), targets, use=0)
    return weights_of(policy.network), metrics


def test_log_probs_are_in_the_order_of_the_batch_whatever_the_micro_batches(tmp_path: Path) -> None:
    batch, plain = a_batch(), AutoModelForCausalLM.from_pretrained(a_model(), dtype=torch.float32)
    expected, start = [], 0
    for length, response in zip(batch.sequence_lengths.tolist(), batch.response_lengths.tolist(), strict=True):
        ids = torch.from_numpy(batch.input_ids[start : start + length]).long()
        with torch.no_grad():
            logprobs = plain(input_ids=ids[None]).logits[0].log_softmax(-1)
        expected += [float(logprobs[at - 1, ids[at]]) for at in range(length - response, length)]
        start += length
    for budget in (1, 9, 16, 1000):
        policy = Policy(a_config(tmp_path, f"actor.micro_batch_tokens={budget}"), a_world())
        assert policy.logprobs(batch).tolist() == pytest.approx(expected, abs=1e-5)


def test_log_probs_are_at_the_temperature_of_sampling(tmp_path: Path) -> None:
    cold, warm = (
        Policy(a_config(tmp_path, f"sampling.temperature={temperature}"), a_world()).logprobs(a_batch())
        for temperature in (0.5, 1.0)
    )
    assert not torch.allclose(cold, warm, atol=0.01)


@pytest.mark.parametrize(
    ("aggregation", "minibatches"), [("seq-mean-token-mean", 1), ("token-mean", 3), ("seq-mean-token-sum", 1)]
)
def test_the_update_does_not_depend_on_the_micro_batches(tmp_path: Path, aggregation: str, minibatches: int) -> None:
    settings = (
        f"algorithm.loss_aggregation={aggregation}",
        f"actor.minibatches={minibatches}",
        f"actor.learning_rate={STEP}",
    )
    weights, metrics = updated(tmp_path, *settings, "actor.micro_batch_tokens=1000")
    for budget in (1, 13):
        cut_weights, cut_metrics = updated(tmp_path, *settings, f"actor.micro_batch_tokens={budget}")
        assert largest_difference(cut_weights, weights) < 1e-6
        assert cut_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_the_update_does_not_depend_on_the_order_of_the_responses(tmp_path: Path) -> None:
    batch, order = a_batch(), [4, 0, 5, 2, 1, 3]
    config = a_config(tmp_path)
    targets = build_targets(batch, some_values(batch), config.algorithm)
    places = np.split(np.arange(len(batch.response_ids)), np.cumsum(batch.response_lengths)[:-1])
    moved = torch.from_numpy(np.concatenate([places[index] for index in order]))
    other = Targets(*(getattr(targets, name)[moved] for name in Targets.__slots__))
    rate = f"actor.learning_rate={STEP}"
    weights, metrics = updated(tmp_path, rate, targets=targets)
    moved_weights, moved_metrics = updated(tmp_path, rate, batch=reorder(batch, order), targets=other)
    assert largest_difference(moved_weights, weights) < 1e-6
    assert moved_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_on_the_first_step_of_an_update_the_ratio_is_1_and_nothing_is_clipped(tmp_path: Path) -> None:
    _, metrics = updated(tmp_path)
    assert metrics["clipped"] == 0
    assert metrics["ratio_sum"] == pytest.approx(metrics["tokens"], rel=1e-6)
    assert metrics["kl_proximal_sum"] == pytest.approx(0, abs=1e-9)


def test_with_a_tiny_learning_rate_later_minibatches_are_not_clipped_either(tmp_path: Path) -> None:
    settings = ("actor.minibatches=3", "algorithm.clip_low=1e-3", "algorithm.clip_high=1e-3")
    _, gentle = updated(tmp_path, *settings, "actor.learning_rate=1e-12")
    _, rough = updated(tmp_path, *settings, "actor.learning_rate=1e-2")
    assert gentle["clipped"] == 0
    assert gentle["ratio_sum"] == pytest.approx(gentle["tokens"], rel=1e-5)
    assert rough["clipped"] > 0


@pytest.mark.parametrize("minibatches", [1, 2, 3])
def test_a_pass_uses_every_token_once_whatever_the_minibatches(tmp_path: Path, minibatches: int) -> None:
    batch = a_batch()
    config = a_config(tmp_path)
    targets = build_targets(batch, some_values(batch), config.algorithm)
    _, metrics = updated(tmp_path, f"actor.minibatches={minibatches}")
    assert metrics["tokens"] == len(batch.response_ids)
    assert metrics["policy_kept"] == int(targets.keep_policy.sum())
    assert metrics["entropy_kept"] == int(targets.keep_entropy.sum())


def test_a_pass_takes_one_optimizer_step_for_each_minibatch(tmp_path: Path) -> None:
    settings = ("actor.schedule=linear", "run.steps=1", "actor.minibatches=3")
    _, metrics = updated(tmp_path, *settings)  # rates 1, 2/3 and 1/3 of the peak
    assert metrics["learning_rate"] == pytest.approx(1e-4 / 3)


def test_losses_are_means_over_the_minibatches_so_that_their_number_does_not_scale_them(tmp_path: Path) -> None:
    slow = "actor.learning_rate=1e-12"  # all minibatches meet the same weights
    _, one = updated(tmp_path, slow, "algorithm.loss_aggregation=seq-mean-token-mean")
    _, three = updated(tmp_path, slow, "algorithm.loss_aggregation=seq-mean-token-mean", "actor.minibatches=3")
    assert three["policy_loss"] == pytest.approx(one["policy_loss"], rel=1e-4)  # 6 responses: three sets of two
    assert three["entropy_bonus"] == pytest.approx(one["entropy_bonus"], rel=1e-4)


def test_an_update_makes_tokens_of_positive_advantage_likelier_and_the_others_less(tmp_path: Path) -> None:
    batch = a_batch()
    policy = Policy(a_config(tmp_path, "algorithm.entropy_coef=0", "actor.learning_rate=1e-3"), a_world())
    before = policy.logprobs(batch)
    good = torch.from_numpy(batch.rewards).repeat_interleave(torch.from_numpy(batch.response_lengths).long()) > 0.6
    everything = torch.ones_like(good)
    advantages = torch.where(good, 1.0, -1.0)
    nothing = torch.zeros_like(advantages)
    policy.update(batch, before, Targets(advantages, everything, everything, nothing, nothing), use=0)
    change = policy.logprobs(batch) - before
    assert float(change[good].mean()) > 0
    assert float(change[~good].mean()) < 0


def test_the_entropy_bonus_raises_the_entropy(tmp_path: Path) -> None:
    batch = a_batch()
    policy = Policy(a_config(tmp_path, "algorithm.entropy_coef=1", "actor.learning_rate=1e-3"), a_world())
    tokens = torch.zeros(len(batch.response_ids))
    everything = torch.ones(len(tokens), dtype=torch.bool)
    targets = Targets(tokens, everything, everything, tokens, tokens)
    entropies = [policy.update(batch, policy.logprobs(batch), targets, use)["entropy_sum"] for use in range(4)]
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_the_advantages_of_masked_tokens_change_nothing_even_when_they_are_not_finite(
    tmp_path: Path, bad: float
) -> None:
    batch = a_batch()
    targets = build_targets(batch, some_values(batch), a_config(tmp_path).algorithm)
    assert not targets.keep_policy.all()
    poisoned = replace(targets, advantages=targets.advantages.masked_fill(~targets.keep_policy, bad))
    weights, metrics = updated(tmp_path, targets=targets)
    poisoned_weights, poisoned_metrics = updated(tmp_path, targets=poisoned)
    assert largest_difference(poisoned_weights, weights) == 0
    assert poisoned_metrics == metrics


def test_weights_are_by_their_hugging_face_names_and_a_copy(tmp_path: Path) -> None:
    policy = Policy(a_config(tmp_path), a_world())
    weights = policy.weights()
    plain = AutoModelForCausalLM.from_pretrained(a_model(), dtype=torch.float32)
    assert largest_difference(weights, weights_of(plain)) == 0
    weights["model.norm.weight"].zero_()
    assert policy.weights()["model.norm.weight"].any()


def test_a_policy_that_goes_on_from_a_save_takes_the_same_step(tmp_path: Path) -> None:
    batch, config = a_batch(), a_config(tmp_path, "actor.schedule=cosine", "actor.warmup_steps=2")
    targets = build_targets(batch, some_values(batch), config.algorithm)
    first, second = Policy(config, a_world()), Policy(config, a_world())
    proximal = first.logprobs(batch)
    first.update(batch, proximal, targets, use=0)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    assert second.update(batch, proximal, targets, use=1) == first.update(batch, proximal, targets, use=1)
    assert largest_difference(weights_of(second.network), weights_of(first.network)) == 0
