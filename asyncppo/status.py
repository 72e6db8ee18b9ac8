"""`asyncppo status RUN`: what each process of a run does and waits for, from outside, by the files in `RUN/status/`.

A process of this host is alive if its pid is and the file is fresh, or the creation time the same (which moves when the
clock is set); one of another host if its file is fresh.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from asyncppo.errors import UserError
from asyncppo.waits import STATUS_DIRECTORY, Item, ProcessStatus, stacks_path, status_path

_FRESH_S = 15.0
"""A process writes its file every second: one that has not for so long is silent."""
_FORGOTTEN_S = 86400.0
"""A rollout server that died, failed or stalled so long ago is no longer shown."""
_STACKS_S = 5.0
"""A process that was asked for its stacks has written them within this time."""
_ORDER = ("supervisor", "learner", "critic", "rollout")


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One process, as it is seen from outside."""

    status: ProcessStatus
    condition: str
    """running, ended, failed, dead, stopped, silent or stalled."""
    age_s: float
    """Since it wrote its file."""
    late: str = ""
    """The wait that is beyond its limit, if one is."""

    @property
    def is_well(self) -> bool:
        """Whether it runs, or has ended well."""
        return self.condition in ("running", "ended")


def processes_in(run_directory: Path) -> list[Process]:
    """Every process that has said something in this run.

    Raises:
        UserError: this is no run directory, or one of a run that has not been started.
    """
    directory = run_directory / STATUS_DIRECTORY
    if not directory.is_dir():
        what = "has no status/: it was not started, or not by python -m trainer"
        raise UserError(f"{run_directory} {what if run_directory.is_dir() else 'is no run directory'}")
    found = []
    for path in directory.glob("[!.]*.json"):
        try:
            status = msgspec.json.decode(path.read_bytes(), type=ProcessStatus)
        except (OSError, msgspec.DecodeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        process = _seen(status)
        if not (
            process.condition in ("dead", "silent", "failed", "stalled")
            and _is_rollout(status)
            and process.age_s > _FORGOTTEN_S
        ):
            found.append(process)
    if not found:
        raise UserError(f"{directory} is empty: the run was not started")
    return sorted(found, key=lambda each: (_rank(each.status.role), each.status.role))


def is_well(processes: list[Process]) -> bool:
    """Whether nothing is dead or stalled. When the trainer has ended well, its rollout servers may have died since."""
    supervisor = next((each for each in processes if each.status.role == "supervisor"), None)
    over = supervisor is not None and supervisor.condition == "ended"
    return all(each.is_well or (over and _is_rollout(each.status)) for each in processes)


def show(run_directory: Path, processes: list[Process], console: Console) -> None:
    """One screen for people."""
    facts = {
        key: value for each in processes for key, value in each.status.facts.items() if "learner" in each.status.role
    }
    version = f", version {facts['policy_version']} is trained" if "policy_version" in facts else ""
    console.print(f"{run_directory}: {'nothing is dead or stalled' if is_well(processes) else 'NOT WELL'}{version}")
    table = Table(box=None, pad_edge=False)
    for column in ("process", "pid", "is", "does", "since", "limit"):
        table.add_column(column, overflow="fold")
    for each in processes:
        status = each.status
        host = "" if status.host == socket.gethostname() else f"@{status.host}"
        lines = _lines(each)
        for number, line in enumerate(lines):
            who = (status.role, f"{status.pid}{host}", each.condition) if number == 0 else ("", "", "")
            table.add_row(*who, *line)
    console.print(table)


def stacks(run_directory: Path, processes: list[Process]) -> str:
    """All threads' stacks of every process that runs on this host: each writes them when it gets SIGUSR2."""
    parts = []
    for each in processes:
        status = each.status
        path = stacks_path(status_path(run_directory, status.role))
        if status.host != socket.gethostname() or each.condition not in ("running", "silent", "stalled"):
            continue
        if not path.exists():  # without it SIGUSR2 would end the process
            parts.append(f"== {status.role}, process {status.pid}: cannot write its stacks\n")
            continue
        before = path.stat().st_size
        os.kill(status.pid, signal.SIGUSR2)
        deadline = time.monotonic() + _STACKS_S
        size = before
        while time.monotonic() < deadline and (size == before or path.stat().st_size != size):
            size = path.stat().st_size
            time.sleep(0.1)
        said = path.read_bytes()[before:].decode(errors="replace")
        parts.append(f"== {status.role}, process {status.pid}\n{said or f'nothing within {_STACKS_S:.0f} s'}\n")
    return "\n".join(parts)


def _seen(status: ProcessStatus) -> Process:
    age = max(0.0, time.time() - status.written)
    late = next((item.what for item in status.waits if item.limit_s is not None and item.counted_s > item.limit_s), "")
    condition: str = status.state
    if status.state == "running":
        condition = _alive(status, age)
        if condition == "running" and late:
            condition = "stalled"
    return Process(status=status, condition=condition, age_s=age, late=late)


def _alive(status: ProcessStatus, age: float) -> str:
    if status.host == socket.gethostname():
        try:
            process = psutil.Process(status.pid)
            another = abs(process.create_time() - status.created) > 1 and age > _FRESH_S
            if another or process.status() == psutil.STATUS_ZOMBIE:
                return "dead"
            if process.status() == psutil.STATUS_STOPPED:
                return "stopped"
        except psutil.NoSuchProcess:
            return "dead"
    return "running" if age <= _FRESH_S else "silent"


def _lines(process: Process) -> list[tuple[str, str, str]]:
    status = process.status
    if process.condition in ("ended", "failed"):
        return [(status.why, f"{_seconds(process.age_s)} ago", "")]
    doing = [(item.what, _seconds(item.for_s + process.age_s), "") for item in status.phases]
    waits = [(f"waits for {item.what}", _seconds(item.for_s + process.age_s), _limit(item)) for item in status.waits]
    silent = [("", f"silent for {_seconds(process.age_s)}", "")] if process.age_s > _FRESH_S else []
    why = [(status.why, "", "")] if status.why else []
    unwritten = [(f"{status.unwritten} writes of its status failed", "", "")] if status.unwritten else []
    return [*why, *doing, *waits, *silent, *unwritten] or [("", "", "")]


def _limit(item: Item) -> str:
    return "none" if item.limit_s is None else _seconds(item.limit_s)


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _is_rollout(status: ProcessStatus) -> bool:
    return status.role.startswith("rollout")


def _rank(role: str) -> int:
    return next((number for number, name in enumerate(_ORDER) if role.startswith(name)), len(_ORDER))
