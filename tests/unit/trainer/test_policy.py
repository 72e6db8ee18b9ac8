"""Claims about the actor: its update is the batch's, however that is cut, ordered or masked. Plain engine, float32."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncppo import algorithm
from asyncppo.config import Config
from tests.model_maker import a_batch, a_config, a_model, a_world, largest_difference, make_model, reorder, weights_of
from trainer.model.policy import Policy, Scores, objective
from trainer.stream.batch import Batch
from trainer.targets import TargetBuilder, Targets

pytestmark = pytest.mark.unit


STEP = 1e-5
"""Learning rate where weights are compared. Adam's first step is about ± this for every weight: a wrong gradient
differs by up to twice as much, and rounding, where a gradient is almost 0, by far less."""


def some_values(batch: Batch) -> torch.Tensor:
    """[2, T], different at every token."""
    tokens = len(batch.response_ids)
    return torch.stack((torch.linspace(-0.5, 0.5, tokens), torch.linspace(0.4, -0.1, tokens).square()))


def some_targets(batch: Batch, config: Config) -> Targets:
    return TargetBuilder(config).build(batch, some_values(batch), None)


def updated(
    directory: Path,
    *overrides: str,
    batch: Batch | None = None,
    targets: Targets | None = None,
    scores: Scores | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights and metrics after one pass of a new policy."""
    config = a_config(directory, *overrides)
    policy = Policy(config, a_world())
    batch = batch or a_batch()
    targets = targets or some_targets(batch, config)
    metrics = policy.update(batch, scores or policy.score(batch), targets, use=0)
    return weights_of(policy.network), metrics


def logprobs_of(policy: Policy, batch: Batch) -> torch.Tensor:
    logprobs = policy.score(batch).logprobs
    assert logprobs is not None
    return logprobs


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
        assert logprobs_of(policy, batch).tolist() == pytest.approx(expected, abs=1e-5)


def test_log_probs_are_at_the_temperature_of_sampling(tmp_path: Path) -> None:
    cold, warm = (
        logprobs_of(Policy(a_config(tmp_path, f"sampling.temperature={temperature}"), a_world()), a_batch())
        for temperature in (0.5, 1.0)
    )
    assert not torch.allclose(cold, warm, atol=0.01)


SWITCHES: dict[str, tuple[str, ...]] = {
    "decoupled PPO": ("algorithm.loss_aggregation=seq-mean-token-mean",),
    "DAPO": ("algorithm.loss_aggregation=token-mean", "algorithm.clip_high=0.28", "actor.minibatches=3"),
    "sums": ("algorithm.loss_aggregation=seq-mean-token-sum",),
    "GSPO": (
        "algorithm.ratio=sequence",
        "algorithm.clip_low=0.01",
        "algorithm.clip_high=0.01",
        "algorithm.loss_aggregation=constant",
        "actor.minibatches=2",
    ),
    "MinPRO": ("algorithm.ratio=prefix-min", "algorithm.dual_clip=1.5", "actor.minibatches=2"),
    "DPPO": ("algorithm.trust=divergence", "algorithm.divergence_limit=0.002"),
    "weights of responses": (
        "algorithm.behaviour_level=sequence",
        "algorithm.behaviour_mode=clamp",
        "algorithm.behaviour_cap=1.05",
    ),
    "A-3PO": ("algorithm.proximal=interpolate", "actor.minibatches=2"),
    "no correction": ("algorithm.proximal=behaviour", "algorithm.behaviour_mode=none"),
    "a reference": ("algorithm.kl_coef=0.5", "actor.minibatches=2"),
}
"""Every switch of the policy loss, in settings under which it says something else than the default."""

RATE = f"actor.learning_rate={STEP}"


