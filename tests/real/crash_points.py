"""The named points of a step at which the learner kills itself, from outside: methods are wrapped, nothing is changed.

`install("update:2")` kills this process with SIGKILL before the second update; `"update:2:all"` the supervisor and
the critics before, at the same moment, as the end of a machine does.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from asyncppo.metrics import LEDGER_FILE, METRICS_FILE

Fires = Callable[..., bool]


def _always(*_: Any, **__: Any) -> bool:
    return True


def _is_ack(_: Any, __: bytes, message: Any) -> bool:
    return type(message).__name__ == "Ack"


def _to(prefix: str) -> Fires:
    """A rename to a name that begins so."""
    return lambda _, destination, *__: Path(destination).name.startswith(prefix)


def _is_batch(*_: Any, **line: Any) -> bool:
    return "groups" in line


POINTS: dict[str, tuple[str, str, Fires]] = {
    # name: what is wrapped; before, after or in the middle of the call; the calls that count
    "group received": ("trainer.stream.intake.Intake._receive_group", "before", _always),
    "group held": ("trainer.stream.intake.Intake._receive_group", "after", _always),
    "before the ack": ("asyncppo.transport.zmq.ZmqHub.send", "before", _is_ack),
    "after the ack": ("asyncppo.transport.zmq.ZmqHub.send", "after", _is_ack),
    "before the ledger's line": ("asyncppo.metrics.Journal.ledger", "before", _is_batch),
    "in the ledger's line": ("asyncppo.metrics.Journal.ledger", "middle", _is_batch),
    "after the ledger's line": ("asyncppo.metrics.Journal.ledger", "after", _is_batch),
    "batch taken": ("trainer.stream.intake.Intake.take", "after", _always),
    "critics asked": ("trainer.model.critics.Critics.learn", "after", _always),
    "values there": ("trainer.model.critics.Critics.values", "after", _always),
    "before the update": ("trainer.model.policy.Policy.update", "before", _always),
    "after the update": ("trainer.model.policy.Policy.update", "after", _always),
    "version handed over": ("trainer.publish.publisher.Publisher.publish", "after", _always),
    "before the version's rename": ("os.replace", "before", _to("v0")),
    "after the version's rename": ("os.replace", "after", _to("v0")),
    "before the announcement": ("trainer.stream.intake.Intake.announce", "before", _always),
    "after the announcement": ("trainer.stream.intake.Intake.announce", "after", _always),
    "before the metrics' line": ("asyncppo.metrics.Journal.step", "before", _always),
    "in the metrics' line": ("asyncppo.metrics.Journal.step", "middle", _always),
    "after the metrics' line": ("asyncppo.metrics.Journal.step", "after", _always),
    "checkpoint begun": ("trainer.stream.state.StreamState.write", "before", _always),
    "checkpoint's parts written": ("trainer.checkpoint.Checkpoints._commit", "before", _always),
    "before the checkpoint's rename": ("os.replace", "before", _to("step_")),
    "after the checkpoint's rename": ("os.replace", "after", _to("step_")),
    "before retention": ("trainer.checkpoint.Checkpoints._retain", "before", _always),
    "in retention": ("os.replace", "after", _to(".partial-removed-")),
}


def install(crash: str) -> None:
    """Kill this process at `point:n` (or `point:n:all`): at the n-th call that counts."""
    point, number, *everybody = crash.split(":")
    target, moment, fires = POINTS[point]
    holder, name = _find(target)
    original: Callable[..., Any] = getattr(holder, name)
    left = int(number)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= fires(*arguments, **named)
        now = left == 0 and fires(*arguments, **named)
        if now and moment == "middle":
            _write_half(name, *arguments, **named)
        if now and moment != "after":
            _die(bool(everybody))
        result = original(*arguments, **named)
        if now:
            _die(bool(everybody))
        return result

    setattr(holder, name, wrapped)


def _find(target: str) -> tuple[Any, str]:
    parts = target.split(".")
    modules = next(n for n in range(len(parts) - 1, 0, -1) if _is_module(".".join(parts[:n])))
    holder: Any = importlib.import_module(".".join(parts[:modules]))
    for part in parts[modules:-1]:
        holder = getattr(holder, part)
    return holder, parts[-1]


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def _write_half(name: str, journal: Any, *arguments: Any, **line: Any) -> None:
    """As a kill in the middle of a write leaves a file."""
    data = msgspec.json.encode(arguments[0] if arguments else line)
    file = {"ledger": LEDGER_FILE, "step": METRICS_FILE}[name]
    with (journal._directory / file).open("ab") as torn:
        torn.write(data[: len(data) // 2])


def _die(everybody: bool) -> None:
    if everybody:
        supervisor = psutil.Process(os.getppid())
        others = [process for process in supervisor.children() if process.pid != os.getpid()]
        for process in (supervisor, *others):
            process.send_signal(signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
