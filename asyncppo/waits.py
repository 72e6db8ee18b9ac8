"""What this process waits for and works on, by name, since when and how long at most; and a thread that looks at it.

    with waiting("critic 0 to learn", limit_s=1800) as wait:   # a wait: its own code ends it at the limit
        …; wait.renew()                                        # the limit counts anew: something came
    with phase("update of version 12"):                        # work: `guard.stall_s` is its limit
        …

One registry for each process, from any thread or task. `Watchdog` writes it to `RUN/status/ROLE.json` every second,
which `asyncppo status RUN` reads. A wait that outlives its own limit, or a phase that outlives `guard.stall_s` (waits
inside it do not count), is a *stall*: all threads' stacks and the state go to `RUN/stalls/` and to the terminal, and
the process ends with exit code 1, because a thread that hangs in C cannot be interrupted. Time in which the whole
process stood still (SIGSTOP, a suspended machine) does not count; time in which only the watchdog did, because its disk
was slow, does.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import itertools
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import msgspec
import psutil

log = logging.getLogger("asyncppo.watchdog")

STATUS_DIRECTORY = "status"
STALLS_DIRECTORY = "stalls"
TICK_S = 1.0
"""A status file is written this often."""
_GRACE_S = 60.0
"""A wait whose own limit has passed by so much (or by `guard.stall_s`, if that is less) will not end."""
_STOOD_STILL_S = 5.0
"""A watchdog that was not woken for so long belongs to a process that stood still."""
_REPORT_S = 30.0
"""A process that has stalled ends after so long even if its report cannot be written: the disk may be what hangs."""
_BLOCKED_S = 10.0
"""An event loop that has not turned for so long is worth a warning."""

State = Literal["running", "ended", "failed", "stalled"]


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One wait, or one phase."""

    what: str
    for_s: float
    """Seconds since it began."""
    limit_s: float | None
    """Of a wait without a limit: None."""
    counted_s: float
    """Seconds that count towards the limit: since the last sign of progress, without what is excused."""


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What one process says of itself: `status/ROLE.json`."""

    role: str
    pid: int
    created: float
    """When the process was created, Unix time, as psutil says: with the pid it names one process of a host."""
    host: str
    written: float
    """Unix time of this file."""
    state: State
    why: str = ""
    """Of a process that ended: why."""
    facts: dict[str, int | float | str] = {}
    """What it told of itself: policy_version, …"""
    phases: list[Item] = []
    """What it works on, the outermost first."""
    waits: list[Item] = []
    """What it waits for."""
    unwritten: int = 0
    """Writes of this file that failed."""


class Wait:
    """A wait in progress."""

    def __init__(self, what: str, limit_s: float, now: float, thread: int, clock: Callable[[], float]) -> None:
        self.what, self.limit_s, self.thread = what, limit_s, thread
        self.since = self.counted_from = now
        self.is_pulse = False
        self._clock = clock

    def renew(self, what: str | None = None) -> None:
        """Something came, and the rest has the whole limit again; `what` says what is waited for now."""
        self.counted_from = self._clock()
        if what is not None:
            self.what = what

    def item(self, now: float) -> Item:
        """For the status file."""
        limit = self.limit_s if math.isfinite(self.limit_s) else None
        return Item(what=self.what, for_s=now - self.since, limit_s=limit, counted_s=now - self.counted_from)


class Registry:
    """The waits and phases of one process.

    Args:
        clock: seconds; another one in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waits: dict[int, Wait] = {}
        self._phases: dict[int, Wait] = {}
        self._facts: dict[str, int | float | str] = {}

    @contextmanager
    def waiting(self, what: str, limit_s: float) -> Iterator[Wait]:
        """Name a wait. Whoever waits keeps the limit; `math.inf` for a wait that something else ends.

        Args:
            what: what is waited for, to be read after "waits for".
            limit_s: seconds from now, or from the last `Wait.renew`.
        """
        wait = Wait(what, limit_s, self.clock(), threading.get_ident(), self.clock)
        number = next(self._numbers)
        with self._lock:
            self._waits[number] = wait
        try:
            yield wait
        finally:
            ended = self.clock()
            with self._lock:
                del self._waits[number]
                for phase in self._phases.values():
                    if phase.thread == wait.thread:  # a wait has a limit of its own
                        phase.counted_from += max(0.0, ended - max(wait.since, phase.counted_from))

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Name a piece of work of this thread; waits in it do not count. Not for asyncio tasks."""
        phase = Wait(what, math.inf, self.clock(), threading.get_ident(), self.clock)
        number = next(self._numbers)
        with self._lock:
            self._phases[number] = phase
        try:
            yield
        finally:
            with self._lock:
                del self._phases[number]

    def note(self, **facts: int | float | str) -> None:
        """Tell of this process what others may want to know: `note(policy_version=12)`."""
        with self._lock:
            self._facts |= facts

    async def beat(self, limit_s: float) -> None:
        """Run as a task of an event loop: the watchdog sees when that loop no longer turns."""
        with self.waiting("the event loop to turn", limit_s) as wait:
            wait.is_pulse = True
            while True:
                await asyncio.sleep(TICK_S)
                wait.renew()

    def excuse(self, seconds: float) -> None:
        """The process stood still for so long: no wait and no phase has had this time."""
        with self._lock:
            for each in [*self._waits.values(), *self._phases.values()]:
                each.counted_from += seconds

    def stall(self, stall_s: float) -> str | None:
        """What has stalled, or None."""
        now = self.clock()
        with self._lock:
            for wait in self._waits.values():
                counted = now - wait.counted_from
                if counted > wait.limit_s + min(_GRACE_S, stall_s):
                    return f"waits for {wait.what} for {counted:.0f} s, although its limit is {wait.limit_s:.0f} s"
            waiting_threads = {wait.thread for wait in self._waits.values() if not wait.is_pulse}
            for phase in self._phases.values():
                counted = now - phase.counted_from
                if counted > stall_s and phase.thread not in waiting_threads:
                    return f"{phase.what} takes {counted:.0f} s already (guard.stall_s is {stall_s:.0f})"
        return None

    def blocked_loop_s(self) -> float:
        """For how long the event loop has not turned; 0 without one."""
        now = self.clock()
        with self._lock:
            return max((now - wait.counted_from for wait in self._waits.values() if wait.is_pulse), default=0.0)

    def now(self) -> tuple[dict[str, int | float | str], list[Item], list[Item]]:
        """Facts, phases and waits. Of an event loop that turns nothing is said."""
        now = self.clock()
        with self._lock:
            waits = [w for w in self._waits.values() if not w.is_pulse or now - w.counted_from > _STOOD_STILL_S]
            phases = [phase.item(now) for phase in self._phases.values()]
            return dict(self._facts), phases, [wait.item(now) for wait in waits]


HERE = Registry()
"""This process's."""
waiting = HERE.waiting
phase = HERE.phase
note = HERE.note


