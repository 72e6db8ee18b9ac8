"""A critic that dies comes back in the very state it had: every moment of its death, the plain engine, no socket."""

import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncppo.config import Config
from asyncppo.errors import CheckpointError, EngineError, StallError
from asyncppo.messages import CriticReady, Done, Learn, Learned, LoadCritic, SaveCritic, StartCritic, Stop, ToCritic
from asyncppo.metrics import Journal, read
from asyncppo.transport.memory import MemoryChannel
from tests.model_maker import a_batch, a_config, a_lesson, a_world, largest_difference, weights_of
from trainer.model.critic import Critic, serve
from trainer.model.critics import Critics, Lessons

pytestmark = pytest.mark.unit

STEPS = 5
SAVED = 3
"""The version that is saved; the save is whole one step later only."""


class Killed(BaseException):
    """kill -9."""


class Mortal:
    """The critic's end of the line, at which its process dies once: at the n-th message, in one of four moments."""

    def __init__(self, inner: MemoryChannel, moment: str, number: int) -> None:
        self._inner = inner
        self._moment = moment
        self._left = number

    def _may_die(self, moment: str) -> None:
        if moment == self._moment:
            self._left -= 1
            if self._left == -1:
                raise Killed

    def send(self, message: Any) -> bool:
        self._may_die("before it answers")
        self._inner.send(message)
        self._may_die("after it answered")
        return True

    def receive(self, timeout_s: float) -> Any:
        message = self._inner.receive(timeout_s)
        if message is not None:
            self._may_die("with what it was asked")  # which is gone
        return message


class BeforeReading(Mortal):
    """What it was asked stays in the queue, for the next process to find."""

    def receive(self, timeout_s: float) -> Any:
        message = Mortal.receive(self, timeout_s)
        if message is not None and self._left >= 0 and self._moment == "before it reads":
            self._left -= 1
            if self._left == -1:
                self._inner._inbox.put([bytes(frame) for frame in self._inner._codec.encode(message)])
                raise Killed
        return message


class Ensemble:
    """Two critics in threads; one dies as it is told to, and is started again."""

    def __init__(self, config: Config, journal: Journal | None, moment: str = "never", number: int = 0) -> None:
        self.critics: list[Critic] = [Critic(config, index, a_world()) for index in range(2)]
        self.deaths = 0
        ends = [MemoryChannel.pair(ToCritic) for _ in range(2)]
        event = journal.event if journal else None
        self.view = Critics(config, [ours for ours, _ in ends], event, come_back=True)
        lines: list[Any] = [BeforeReading(ends[0][1], moment, number), ends[1][1]]
        self.threads = [
            threading.Thread(target=self._live, args=(config, i, line), daemon=True) for i, line in enumerate(lines)
        ]
        for thread in self.threads:
            thread.start()

    def _live(self, config: Config, index: int, line: Any) -> None:
        while True:
            try:
                serve(self.critics[index], line, index, a_world())
                return
            except Killed:
                self.deaths += 1
                self.critics[index] = Critic(config, index, a_world())

    def end(self) -> list[dict[str, torch.Tensor]]:
        self.view.stop("the test is over")
        for thread in self.threads:
            thread.join(timeout=10)
            assert not thread.is_alive()
        return [weights_of(critic.network) for critic in self.critics]


def a_reward(step: int) -> torch.Tensor:
    returns = np.linspace(-1, 1, 23, dtype=np.float32) * (step + 1)
    return torch.from_numpy(np.array(a_lesson(a_batch(), returns, [1] * 6).rewards))


def train(ensemble: Ensemble, directory: Path) -> list[torch.Tensor]:
    """A run with a checkpoint that is whole a step after it was begun; gives the values of each step."""
    values = []
    view = ensemble.view
    view.wait_until_ready()
    for step in range(STEPS):
        if step == SAVED:
            view.save(directory / "partial")
        view.learn(a_batch(version=step), a_reward(step), step)
        values.append(view.values().values)
        if step == SAVED:
            (directory / "partial").rename(directory / "whole")
            view.saved(directory / "whole", SAVED)
    return values


