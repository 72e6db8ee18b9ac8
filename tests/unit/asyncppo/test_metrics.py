"""The journal: what is written line by line, and what a reader sees of it."""

import math
import re
from pathlib import Path

import pytest

from asyncppo.metrics import STEP_METRICS, Journal, read
from tests import run_maker

pytestmark = pytest.mark.unit


def test_steps_and_events_come_back_as_they_were_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "run")
    journal.step({"step": 1, "reward/mean": 0.5, "staleness/histogram": [1, 2]})
    journal.event("swap", server="a", pause_s=0.25)
    journal.close()
    assert list(read(tmp_path / "new/run/metrics.jsonl")) == [
        {"step": 1, "reward/mean": 0.5, "staleness/histogram": [1, 2]}
    ]
    (event,) = read(tmp_path / "new/run/events.jsonl")
    assert event.pop("time") > 1e9
    assert event == {"event": "swap", "server": "a", "pause_s": 0.25}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(tmp_path: Path, number: float) -> None:
    journal = Journal(tmp_path)
    journal.step({"a": number, "nested": {"b": number}, "c": 1.0})
    journal.close()
    assert list(read(tmp_path / "metrics.jsonl")) == [{"a": None, "nested": {"b": None}, "c": 1.0}]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.step({"step": 1})
    assert list(read(tmp_path / "metrics.jsonl")) == [{"step": 1}]
    journal.step({"step": 2})
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2]
    journal.close()


def test_a_journal_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    for step in (1, 2):
        journal = Journal(tmp_path)
        journal.step({"step": step})
        journal.close()
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"step":2')
    assert list(read(path)) == [{"step": 1}]


def test_a_file_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert list(read(tmp_path / "metrics.jsonl")) == []


def test_every_metric_of_a_step_is_documented_and_the_synthetic_run_has_them_all() -> None:
    names = {re.sub(r"^critic/\d+/", "critic/M/", key) for key in run_maker.row(1)}
    assert names <= set(STEP_METRICS)
    assert set(STEP_METRICS) - names == {"time/checkpoint_s"}
