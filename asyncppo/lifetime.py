"""Process lifetimes: a child dies with its parent, a stop request is a flag, and a child is ended within a limit."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence

import psutil

_PR_SET_PDEATHSIG = 1
_KILL_S = 5.0
"""A killed process is gone within this time."""

SAME_REQUEST_S = 0.5
"""Signals this close together are one request: the kernel announces a parent's death once for each of its threads."""


def die_with_parent(parent: int, signal_number: int = signal.SIGTERM) -> None:
    """Ask the kernel to send this process a signal when the one that started it is gone (Linux).

    Args:
        parent: the pid of the one that started it, as it knows itself: it may be gone already.
        signal_number: what is sent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number)
        if os.getppid() != parent:  # it went before we asked
            os.kill(os.getpid(), signal_number)


def orphaned(parent: int, for_s: float) -> Callable[[], bool]:
    """Whether the process that started this one has been gone for so long, counted from the first call that saw it."""
    since: list[float] = []

    def check() -> bool:
        if os.getppid() == parent:
            return False
        since.append(time.monotonic())
        return since[-1] - since[0] >= for_s

    return check


def stop_flag() -> Callable[[], bool]:
    """Install handlers for SIGINT, SIGTERM and SIGHUP (a terminal that was closed); returns whether one came.

    A second one, `SAME_REQUEST_S` later or more, ends the process at once; not SIGHUP, of which a shell and the kernel
    send one each. SIGHUP stays ignored where it is (`nohup`).
    """
    asked: list[float] = []

    def handle(number: int, _: object) -> None:
        now = time.monotonic()
        if number != signal.SIGHUP and asked and now - asked[0] >= SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked.append(now)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handle)
    return lambda: bool(asked)


def end(children: Iterable[subprocess.Popen[bytes]], limit_s: float) -> list[int]:
    """SIGTERM to children and all their descendants, SIGKILL after the limit; returns the pids that needed it."""
    running = [child for child in children if child.poll() is None]  # another may have the pid of one that is gone
    family: list[psutil.Process] = []
    for child in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(child.pid)
            family += [process, *process.children(recursive=True)]
    killed = end_processes(family, limit_s)
    codes = {process.pid: getattr(process, "returncode", None) for process in family}
    for child in running:
        child.returncode = codes.get(child.pid)  # psutil has waited for it: Popen could not learn it any more
    return killed


def end_processes(processes: Sequence[psutil.Process], limit_s: float) -> list[int]:
    """SIGTERM to these processes, SIGKILL after the limit; returns the pids that needed it."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=limit_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_KILL_S)
    return [process.pid for process in alive]
