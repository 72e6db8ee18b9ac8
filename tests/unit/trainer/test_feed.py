"""The feed: every rank gets the same batch or the same stop, and held-out answers become pass@1."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from asyncppo.algorithm import assign_shards
from asyncppo.config import Config
from asyncppo.messages import Group
from asyncppo.metrics import EVENTS_FILE, Journal, read
from tests.stream_maker import a_buffered, a_config, a_group, a_prompt, weights_of
from trainer.feed import Feed
from trainer.model.world import World
from trainer.stream.batch import Batch, pack
from trainer.stream.buffer import BufferedGroup
from trainer.stream.intake import Intake
from trainer.stream.prompts import Prompt

pytestmark = pytest.mark.unit

GROUPS = [a_buffered(0, 1, a_prompt(7, tokens=2), a_group(1)), a_buffered(2, 2, a_prompt(12, tokens=4))]
CONFIG = a_config(eval={"samples": 2})


class Wire:
    """A world of two ranks: what rank 0 shares goes to rank 1 as bytes, as `World.share` sends it."""

    sent: bytes

    def rank(self, rank: int) -> World:
        def share(arrays: Mapping[str, Any] | None) -> dict[str, Any]:
            if rank == 0:
                assert arrays is not None
                file = io.BytesIO()
                np.savez(file, **arrays)
                self.sent = file.getvalue()
                return dict(arrays)
            with np.load(io.BytesIO(self.sent), allow_pickle=False) as loaded:
                return {name: loaded[name] for name in loaded.files}

        return cast("World", SimpleNamespace(rank=rank, share=share))


class ScriptedIntake:
    """Gives out what it was told to."""

    def __init__(
        self, taken: list[BufferedGroup] | None = None, answers: list[Group] | None = None, served: int | None = None
    ) -> None:
        self._taken, self._answers, self._served = taken, answers, served
        self.announced: list[int] = []
        self.limits: list[int] = []

    def take(self, version: int, should_stop: object, *, warm_start: bool) -> list[BufferedGroup] | None:
        self.warm_start = warm_start
        return self._taken

    def evaluate(self, prompts: Sequence[Prompt], version: int, should_stop: object) -> list[Group] | None:
        return self._answers

    def oldest_served_version(self) -> int | None:
        return self._served

    def limit_staleness(self, bound: int) -> None:
        self.limits.append(bound)

    def announce(self, weights: Any) -> None:
        self.announced.append(weights.policy_version)


def a_feed(
    world: World, intake: ScriptedIntake | None = None, journal: Journal | None = None, config: Config = CONFIG
) -> Feed:
    sets = {"easy": [a_prompt(1), a_prompt(2)]}
    return Feed(config, world, cast("Intake | None", intake), journal, sets, Path(), lambda: False)


def test_every_rank_gets_the_same_batch() -> None:
    wire = Wire()
    first = a_feed(wire.rank(0), ScriptedIntake(GROUPS)).take(2)
    second = a_feed(wire.rank(1)).take(2)
    shards = [assign_shards(CONFIG.run.seed, held.prompt.prompt_id, 0, 2, 2) for held in GROUPS]
    expected = pack(GROUPS, shards, version=2)
    for batch in (first, second):
        assert batch is not None
        for field in fields(Batch):
            ours, theirs = getattr(expected, field.name), getattr(batch, field.name)
            assert type(ours) is type(theirs)
            if isinstance(ours, np.ndarray):
                assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes()), field.name
            else:
                assert ours == theirs
    assert sorted(expected.shard[:2]) == sorted(expected.shard[2:]) == [0, 1]  # one response for each critic


def test_shards_are_the_same_on_every_use() -> None:
    first, again = (
        a_feed(Wire().rank(0), ScriptedIntake([replace(held, uses=uses) for held in GROUPS])).take(2 + uses)
        for uses in range(2)
    )
    assert first is not None
    assert again is not None
    assert (first.uses.tolist(), again.uses.tolist()) == ([0, 0], [1, 1])
    assert first.shard.tolist() == again.shard.tolist()


@pytest.mark.parametrize("warm_start", [False, True])
def test_the_intake_is_told_of_the_warm_start(warm_start: bool) -> None:
    intake = ScriptedIntake(GROUPS)
    assert a_feed(Wire().rank(0), intake).take(0, warm_start=warm_start) is not None
    assert intake.warm_start == warm_start


def test_every_rank_learns_of_a_stop() -> None:
    wire = Wire()
    assert a_feed(wire.rank(0), ScriptedIntake(taken=None)).take(0) is None
    assert a_feed(wire.rank(1)).take(0) is None


def test_pass_at_1_is_the_mean_reward_and_is_recorded(tmp_path: Path) -> None:
    answers = [a_group(1, rewards=[0, 0]), a_group(2, rewards=[1, 0])]
    journal = Journal(tmp_path)
    assert a_feed(Wire().rank(0), ScriptedIntake(answers=answers), journal).evaluate(3) == {"easy": 0.25}
    journal.close()
    (event,) = read(tmp_path / EVENTS_FILE)
    assert (event["event"], event["set"], event["policy_version"], event["problems"]) == ("eval", "easy", 3, 2)
    assert (event["pass_at_1"], event["pass_at_k"], event["length_mean"], event["reward_errors"]) == (0.25, 0.5, 3.0, 0)
    # problems scored 0 and 0.5: standard deviation 0.5/√2, of the mean of two 0.5/√2/√2
    assert event["standard_error"] == pytest.approx(0.25)


def test_an_evaluation_that_was_stopped_has_no_score() -> None:
    assert a_feed(Wire().rank(0), ScriptedIntake(answers=None)).evaluate(0) == {}


@pytest.mark.parametrize(("served", "wanted"), [(None, 5), (3, 3), (5, 5), (-1, -1), (9, 5)])
def test_versions_that_a_server_still_serves_are_wanted(served: int | None, wanted: int) -> None:
    assert a_feed(Wire().rank(0), ScriptedIntake(served=served)).oldest_wanted_version(newest=5) == wanted


def test_only_the_first_rank_talks_with_servers() -> None:
    intake = ScriptedIntake()
    first = a_feed(Wire().rank(0), intake)
    first.announce(weights_of(4))
    first.limit_staleness(1)
    assert (intake.announced, intake.limits) == ([4], [1])
    other = a_feed(Wire().rank(1))
    with pytest.raises(AssertionError, match="only rank 0 has the intake"):
        other.announce(weights_of(4))
    with pytest.raises(AssertionError, match="only rank 0 has the intake"):
        other.limit_staleness(1)
    assert other.state().ledger.consumed == 0


@pytest.mark.parametrize(("every", "bounds"), [(1, [0, 2]), (3, [2, 2])])
def test_the_brake_leaves_room_until_the_next_version_is_published(every: int, bounds: list[int]) -> None:
    """Version 0 is published, then 3: the batch for version 2 has to be leased by a bound of 2."""
    intake = ScriptedIntake()
    config = a_config(publish={"every": every}, stream={"max_staleness": 4})
    feed = a_feed(Wire().rank(0), intake, config=config)
    for bound in (0, 2):
        feed.limit_staleness(bound)
    assert intake.limits == bounds


@pytest.mark.parametrize(("on_error", "responses"), [("mask", 3), ("zero", 4)])
def test_a_reward_error_leaves_the_batch_of_every_rank_or_stays_with_its_zero(on_error: str, responses: int) -> None:
    failed = a_buffered(2, 3, a_prompt(12), a_group(3, reward_errors=np.array([0, 1], np.uint8)))
    wire = Wire()
    config = a_config(reward={"on_error": on_error})
    first = a_feed(wire.rank(0), ScriptedIntake([GROUPS[0], failed]), config=config).take(2)
    second = a_feed(wire.rank(1), config=config).take(2)
    for batch in (first, second):
        assert batch is not None
        assert (len(batch.rewards), batch.reward_errors.tolist()) == (responses, [0, 1])


def test_an_evaluation_counts_a_reward_error_as_zero_whatever_is_done_with_it_in_training(tmp_path: Path) -> None:
    failed = a_group(1, rewards=[1, 0], reward_errors=np.array([0, 1], np.uint8))
    journal = Journal(tmp_path)
    scores = a_feed(Wire().rank(0), ScriptedIntake(answers=[failed, failed]), journal).evaluate(2)
    journal.close()
    (event,) = list(read(tmp_path / EVENTS_FILE))
    assert (scores["easy"], event["reward_errors"]) == (0.5, 2)