@torch.no_grad()
def off_policy(batch: Batch, policy: Policy) -> tuple[Batch, Scores]:
    """The batch as if an earlier policy had drawn it, and scores from before an update that has begun."""
    current = policy.score(batch)
    forward = policy._forward(policy.network, batch)[0]
    tokens = torch.arange(len(forward))
    proximal = forward + 0.3 * torch.sin(1.0 + tokens)
    behaviour = proximal + 0.1 * torch.cos(2.0 * tokens)
    ages = np.arange(len(batch.response_lengths), dtype=np.int32) % 3 + 1
    drawn = replace(
        batch,
        behaviour_logprobs=behaviour.numpy(),
        token_versions=np.repeat(batch.version - ages, batch.response_lengths).astype(np.int32),
    )
    reference = None if current.reference is None else current.reference + 0.2 * torch.sin(3.0 * tokens)
    return drawn, Scores(None if current.logprobs is None else proximal, current.entropy, reference)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_the_update_does_not_depend_on_the_micro_batches(tmp_path: Path, switches: tuple[str, ...]) -> None:
    settings = (*switches, RATE)
    batch, scores = off_policy(a_batch(), Policy(a_config(tmp_path, *settings), a_world()))
    weights, metrics = updated(tmp_path, *settings, "actor.micro_batch_tokens=1000", batch=batch, scores=scores)
    for budget in (1, 13):
        cut_weights, cut_metrics = updated(
            tmp_path, *settings, f"actor.micro_batch_tokens={budget}", batch=batch, scores=scores
        )
        assert largest_difference(cut_weights, weights) < 1e-6
        assert cut_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_the_update_does_not_depend_on_the_order_of_the_responses(tmp_path: Path, switches: tuple[str, ...]) -> None:
    order = [4, 0, 5, 2, 1, 3]
    settings = (*switches, RATE, "actor.minibatches=1")  # which responses are in a minibatch goes by their place
    config = a_config(tmp_path, *settings)
    batch, scores = off_policy(a_batch(), Policy(config, a_world()))
    targets = some_targets(batch, config)
    places = np.split(np.arange(len(batch.response_ids)), np.cumsum(batch.response_lengths)[:-1])
    moved = torch.from_numpy(np.concatenate([places[index] for index in order]))
    other = Targets(*(getattr(targets, name)[moved] for name in Targets.__slots__))
    moved_scores = Scores(*(None if (x := getattr(scores, name)) is None else x[moved] for name in Scores.__slots__))
    weights, metrics = updated(tmp_path, *settings, batch=batch, targets=targets, scores=scores)
    moved_weights, moved_metrics = updated(
        tmp_path, *settings, batch=reorder(batch, order), targets=other, scores=moved_scores
    )
    assert largest_difference(moved_weights, weights) < 1e-6
    assert moved_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("switches", list(SWITCHES.values())[2:], ids=list(SWITCHES)[2:])
def test_every_switch_changes_the_update(tmp_path: Path, switches: tuple[str, ...]) -> None:
    batch, scores = off_policy(a_batch(), Policy(a_config(tmp_path, *switches), a_world()))
    plain = tuple(switch for switch in switches if "minibatches" in switch)
    plain_batch, plain_scores = off_policy(a_batch(), Policy(a_config(tmp_path, *plain), a_world()))
    weights, _ = updated(tmp_path, *switches, RATE, batch=batch, scores=scores)
    plain_weights, _ = updated(tmp_path, *plain, RATE, batch=plain_batch, scores=plain_scores)
    assert largest_difference(weights, plain_weights) > 5e-6


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
    targets = some_targets(batch, config)
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
    before = policy.score(batch)
    good = torch.from_numpy(batch.rewards).repeat_interleave(torch.from_numpy(batch.response_lengths).long()) > 0.6
    everything = torch.ones_like(good)
    advantages = torch.where(good, 1.0, -1.0)
    nothing = torch.zeros_like(advantages)
    policy.update(batch, before, Targets(advantages, everything, everything, nothing, nothing), use=0)
    change = logprobs_of(policy, batch) - before.logprobs
    assert float(change[good].mean()) > 0
    assert float(change[~good].mean()) < 0


def test_the_entropy_bonus_raises_the_entropy(tmp_path: Path) -> None:
    batch = a_batch()
    policy = Policy(a_config(tmp_path, "algorithm.entropy_coef=1", "actor.learning_rate=1e-3"), a_world())
    tokens = torch.zeros(len(batch.response_ids))
    everything = torch.ones(len(tokens), dtype=torch.bool)
    targets = Targets(tokens, everything, everything, tokens, tokens)
    entropies = [policy.update(batch, policy.score(batch), targets, use)["entropy_sum"] for use in range(4)]
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_the_advantages_of_masked_tokens_change_nothing_even_when_they_are_not_finite(
    tmp_path: Path, bad: float
) -> None:
    batch = a_batch()
    targets = some_targets(batch, a_config(tmp_path))
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


def test_weights_for_the_engine_are_rounded_to_its_dtype(tmp_path: Path) -> None:
    policy = Policy(a_config(tmp_path), a_world())
    rounded, whole = policy.weights(torch.bfloat16), policy.weights()
    assert all(torch.equal(rounded[name], whole[name].bfloat16()) for name in whole)
    assert largest_difference(policy.weights(), whole) == 0


