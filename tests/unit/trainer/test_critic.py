"""Claims about a critic, and about the line between it and the learner. Plain engine, float32, no socket."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from asyncppo import algorithm
from asyncppo.config import Config
from asyncppo.errors import EngineError, StallError
from asyncppo.messages import CriticReady, Done, Learn, Learned, ToCritic
from asyncppo.transport.memory import MemoryChannel
from tests.model_maker import a_batch, a_config, a_lesson, a_world, largest_difference, make_model, weights_of
from trainer import preflight
from trainer.model.critic import Critic, serve
from trainer.model.critics import Critics
from trainer.model.engine import StepReport

pytestmark = pytest.mark.unit

SHARD = (1, 0, 0, 1, 1, 0)
"""Responses with 4, 3 and 2 tokens are the critic's own; those with 1, 7 and 6 are not."""


def own_tokens() -> np.ndarray:
    return np.repeat(np.array(SHARD, dtype=bool), a_batch().response_lengths)


def a_critic(directory: Path, *overrides: str, index: int = 0) -> Critic:
    return Critic(a_config(directory, *overrides), index, a_world())


def a_task() -> np.ndarray:
    """Returns that a critic can learn: 1 for responses of an even number, −1 for the others."""
    lengths = a_batch().response_lengths
    return np.repeat(1.0 - 2.0 * (np.arange(len(lengths)) % 2), lengths).astype(np.float32)


def a_reward() -> torch.Tensor:
    """[T] rewards whose returns are `a_task`."""
    return torch.from_numpy(np.array(a_lesson(a_batch(), a_task(), SHARD).rewards))


def a_lesson_of(returns: np.ndarray, step: int = 0) -> Learn:
    return a_lesson(a_batch(), returns, SHARD, step)


def test_a_critic_learns_from_its_own_shard_alone(tmp_path: Path) -> None:
    elsewhere_changed = np.where(own_tokens(), a_task(), 1e6).astype(np.float32)
    here_changed = np.where(own_tokens(), a_task() + 1, a_task()).astype(np.float32)
    critics = []
    for returns in (a_task(), elsewhere_changed, here_changed):
        critics.append(a_critic(tmp_path, "critic.epochs=2", "critic.minibatches=2"))
        critics[-1].learn(a_lesson_of(returns))
    first, second, third = (weights_of(critic.network) for critic in critics)
    assert largest_difference(first, second) == 0
    assert largest_difference(first, third) > 0


def test_a_critic_learns_before_it_gives_values(tmp_path: Path) -> None:
    critic = a_critic(tmp_path)
    lesson = a_lesson_of(a_task())
    before = critic.values(lesson)
    learned = critic.learn(lesson)
    assert not np.allclose(learned.values, before.numpy(), atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(np.array(learned.values)), critic.values(lesson), atol=0, rtol=0)


def test_values_are_in_the_order_of_the_batch_whatever_the_micro_batches(tmp_path: Path) -> None:
    batch, whole = a_batch(), a_critic(tmp_path, "critic.micro_batch_tokens=1000")
    values = whole.values(a_lesson_of(a_task()))
    assert len(values) == len(batch.response_ids)
    one_by_one = []
    for index in range(len(batch.response_lengths)):
        start = int(batch.sequence_lengths[:index].sum())
        length, response = int(batch.sequence_lengths[index]), int(batch.response_lengths[index])
        alone = Learn(
            step=0,
            input_ids=batch.input_ids[start : start + length],
            sequence_lengths=np.array([length], dtype=np.int32),
            response_lengths=np.array([response], dtype=np.int32),
            rewards=np.zeros(response, dtype=np.float32),
            shard=np.array([1], dtype=np.uint8),
            group_index=np.array([0], dtype=np.int32),
        )
        one_by_one.append(whole.values(alone))
    torch.testing.assert_close(values, torch.cat(one_by_one), atol=1e-5, rtol=0)
    for budget in (1, 13):
        cut = a_critic(tmp_path, f"critic.micro_batch_tokens={budget}")
        torch.testing.assert_close(cut.values(a_lesson_of(a_task())), values, atol=1e-5, rtol=0)


