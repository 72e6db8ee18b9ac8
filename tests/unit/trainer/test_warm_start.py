"""Claims about the critics' warm start: what it takes, what it keeps, and who finds it. Plain engine, no socket."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncppo.config import Config
from asyncppo.messages import Done, ExportCritic, Learn, StartCritic, Stop
from asyncppo.metrics import EVENTS_FILE, Journal, read
from tests.model_maker import a_batch, a_config, a_lesson, a_world, largest_difference, weights_of
from trainer import warm_start
from trainer.model.critic import Critic
from trainer.model.critics import Critics
from trainer.stream.batch import Batch

pytestmark = pytest.mark.unit


class Batches:
    """A feed of so many batches, which then is told to stop."""

    def __init__(self, count: int = 99, before_take: Callable[[int], None] = lambda number: None) -> None:
        self.taken: list[tuple[int, bool]] = []
        self._left = count
        self._before_take = before_take

    def take(self, version: int, *, warm_start: bool = False) -> Batch | None:
        self._before_take(len(self.taken))
        self.taken.append((version, warm_start))
        self._left -= 1
        return None if self._left < 0 else a_batch(version=version)


class Direct:
    """A channel to a critic that works when it is told something."""

    def __init__(self, critic: Critic) -> None:
        self._critic = critic
        self._answers: list[Any] = []
        self.told: list[Any] = []

    def send(self, message: Any) -> bool:
        self.told.append(message)
        match message:
            case Learn():
                self._answers.append(self._critic.learn(message))
            case ExportCritic():
                self._critic.export(Path(message.directory))
                self._answers.append(Done())
            case StartCritic():
                self._critic.start(message.directory)
                self._answers.append(Done())
            case _:
                assert isinstance(message, Stop)
        return True

    def receive(self, timeout_s: float) -> Any:
        return self._answers.pop(0) if self._answers else None

    def close(self) -> None:
        pass


def some_lesson(step: int) -> Learn:
    return a_lesson(a_batch(), np.linspace(-1, 1, 23), [1, 0] * 3, step)


class Run:
    """A run's critics and what they are told."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.critics = [Critic(config, index, a_world()) for index in range(config.algorithm.critics)]
        self.channels = [Direct(critic) for critic in self.critics]
        self.feed = Batches()

    def warm_start(self, feed: Batches | None = None, journal: Journal | None = None) -> bool:
        self.feed = feed or self.feed
        return warm_start.run(self.config, a_world(), self.feed, Critics(self.config, self.channels), journal)  # type: ignore[arg-type]

    def steps(self, index: int) -> list[int]:
        return [message.step for message in self.channels[index].told if isinstance(message, Learn)]

    def values(self, index: int) -> list[float]:
        return self.critics[index].values(a_lesson(a_batch(), np.zeros(23), [1] * 6)).tolist()


def a_run(directory: Path, *overrides: str) -> Run:
    settings = ("critic.warmup_batches=3", f"critic.warmup_directory={directory}/kept", "critic.warmup_steps=4")
    return Run(a_config(directory, *settings, *overrides))


def kept(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "kept").glob("*"))