def test_the_probe_is_every_tokens_log_prob_at_temperature_1_by_the_weights_as_they_are(tmp_path: Path) -> None:
    policy = Policy(a_config(tmp_path, "sampling.temperature=0.5"), a_world())
    ids = np.arange(10, 30, dtype=np.int32)
    before = policy.probe(ids)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.mul_(1.25)
    probed = policy.probe(ids)
    plain = AutoModelForCausalLM.from_pretrained(a_model(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.25)
        logprobs = plain(input_ids=torch.from_numpy(ids).long()[None]).logits[0].log_softmax(-1)
    expected = [float(logprobs[at - 1, ids[at]]) for at in range(1, len(ids))]
    assert probed.tolist() == pytest.approx(expected, abs=1e-5)
    assert float((probed - before).abs().mean()) > 0.01
    assert not probed.requires_grad
    assert policy.probe(ids[:1]).shape == policy.probe(ids[:0]).shape == (0,)


def test_a_policy_that_goes_on_from_a_save_takes_the_same_step(tmp_path: Path) -> None:
    batch, config = a_batch(), a_config(tmp_path, "actor.schedule=cosine", "actor.warmup_steps=2")
    targets = some_targets(batch, config)
    first, second = Policy(config, a_world()), Policy(config, a_world())
    scores = first.score(batch)
    first.update(batch, scores, targets, use=0)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    assert second.update(batch, scores, targets, use=1) == first.update(batch, scores, targets, use=1)
    assert largest_difference(weights_of(second.network), weights_of(first.network)) == 0


# --- which policies meet in the loss ---------------------------------------------------------------------------------


def anchors(directory: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[tuple[torch.Tensor, ...]]:
    """(current, proximal, behaviour) of two steps, as `policy_loss` got them: one forward pass each, batch order."""
    seen = []
    loss = algorithm.policy_loss

    def spy(logprobs: torch.Tensor, proximal: torch.Tensor, behaviour: torch.Tensor, *args: object, **more: object):  # type: ignore[no-untyped-def]
        seen.append((logprobs.detach().clone(), proximal.clone(), behaviour.clone()))
        return loss(logprobs, proximal, behaviour, *args, **more)

    monkeypatch.setattr(algorithm, "policy_loss", spy)
    config = a_config(directory, *overrides, "actor.micro_batch_tokens=1000", "actor.learning_rate=1e-2")
    policy, batch = Policy(config, a_world()), aged_batch()
    scores, targets = policy.score(batch), some_targets(batch, config)
    for use in range(2):
        policy.update(batch, scores, targets, use)
    assert len(seen) == 2
    return seen


def aged_batch() -> Batch:
    """Responses 0, 1, 2, 3, 4 and 5 versions old."""
    batch = a_batch(version=6)
    ages = np.arange(6, dtype=np.int32)
    return replace(batch, token_versions=np.repeat(6 - ages, batch.response_lengths).astype(np.int32))


def test_the_recomputed_proximal_is_the_actor_when_the_update_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = anchors(tmp_path, monkeypatch)
    torch.testing.assert_close(first[1], first[0], atol=1e-6, rtol=0)
    assert torch.equal(second[1], first[1])
    assert not torch.allclose(second[0], first[0], atol=1e-3)


def test_the_behaviour_policy_as_proximal_leaves_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.from_numpy(aged_batch().behaviour_logprobs)
    for _, proximal, behaviour in anchors(tmp_path, monkeypatch, "algorithm.proximal=behaviour"):
        assert torch.equal(proximal, drawn)
        assert torch.equal(behaviour, drawn)


def test_the_interpolated_proximal_is_nearer_to_the_current_policy_the_older_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = aged_batch()
    drawn = torch.from_numpy(batch.behaviour_logprobs)
    share = torch.tensor([1.0, 1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5])  # of the behaviour policy, by age
    share = share.repeat_interleave(torch.from_numpy(batch.response_lengths).long())
    for current, proximal, behaviour in anchors(tmp_path, monkeypatch, "algorithm.proximal=interpolate"):
        torch.testing.assert_close(proximal, share * drawn + (1 - share) * current, atol=1e-5, rtol=0)
        assert torch.equal(behaviour, drawn)


@pytest.mark.parametrize("proximal", ["interpolate", "behaviour"])
def test_without_a_recomputed_proximal_there_is_no_forward_pass_for_it(tmp_path: Path, proximal: str) -> None:
    policy = Policy(a_config(tmp_path, f"algorithm.proximal={proximal}"), a_world())
    assert policy.score(a_batch()) == Scores(None, None, None)


def test_scores_hold_the_entropy_before_every_token(tmp_path: Path) -> None:
    batch, plain = a_batch(), AutoModelForCausalLM.from_pretrained(a_model(), dtype=torch.float32)
    policy = Policy(a_config(tmp_path), a_world())
    entropy, expected, start = policy.score(batch).entropy, [], 0
    for length, response in zip(batch.sequence_lengths.tolist(), batch.response_lengths.tolist(), strict=True):
        ids = torch.from_numpy(batch.input_ids[start : start + length]).long()
        with torch.no_grad():
            logits = plain(input_ids=ids[None]).logits[0]
        expected += torch.distributions.Categorical(logits=logits).entropy()[length - response - 1 : -1].tolist()
        start += length
    assert entropy is not None
    assert entropy.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_objective_is_what_the_config_says(tmp_path: Path) -> None:
    settings = {
        "clip_low": 0.1,
        "clip_high": 0.3,
        "dual_clip": 3.0,
        "ratio": "sequence",
        "trust": "divergence",
        "divergence_limit": 0.2,
        "behaviour_mode": "clamp",
        "behaviour_cap": 2.0,
        "behaviour_level": "sequence",
        "entropy_coef": 0.05,
        "kl_coef": 0.5,
    }
    config = a_config(tmp_path, *(f"algorithm.{name}={value}" for name, value in settings.items()))
    assert objective(config.algorithm) == algorithm.Objective(**settings)
    assert set(settings) == set(algorithm.Objective.__slots__)


# --- the reference ---------------------------------------------------------------------------------------------------


def test_without_a_coefficient_no_reference_is_loaded(tmp_path: Path) -> None:
    policy = Policy(a_config(tmp_path, "algorithm.reference=not/there"), a_world())
    assert policy.score(a_batch()).reference is None


def test_at_the_start_the_reference_is_the_actor_and_its_kl_has_no_gradient(tmp_path: Path) -> None:
    plain_weights, plain = updated(tmp_path)
    weights, metrics = updated(tmp_path, "algorithm.kl_coef=10")
    assert metrics["kl_reference_sum"] == pytest.approx(0, abs=1e-9)
    assert metrics["policy_loss"] == pytest.approx(plain["policy_loss"])
    assert metrics["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    assert largest_difference(weights, plain_weights) < 1e-6


def test_the_reference_stays_as_it_was_and_holds_the_actor_back(tmp_path: Path) -> None:
    batch, ends = a_batch(), []
    for coefficient in (1e-9, 10.0):
        config = a_config(
            tmp_path, f"algorithm.kl_coef={coefficient}", "actor.learning_rate=1e-3", "algorithm.entropy_coef=0"
        )
        policy = Policy(config, a_world())
        first = policy.score(batch)
        targets = some_targets(batch, config)
        for use in range(8):
            metrics = policy.update(batch, policy.score(batch), targets, use)
        assert torch.equal(policy.score(batch).reference, first.reference)
        assert not torch.equal(logprobs_of(policy, batch), first.logprobs)
        ends.append(metrics["kl_reference_sum"])
    assert ends[1] < 0.5 * ends[0]


def test_another_reference_is_the_one_named(tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=5)
    named = Policy(a_config(tmp_path, "algorithm.kl_coef=1", f"algorithm.reference={other}"), a_world())
    expected = logprobs_of(Policy(a_config(tmp_path, model=other), a_world()), a_batch())
    scores = named.score(a_batch())
    assert torch.equal(scores.reference, expected)
    assert not torch.allclose(scores.reference, scores.logprobs, atol=0.01)


# --- steps that are skipped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_advantage_that_is_not_finite_skips_the_steps_of_its_minibatches_alone(tmp_path: Path, bad: float) -> None:
    batch, config = a_batch(), a_config(tmp_path, "actor.minibatches=3", "algorithm.mask_fraction=0")
    targets = some_targets(batch, config)
    poisoned = replace(targets, advantages=targets.advantages.clone())
    poisoned.advantages[0] = bad
    policy = Policy(config, a_world())
    before = weights_of(policy.network)
    metrics = policy.update(batch, policy.score(batch), poisoned, 0)
    assert metrics["skipped"] == 1
    after = weights_of(policy.network)
    assert largest_difference(after, before) > 0
    assert all(bool(weights.isfinite().all()) for weights in after.values())
    assert policy.update(batch, policy.score(batch), targets, 1)["skipped"] == 0


def test_a_pass_whose_steps_are_all_skipped_changes_nothing(tmp_path: Path) -> None:
    batch, config = a_batch(), a_config(tmp_path, "actor.minibatches=2", "algorithm.mask_fraction=0")
    targets = some_targets(batch, config)
    policy = Policy(config, a_world())
    before = weights_of(policy.network)
    poisoned = replace(targets, advantages=targets.advantages * float("nan"))
    assert policy.update(batch, policy.score(batch), poisoned, 0)["skipped"] == 2
    assert largest_difference(weights_of(policy.network), before) == 0


@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_constant_of_the_loss_is_responses_times_the_longest_one_allowed(tmp_path: Path, minibatches: int) -> None:
    slow = ("actor.learning_rate=1e-12", f"actor.minibatches={minibatches}")
    _, sums = updated(tmp_path, *slow, "algorithm.loss_aggregation=seq-mean-token-sum")
    _, constant = updated(tmp_path, *slow, "algorithm.loss_aggregation=constant")
    assert constant["policy_loss"] == pytest.approx(sums["policy_loss"] / 8, rel=1e-4)