def test_learning_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    # Adam's first step is about ± the learning rate for every weight: a wrong gradient differs by up to twice that.
    results = []
    for budget in (1000, 1, 13):
        critic = a_critic(tmp_path, f"critic.micro_batch_tokens={budget}", "critic.learning_rate=1e-5")
        metrics = critic.learn(a_lesson_of(a_task())).metrics
        results.append((weights_of(critic.network), metrics))
    for weights, metrics in results[1:]:
        assert largest_difference(weights, results[0][0]) < 1e-6
        assert metrics == pytest.approx(results[0][1], rel=1e-4)


def test_the_loss_is_half_the_mean_squared_error_over_the_shards_tokens(tmp_path: Path) -> None:
    critic = a_critic(tmp_path)
    lesson = a_lesson_of(a_task())
    errors = (critic.values(lesson).numpy() - a_task())[own_tokens()]
    assert critic.learn(lesson).metrics["loss"] == pytest.approx(0.5 * float((errors**2).mean()), rel=1e-5)


def test_the_loss_falls_and_the_explained_variance_rises_on_a_task_that_can_be_learned(tmp_path: Path) -> None:
    critic = a_critic(tmp_path, "critic.learning_rate=1e-2", "critic.epochs=2")
    history = [critic.learn(a_lesson_of(a_task(), step)).metrics for step in range(12)]
    losses = [metrics["loss"] for metrics in history]
    assert losses[-1] < 0.1 * losses[0]
    assert history[-1]["explained_variance"] > 0.8
    assert history[-1]["explained_variance"] > history[0]["explained_variance"]


def test_explained_variance_is_reported_for_the_own_and_the_other_responses(tmp_path: Path) -> None:
    critic = a_critic(tmp_path)
    learned = critic.learn(a_lesson_of(a_task()))
    for name, tokens in (("explained_variance", own_tokens()), ("explained_variance_other", ~own_tokens())):
        errors, returns = (a_task() - learned.values)[tokens], a_task()[tokens]
        assert learned.metrics[name] == pytest.approx(1 - float(errors.var() / returns.var()), rel=1e-4)
    assert set(learned.metrics) == {"loss", "grad_norm", "skipped", "explained_variance", "explained_variance_other"}
    assert learned.seconds > 0


def test_what_cannot_be_said_is_left_out_of_the_metrics(tmp_path: Path) -> None:
    everything = critic_metrics = a_critic(tmp_path).learn(a_lesson(a_batch(), a_task(), [1] * 6)).metrics
    assert "explained_variance_other" not in everything
    equal = np.ones_like(a_task())
    critic_metrics = a_critic(tmp_path).learn(a_lesson_of(equal)).metrics
    assert set(critic_metrics) == {"loss", "grad_norm", "skipped"}


def test_a_critic_whose_shard_is_empty_gives_values_and_learns_nothing(tmp_path: Path) -> None:
    critic = a_critic(tmp_path)
    before = weights_of(critic.network)
    learned = critic.learn(a_lesson(a_batch(), a_task(), [0] * 6))
    assert largest_difference(weights_of(critic.network), before) == 0
    assert len(learned.values) == len(a_task())


def test_epochs_and_minibatches_are_the_optimizer_steps(tmp_path: Path) -> None:
    for settings, expected in ((("algorithm.utd=2",), 2), (("critic.epochs=3", "critic.minibatches=2"), 6)):
        critic = a_critic(tmp_path, *settings, "critic.schedule=linear")
        critic.learn(a_lesson_of(a_task()))
        optimizer_steps = {int(state["step"]) for state in critic._engine._optimizer.state.values()}
        assert optimizer_steps == {expected}


def test_critics_of_one_run_start_from_different_heads_and_equal_trunks(tmp_path: Path) -> None:
    first, second = (weights_of(a_critic(tmp_path, index=index).network) for index in range(2))
    assert {name for name in first if not torch.equal(first[name], second[name])} == {"hf.score.weight"}


