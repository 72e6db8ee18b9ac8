"""`asyncppo status`: what it says of processes that live, died, stopped, hang or have ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from asyncppo import waits
from asyncppo.cli import main
from asyncppo.status import Process, processes_in
from asyncppo.waits import Item, ProcessStatus, status_path

pytestmark = pytest.mark.unit

NOTHING: list[Item] = []


def write(directory: Path, role: str, **changes: object) -> ProcessStatus:
    """The status of this very process, which lives, with changes."""
    mine = ProcessStatus(
        role=role,
        pid=os.getpid(),
        created=psutil.Process().create_time(),
        host=waits.socket.gethostname(),
        written=time.time(),
        state="running",
    )
    status = msgspec.structs.replace(mine, **changes)
    path = status_path(directory, role)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(status))
    return status


def waits_for(what: str, counted_s: float, limit_s: float | None) -> list[Item]:
    return [Item(what=what, for_s=counted_s, limit_s=limit_s, counted_s=counted_s)]


def asked(directory: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    monkeypatch.setattr(sys, "argv", ["asyncppo", "status", str(directory), *more])
    with pytest.raises(SystemExit) as left:
        main()
    return int(str(left.value.code or 0))


def condition_of(directory: Path) -> str:
    (process,) = processes_in(directory)
    return process.condition


def test_it_says_who_does_what_and_waits_for_what_and_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    write(tmp_path, "rollout a", facts={"policy_version": 11, "state": "generating"})
    write(tmp_path, "critic 0", waits=waits_for("the learner", 3.0, None))
    learner = waits_for("a batch for version 12", 180.0, 1800.0)
    write(
        tmp_path, "learner", facts={"policy_version": 12}, phases=waits_for("wait for batch", 180, None), waits=learner
    )
    write(tmp_path, "supervisor")
    assert asked(tmp_path, monkeypatch) == 0
    said = capsys.readouterr().out
    assert "nothing is dead or stalled, version 12 is trained" in said
    assert said.index("supervisor") < said.index("learner") < said.index("critic 0") < said.index("rollout a")
    (line,) = [line for line in said.splitlines() if "waits for a batch" in line]
    assert line.split()[-4:] == ["3", "min", "30", "min"]
    (line,) = [line for line in said.splitlines() if "waits for the learner" in line]
    assert line.split()[-3:] == ["3", "s", "none"]


@pytest.mark.parametrize(
    ("changes", "expected", "code"),
    [
        ({}, "running", 0),
        ({"pid": 1 << 22}, "dead", 1),  # above the largest pid
        ({"created": 1.0, "written": 1.0}, "dead", 1),  # the pid is another process's now
        ({"created": 1.0}, "running", 0),  # the clock was set: the file is fresh
        ({"state": "ended"}, "ended", 0),
        ({"state": "failed", "why": "ValueError: no"}, "failed", 1),
        ({"state": "stalled", "why": "waits for ever"}, "stalled", 1),
        ({"written": 1.0}, "silent", 1),
        ({"written": 1.0, "unwritten": 4}, "silent", 1),  # the disk was full once: that excuses no silence now
        ({"unwritten": 4}, "running", 0),
        ({"waits": waits_for("a batch", 61.0, 60.0)}, "stalled", 1),
        ({"waits": waits_for("a batch", 59.0, 60.0)}, "running", 0),
        ({"host": "elsewhere", "pid": 1 << 22}, "running", 0),
        ({"host": "elsewhere", "written": time.time() - 60}, "silent", 1),
    ],
)
def test_the_condition_of_a_process_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], expected: str, code: int
) -> None:
    write(tmp_path, "learner", **changes)
    assert condition_of(tmp_path) == expected
    assert asked(tmp_path, monkeypatch, "--json") == code


def test_a_stopped_process_is_seen_as_stopped_and_a_killed_one_as_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        write(tmp_path, "critic 0", pid=child.pid, created=psutil.Process(child.pid).create_time())
        assert condition_of(tmp_path) == "running"
        child.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while condition_of(tmp_path) != "stopped":
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    assert condition_of(tmp_path) == "dead"


def test_a_rollout_server_that_died_counts_while_the_run_goes_on_and_is_forgotten_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "rollout a", pid=1 << 22)
    write(tmp_path, "supervisor")
    assert asked(tmp_path, monkeypatch, "--json") == 1
    write(tmp_path, "supervisor", state="ended", why="exit code 0")
    assert asked(tmp_path, monkeypatch, "--json") == 0
    write(tmp_path, "supervisor")
    write(tmp_path, "rollout a", pid=1 << 22, written=time.time() - 100_000)
    assert [each.status.role for each in processes_in(tmp_path)] == ["supervisor"]
    for state in ("failed", "stalled"):
        write(tmp_path, "rollout a", state=state)
        assert asked(tmp_path, monkeypatch, "--json") == 1
        write(tmp_path, "rollout a", state=state, written=time.time() - 100_000)
        assert asked(tmp_path, monkeypatch, "--json") == 0


def test_json_has_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = write(tmp_path, "learner", facts={"policy_version": 3}, waits=waits_for("a batch", 1.0, 60.0))
    asked(tmp_path, monkeypatch, "--json")
    said = msgspec.json.decode(capsys.readouterr().out)
    assert said["well"] is True
    (process,) = msgspec.convert(said["processes"], list[Process])
    assert process.status == status


@pytest.mark.parametrize(("made", "expected"), [(".", "has no status/"), ("status", "is empty"), (None, "is no run")])
def test_what_is_no_run_exits_with_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], made: str | None, expected: str
) -> None:
    if made:
        (tmp_path / "run" / made).mkdir(parents=True)
    assert asked(tmp_path / "run", monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_stacks_are_those_of_the_processes_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = (
        "import sys, time; from pathlib import Path; from asyncppo.waits import Watchdog\n"
        "def sleeps(): print('up', flush=True); time.sleep(60)\n"
        "with Watchdog('critic 0', Path(sys.argv[1]), 100): sleeps()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout
        assert child.stdout.readline() == "up\n"
        assert asked(tmp_path, monkeypatch, "--stacks") == 0
        assert "in sleeps" in capsys.readouterr().out
        assert child.poll() is None
    finally:
        child.kill()
        child.communicate()
