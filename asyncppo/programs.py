"""Starting AsyncPPO's programs: which interpreter runs them, as children that cannot outlive the one that started them.

The trainer and the rollout server live in environments of their own, so they are started by module name and never
imported here. The rest of a child's life is `asyncppo.lifetime`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import psutil

import asyncppo
from asyncppo.errors import UserError
from asyncppo.lifetime import end, end_processes

Role = Literal["trainer", "rollout"]

MODULES: dict[Role, str] = {"trainer": "trainer", "rollout": "rollout_server"}
"""The module behind each role, for `python -m`."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KILL_AFTER_S = 5.0


def interpreter(role: Role) -> str:
    """The Python that runs a role.

    The first of: `ASYNCPPO_TRAINER_PYTHON` or `ASYNCPPO_ROLLOUT_PYTHON`; `.venvs/<role>/bin/python` beside this
    repository's pyproject.toml or in the current directory (`ASYNCPPO_VENVS` names another place than `.venvs`); the
    Python of this process.

    Raises:
        UserError: the environment variable names something that is not there.
    """
    variable = f"ASYNCPPO_{role.upper()}_PYTHON"
    if named := os.environ.get(variable):
        if not os.access(named, os.X_OK):
            raise UserError(f"{variable} is {named}: expected a Python interpreter there")
        return named
    venvs = os.environ.get("ASYNCPPO_VENVS", ".venvs")
    repository = Path(asyncppo.__file__).resolve().parents[1]
    places = [repository] if (repository / "pyproject.toml").is_file() else []
    for place in [*places, Path.cwd()]:
        python = place / venvs / role / "bin" / "python"
        if os.access(python, os.X_OK):
            return str(python)
    return sys.executable


def command(role: Role, arguments: Sequence[str], module: str | None = None) -> list[str]:
    """The command line of a role, or of another module in its environment."""
    return [interpreter(role), "-m", module or MODULES[role], *arguments]


def environment() -> dict[str, str]:
    """What a child sees: one OpenMP thread unless more were asked for; small matrices only lose time to the others."""
    return {"OMP_NUM_THREADS": "1", **os.environ}


@dataclass(frozen=True)
class Program:
    """A child that was started."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path | None
    """Its stdout and stderr; None when it writes to ours."""

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.poll()

    def tail(self, lines: int) -> list[str]:
        """The last lines of its log that say something."""
        if self.log is None or not self.log.exists():
            return []
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 400 * lines))
            text = file.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-lines:]


class Programs:
    """The children of this process; leaving the `with` block ends whatever is left of them, grandchildren included.

    Orphaned descendants come back to this process (Linux's child subreaper), which ends them too; and when this process
    is killed, the kernel sends its children SIGTERM. Children that were there before the block (multiprocessing's
    resource tracker, say) are left alone. To be used in the main thread, which lives as long as the process.
    """

    def __init__(self) -> None:
        self._programs: list[Program] = []
        self._before: set[psutil.Process] = set()

    def __enter__(self) -> Self:
        self._before = set(psutil.Process().children())
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(limit_s=_KILL_AFTER_S)
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)  # nobody would wait for later orphans

    def start(
        self, name: str, argv: Sequence[str], log: Path | None = None, extra: Mapping[str, str] | None = None
    ) -> Program:
        """Start a program in a session of its own, so that Ctrl-C reaches only us.

        Args:
            name: what people call it.
            argv: its command line, from `command`.
            log: file for its stdout and stderr, made with its directory; without one it writes to ours.
            extra: environment variables besides `environment()`.
        """
        with contextlib.ExitStack() as stack:
            sink = None
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                sink = stack.enter_context(log.open("ab"))
            process = subprocess.Popen(
                argv,
                env={**environment(), **(extra or {})},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        program = Program(name, process, log)
        self._programs.append(program)
        return program

    def running(self) -> list[Program]:
        """Those that have not ended."""
        return [program for program in self._programs if program.code is None]

    def ask_to_end(self, limit_s: float, give_up: Callable[[], bool] = lambda: False) -> list[Program]:
        """SIGTERM to each program itself, which ends its own children in order; returns those that ignored it.

        Args:
            limit_s: how long to wait.
            give_up: ends the wait early when it becomes true.
        """
        for program in self.running():
            program.process.terminate()
        deadline = time.monotonic() + limit_s
        while self.running() and time.monotonic() < deadline and not give_up():
            time.sleep(0.05)
        return self.running()

    def end(self, limit_s: float) -> list[str]:
        """SIGTERM to them and all their descendants, SIGKILL after the limit; returns the names that needed force."""
        running = self.running()
        killed = end([program.process for program in running], limit_s)
        ours = [process for process in psutil.Process().children() if process not in self._before]
        orphans = [*ours, *(below for process in ours for below in _descendants(process))]  # they came back to us
        end_processes(orphans, limit_s)
        return [program.name for program in running if program.process.pid in killed]


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.children(recursive=True))
    return []


if sys.platform == "linux":
    _libc = ctypes.CDLL(None)

    def _prctl(option: int, value: int) -> None:
        _libc.prctl(option, value)

else:

    def _prctl(option: int, value: int) -> None:
        """Only Linux knows these."""


def _die_with_parent() -> None:
    """Runs in the child before the program; the kernel keeps it over exec."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
