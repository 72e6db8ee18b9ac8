"""The report: the numbers of a known run, and of runs that lack something."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from asyncppo.demo import unmet, verdict
from asyncppo.errors import UserError
from asyncppo.report.plots import draw
from asyncppo.report.summary import Summary, summarize
from asyncppo.report.text import show
from tests.run_maker import FIRST_STEP, START, append, evaluation, events, row, swap, write_config, write_run

pytestmark = pytest.mark.unit


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    return summarize(write_run(tmp_path / "demo"))


def text_of(summary: Summary) -> str:
    console = Console(file=io.StringIO(), width=80)
    show(summary, [], console)
    return console.file.getvalue()  # type: ignore[attr-defined]


# ---- the summary ----


def test_the_run_is_counted(summary: Summary) -> None:
    assert (summary.steps, summary.steps_wanted, summary.groups) == (40, 40, 320)
    assert (summary.swaps, summary.dropped, summary.servers) == (41, 0, ("demo-1",))
    assert summary.end_reason == "the run is complete"
    assert summary.train_wall_s == pytest.approx(104.0)  # ready at 8 s, 26 s to the first step, 80 s, 6 s to the end


def test_staleness_is_summed_over_all_batches(summary: Summary) -> None:
    assert summary.staleness_histogram == (80, 120, 80, 40, 0)
    assert (summary.max_staleness_seen, summary.max_staleness) == (3, 4)


def test_pauses_leave_out_the_swap_to_version_0_which_paused_nothing(summary: Summary) -> None:
    assert len(summary.pauses_s) == 40
    assert summary.pause_median_s == pytest.approx(0.2)


def test_held_out_sets_are_compared_before_and_after(summary: Summary) -> None:
    six, eight = summary.comparisons
    assert (six.set_name, eight.set_name) == ("6-op", "8-op")
    assert six.before is not None
    assert six.before.standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 128))
    assert six.gain == pytest.approx(0.5)
    assert six.standard_error == pytest.approx(math.sqrt(2 * 0.25 * 0.75 / 128))


def test_a_standard_error_that_the_event_gives_is_taken(tmp_path: Path) -> None:
    append(tmp_path / "events.jsonl", [evaluation("6-op", 0, 0.5, START) | {"standard_error": 0.01}])
    assert summarize(tmp_path).scores[0].standard_error == 0.01


def test_the_wall_clock_is_split_without_gaps(summary: Summary) -> None:
    whole = {phase.name: phase.seconds for phase in summary.phases if not phase.part}
    assert whole == pytest.approx(
        {
            "start-up, until version 0 is served": 21.0,
            "held-out problems, before": 5.0,
            "40 training steps": 80.0,
            "held-out problems, after": 5.0,
            "saving and exporting": 1.0,
        }
    )
    parts = {phase.name: phase.seconds for phase in summary.phases if phase.part}
    assert parts["the trainer loads its models"] == pytest.approx(8.0)
    assert parts["until a rollout server joins"] == pytest.approx(12.0)
    assert parts["SGLang starts and loads version 0"] == pytest.approx(1.0)
    assert parts["waiting for the rollout servers"] == pytest.approx(28.0)
    assert parts["updating the actor"] == pytest.approx(30.0)
    assert sum(parts.values()) == pytest.approx(21.0 + 80.0)


def test_first_and_last_are_means_over_five_steps(summary: Summary) -> None:
    assert summary.first("reward/mean") == pytest.approx(0.22)
    assert summary.last("reward/mean") == pytest.approx(0.57)
    assert summary.first("no/such") is None


def test_drops_are_counted_by_reason(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "demo", **{"stream/dropped": 3})
    reasons = ["too stale", "server left", "too stale"]
    append(directory / "events.jsonl", [{"event": "dropped", "time": START, "lease": 1, "reason": r} for r in reasons])
    found = summarize(directory)
    assert (found.dropped, found.dropped_by_reason) == (3, {"too stale": 2, "server left": 1})
    assert "3 dropped (2 too stale, 1 server left)" in text_of(found)


def test_steps_that_were_done_twice_count_once(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "demo")
    append(directory / "metrics.jsonl", [row(40, **{"reward/mean": 0.9})])
    found = summarize(directory)
    assert len(found.rows) == 40
    assert found.rows[-1]["reward/mean"] == 0.9


def test_the_trainers_lives_add_up(tmp_path: Path) -> None:
    start = {"event": "start", "version": 0, "resumed": False}
    append(
        tmp_path / "events.jsonl",
        [
            start | {"time": START},  # killed: its last sign of life is the step 10 s later
            start | {"time": START + 100},
            {"event": "end", "time": START + 130, "version": 2, "reason": "the run is complete"},
        ],
    )
    append(tmp_path / "metrics.jsonl", [row(1, time=START + 10), row(2, time=START + 120)])
    assert summarize(tmp_path).train_wall_s == pytest.approx(40.0)


def test_a_run_that_was_killed_has_no_end(tmp_path: Path) -> None:
    write_config(tmp_path, 40)
    append(tmp_path / "events.jsonl", events(40)[:6])
    append(tmp_path / "metrics.jsonl", [row(1), row(2)])
    found = summarize(tmp_path)
    assert found.end_reason is None
    assert found.train_wall_s == pytest.approx(row(2)["time"] - (START + 8))
    assert found.comparisons[0].after is None
    assert "2 of 40 steps" in text_of(found)
    assert "it has not ended" in text_of(found)


def test_a_run_that_has_just_begun_can_be_reported(tmp_path: Path) -> None:
    append(tmp_path / "events.jsonl", events(40)[:2])
    found = summarize(tmp_path)
    assert found.steps == 0
    assert draw(found) == []
    assert "0 steps" in text_of(found)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name a run directory"):
        summarize(tmp_path)


# ---- the text ----


def test_the_text_fits_80_columns_up_to_paths_and_says_what_matters(summary: Summary) -> None:
    (summary.directory / "actor").mkdir()
    text = text_of(summary)
    tables = text.split("\nwho waits")[0]
    assert max(map(len, tables.splitlines())) <= 80
    for part in (
        "40 of 40 steps in 1:44 (the run is complete)",
        "25.0% ± 3.8",
        "75.0% ± 3.8",
        "+50.0 ± 5.4",
        "most seen 3, bound 4",
        "the trainer waits for the rollout servers 35 % of the time; they idle 5.0 %",
        "41, pause 0.20 s (median), 0.20 s (longest)",
        "320 trained on, 0 dropped",
        f"{summary.directory / 'actor'} (an ordinary Hugging Face directory)",
        f"logs           {summary.directory / 'logs'}",
    ):
        assert part in text


# ---- the pictures ----


def test_the_pictures_are_written_and_are_pngs(summary: Summary) -> None:
    paths = draw(summary)
    assert [path.name for path in paths] == [
        "overview.png",
        "learning.png",
        "staleness.png",
        "critics.png",
        "policy.png",
        "time.png",
    ]
    for path in paths:
        assert path.parent == summary.directory / "plots"
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(path.name for path in paths)


def test_runs_without_critics_or_with_one_step_can_be_drawn(tmp_path: Path) -> None:
    bare = {key: number for key, number in row(1).items() if not key.startswith(("value/", "critic/"))}
    append(tmp_path / "metrics.jsonl", [bare | {"logprob_gap/mean": None, "policy/ess": None}])
    assert len(draw(summarize(tmp_path))) == 6


# ---- the verdict ----


def test_the_verdict_has_the_demos_keys(summary: Summary) -> None:
    found = verdict(summary)
    assert found.__struct_fields__ == (
        "pass_at_1_before",
        "pass_at_1_after",
        "steps",
        "groups",
        "dropped",
        "max_staleness_seen",
        "swaps",
        "train_wall_s",
    )
    assert (found.pass_at_1_before, found.pass_at_1_after, found.swaps) == (0.25, 0.75, 41)
    assert found.train_wall_s == 104.0


def test_a_run_that_learned_meets_every_condition(summary: Summary) -> None:
    assert unmet(summary) == []


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (0.25, ["not more than 3 standard errors", "less than 0.1"]),
        (0.30, ["not more than 3 standard errors", "less than 0.1"]),
        (0.40, ["not more than 3 standard errors"]),  # a gain of 0.15, 3 standard errors are 0.17
        (0.45, []),
    ],
)
def test_learning_is_a_gain_beyond_chance_and_of_a_tenth(tmp_path: Path, after: float, said: list[str]) -> None:
    failures = unmet(summarize(write_run(tmp_path / "demo", after=after)))
    assert len(failures) == len(said)
    for failure, part in zip(failures, said, strict=True):
        assert part in failure


def test_a_gain_below_a_tenth_is_no_learning_however_sure(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "demo")
    sure = {"standard_error": 0.001}
    end = FIRST_STEP + 80
    (directory / "events.jsonl").unlink()
    append(
        directory / "events.jsonl",
        [evaluation("6-op", 0, 0.5, START) | sure, swap(1, START), evaluation("6-op", 40, 0.55, end) | sure],
    )
    (failure,) = unmet(summarize(directory))
    assert "less than 0.1" in failure


def test_missing_steps_staleness_above_the_bound_and_missing_evaluations_are_named(tmp_path: Path) -> None:
    write_config(tmp_path, 40)
    append(tmp_path / "metrics.jsonl", [row(1, **{"staleness/max": 5})])
    every, staleness, learning = unmet(summarize(tmp_path))
    assert every == "every step: 1 of 40 are done"
    assert staleness == "staleness: 5 was seen, above the bound of 4"
    assert "not answered both before and after" in learning
