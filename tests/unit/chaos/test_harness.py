"""Claims about the chaos harness: it sees a run that stands still, a program that ends by itself, one that stays."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.chaos.cluster import MARK, Cluster, Member
from tests.chaos.harness import Chaos

pytestmark = pytest.mark.unit


def a_chaos(directory: Path, *members: Member) -> Chaos:
    """Of programs that are given, and a run that makes no step."""
    trainer = Member("trainer", [], directory / "log", {})
    cluster: Any = SimpleNamespace(
        seed=0, ports={}, address="tcp://127.0.0.1:1", trainer=trainer, members=list(members), run=directory
    )
    return Chaos(cast("Cluster", cluster), 0.0, iter(()), say=lambda line: None)


def test_a_run_that_stands_still_is_a_stall_only_when_no_fault_explains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chaos = a_chaos(tmp_path)
    chaos._later(0.6, "it goes on", lambda: None)
    began = time.monotonic()
    assert not chaos._waits(lambda: False, 0.3, "a step")
    assert time.monotonic() - began >= 0.9  # the fault, and the limit after it
    assert chaos.summary.stalls_unexplained == 1
    assert chaos._waits(lambda: True, 0.3, "nothing")
    assert chaos.summary.stalls_unexplained == 1
    assert not chaos.summary.good


@pytest.mark.parametrize(("since_fault", "unexplained"), [(1.0, 0), (60.0, 1)])
def test_a_program_that_ends_by_itself_is_counted_and_started_again(
    tmp_path: Path, since_fault: float, unexplained: int
) -> None:
    member = Member("a", [sys.executable, "-c", "import sys; sys.exit(7)"], tmp_path / "log", {})
    chaos = a_chaos(tmp_path, member)
    chaos._last_fault = time.monotonic() - since_fault
    member.start()
    deadline = time.monotonic() + 20
    while member.starts < 2 and time.monotonic() < deadline:
        chaos._tick()
    assert member.starts == 2
    assert member.process
    member.process.wait(10)
    assert (chaos.summary.exits["a 7"], chaos.summary.deaths_unexplained) == (1, unexplained)
    assert chaos.summary.restarts == 1


def test_an_end_that_was_asked_for_is_none_of_those(tmp_path: Path) -> None:
    member = Member("a", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", {})
    chaos = a_chaos(tmp_path, member)
    chaos._last_fault = time.monotonic() - 60
    member.start()
    assert chaos._terminate(member) == "it has ended"
    while member.due is None:
        chaos._tick()
    assert (dict(chaos.summary.exits), chaos.summary.deaths_unexplained) == ({}, 0)


def test_what_outlives_its_program_is_found_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "_model", lambda self: Path("none"))
    cluster = Cluster(tmp_path, seed=0)
    orphan = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", "orphan"], env={MARK: str(tmp_path)}
    )
    time.sleep(0.2)
    (line,) = cluster.end()
    assert "orphan" in line
    orphan.wait(10)
    assert not cluster.end()
