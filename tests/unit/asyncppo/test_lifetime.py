"""Lifetimes, with real processes: a child dies with its parent, a stop is a flag, and `end` leaves nobody behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from asyncppo.lifetime import SAME_REQUEST_S, end

pytestmark = pytest.mark.unit

LONG = 20.0
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")

Started = subprocess.Popen[bytes]


@pytest.fixture
def started() -> Iterator[list[Started]]:
    """Processes that the test starts; none of them outlives it."""
    processes: list[Started] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def start(started: list[Started], code: str, *arguments: object) -> Started:
    """A Python process that has come as far as its first printed line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    return started[-1]


def line_of(process: Started) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def is_gone(pid: int) -> bool:
    """Ended, also when nobody has waited for it yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ends(pid: int) -> bool:
    deadline = time.monotonic() + LONG
    while not is_gone(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.01)
    return True


# --- die_with_parent -------------------------------------------------------------------------------------------------

GRANDCHILD = """
import os, sys, time
from asyncppo.lifetime import die_with_parent
die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(600)
"""
MIDDLE = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
time.sleep(600)
"""


@linux
def test_a_child_dies_when_its_parent_is_killed(started: list[Started]) -> None:
    middle = start(started, MIDDLE, GRANDCHILD)
    grandchild = int(line_of(middle))
    assert not is_gone(grandchild)
    middle.kill()
    assert ends(grandchild)


@linux
def test_a_child_whose_parent_was_gone_before_it_asked_dies_at_once(started: list[Started]) -> None:
    before = start(started, "pass")
    before.wait()
    orphan = start(started, GRANDCHILD, before.pid)
    assert line_of(orphan) == ""
    assert orphan.wait(LONG) == -signal.SIGTERM


@linux
def test_a_child_of_process_1_lives() -> None:
    # in a container the one that starts it may well be process 1
    code = "import os; os.getppid = lambda: 1; from asyncppo.lifetime import die_with_parent; die_with_parent(1)"
    assert subprocess.run([sys.executable, "-c", code], timeout=LONG).returncode == 0


# --- stop_flag -------------------------------------------------------------------------------------------------------

STOPPABLE = """
import signal, sys, time
from asyncppo.lifetime import stop_flag
if sys.argv[-1] != "ignores SIGHUP":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
should_stop = stop_flag()
print(should_stop(), flush=True)
while not should_stop():
    time.sleep(0.01)
print(should_stop(), flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_a_flag_and_the_process_ends_in_its_own_time(
    started: list[Started], number: signal.Signals
) -> None:
    process = start(started, STOPPABLE, 0)
    assert line_of(process) == "False"
    process.send_signal(number)
    assert line_of(process) == "True"
    assert process.wait(LONG) == 0


def test_a_second_signal_ends_the_process_at_once(started: list[Started]) -> None:
    process = start(started, STOPPABLE, 600)
    line_of(process)
    process.send_signal(signal.SIGTERM)
    assert line_of(process) == "True"
    time.sleep(SAME_REQUEST_S)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONG) == -signal.SIGTERM


def test_a_closed_terminal_may_say_so_twice_and_one_that_is_ignored_stays_so(started: list[Started]) -> None:
    process = start(started, STOPPABLE, 2 * SAME_REQUEST_S)
    line_of(process)
    process.send_signal(signal.SIGHUP)
    assert line_of(process) == "True"
    time.sleep(1.2 * SAME_REQUEST_S)
    process.send_signal(signal.SIGHUP)
    assert process.wait(LONG) == 0
    ignores = start(
        started, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + STOPPABLE, 0, "ignores SIGHUP"
    )
    line_of(ignores)
    ignores.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    ignores.send_signal(signal.SIGTERM)
    assert line_of(ignores) == "True"
    assert ignores.wait(LONG) == 0


def test_signals_that_come_together_are_one_request(started: list[Started]) -> None:
    # the kernel announces the death of a parent with several threads several times
    process = start(started, STOPPABLE, 0.3)
    line_of(process)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert line_of(process) == "True"
    assert process.wait(LONG) == 0


ORPHANED = """
import sys, time
from asyncppo.lifetime import orphaned
at_once, later = orphaned(int(sys.argv[1]), for_s=0), orphaned(int(sys.argv[1]), for_s=0.2)
print(at_once(), later(), flush=True)
time.sleep(0.3)
print(later(), flush=True)
"""


def test_a_process_is_orphaned_once_the_one_that_started_it_has_been_gone_for_so_long(started: list[Started]) -> None:
    assert line_of(start(started, ORPHANED, os.getpid())) == "False False"
    orphan = start(started, ORPHANED, 1 << 30)
    assert line_of(orphan) == "True False"
    assert line_of(orphan) == "True"


# --- end -------------------------------------------------------------------------------------------------------------

OBEDIENT = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which its child inherits
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_end_needs_no_force_with_those_that_obey(started: list[Started]) -> None:
    processes = [start(started, OBEDIENT) for _ in range(2)]
    for process in processes:
        line_of(process)
    assert end(processes, limit_s=LONG) == []
    assert [process.poll() for process in processes] == [-signal.SIGTERM] * 2


def test_end_kills_a_process_that_ignores_sigterm_and_its_child(started: list[Started]) -> None:
    process = start(started, STUBBORN)
    child = int(line_of(process))
    begun = time.monotonic()
    assert sorted(end([process], limit_s=0.3)) == sorted([process.pid, child])
    assert time.monotonic() - begun >= 0.3
    assert process.poll() == -signal.SIGKILL
    assert ends(child)


def test_end_reaches_the_children_of_those_that_obey(started: list[Started]) -> None:
    code = STUBBORN.replace("SIG_IGN", "SIG_DFL")
    process = start(started, code)
    child = int(line_of(process))
    assert end([process], limit_s=LONG) == []
    assert ends(child)


def test_end_does_not_touch_what_has_taken_the_pid_of_a_child_that_was_gone(started: list[Started]) -> None:
    innocent, gone = start(started, OBEDIENT), start(started, "pass")
    line_of(innocent)
    gone.wait()
    gone.pid = innocent.pid
    assert end([gone], limit_s=0.1) == []
    assert innocent.poll() is None


def test_end_of_nothing_and_of_what_has_just_ended_is_nothing(started: list[Started]) -> None:
    assert end([], limit_s=LONG) == []
    process = start(started, "pass")
    assert ends(process.pid)  # but nobody has waited for it
    assert end([process], limit_s=LONG) == []
    assert process.poll() == 0


def test_end_leaves_no_child_that_python_thinks_is_running() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    end([process], limit_s=LONG)
    del process
    gc.collect()  # a ResourceWarning would be an error here