# --- the line between learner and critics ----------------------------------------------------------------------------


class Served:
    """Two critics, each serving in a thread of its own, and the learner's view of them."""

    def __init__(self, config: Config) -> None:
        self.critics = [Critic(config, index, a_world()) for index in range(2)]
        ends = [MemoryChannel.pair(ToCritic) for _ in self.critics]
        self.view = Critics(config, [learner for learner, _ in ends])
        self.errors: list[Exception | None] = [None, None]
        self.threads = [
            threading.Thread(target=self._serve, args=(index, channel)) for index, (_, channel) in enumerate(ends)
        ]
        for thread in self.threads:
            thread.start()

    def _serve(self, index: int, channel: MemoryChannel) -> None:
        try:
            serve(self.critics[index], channel, index, a_world())
        except Exception as error:
            self.errors[index] = error

    def end(self) -> None:
        self.view.stop("the test is over")
        for thread in self.threads:
            thread.join(timeout=10)
        assert not any(thread.is_alive() for thread in self.threads)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    pair = Served(a_config(tmp_path, "critic.timeout_s=20"))
    yield pair
    pair.end()


def test_critics_learn_each_from_its_shard_and_answer_with_values_in_their_order(
    served: Served, tmp_path: Path
) -> None:
    batch = a_batch()
    served.view.wait_until_ready()
    served.view.learn(batch, a_reward(), batch.version)
    answer = served.view.values()
    metrics = answer.metrics
    assert answer.values.shape == (2, len(batch.response_ids))
    assert answer.fresh.shape == (0, 0)
    for index in range(2):
        twin = a_critic(tmp_path, index=index)
        learned = twin.learn(a_lesson(batch, a_task(), batch.shard == index, batch.version))
        assert answer.values[index].tolist() == pytest.approx(learned.values.tolist(), abs=1e-6)
        assert {name: metrics[f"critic/{index}/{name}"] for name in learned.metrics} == pytest.approx(learned.metrics)
        assert metrics[f"critic/{index}/seconds"] > 0


