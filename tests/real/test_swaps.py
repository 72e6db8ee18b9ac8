"""Hot swaps of a real SGLang under load, by both transports: `asyncppo bench swap`, short.

The long form, with other sizes and loads, is the same command: `asyncppo bench swap --swaps 200 --requests 16`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.real.run_tools import ROOT

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

SWAPS = 6
LOADS = (1, 64)
TRANSPORTS = ("disk", "broadcast")
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def measured(rollout_python: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, Path]:
    """What the command prints, and its directory: one SGLang for all rows."""
    directory = tmp_path_factory.mktemp("bench")
    options = {
        "--sizes": "0.1M",
        "--transports": ",".join(TRANSPORTS),
        "--requests": ",".join(map(str, LOADS)),
        "--swaps": str(SWAPS),
        "--tokens": "128",
        "--check": "64",
        "--device": "cpu",
        "--publish-directory": str(directory),
        "--directory": str(directory),
    }
    command = [sys.executable, "-m", "asyncppo.cli", "bench", "swap", "--json"]
    command += [part for option in options.items() for part in option]
    environment = os.environ | {
        "ASYNCPPO_TRAINER_PYTHON": sys.executable,
        "ASYNCPPO_ROLLOUT_PYTHON": rollout_python,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=380)
    logs = "".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in directory.glob("*/*.log"))
    assert done.returncode == 0, done.stderr[-3000:] + logs
    rows: Rows = json.loads(done.stdout.splitlines()[-1])
    return rows, directory


@pytest.fixture
def rows(measured: tuple[Rows, Path]) -> Rows:
    return measured[0]


def test_every_version_is_served_under_every_load_by_both_transports(rows: Rows) -> None:
    assert [(row["transport"], row["requests"]) for row in rows] == [(t, load) for t in TRANSPORTS for load in LOADS]
    assert {row["swaps"] for row in rows} == {SWAPS}
    assert [row["failed_swaps"] for row in rows] == [0, 0, 0, 0]
    assert [row["attempts"] for row in rows] == [1, 1, 1, 1]


def test_no_group_is_lost_and_no_engine_is_restarted(rows: Rows) -> None:
    assert [(row["lost_groups"], row["engine_restarts"]) for row in rows] == [(0, 0)] * 4


def test_responses_go_on_over_several_swaps(rows: Rows) -> None:
    for row in rows:
        assert row["met_a_swap"] > 0, row
        assert row["most_versions"] >= (3 if row["requests"] > 1 else 2), row


def test_every_token_has_the_log_prob_of_the_weights_that_its_span_names(rows: Rows) -> None:
    for row in rows:
        assert row["gaps"]["tokens"] > 500, row
        assert row["gaps"]["largest"] < 1e-4, row
        assert row["gaps"]["wrong"] > 0.05, "the versions do not differ: nothing was proved"


def test_the_engine_answers_the_probe_as_the_trainer_does(rows: Rows) -> None:
    assert all(row["probe_gap"] < 1e-5 for row in rows)


def test_all_phases_are_timed_and_the_learner_waits_for_none_of_them(rows: Rows) -> None:
    for row in rows:
        phases = [row[phase]["median"] for phase in ("pause_s", "load_s", "resume_s")]
        assert min(phases) > 0
        assert row["probe_s"]["median"] > 0
        assert row["still_s"]["largest"] <= row["served_s"]["largest"]
        assert row["served_s"]["largest"] < 30
        assert row["bound_s"] == pytest.approx(row["bytes"] / row["bandwidth"])
        assert row["limit_s"] == pytest.approx(2 * row["bound_s"] + 0.05)
        assert row["in_reach"] == (row["still_s"]["median"] <= row["limit_s"])


def test_the_servers_memory_is_flat(rows: Rows) -> None:
    assert rows[-1]["memory_mb"][1] < rows[0]["memory_mb"][0] + 150, [row["memory_mb"] for row in rows]


def test_nothing_is_left_behind(measured: tuple[Rows, Path]) -> None:
    _, directory = measured
    mine = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert [line[:200] for line in mine if str(directory) in line] == []
    assert not list(directory.glob("asyncppo-*/v*")), "published versions were not removed"
