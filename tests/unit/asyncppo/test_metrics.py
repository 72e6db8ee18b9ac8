"""The journal: what is written line by line, and what a reader sees of it."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from asyncppo import metrics
from asyncppo.errors import JournalError
from asyncppo.metrics import EVENTS_FILE, LEDGER_FILE, METRICS_FILE, STEP_METRICS, Journal, read
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


@pytest.mark.parametrize("torn", ['{"step":2', '{"step":2' + "x" * 200_000])
def test_a_torn_last_line_is_cut_off_before_the_next_one_is_written(tmp_path: Path, torn: str) -> None:
    for name in (METRICS_FILE, EVENTS_FILE, LEDGER_FILE):
        (tmp_path / name).write_text('{"step":1}\n' + torn)
    journal = Journal(tmp_path)
    journal.step({"step": 3})
    journal.event("start")
    journal.ledger(version=3)
    journal.close()
    assert [row["step"] for row in read(tmp_path / METRICS_FILE)] == [1, 3]
    assert [row.get("event") for row in read(tmp_path / EVENTS_FILE)] == [None, "start"]
    assert [row.get("version") for row in read(tmp_path / LEDGER_FILE)] == [None, 3]
    (tmp_path / METRICS_FILE).write_text(torn)
    Journal(tmp_path).close()
    assert (tmp_path / METRICS_FILE).read_bytes() == b""


def test_metrics_and_ledger_are_cut_where_the_checkpoint_was_made_and_events_stay(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.step({"step": 1})
    journal.ledger(version=0)
    sizes = journal.sizes()
    for step in (2, 3):
        journal.step({"step": step})
        journal.ledger(version=step - 1)
        journal.event("swap")
    journal.sync()
    journal.close()
    journal = Journal(tmp_path)
    assert journal.roll_back(*sizes) == 2
    assert journal.roll_back(*sizes) == 0
    journal.step({"step": 2})
    journal.ledger(version=1)
    journal.close()
    assert [row["step"] for row in read(tmp_path / METRICS_FILE)] == [1, 2]
    assert [row["version"] for row in read(tmp_path / LEDGER_FILE)] == [0, 1]
    assert len(list(read(tmp_path / EVENTS_FILE))) == 2


def test_files_that_are_shorter_than_the_checkpoint_says_are_left_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path)
    journal.step({"step": 1})
    assert journal.roll_back(1000, 1000) == 0
    assert list(read(tmp_path / METRICS_FILE)) == [{"step": 1}]
    assert "lines are missing" in caplog.text
    journal.close()


def test_a_run_without_a_ledger_has_no_file_of_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.sizes() == (0, 0)
    journal.close()
    assert not (tmp_path / LEDGER_FILE).exists()


def test_a_file_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert list(read(tmp_path / "metrics.jsonl")) == []


def test_every_metric_of_a_step_is_documented_and_the_synthetic_run_has_them_all() -> None:
    names = {re.sub(r"^critic/\d+/", "critic/M/", key) for key in run_maker.row(1)}
    assert names <= set(STEP_METRICS)
    assert set(STEP_METRICS) - names == {"time/checkpoint_s"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("kind", ["step", "ledger"])
def test_a_line_that_the_disk_does_not_take_is_an_error_that_says_what_to_do(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_PATIENCE_S", 0.2)
    name = {"step": METRICS_FILE, "ledger": LEDGER_FILE}[kind]
    (tmp_path / name).symlink_to("/dev/full")
    journal = Journal(tmp_path)
    write = {
        "step": lambda: journal.step({"step": 1}),
        "ledger": lambda: journal.ledger(version=0, groups=[]),
    }[kind]
    with pytest.raises(JournalError, match=rf"{name}: a line cannot be written: .*No space.*start the same command"):
        write()
    journal.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_event_that_the_disk_does_not_take_is_counted_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / EVENTS_FILE).symlink_to("/dev/full")
    journal = Journal(tmp_path)
    for _ in range(3):
        journal.event("start")
    journal.close()
    assert journal.lost_events == 3
    assert caplog.text.count("is lost") == 1


def test_a_line_that_is_written_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)

    class Reluctant:
        """Takes three bytes at a time, and fails in between, as a disk that is full for a moment."""

        def __init__(self, file: Any) -> None:
            self._file, self._turn = file, 0

        def write(self, data: Any) -> int:
            self._turn += 1
            if self._turn % 4 == 0:
                raise OSError("no space left on device")
            return int(self._file.write(data[:3]))

    real = journal._files[METRICS_FILE]
    monkeypatch.setitem(journal._files, METRICS_FILE, Reluctant(real))
    monkeypatch.setattr(metrics.time, "sleep", lambda seconds: None)
    journal.step({"step": 1})
    journal.step({"step": 2})
    monkeypatch.setitem(journal._files, METRICS_FILE, real)
    journal.close()
    assert [row["step"] for row in read(tmp_path / METRICS_FILE)] == [1, 2]
