"""Process lifetimes: a child dies with its parent, a stop request is a flag, and a child is ended within a limit."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable

import psutil

_PR_SET_PDEATHSIG = 1


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


def stop_flag() -> Callable[[], bool]:
    """Install handlers for SIGINT and SIGTERM; returns whether one came. A second one ends the process at once."""
    asked = threading.Event()

    def handle(number: int, _: object) -> None:
        if asked.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return asked.is_set


def end(children: Iterable[subprocess.Popen[bytes]], limit_s: float) -> list[int]:
    """SIGTERM to children and all their descendants, SIGKILL after the limit; returns the pids that needed it."""
    family: list[psutil.Process] = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(child.pid)
            family += [process, *process.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=limit_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
    return [process.pid for process in alive]
