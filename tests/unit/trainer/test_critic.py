"""Claims about a critic, and about the line between it and the learner. Plain engine, float32, no socket."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncppo.config import Config
from asyncppo.errors import EngineError, StallError
from asyncppo.messages import CriticReady, Done, Learn, Learned, ToCritic
from asyncppo.transport.memory import MemoryChannel
from tests.model_maker import a_batch, a_config, a_lesson, a_world, largest_difference, weights_of
from trainer.model.critic import Critic, serve
from trainer.model.critics import Critics

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
            returns=np.zeros(response, dtype=np.float32),
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
    assert set(learned.metrics) == {"loss", "grad_norm", "explained_variance", "explained_variance_other"}
    assert learned.seconds > 0


def test_what_cannot_be_said_is_left_out_of_the_metrics(tmp_path: Path) -> None:
    everything = critic_metrics = a_critic(tmp_path).learn(a_lesson(a_batch(), a_task(), [1] * 6)).metrics
    assert "explained_variance_other" not in everything
    equal = np.ones_like(a_task())
    critic_metrics = a_critic(tmp_path).learn(a_lesson_of(equal)).metrics
    assert set(critic_metrics) == {"loss", "grad_norm"}


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
    batch, returns = a_batch(), torch.from_numpy(a_task())
    served.view.wait_until_ready()
    served.view.learn(batch, returns)
    values, metrics = served.view.values()
    assert values.shape == (2, len(batch.response_ids))
    for index in range(2):
        twin = a_critic(tmp_path, index=index)
        learned = twin.learn(a_lesson(batch, a_task(), batch.shard == index, batch.version))
        assert values[index].tolist() == pytest.approx(learned.values.tolist(), abs=1e-6)
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
    view.learn(a_batch(), torch.from_numpy(a_task()))
    assert [critic.receive(1).shard.tolist() for _, critic in ends] == shards


def test_critics_save_and_go_on_from_it(served: Served, tmp_path: Path) -> None:
    served.view.wait_until_ready()
    served.view.learn(a_batch(), torch.from_numpy(a_task()))
    served.view.values()
    served.view.save(tmp_path / "state")
    saved = [weights_of(critic.network) for critic in served.critics]
    served.view.learn(a_batch(version=5), torch.from_numpy(a_task()))
    expected, _ = served.view.values()
    served.view.load(tmp_path / "state")
    for critic, weights in zip(served.critics, saved, strict=True):
        assert largest_difference(weights_of(critic.network), weights) == 0
    served.view.learn(a_batch(version=5), torch.from_numpy(a_task()))
    assert torch.equal(served.view.values()[0], expected)


def test_a_critic_that_fails_is_named_with_its_reason(served: Served, tmp_path: Path) -> None:
    served.view.wait_until_ready()
    (tmp_path / "critic_0").mkdir()
    served.critics[0].save(tmp_path / "critic_0")
    with pytest.raises(EngineError, match=r"critic 1 failed: CheckpointError: .*critic_1: expected plain\.pt"):
        served.view.load(tmp_path)
    served.threads[1].join(timeout=10)
    assert type(served.errors[1]).__name__ == "CheckpointError"
    assert served.errors[0] is None


def test_no_answer_within_the_time_limit_is_a_stall_that_names_the_critic(tmp_path: Path) -> None:
    ends = [MemoryChannel.pair(ToCritic) for _ in range(2)]
    view = Critics(a_config(tmp_path, "critic.timeout_s=0.3"), [learner for learner, _ in ends])
    ends[0][1].send(CriticReady(index=0, parameters=1))
    started = time.monotonic()
    with pytest.raises(StallError, match=r"for critic 1 to come up \(critic\.timeout_s\)"):
        view.wait_until_ready()
    assert 0.25 < time.monotonic() - started < 5


def test_an_answer_to_something_else_is_no_answer(tmp_path: Path) -> None:
    learner, critic = MemoryChannel.pair(ToCritic)
    view = Critics(a_config(tmp_path, "critic.timeout_s=0.2"), [learner])
    critic.send(Done())
    with pytest.raises(StallError, match="learn and give its values"):
        view.values()
    late = Learned(step=3, values=np.zeros(23, dtype=np.float32), metrics={}, seconds=1.0)
    view.learn(a_batch(version=4), torch.from_numpy(a_task()))
    critic.send(late)
    with pytest.raises(StallError, match="learn and give its values"):
        view.values()


def test_without_critics_there_are_no_values(tmp_path: Path) -> None:
    view = Critics(a_config(tmp_path, "algorithm.critics=0"), [])
    view.wait_until_ready()
    view.learn(a_batch(), torch.from_numpy(a_task()))
    values, metrics = view.values()
    assert values.numel() == 0
    assert metrics == {}


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
    serve(a_critic(tmp_path), critic, 0, a_world(), should_stop=lambda: True)
    with pytest.raises(EngineError, match="critic 0 failed: it was told to end, and not by the learner"):
        view.values()


def test_a_critic_whose_learner_is_gone_still_ends_when_it_is_told_to(tmp_path: Path) -> None:
    class NobodyThere(MemoryChannel):
        def send(self, message: object) -> bool:
            return False

    _, critic = NobodyThere.pair(ToCritic)
    asked = iter([False, False, True, True])
    serve(a_critic(tmp_path), critic, 0, a_world(), should_stop=lambda: next(asked))