@pytest.mark.parametrize(
    ("settings", "shards"),
    [
        (("algorithm.shards=shared",), [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
        (("algorithm.truncated=zero",), [[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]),
        (("algorithm.truncated=mask",), [[1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 1]]),
        (("algorithm.truncated=bootstrap", "algorithm.shards=shared"), [[1, 1, 0, 1, 1, 1], [1, 1, 0, 1, 1, 1]]),
    ],
)
def test_who_learns_from_what_follows_shards_and_truncated(
    tmp_path: Path, settings: tuple[str, ...], shards: list[list[int]]
) -> None:
    ends = [MemoryChannel.pair(ToCritic) for _ in range(2)]
    view = Critics(a_config(tmp_path, *settings), [learner for learner, _ in ends])
    view.learn(a_batch(), a_reward(), 4)
    assert [critic.receive(1).shard.tolist() for _, critic in ends] == shards


def test_critics_save_and_go_on_from_it(served: Served, tmp_path: Path) -> None:
    served.view.wait_until_ready()
    served.view.learn(a_batch(), a_reward(), 4)
    served.view.values()
    served.view.save(tmp_path / "state")
    saved = [weights_of(critic.network) for critic in served.critics]
    served.view.learn(a_batch(version=5), a_reward(), 5)
    expected = served.view.values().values
    served.view.load(tmp_path / "state")
    for critic, weights in zip(served.critics, saved, strict=True):
        assert largest_difference(weights_of(critic.network), weights) == 0
    served.view.learn(a_batch(version=5), a_reward(), 5)
    assert torch.equal(served.view.values().values, expected)


def test_a_critic_that_fails_is_named_with_its_reason(served: Served, tmp_path: Path) -> None:
    served.view.wait_until_ready()
    (tmp_path / "critic_0").mkdir()
    served.critics[0].save(tmp_path / "critic_0")
    with pytest.raises(EngineError, match=r"critic 1 failed: CheckpointError: .*critic_1: expected engine\.json"):
        served.view.load(tmp_path)
    served.threads[1].join(timeout=10)
    assert type(served.errors[1]).__name__ == "CheckpointError"
    assert served.errors[0] is None


def test_no_answer_within_the_time_limit_is_a_stall_that_names_the_critic(tmp_path: Path) -> None:
    ends = [MemoryChannel.pair(ToCritic) for _ in range(2)]
    view = Critics(a_config(tmp_path, "critic.timeout_s=0.3"), [learner for learner, _ in ends])
    ends[0][1].send(CriticReady(index=0, parameters=1, session="a"))
    started = time.monotonic()
    with pytest.raises(StallError, match=r"for critic 1 to come up \(critic\.timeout_s\)"):
        view.wait_until_ready()
    assert 0.25 < time.monotonic() - started < 5


def test_an_answer_to_something_else_or_of_another_process_is_no_answer(tmp_path: Path) -> None:
    learner, critic = MemoryChannel.pair(ToCritic)
    view = Critics(a_config(tmp_path, "critic.timeout_s=0.2"), [learner])
    critic.send(CriticReady(index=0, parameters=1, session="now"))
    view.wait_until_ready()
    view.learn(a_batch(version=4), a_reward(), 4)
    numbers, nothing = np.zeros(23, dtype=np.float32), np.zeros(0, dtype=np.float32)

    def learned(step: int, session: str) -> Learned:
        return Learned(step=step, values=numbers, fresh_values=nothing, metrics={}, seconds=1.0, session=session)

    for wrong in (Done(session="now"), learned(3, "now"), learned(4, "before")):
        critic.send(wrong)
        with pytest.raises(StallError, match="learn and give its values"):
            view.values()
    critic.send(learned(4, "now"))
    assert view.values().values.tolist() == [[0.0] * 23]


def test_without_critics_there_are_no_values(tmp_path: Path) -> None:
    view = Critics(a_config(tmp_path, "algorithm.critics=0"), [])
    view.wait_until_ready()
    view.learn(a_batch(), a_reward(), 4)
    answer = view.values()
    assert (answer.values.shape, answer.fresh.shape, answer.metrics) == ((0, 0), (0, 0), {})


def test_a_stop_ends_every_critic(served: Served) -> None:
    served.view.wait_until_ready()
    served.view.stop("the run is complete")
    for thread in served.threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert served.errors == [None, None]


def test_a_critic_that_is_told_to_end_says_so_to_the_learner(tmp_path: Path) -> None:
    learner, critic = MemoryChannel.pair(ToCritic)
    view = Critics(a_config(tmp_path), [learner])
    asked = iter([False, False, True])
    assert not serve(a_critic(tmp_path), critic, 0, a_world(), should_stop=lambda: next(asked))
    view.wait_until_ready()
    view.learn(a_batch(), a_reward(), 4)
    with pytest.raises(EngineError, match="critic 0 failed: it was told to end, and not by the learner"):
        view.values()


def test_a_critic_whose_learner_is_gone_still_ends_when_it_is_told_to(tmp_path: Path) -> None:
    class NobodyThere(MemoryChannel):
        def send(self, message: object) -> bool:
            return False

    _, critic = NobodyThere.pair(ToCritic)
    asked = iter([False, False, True, True])
    serve(a_critic(tmp_path), critic, 0, a_world(), should_stop=lambda: next(asked))


# --- targets, clip and fresh values ----------------------------------------------------------------------------------


def targets_of(
    directory: Path, monkeypatch: pytest.MonkeyPatch, lesson: Learn, *overrides: str
) -> tuple[Critic, torch.Tensor, Learned, list[tuple[Any, ...]]]:
    """A critic that learned, its values before, its answer, and (values, targets, old values) of each step.

    One forward pass holds the whole shard.
    """
    steps = []
    loss = algorithm.value_loss

    def spy(values: torch.Tensor, returns: torch.Tensor, weights: torch.Tensor, **more: Any) -> algorithm.Loss:
        steps.append((values.detach().clone(), returns.clone(), more["old_values"], more["clip"]))
        return loss(values, returns, weights, **more)

    critic = a_critic(directory, "critic.micro_batch_tokens=1000", *overrides)
    before = critic.values(lesson)
    monkeypatch.setattr(algorithm, "value_loss", spy)
    return critic, before, critic.learn(lesson), steps


def test_with_lam_1_the_target_is_the_return_and_nothing_is_valued_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, learned, steps = targets_of(tmp_path, monkeypatch, a_lesson_of(a_task()), "critic.epochs=2")
    assert [step[1].tolist() for step in steps] == [a_task()[own_tokens()].tolist()] * 2
    assert [step[2:] for step in steps] == [(None, None)] * 2
    assert len(learned.fresh_values) == 0


@pytest.mark.parametrize(("lam", "gamma"), [(0.5, 1.0), (0.0, 1.0), (0.25, 0.5)])
def test_below_lam_1_the_target_is_td_lambda_on_the_critics_values_before_it_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lam: float, gamma: float
) -> None:
    lesson = a_lesson_of(a_task() * np.linspace(0.5, 1.5, len(a_task()), dtype=np.float32))
    settings = (f"critic.lam={lam}", f"algorithm.gamma={gamma}", "critic.epochs=3", "critic.learning_rate=1e-2")
    _, before, learned, steps = targets_of(tmp_path, monkeypatch, lesson, *settings)
    expected, end = [], 0
    for length in lesson.response_lengths.tolist():
        rewards, values = lesson.rewards[end : end + length].tolist(), before[end : end + length].tolist()
        after, targets = 0.0, []  # G_{t+1}, and V_{t+1}: both 0 after the last token
        for reward, value in zip(reversed(rewards), [0.0, *reversed(values[1:])], strict=True):
            after = reward + gamma * ((1 - lam) * value + lam * after)
            targets.append(after)
        expected += reversed(targets)
        end += length
    wanted = np.array(expected)[own_tokens()].tolist()
    assert len(steps) == 3
    for step in steps:  # the same in all epochs
        assert step[1].tolist() == pytest.approx(wanted, abs=1e-5)
    assert not torch.allclose(steps[2][0], steps[0][0], atol=1e-3)
    assert learned.fresh_values.tolist() == before.tolist()


def test_the_value_clip_is_around_the_values_before_learning_in_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("critic.value_clip=0.05", "critic.epochs=3", "critic.learning_rate=1e-2")
    _, before, learned, steps = targets_of(tmp_path, monkeypatch, a_lesson_of(a_task()), *settings)
    for _, targets, old, clip in steps:
        assert old.tolist() == before[torch.from_numpy(own_tokens())].tolist()
        assert targets.tolist() == a_task()[own_tokens()].tolist()
        assert clip == 0.05
    assert learned.fresh_values.tolist() == before.tolist()


def test_a_value_clip_keeps_values_near_those_before(tmp_path: Path) -> None:
    moved = []
    without_momentum = ("critic.betas=[0.0, 0.999]", "critic.learning_rate=1e-4", "critic.epochs=20")
    for clip in (("critic.value_clip=0.01",), ()):
        critic = a_critic(tmp_path, *clip, *without_momentum)
        before = critic.values(a_lesson_of(a_task()))
        learned = critic.learn(a_lesson_of(a_task()))
        moved.append(float((torch.from_numpy(np.array(learned.values)) - before)[own_tokens()].abs().mean()))
    assert moved[0] < 0.5 * moved[1]


def test_fresh_values_are_those_before_learning_and_change_nothing_else(tmp_path: Path) -> None:
    lesson = a_lesson_of(a_task())
    plain, asked = a_critic(tmp_path), a_critic(tmp_path, "critic.fresh_values=true")
    before = asked.values(lesson)
    expected, learned = plain.learn(lesson), asked.learn(lesson)
    assert learned.fresh_values.tolist() == before.tolist()
    assert learned.values.tolist() == expected.values.tolist()
    errors = a_task() - before.numpy()
    fresh = 1 - float(errors.var() / a_task().var())
    explained = learned.metrics.pop("explained_variance_fresh")
    assert explained == pytest.approx(fresh, rel=1e-4)
    assert learned.metrics == expected.metrics


def test_process_rewards_are_part_of_the_return_and_gamma_discounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = a_lesson_of(a_task())
    rewards = np.array(lesson.rewards)
    rewards[0] = 0.25  # the first token of the first response, which has four and earns 1 at its end
    lesson = msgspec.structs.replace(lesson, rewards=rewards)
    _, _, _, steps = targets_of(tmp_path, monkeypatch, lesson, "algorithm.gamma=0.5")
    assert steps[0][1][:4].tolist() == [0.375, 0.25, 0.5, 1.0]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_lesson_that_is_not_finite_is_skipped_and_counted(tmp_path: Path, bad: float) -> None:
    critic = a_critic(tmp_path, "critic.minibatches=3", "critic.epochs=2")
    before = weights_of(critic.network)
    lesson = a_lesson_of(a_task())
    rewards = np.array(lesson.rewards)
    rewards[0] = bad  # of the first response, which is alone in its minibatch
    learned = critic.learn(msgspec.structs.replace(lesson, rewards=rewards))
    assert learned.metrics["skipped"] == 2
    assert largest_difference(weights_of(critic.network), before) > 0
    assert all(bool(weights.isfinite().all()) for weights in weights_of(critic.network).values())
    assert critic.learn(a_lesson_of(a_task(), 1)).metrics["skipped"] == 0


# --- critics that differ ---------------------------------------------------------------------------------------------


def test_each_critic_has_its_own_checkpoint_learning_rate_and_steps(tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=5, hidden=16)
    each = f"critic.each=[{{learning_rate: 1.0e-5, minibatches: 3}}, {{path: {other}, epochs: 2, warmup_steps: 4}}]"
    first, second = (a_critic(tmp_path, each, index=index) for index in range(2))
    assert second.parameters < first.parameters
    for critic, steps, rates in ((first, 3, [1e-5] * 3), (second, 2, [0.25e-3, 0.5e-3])):
        seen, step = [], critic._engine.step

        def spy(step: Callable[[], StepReport] = step, seen: list[float] = seen) -> StepReport:
            report = step()
            seen.append(report.learning_rate)
            return report

        critic._engine.step = spy  # type: ignore[method-assign]
        critic.learn(a_lesson_of(a_task()))
        assert len(seen) == steps
        assert seen == pytest.approx(rates)


def test_each_critic_has_its_own_weight_decay_and_micro_batches(tmp_path: Path) -> None:
    each = "critic.each=[{weight_decay: 0.5}, {micro_batch_tokens: 1000}]"
    first, second = (a_critic(tmp_path, each, index=index) for index in range(2))
    lesson = a_lesson_of(a_task())
    assert [critic._engine._optimizer.param_groups[0]["weight_decay"] for critic in (first, second)] == [0.5, 0.0]
    everything = np.arange(6)
    assert len(first._plan(lesson, everything)) > 1
    assert len(second._plan(lesson, everything)) == 1


# --- export and start ------------------------------------------------------------------------------------------------


def test_an_exported_critic_loads_as_critic_path_and_gives_the_same_values(tmp_path: Path) -> None:
    lesson = a_lesson_of(a_task())
    trained = a_critic(tmp_path, "critic.learning_rate=1e-2")
    expected = trained.learn(lesson).values.tolist()
    trained.export(tmp_path / "exported")
    again = a_critic(tmp_path, f"critic.path={tmp_path}/exported", index=1)
    assert again.values(lesson).tolist() == expected
    assert largest_difference(weights_of(again.network), weights_of(trained.network)) == 0


def test_an_exported_critic_has_the_actors_tokenizer_and_passes_preflight(tmp_path: Path) -> None:
    a_critic(tmp_path).export(tmp_path / "exported")
    preflight.check_models(a_config(tmp_path, f"critic.path={tmp_path}/exported"))


def test_a_critic_that_starts_from_an_export_is_one_constructed_from_it(tmp_path: Path) -> None:
    settings = ("critic.learning_rate=1e-2", "critic.warmup_steps=4", "critic.schedule=linear", "run.steps=6")
    used = a_critic(tmp_path, *settings)
    for step in range(3):
        used.learn(a_lesson_of(a_task(), step))
    used.export(tmp_path / "exported")
    used.learn(a_lesson_of(-a_task(), 3))  # what came after the export is gone
    used.start(tmp_path / "exported")
    twin = a_critic(tmp_path, *settings, f"critic.path={tmp_path}/exported")
    assert largest_difference(weights_of(used.network), weights_of(twin.network)) == 0
    for step in range(2):
        left, right = used.learn(a_lesson_of(a_task(), step)), twin.learn(a_lesson_of(a_task(), step))
        assert left.metrics == right.metrics
        assert left.values.tolist() == right.values.tolist()
    assert used._engine._schedule.last_epoch == 2  # not 3 + 1 + 2
    assert largest_difference(weights_of(used.network), weights_of(twin.network)) == 0


def test_the_learner_has_all_critics_export_and_start(served: Served, tmp_path: Path) -> None:
    served.view.wait_until_ready()
    served.view.learn(a_batch(), a_reward(), 4)
    expected = served.view.values().values
    served.view.export(tmp_path / "all")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["critic_0", "critic_1"]
    served.view.learn(a_batch(version=5), a_reward(), 5)
    served.view.values()
    served.view.start(tmp_path / "all")
    found = [critic.values(a_lesson_of(a_task())) for critic in served.critics]
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-6, rtol=0)


def test_fresh_values_come_from_all_critics_with_the_answer(tmp_path: Path) -> None:
    pair = Served(a_config(tmp_path, "critic.timeout_s=20", "critic.fresh_values=true"))
    try:
        pair.view.wait_until_ready()
        lesson = a_lesson_of(a_task())
        before = torch.stack([critic.values(lesson) for critic in pair.critics])
        pair.view.learn(a_batch(), a_reward(), 4)
        answer = pair.view.values()
        torch.testing.assert_close(answer.fresh, before, atol=1e-6, rtol=0)
        assert not torch.allclose(answer.values, before, atol=1e-4)
    finally:
        pair.end()


# --- the warm start's own settings -----------------------------------------------------------------------------------


def test_the_warm_starts_rate_falls_linearly_and_its_lessons_have_one_epoch(tmp_path: Path) -> None:
    settings = (
        "critic.warmup_batches=4",
        "critic.warmup_learning_rate=1e-2",
        "critic.epochs=3",
        "critic.warmup_steps=9",
        "critic.minibatches=2",
    )
    critic, rates = a_critic(tmp_path, *settings), []
    for step in range(-4, 0):
        rates.append(critic._engine._optimizer.param_groups[0]["lr"])
        critic.learn(a_lesson_of(a_task(), step))
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])  # two optimiser steps a batch
    assert critic._engine._schedule.last_epoch == 8


def test_without_a_rate_of_its_own_the_warm_start_has_the_critics_rate_throughout(tmp_path: Path) -> None:
    critic = a_critic(tmp_path, "critic.warmup_batches=3", "critic.warmup_steps=9", "critic.schedule=linear")
    for step in range(-3, 0):
        assert critic._engine._optimizer.param_groups[0]["lr"] == 1e-3
        critic.learn(a_lesson_of(a_task(), step))


def test_a_critic_that_was_warm_started_before_begins_from_there(tmp_path: Path) -> None:
    settings = ("critic.warmup_batches=3", "critic.warmup_steps=4")
    config = a_config(tmp_path, *settings)
    warm = Critic(config, 1, a_world())
    warm.learn(a_lesson_of(a_task(), -1))
    config.warmup_directory.mkdir(parents=True)
    warm.export(config.warmup_directory / "critic_1")
    found = Critic(config, 1, a_world())
    assert largest_difference(weights_of(found.network), weights_of(warm.network)) == 0
    assert found._engine._optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-3)  # the run's schedule