def status_path(run_directory: Path, role: str) -> Path:
    """The status file of a role; `critic 0` and the like become file names."""
    return run_directory / STATUS_DIRECTORY / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', role)}.json"


def stacks_path(status_file: Path) -> Path:
    """Where a process writes all threads' stacks when it gets SIGUSR2."""
    return status_file.with_suffix(".stacks")


def forget_statuses(run_directory: Path) -> None:
    """Remove what an earlier trainer of this run said of itself; the rollout servers' files are theirs."""
    for name in ("supervisor", "learner", "critic"):
        for path in (run_directory / STATUS_DIRECTORY).glob(f"{name}*"):
            path.unlink(missing_ok=True)


class Watchdog:
    """A thread that writes this process's status file and ends the process when it has stalled.

    As a context manager it says in the end how the block ended; `code` of a block that ends without an error.

    Args:
        role: who this process is: `learner`, `critic 0`, `rollout a`.
        run_directory: status and stacks are written below it.
        stall_s: `guard.stall_s`.
        registry, leave, timer: others in tests.
    """

    def __init__(
        self,
        role: str,
        run_directory: Path,
        stall_s: float,
        registry: Registry = HERE,
        leave: Callable[[int], object] = os._exit,
        timer: Callable[..., threading.Timer] = threading.Timer,
    ) -> None:
        self.code = 0
        self.journal: Callable[..., None] | None = None
        """Writes an event; the learner sets it."""
        self._role = role
        self._run_directory = run_directory
        self._stall_s = stall_s
        self._registry = registry
        self._leave = leave
        self._timer = timer
        self._path = status_path(run_directory, role)
        self._created = psutil.Process().create_time()
        self._unwritten = 0
        self._last = registry.clock()
        self._told_of_loop = False
        self._stacks: IO[bytes] | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._write("running")
        try:
            path = stacks_path(self._path)
            path.unlink(missing_ok=True)  # that of another process of this role stays that process's file
            self._stacks = path.open("wb")
            faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        except OSError as error:
            log.warning("stacks on demand cannot be written: %s", error)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(timeout=10)
        why = f"{kind.__name__}: {error}" if kind else f"exit code {self.code}"
        if self._is_mine():
            self._write("failed" if kind or self.code else "ended", why)
        if self._stacks is not None:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # one that is on its way must not end the process
            faulthandler.unregister(signal.SIGUSR2)
            path = stacks_path(self._path)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._stacks.fileno()), path.stat()):
                    path.unlink()
            self._stacks.close()

    def tick(self) -> None:
        """Look once: excuse a standstill, write the status, end the process if it has stalled."""
        gap = self._registry.clock() - self._last
        if gap > _STOOD_STILL_S:
            log.warning("this process stood still for %.0f s, which counts towards no limit", gap)
            self._registry.excuse(gap)
        stalled = self._registry.stall(self._stall_s)
        if stalled:
            at_last = self._timer(_REPORT_S, self._leave, (1,))
            at_last.daemon = True
            at_last.start()
            self._report(stalled)
            at_last.cancel()
            self._leave(1)
            return
        self._write("running")
        self._look_at_the_loop()
        self._last = self._registry.clock()  # only the sleep until the next tick is looked at, not a slow disk

    def _run(self) -> None:
        while not self._ending.wait(TICK_S):
            self.tick()

    def _look_at_the_loop(self) -> None:
        blocked = self._registry.blocked_loop_s()
        if blocked < _BLOCKED_S:
            self._told_of_loop = False
        elif not self._told_of_loop:
            self._told_of_loop = True
            log.warning("the event loop has not turned for %.0f s; all stacks follow", blocked)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)

    def _status(self, state: State, why: str) -> bytes:
        facts, phases, waits = self._registry.now()
        status = ProcessStatus(
            role=self._role,
            pid=os.getpid(),
            created=self._created,
            host=socket.gethostname(),
            written=time.time(),
            state=state,
            why=why,
            facts=facts,
            phases=phases,
            waits=waits,
            unwritten=self._unwritten,
        )
        return msgspec.json.format(msgspec.json.encode(status))

    def _write(self, state: State, why: str = "") -> None:
        partial = self._path.with_name(f".{self._path.name}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(self._status(state, why))
            os.replace(partial, self._path)
        except OSError as error:  # a full disk must not end a run that trains
            self._unwritten += 1
            if self._unwritten == 1:
                log.warning("%s cannot be written, and this is said once: %s", self._path, error)

    def _is_mine(self) -> bool:
        """Whether no other process of this role has written the status file since."""
        try:
            status = msgspec.json.decode(self._path.read_bytes(), type=ProcessStatus)
        except (OSError, msgspec.DecodeError):  # nobody's: `_write` says what is wrong with it
            return True
        return (status.host, status.pid) == (socket.gethostname(), os.getpid())

    def _report(self, what: str) -> None:
        log.critical("stalled: %s %s. All stacks follow, then this process ends", self._role, what)
        self._write("stalled", what)
        name = f"{self._path.stem}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        path = self._run_directory / STALLS_DIRECTORY / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(f"{self._role} {what}\n\n".encode() + self._status("stalled", what) + b"\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            log.critical("stacks and state are in %s", path)
        except OSError as error:
            log.critical("%s cannot be written: %s", path, error)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if self.journal is not None:
            try:
                self.journal("stalled", role=self._role, what=what, stacks=str(path))
            except ValueError as error:  # a journal that is closed already
                log.critical("the event cannot be written: %s", error)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