def test_it_takes_its_batches_of_version_0_and_their_steps_end_with_minus_one(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert run.warm_start()
    assert run.feed.taken == [(0, True)] * 3
    assert [run.steps(index) for index in range(2)] == [[-3, -2, -1]] * 2


@pytest.mark.parametrize("override", ["critic.warmup_batches=0", "algorithm.critics=0"])
def test_without_batches_or_critics_there_is_none(tmp_path: Path, override: str) -> None:
    run = a_run(tmp_path, override)
    assert run.warm_start()
    assert run.feed.taken == []
    assert kept(tmp_path) == []
    assert all(channel.told == [] for channel in run.channels)


def test_critics_begin_the_run_with_what_they_learned_and_nothing_else(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    cold = run.values(0)
    run.warm_start()
    directory = run.config.warmup_directory
    assert run.values(0) != cold
    for index in range(2):
        twin = a_run(tmp_path, f"critic.path={directory}/critic_{index}", "critic.warmup_batches=0").critics[index]
        left, right = run.critics[index].learn(some_lesson(0)), twin.learn(some_lesson(0))
        assert left.values.tolist() == right.values.tolist()  # the same weights, optimiser and rate
        assert left.metrics == right.metrics
        assert largest_difference(weights_of(run.critics[index].network), weights_of(twin.network)) == 0


def test_each_critic_is_kept_and_a_second_run_finds_them_and_learns_nothing(tmp_path: Path) -> None:
    first = a_run(tmp_path)
    first.warm_start()
    (name,) = kept(tmp_path)
    assert sorted(path.name for path in (tmp_path / "kept" / name).iterdir()) == ["critic_0", "critic_1"]
    assert first.values(0) != first.values(1)
    for override in ("run.name=second", "run.seed=8"):  # the first policy is the same whatever the seed
        second = a_run(tmp_path, override)
        assert second.warm_start()
        assert second.feed.taken == []
        assert [second.steps(index) for index in range(2)] == [[], []]
        assert [second.values(index) for index in range(2)] == [first.values(index) for index in range(2)]
    assert kept(tmp_path) == [name]


def test_a_run_of_another_learning_rate_does_not_find_them(tmp_path: Path) -> None:
    a_run(tmp_path).warm_start()
    other = a_run(tmp_path, "critic.learning_rate=2e-3")
    other.warm_start()
    assert len(other.feed.taken) == 3
    assert len(kept(tmp_path)) == 2


def test_a_stop_in_the_middle_keeps_nothing_and_the_next_run_begins_anew(tmp_path: Path) -> None:
    stopped = a_run(tmp_path)
    assert not stopped.warm_start(Batches(2))
    assert stopped.steps(0) == [-3, -2]
    assert kept(tmp_path) == []
    again = a_run(tmp_path)
    assert again.warm_start()
    assert again.steps(0) == [-3, -2, -1]
    assert len(kept(tmp_path)) == 1


def test_what_is_kept_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, export, seen = a_run(tmp_path), Critic.export, []

    def full_disk(critic: Critic, directory: Path) -> None:
        export(critic, directory)
        seen.append((directory.name, kept(tmp_path), run.config.warmup_directory.exists()))
        if directory.name == "critic_1":
            raise OSError("no space left")

    monkeypatch.setattr(Critic, "export", full_disk)
    with pytest.raises(OSError, match="no space"):
        run.warm_start()
    assert [(name, there) for name, _, there in seen] == [("critic_0", False), ("critic_1", False)]
    monkeypatch.undo()
    again = a_run(tmp_path)
    assert again.warm_start()
    assert len(again.feed.taken) == 3
    assert [name for name in kept(tmp_path) if not name.startswith(".")] == [run.config.warmup_directory.name]
    assert again.config.warmup_directory == run.config.warmup_directory


def test_a_run_that_was_built_before_another_had_ended_takes_its_critics_all_the_same(tmp_path: Path) -> None:
    late, quick = a_run(tmp_path, "run.name=late"), a_run(tmp_path)
    quick.warm_start()
    assert late.warm_start()
    assert late.feed.taken == []
    assert late.values(0) == quick.values(0)
    assert late.critics[0]._engine._optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-3)  # the run's schedule


def test_of_two_runs_at_the_same_time_the_quicker_ones_critics_stay(tmp_path: Path) -> None:
    slow, quick = a_run(tmp_path, "run.name=slow"), a_run(tmp_path)

    def finish_the_other(number: int) -> None:
        if number == 2:
            quick.warm_start()

    assert slow.warm_start(Batches(before_take=finish_the_other))
    assert len(slow.feed.taken) == 3
    assert [slow.values(index) for index in range(2)] == [quick.values(index) for index in range(2)]
    assert kept(tmp_path) == [slow.config.warmup_directory.name]


def test_ranks_above_the_first_take_the_same_batches_and_touch_nothing(tmp_path: Path) -> None:
    feed, config = Batches(), a_run(tmp_path).config
    assert warm_start.run(config, a_world(), feed, None, None)  # type: ignore[arg-type]
    assert len(feed.taken) == 3
    assert kept(tmp_path) == []


def test_every_batch_is_an_event(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    a_run(tmp_path, "critic.fresh_values=true").warm_start(journal=journal)
    journal.close()
    events = list(read(tmp_path / EVENTS_FILE))
    assert [(event["event"], event["batch"], event["batches"]) for event in events] == [
        ("warm_start", number, 3) for number in (1, 2, 3)
    ]
    for event in events:
        assert event["reward"] == pytest.approx(2.5 / 6)
        assert event["explained_variance_fresh"] is not None
        assert event["critic/1/loss"] > 0


def test_a_resumed_run_has_its_own_schedule_even_if_what_was_kept_is_gone(tmp_path: Path) -> None:
    settings = ("critic.warmup_batches=3", "critic.warmup_learning_rate=1e-2", "critic.warmup_steps=4")
    config = a_config(tmp_path, *settings)
    run = Run(config)
    run.warm_start()
    run.critics[0].learn(some_lesson(0))
    run.critics[0].save(tmp_path / "state")
    config.warmup_directory.rename(tmp_path / "gone")
    resumed = Critic(config, 0, a_world())
    resumed.load(tmp_path / "state")
    for step in range(1, 5):
        expected = run.critics[0].learn(some_lesson(step))
        assert resumed.learn(some_lesson(step)).metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
    rates = [critic._engine._optimizer.param_groups[0]["lr"] for critic in (run.critics[0], resumed)]
    assert rates == [1e-3, 1e-3]
