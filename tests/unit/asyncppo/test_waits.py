"""The watchdog: what counts as a stall, what is excused, what is written; with a clock that the test moves."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncppo.waits import ProcessStatus, Registry, Watchdog, forget_statuses, status_path

pytestmark = pytest.mark.unit

STALL_S = 30.0


class Scene:
    """A registry, and the watchdog of it, in a time of their own."""

    def __init__(self, directory: Path) -> None:
        self.now = 0.0
        self.directory = directory
        self.registry = Registry(lambda: self.now)
        self.left: list[int] = []
        self.dog = Watchdog("learner", directory, STALL_S, self.registry, self.left.append)

    def pass_(self, seconds: float) -> None:
        """So much time, in which the watchdog looks every second, until it ends the process."""
        for _ in range(round(seconds)):
            if not self.left:
                self.now += 1.0
                self.dog.tick()

    def status(self) -> ProcessStatus:
        return msgspec.json.decode(status_path(self.directory, "learner").read_bytes(), type=ProcessStatus)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_wait_is_a_stall_only_when_its_own_limit_has_long_passed(scene: Scene) -> None:
    with scene.registry.waiting("a batch", limit_s=100):
        scene.pass_(100 + STALL_S - 1)
        assert scene.left == []
        scene.pass_(5)
    assert scene.left == [1]
    assert scene.status().why == "waits for a batch for 131 s, although its limit is 100 s"


def test_progress_renews_a_wait_and_one_without_a_limit_never_stalls(scene: Scene) -> None:
    with scene.registry.waiting("the learner", math.inf), scene.registry.waiting("critic 0", limit_s=10) as wait:
        for _ in range(100):
            scene.pass_(9)
            wait.renew()
    assert scene.left == []


def test_a_phase_stalls_after_stall_s_of_work(scene: Scene) -> None:
    with scene.registry.phase("update of version 3"):
        scene.pass_(STALL_S)
        assert scene.left == []
        scene.pass_(1)
    assert scene.left == [1]
    assert "update of version 3 takes 31 s already (guard.stall_s is 30)" in scene.status().why


def test_waits_within_a_phase_are_not_work_but_the_work_around_them_is(scene: Scene) -> None:
    with scene.registry.phase("publish"):
        scene.pass_(20)
        with scene.registry.waiting("the disk", limit_s=500):
            scene.pass_(400)
        assert scene.left == []
        scene.pass_(10)
        assert scene.left == []
        scene.pass_(1)
        assert scene.left == [1]


def test_a_wait_of_another_thread_excuses_nobody(scene: Scene) -> None:
    done = threading.Event()

    def other() -> None:
        with scene.registry.waiting("something else", math.inf):
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    while not scene.registry.now()[2]:
        time.sleep(0.01)
    with scene.registry.phase("update"):
        scene.pass_(STALL_S + 1)
    done.set()
    thread.join()
    assert scene.left == [1]


def test_time_in_which_the_whole_process_stood_still_counts_towards_nothing(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    with scene.registry.waiting("a batch", limit_s=10), scene.registry.phase("evaluation"):
        scene.pass_(5)
        scene.now += 100_000  # SIGSTOP, SIGCONT
        scene.dog.tick()
        assert scene.left == []
        assert "stood still for 100000 s" in caplog.text
        scene.pass_(5 + STALL_S + 1)
        assert scene.left == [1]


def test_a_watchdog_that_its_own_slow_disk_holds_up_excuses_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> None:
        scene.now += 20

    monkeypatch.setattr(scene.dog, "_write", slow)
    with scene.registry.phase("update"):
        scene.pass_(3)
    assert scene.left == [1]


def test_a_stall_ends_the_process_even_if_its_report_hangs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[bool] = []
    monkeypatch.setattr("asyncppo.waits._REPORT_S", 0.01)

    def hangs(_: str) -> None:
        deadline = time.monotonic() + 10
        while not scene.left and time.monotonic() < deadline:
            time.sleep(0.01)
        reported.append(bool(scene.left))

    monkeypatch.setattr(scene.dog, "_report", hangs)
    with scene.registry.phase("update"):
        scene.pass_(STALL_S + 1)
    assert reported == [True]


def test_a_process_ends_only_its_own_files_and_not_those_of_another_of_its_role(tmp_path: Path) -> None:
    path = status_path(tmp_path, "learner")
    stacks = path.with_suffix(".stacks")
    with Watchdog("learner", tmp_path, STALL_S, Registry()) as mine:
        mine._ending.set()
        mine._thread.join()
        other = msgspec.structs.replace(msgspec.json.decode(path.read_bytes(), type=ProcessStatus), pid=1 << 22)
        path.write_bytes(msgspec.json.encode(other))
        stacks.unlink()
        stacks.write_text("another's")
    assert msgspec.json.decode(path.read_bytes(), type=ProcessStatus) == other
    assert stacks.read_text() == "another's"


def test_a_second_process_of_a_role_has_stacks_of_its_own(tmp_path: Path) -> None:
    stacks = status_path(tmp_path, "learner").with_suffix(".stacks")
    with Watchdog("learner", tmp_path, STALL_S, Registry()):
        first = stacks.stat()
        held = stacks.open("rb")
        with Watchdog("learner", tmp_path, STALL_S, Registry()):
            assert not os.path.samestat(first, stacks.stat())
        held.close()


def test_what_has_ended_is_no_stall_even_if_it_ended_by_an_error(scene: Scene) -> None:
    for block in (scene.registry.waiting("a batch", 10), scene.registry.phase("update")):
        with pytest.raises(ValueError, match="no"), block:
            raise ValueError("no")
    scene.pass_(100)
    assert scene.left == []
    assert scene.status().waits == scene.status().phases == []


def test_a_stall_leaves_stacks_state_and_an_event(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    events: list[dict[str, Any]] = []
    scene.dog.journal = lambda event, **details: events.append({"event": event, **details})
    scene.registry.note(policy_version=12)
    with scene.registry.waiting("critic 1 to learn", limit_s=1):
        scene.pass_(60)
    (path,) = (scene.directory / "stalls").iterdir()
    said = path.read_text()
    assert said.startswith("learner waits for critic 1 to learn for 32 s, although its limit is 1 s")
    assert '"policy_version": 12' in said
    assert "test_a_stall_leaves_stacks_state_and_an_event" in said  # a stack of this very thread
    assert "test_a_stall_leaves_stacks_state_and_an_event" in capfd.readouterr().err
    assert [(event["event"], event["role"], event["stacks"]) for event in events] == [("stalled", "learner", str(path))]
    assert scene.status().state == "stalled"


def test_the_status_file_says_what_is_done_waited_for_and_known(scene: Scene) -> None:
    scene.registry.note(policy_version=3)
    scene.registry.note(policy_version=4, state="generating")
    with scene.registry.phase("update"), scene.registry.waiting("all ranks", limit_s=50) as wait:
        scene.pass_(7)
        wait.renew()
        scene.pass_(2)
        status = scene.status()
    assert status.facts == {"policy_version": 4, "state": "generating"}
    assert [(each.what, each.for_s, each.limit_s) for each in status.phases] == [("update", 9, None)]
    assert [(each.what, each.for_s, each.counted_s, each.limit_s) for each in status.waits] == [("all ranks", 9, 2, 50)]
    assert (status.role, status.pid, status.state) == ("learner", os.getpid(), "running")


def test_a_status_that_cannot_be_written_is_counted_and_ends_nothing(scene: Scene) -> None:
    (scene.directory / "status").write_text("in the way")
    scene.pass_(3)
    (scene.directory / "status").unlink()
    scene.pass_(1)
    assert scene.left == []
    assert scene.status().unwritten == 3


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (None, 0, ("ended", "exit code 0")),
        (None, 1, ("failed", "exit code 1")),
        (ValueError("no"), 0, ("failed", "ValueError: no")),
    ],
)
def test_how_a_process_ended_is_in_its_status(
    tmp_path: Path, error: Exception | None, code: int, expected: tuple[str, str]
) -> None:
    try:
        with Watchdog("critic 1", tmp_path, STALL_S, Registry()) as dog:
            dog.code = code
            if error:
                raise error
    except ValueError:
        assert error
    path = status_path(tmp_path, "critic 1")
    assert path.name == "critic-1.json"
    status = msgspec.json.decode(path.read_bytes(), type=ProcessStatus)
    assert (status.state, status.why) == expected
    assert [each.name for each in path.parent.iterdir()] == ["critic-1.json"]


def test_a_new_trainer_forgets_the_old_ones_processes_and_no_rollout_server(tmp_path: Path) -> None:
    for role in ("supervisor", "learner", "learner rank 1", "critic 0", "rollout critic"):
        path = status_path(tmp_path, role)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    forget_statuses(tmp_path)
    assert [path.name for path in (tmp_path / "status").iterdir()] == ["rollout-critic.json"]


def test_an_event_loop_that_turns_is_not_mentioned_and_one_that_does_not_stalls(
    scene: Scene, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncppo.waits.TICK_S", 0.001)
    asyncio.run(turns_and_stops(scene, caplog))


async def turns_and_stops(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    beat = asyncio.create_task(scene.registry.beat(limit_s=STALL_S))
    for _ in range(50):
        scene.pass_(1)
        renewed = scene.registry._waits  # the task renews its wait whenever the loop turns
        while not renewed or next(iter(renewed.values())).counted_from < scene.now:
            await asyncio.sleep(0.001)
    assert scene.left == []
    assert scene.status().waits == []
    scene.pass_(12)  # the loop stands still: nothing is awaited here
    assert [each.what for each in scene.status().waits] == ["the event loop to turn"]
    assert "the event loop has not turned for 10 s" in caplog.text
    scene.pass_(2 * STALL_S)
    assert scene.left == [1]
    beat.cancel()


HANGS = """
    import logging, sys, threading, time
    from pathlib import Path
    from asyncppo import waits
    logging.basicConfig(stream=sys.stderr)
    waits.TICK_S = 0.05
    def in_a_lock():
        lock = threading.Lock()
        lock.acquire()
        with waits.waiting("a lock that nobody gives back", 0.1):
            print("hangs", flush=True)
            lock.acquire()
    with waits.Watchdog("learner", Path(sys.argv[1]), 0.5):
        in_a_lock()
"""


def test_a_process_that_hangs_in_c_ends_with_1_and_says_where(tmp_path: Path) -> None:
    program = [sys.executable, "-c", textwrap.dedent(HANGS), str(tmp_path)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "stalled: learner waits for a lock that nobody gives back" in ended.stderr
    assert "in in_a_lock" in ended.stderr
    (path,) = (tmp_path / "stalls").iterdir()
    assert "in in_a_lock" in path.read_text()


def test_sigusr2_writes_all_stacks_of_a_process_that_hangs_and_does_not_end_it(tmp_path: Path) -> None:
    program = textwrap.dedent(HANGS).replace("0.5)", "1000)")
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "hangs\n"
        path = tmp_path / "status/learner.stacks"
        process.send_signal(signal.SIGUSR2)
        deadline = time.monotonic() + 20
        while "in in_a_lock" not in path.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