MOMENTS = {  # how often it can die so: 5 batches, a save, and where it counts CriticReady and Stop
    "before it reads": STEPS + 1,
    "with what it was asked": STEPS + 1,
    "before it answers": STEPS + 2,
    "after it answered": STEPS + 2,
}


def config_of(directory: Path, *overrides: str) -> Config:
    return a_config(directory, "critic.timeout_s=20", "critic.minibatches=2", "critic.warmup_steps=3", *overrides)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Values and weights of critics that do not die."""
    directory = tmp_path_factory.mktemp("whole")
    ensemble = Ensemble(config_of(directory), None)
    values = train(ensemble, directory)
    return values, ensemble.end()


@pytest.mark.parametrize("moment", MOMENTS)
def test_whenever_a_critic_dies_values_and_weights_are_those_of_one_that_does_not_bit_by_bit(
    tmp_path: Path, moment: str, expected: tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]
) -> None:
    for number in range(MOMENTS[moment]):
        directory = tmp_path / str(number)
        directory.mkdir()
        journal = Journal(directory)
        ensemble = Ensemble(config_of(directory), journal, moment, number)
        values = train(ensemble, directory)
        weights = ensemble.end()
        journal.close()
        assert ensemble.deaths == 1, f"it was to die {moment}, at message {number}"
        assert all(map(torch.equal, values, expected[0])), number
        died_last = moment == "after it answered" and number == STEPS + 1  # after the last values: nobody asked again
        if not died_last:
            assert max(map(largest_difference, weights, expected[1])) == 0, number
        events = [event for event in read(directory / "events.jsonl") if event["event"] == "critic_restarted"]
        died_first = moment.endswith("answers") and number == 0  # before it said that it is there
        assert [event["critic"] for event in events] == ([] if died_first or died_last else [0]), number
        assert all(event["missed"] == 0 for event in events)


def test_after_a_checkpoint_only_what_is_newer_is_learned_again(tmp_path: Path) -> None:
    ours, theirs = MemoryChannel.pair(ToCritic)
    view = Critics(config_of(tmp_path), [ours], come_back=True)
    nothing = np.zeros(0, dtype=np.float32)

    def answers(step: int, session: str) -> None:
        values = np.zeros(23, dtype=np.float32)
        theirs.send(Learned(step=step, values=values, fresh_values=nothing, metrics={}, seconds=0.1, session=session))

    theirs.send(CriticReady(index=0, parameters=1, session="first"))
    for step in range(5):
        view.learn(a_batch(version=step), a_reward(step), step)
        answers(step, "first")
        view.values()
    view.saved(tmp_path / "step_3", 3)
    view.learn(a_batch(version=5), a_reward(5), 5)
    theirs.send(CriticReady(index=0, parameters=1, session="second"))
    theirs.send(Done(session="second"))
    for step in (3, 4, 5):
        answers(step, "second")
    view.values()
    told = []
    while (message := theirs.receive(0)) is not None:
        told.append((message.session, message.step if isinstance(message, Learn) else message.directory))
    again = told[told.index(("first", 5)) + 1 :]
    assert again == [("second", str(tmp_path / "step_3/critic_0")), ("second", 3), ("second", 4), ("second", 5)]


def test_a_save_that_a_critic_dies_in_is_made_by_the_next_one(tmp_path: Path) -> None:
    ensemble = Ensemble(config_of(tmp_path), None, "with what it was asked", 2)  # two batches, then the save
    ensemble.view.wait_until_ready()
    for step in range(2):
        ensemble.view.learn(a_batch(version=step), a_reward(step), step)
        ensemble.view.values()
    ensemble.view.save(tmp_path)
    assert ensemble.deaths == 1
    whole = Critic(config_of(tmp_path), 0, a_world())
    whole.load(tmp_path / "critic_0")
    assert largest_difference(weights_of(whole.network), ensemble.end()[0]) == 0


def test_a_save_that_cannot_be_written_fails_alone_and_the_critic_goes_on(tmp_path: Path) -> None:
    ensemble = Ensemble(config_of(tmp_path), None)
    ensemble.view.wait_until_ready()
    (tmp_path / "full").touch()  # no directory can be made below a file
    with pytest.raises(CheckpointError, match=r"critic 0 could not save its state: .*; critic 1 could not save"):
        ensemble.view.save(tmp_path / "full")
    ensemble.view.learn(a_batch(version=0), a_reward(0), 0)
    assert ensemble.view.values().values.shape == (2, 23)
    ensemble.end()


@pytest.mark.parametrize("number", range(4))
def test_a_critic_that_dies_in_the_warm_start_begins_it_again_even_if_another_run_has_ended_it(
    tmp_path: Path, number: int
) -> None:
    settings = ("critic.warmup_batches=3", f"critic.warmup_directory={tmp_path}/kept")
    weights = []
    for moment in ("never", "with what it was asked"):
        config = config_of(tmp_path, *settings)
        ensemble = Ensemble(config, None, moment, number)
        ensemble.view.wait_until_ready()
        for step in range(-3, 0):
            ensemble.view.learn(a_batch(version=0), a_reward(step), step)
            ensemble.view.values()
            if step == -3 and moment != "never":  # another run of these settings was quicker
                for index, critic in enumerate(ensemble.critics):
                    critic.export(config.warmup_directory / f"critic_{index}")
        ensemble.view.export(tmp_path / f"{moment}")
        ensemble.view.start(tmp_path / f"{moment}")
        ensemble.view.learn(a_batch(version=0), a_reward(0), 0)
        ensemble.view.values()
        assert ensemble.deaths == (moment != "never")
        weights.append(ensemble.end())
    assert max(map(largest_difference, *weights)) == 0


def test_what_is_meant_for_another_process_is_not_done(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    critic = Critic(config, 0, a_world())
    before = weights_of(critic.network)
    ours, theirs = MemoryChannel.pair(ToCritic)
    lesson = a_lesson(a_batch(), np.ones(23), [1] * 6)
    for meant in ("", "the one that died"):
        for message in (
            Learn(**{name: getattr(lesson, name) for name in lesson.__struct_fields__} | {"session": meant}),
            SaveCritic(directory=str(tmp_path / "saved"), session=meant),
            LoadCritic(directory=str(tmp_path / "none"), session=meant),
            StartCritic(directory=str(tmp_path / "none"), session=meant),
        ):
            ours.send(message)
    ours.send(Stop(reason="the run is complete"))
    assert serve(critic, theirs, 0, a_world())
    assert largest_difference(weights_of(critic.network), before) == 0
    assert isinstance(ours.receive(0), CriticReady)
    assert ours.receive(0) is None
    assert not (tmp_path / "saved").exists()


def test_a_critic_says_that_it_is_there_until_it_is_asked_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.model.critic._READY_S", 0.01)
    ensemble = Ensemble(config_of(tmp_path), None)
    channel: Any = ensemble.view._lines[0].channel
    first, second = channel.receive(10), channel.receive(10)
    assert isinstance(first, CriticReady)
    assert first.session == second.session
    for _ in range(3):
        channel._inbox.put([bytes(frame) for frame in channel._codec.encode(first)])
    ensemble.view.wait_until_ready()  # by one of the many
    ensemble.view.learn(a_batch(version=0), a_reward(0), 0)
    assert ensemble.view.values().values.shape == (2, 23)  # the others are no process that took its place
    assert ensemble.view._lines[0].restarts == 0
    ensemble.end()


@pytest.mark.parametrize("warm", [False, True])
def test_a_learner_that_comes_new_to_a_used_critic_hears_of_it_and_lets_it_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    monkeypatch.setattr("trainer.model.critic._READY_S", 0.05)
    config = config_of(tmp_path, *(["critic.warmup_batches=3"] if warm else []))
    ensemble = Ensemble(config, None)
    ensemble.view.wait_until_ready()
    fresh = [weights_of(critic.network) for critic in ensemble.critics]
    for step in range(2):
        ensemble.view.learn(a_batch(version=step), a_reward(step), step)
        ensemble.view.values()
    assert min(map(largest_difference, [weights_of(c.network) for c in ensemble.critics], fresh)) > 0
    lines = [line.channel for line in ensemble.view._lines]
    for channel in lines:  # kill -9: what was on its way to that learner is lost with it
        while channel.receive(0) is not None:
            pass
    ensemble.view = Critics(config, lines, come_back=True)
    ensemble.view.wait_until_ready()
    assert max(map(largest_difference, [weights_of(c.network) for c in ensemble.critics], fresh)) == 0
    assert all(critic._warming == warm for critic in ensemble.critics)
    ensemble.end()


def test_two_processes_of_one_critic_have_two_sessions(tmp_path: Path) -> None:
    sessions = set()
    for _ in range(2):
        ours, theirs = MemoryChannel.pair(ToCritic)
        ours.send(Stop(reason=""))
        serve(Critic(config_of(tmp_path), 0, a_world()), theirs, 0, a_world())
        sessions.add(ours.receive(0).session)
    assert len(sessions) == 2
    assert "" not in sessions


def test_one_that_does_not_come_back_in_time_is_named_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = a_config(tmp_path, "critic.timeout_s=0.4")
    ours, theirs = MemoryChannel.pair(ToCritic)
    view = Critics(config, [ours], come_back=True)
    view.learn(a_batch(), a_reward(0), 0)

    def fails(*_: object) -> None:
        raise ValueError("the batch is cursed")

    critic = Critic(config, 0, a_world())
    critic.learn = fails  # type: ignore[assignment]

    def live() -> None:
        with pytest.raises(ValueError, match="cursed"):
            serve(critic, theirs, 0, a_world())

    thread = threading.Thread(target=live)
    thread.start()
    with (
        caplog.at_level(logging.ERROR, "asyncppo"),
        pytest.raises(StallError, match=r"for critic 0 to learn and .* it failed: ValueError: the batch is cursed"),
    ):
        view.values()
    thread.join()
    assert "critic 0 failed, and is waited for to come back: ValueError: the batch is cursed" in caplog.text


def test_where_nobody_keeps_batches_for_it_a_new_process_is_refused(tmp_path: Path) -> None:
    ours, theirs = MemoryChannel.pair(ToCritic)
    view = Critics(a_config(tmp_path), [ours])
    for session in ("a", "b"):
        theirs.send(CriticReady(index=0, parameters=1, session=session))
    view.learn(a_batch(), a_reward(0), 0)
    with pytest.raises(EngineError, match="critic 0 is another process than before"):
        view.values()


def test_batches_are_kept_up_to_a_size_and_what_is_missed_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    lessons = Lessons(limit_mb=1)

    def messages(step: int) -> list[Learn]:
        ids = np.zeros(1000, dtype=np.int32)
        rewards = np.zeros(50_000, dtype=np.float32)  # 200 kB: five fit
        given: dict[str, Any] = {"input_ids": ids, "sequence_lengths": ids, "response_lengths": ids}
        return [
            Learn(step=step, rewards=rewards, shard=np.zeros(1000, np.uint8), group_index=ids, **given)
            for _ in range(2)
        ]

    for step in range(9):
        lessons.add(messages(step))
    assert [message.step for message in lessons.of(1)] == [5, 6, 7, 8]
    assert lessons.missed == 5
    assert "critic.recovery_mb" in caplog.text
    lessons.remove_before(3)  # a checkpoint: of those that are missing two are newer
    assert [message.step for message in lessons.of(0)] == [5, 6, 7, 8]
    assert lessons.missed == 2
    lessons.remove_before(7)
    assert [message.step for message in lessons.of(0)] == [7, 8]
    assert lessons.missed == 0
    lessons.clear()
    assert lessons.of(0) == []


def test_a_critic_that_misses_batches_is_told_of_in_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    ensemble = Ensemble(config_of(tmp_path), journal, "with what it was asked", 3)
    ensemble.view._lessons._limit = 1  # bytes: only the newest stays
    ensemble.view.wait_until_ready()
    for step in range(4):
        ensemble.view.learn(a_batch(version=step), a_reward(step), step)
        ensemble.view.values()
    ensemble.end()
    journal.close()
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(line["event"], line["critic"], line["again"], line["missed"]) for line in lines] == [
        ("critic_restarted", 0, 1, 3)
    ]
