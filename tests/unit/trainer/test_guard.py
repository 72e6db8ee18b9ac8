"""Claims about what watches over the updates: the brake, skipped steps, the alarm."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncppo.errors import TrainingError
from asyncppo.metrics import EVENTS_FILE, Journal, read
from tests.model_maker import a_batch, a_config
from trainer.guard import Alarm, Brake, SkippedSteps
from trainer.model.policy import Scores
from trainer.stream.batch import Batch
from trainer.targets import Targets

pytestmark = pytest.mark.unit

GOOD, BAD = 0.9, 0.1
"""Effective sample sizes on either side of the limit of 0.3."""


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path)
    yield journal
    journal.close()


def events(directory: Path) -> list[dict[str, Any]]:
    found = list(read(directory / EVENTS_FILE))
    for event in found:
        assert event.pop("time") > 0
    return found


# --- the brake -------------------------------------------------------------------------------------------------------


def a_brake(directory: Path, *overrides: str, journal: Journal | None = None) -> Brake:
    """Three passes over a batch, a staleness of up to 2, eased after two good steps."""
    settings = ("algorithm.utd=3", "stream.max_staleness=2", "guard.recover_after=2")
    return Brake(a_config(directory, *settings, *overrides), journal)


def after(brake: Brake, *sizes: float, gap: float = math.nan) -> list[tuple[int, int, int]]:
    """(level, passes, bound) after a step of each effective sample size."""
    found = []
    for version, ess in enumerate(sizes):
        brake.observe(version, ess, gap)
        found.append((brake.level, brake.passes, brake.max_staleness))
    return found


def test_passes_go_first_and_then_the_staleness_bound_down_to_one_and_zero(tmp_path: Path) -> None:
    brake = a_brake(tmp_path)
    assert (brake.level, brake.passes, brake.max_staleness) == (0, 3, 2)
    assert after(brake, *[BAD] * 6) == [(1, 2, 2), (2, 1, 2), (3, 1, 1), (4, 1, 0), (4, 1, 0), (4, 1, 0)]


def test_with_one_pass_a_step_or_replay_the_bound_is_all_there_is_to_lower(tmp_path: Path) -> None:
    for override in ("algorithm.utd=1", "algorithm.reuse=replay"):
        assert after(a_brake(tmp_path, override), BAD, BAD, BAD) == [(1, 1, 1), (2, 1, 0), (2, 1, 0)]


def test_at_staleness_0_and_utd_1_there_is_nothing_to_brake(tmp_path: Path) -> None:
    brake = a_brake(tmp_path, "algorithm.utd=1", "stream.max_staleness=0")
    assert after(brake, BAD, BAD) == [(0, 1, 0)] * 2


def test_good_steps_in_a_row_ease_the_brake_in_the_opposite_order_one_level_at_a_time(tmp_path: Path) -> None:
    brake = a_brake(tmp_path)
    after(brake, BAD, BAD, BAD)
    assert after(brake, *[GOOD] * 8) == [
        (3, 1, 1),
        (2, 1, 2),
        (2, 1, 2),
        (1, 2, 2),
        (1, 2, 2),
        (0, 3, 2),
        (0, 3, 2),
        (0, 3, 2),
    ]


def test_a_bad_step_among_good_ones_starts_the_count_anew(tmp_path: Path) -> None:
    brake = a_brake(tmp_path)
    assert [level for level, _, _ in after(brake, BAD, GOOD, BAD, GOOD, GOOD)] == [1, 1, 2, 2, 1]


def test_good_steps_while_it_is_off_ease_nothing_in_advance(tmp_path: Path) -> None:
    brake = a_brake(tmp_path)
    assert [level for level, _, _ in after(brake, GOOD, GOOD, GOOD, BAD, GOOD, GOOD)] == [0, 0, 0, 1, 1, 0]


def test_a_step_without_an_effective_sample_size_neither_brakes_nor_eases(tmp_path: Path) -> None:
    brake = a_brake(tmp_path)
    assert after(brake, math.nan) == [(0, 3, 2)]
    after(brake, BAD)
    assert [level for level, _, _ in after(brake, *[math.nan] * 5, GOOD, math.nan, GOOD)] == [1] * 7 + [0]


def test_a_gap_that_is_not_known_is_no_bad_one_and_keeps_no_good_step_from_counting(tmp_path: Path) -> None:
    brake = a_brake(tmp_path, "guard.max_logprob_gap=0.01")
    after(brake, BAD)
    assert [level for level, _, _ in after(brake, GOOD, GOOD, gap=math.nan)] == [1, 0]


def test_a_gap_above_its_limit_brakes_and_one_at_the_limit_does_not(tmp_path: Path) -> None:
    brake = a_brake(tmp_path, "guard.max_logprob_gap=0.01")
    assert after(brake, GOOD, gap=0.01) == [(0, 3, 2)]
    assert after(brake, GOOD, gap=0.011) == [(1, 2, 2)]
    assert after(brake, math.nan, gap=0.011) == [(2, 1, 2)]
    assert after(a_brake(tmp_path), GOOD, gap=99.0) == [(0, 3, 2)]  # nobody asked


def test_an_effective_sample_size_at_the_limit_is_good_and_a_limit_of_0_does_not_look(tmp_path: Path) -> None:
    assert after(a_brake(tmp_path, "guard.min_ess=0.25"), 0.25, 0.249) == [(0, 3, 2), (1, 2, 2)]
    assert after(a_brake(tmp_path, "guard.min_ess=0"), 0.0, 1e-9) == [(0, 3, 2)] * 2


def test_every_change_of_level_is_an_event_that_says_why(tmp_path: Path, journal: Journal) -> None:
    brake = a_brake(tmp_path, "guard.max_logprob_gap=0.01", journal=journal)
    for version, (ess, gap) in enumerate([(GOOD, 0.0), (BAD, 0.0), (GOOD, 0.5), (GOOD, 0.0), (GOOD, 0.0)]):
        brake.observe(version, ess, gap)
    assert events(tmp_path) == [
        {
            "event": "brake",
            "policy_version": 1,
            "level": 1,
            "passes": 2,
            "max_staleness": 2,
            "reason": "effective sample size 0.10, below guard.min_ess 0.3",
        },
        {
            "event": "brake",
            "policy_version": 2,
            "level": 2,
            "passes": 1,
            "max_staleness": 2,
            "reason": "log-prob gap 0.5, above guard.max_logprob_gap 0.01",
        },
        {
            "event": "brake",
            "policy_version": 4,
            "level": 1,
            "passes": 2,
            "max_staleness": 2,
            "reason": "2 good steps",
        },
    ]


def test_what_cannot_be_lowered_further_is_no_event(tmp_path: Path, journal: Journal) -> None:
    after(a_brake(tmp_path, "algorithm.utd=1", "stream.max_staleness=1", journal=journal), *[BAD] * 4)
    assert len(events(tmp_path)) == 1


# --- skipped steps ---------------------------------------------------------------------------------------------------


def some_targets(batch: Batch) -> Targets:
    tokens = torch.arange(len(batch.response_ids), dtype=torch.float32)
    return Targets(tokens / 7, tokens > 3, tokens < 9, tokens, -tokens)


def observe(steps: SkippedSteps, *counts: int) -> None:
    for number, skipped in enumerate(counts):
        batch = a_batch(version=4 + number)
        logprobs = torch.linspace(-3, -1, len(batch.response_ids))
        steps.observe(skipped, batch, Scores(logprobs, logprobs * 2, None), some_targets(batch))


def dumps(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "runs/test/skipped").glob("*"))


def test_a_good_step_leaves_no_trace(tmp_path: Path, journal: Journal) -> None:
    steps = SkippedSteps(a_config(tmp_path), journal)
    observe(steps, 0, 0)
    assert steps.count == 0
    assert events(tmp_path) == []
    assert dumps(tmp_path) == []


def test_the_batch_of_a_skipped_step_can_be_loaded_without_pickle(tmp_path: Path, journal: Journal) -> None:
    steps = SkippedSteps(a_config(tmp_path), journal)
    observe(steps, 0, 2)
    (name,) = dumps(tmp_path)
    assert name == "version_00000005.npz"
    path = tmp_path / "runs/test/skipped" / name
    batch = a_batch(version=5)
    with np.load(path, allow_pickle=False) as found:
        for field in Batch.__dataclass_fields__:
            if field not in ("version", "prompt_ids", "epochs"):
                assert found[field].tolist() == getattr(batch, field).tolist(), field
        assert tuple(found["prompt_ids"].tolist()) == batch.prompt_ids
        targets = some_targets(batch)
        for field in Targets.__dataclass_fields__:
            assert found[field].tolist() == getattr(targets, field).tolist(), field
        assert found["logprobs"].tolist() == torch.linspace(-3, -1, 23).tolist()
        assert found["entropy"].tolist() == (torch.linspace(-3, -1, 23) * 2).tolist()
        assert "reference" not in found
    (event,) = events(tmp_path)
    assert event == {"event": "skipped", "policy_version": 5, "optimizer_steps": 2, "batch": str(path)}


def test_a_batch_with_numbers_that_are_not_finite_is_dumped_as_it_is(tmp_path: Path, journal: Journal) -> None:
    batch = a_batch()
    bad = np.full(23, np.nan, dtype=np.float32)
    bad[3] = np.inf
    poisoned = replace(batch, behaviour_logprobs=bad)
    SkippedSteps(a_config(tmp_path), journal).observe(1, poisoned, Scores(None, None, None), some_targets(batch))
    with np.load(tmp_path / "runs/test/skipped/version_00000004.npz", allow_pickle=False) as found:
        np.testing.assert_array_equal(found["behaviour_logprobs"], bad)


def test_so_many_steps_in_a_row_end_the_run_and_all_are_counted_and_dumped(tmp_path: Path, journal: Journal) -> None:
    steps = SkippedSteps(a_config(tmp_path, "guard.max_skipped=3"), journal)
    with pytest.raises(TrainingError, match=r"3 steps in a row .*guard\.max_skipped.*version_00000006\.npz"):
        observe(steps, 1, 2, 4, 0)
    assert steps.count == 7
    assert len(dumps(tmp_path)) == 3


def test_a_good_step_between_starts_the_count_in_a_row_anew(tmp_path: Path, journal: Journal) -> None:
    steps = SkippedSteps(a_config(tmp_path, "guard.max_skipped=2"), journal)
    observe(steps, 1, 0, 5, 0, 1, 0)
    assert steps.count == 7
    with pytest.raises(TrainingError):
        observe(steps, 1, 1)


def test_ranks_above_the_first_end_as_well_and_write_nothing(tmp_path: Path) -> None:
    steps = SkippedSteps(a_config(tmp_path, "guard.max_skipped=1"), None)
    with pytest.raises(TrainingError):
        observe(steps, 1)
    assert dumps(tmp_path) == []


# --- the alarm -------------------------------------------------------------------------------------------------------


def test_the_alarm_comes_after_five_steps_in_a_row_and_ends_with_the_first_that_is_apart(
    tmp_path: Path, journal: Journal
) -> None:
    alarm = Alarm(a_config(tmp_path, "guard.min_separation=0.01"), journal)
    together, apart = 0.009, 0.01
    for version, separation in enumerate([together] * 4 + [apart] + [together] * 7 + [apart, apart]):
        alarm.observe(version, separation)
    assert events(tmp_path) == [
        {"event": "critics_collapsed", "policy_version": 9, "by": together},
        {"event": "critics_apart", "policy_version": 12, "by": apart},
    ]


def test_a_separation_that_is_not_defined_neither_counts_nor_ends_the_count(tmp_path: Path, journal: Journal) -> None:
    alarm = Alarm(a_config(tmp_path), journal)
    for version, separation in enumerate([0.0, math.nan, 0.0, 0.0, math.nan, 0.0]):
        alarm.observe(version, separation)
    assert events(tmp_path) == []
    alarm.observe(6, 0.0)
    alarm.observe(7, math.nan)
    assert [event["event"] for event in events(tmp_path)] == ["critics_collapsed"]


def test_a_limit_of_0_gives_no_alarm(tmp_path: Path, journal: Journal) -> None:
    alarm = Alarm(a_config(tmp_path, "guard.min_separation=0"), journal)
    for version in range(9):
        alarm.observe(version, 0.0)
    assert events(tmp_path) == []
