"""A run as its files tell it while they grow: new lines of metrics.jsonl and events.jsonl, and what they add up to.

It only reads, and each line once, so that a run of a hundred thousand steps costs a look at its newest lines.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from asyncppo import config as config_file
from asyncppo.config import Config
from asyncppo.errors import ConfigError
from asyncppo.metrics import EVENTS_FILE, METRICS_FILE

HISTORY = 500
"""Steps that are remembered, for sparklines and averages."""
RECENT = 10
"""Steps that "now" means."""


class Tail:
    """The objects that were added to a JSON-lines file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """New objects, in order. A half-written last line is left for the next look; a torn one is passed over."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                try:
                    row = msgspec.json.decode(line)
                except msgspec.DecodeError:
                    continue
                if isinstance(row, dict):
                    yield row


@dataclass(frozen=True)
class Phase:
    """What a run is doing, in words, and since when."""

    text: str
    since: float
    """Unix time."""


def value(row: Mapping[str, Any] | None, key: str) -> float | None:
    """A metric as a number; None where a row lacks it or it was not finite."""
    found = None if row is None else row.get(key)
    return float(found) if isinstance(found, int | float) else None


class Run:
    """A run directory, followed. Call `refresh`, then look."""

    def __init__(self, directory: Path, config: Config | None = None) -> None:
        self.directory = directory
        self.config = config
        """The run's config; None until the trainer has written it."""
        self.rows: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self.evals: list[dict[str, Any]] = []
        self.events: deque[dict[str, Any]] = deque(maxlen=100)
        """The newest events, swaps left out."""
        self.events_seen = 0
        """How many events there were in all, swaps left out."""
        self.swaps = 0
        self.started: float | None = None
        """When the trainer was ready, for the last time."""
        self.joined: float | None = None
        self.swapped: float | None = None
        self.ended: dict[str, Any] | None = None
        self.first_seen: float | None = None
        self._metrics = Tail(directory / METRICS_FILE)
        self._events = Tail(directory / EVENTS_FILE)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.directory.name

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest step's metrics."""
        return self.rows[-1] if self.rows else None

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.last["step"]) if self.last else 0

    @property
    def steps(self) -> int | None:
        """Steps wanted; None before the config is there."""
        return self.config.run.steps if self.config else None

    def refresh(self) -> bool:
        """Read what is new; returns whether there was anything."""
        if self.config is None and (self.directory / "config.yaml").exists():
            try:
                self.config = config_file.load(self.directory / "config.yaml")
            except ConfigError:
                self.config = None  # it is being written: the next look has it
        new = False
        for event in self._events.read():
            self._take_event(event)
            new = True
        for row in self._metrics.read():
            if "step" not in row:
                continue
            while self.rows and self.rows[-1]["step"] >= row["step"]:
                self.rows.pop()  # the run went on from an older checkpoint: these steps are done again
            self.rows.append(row)
            new = True
        return new

    def _take_event(self, event: dict[str, Any]) -> None:
        at = float(event.get("time", 0.0))
        if self.first_seen is None:
            self.first_seen = at
        match event.get("event"):
            case "launched":
                self.started = self.joined = self.swapped = self.ended = None
            case "start":
                self.started, self.ended = at, None
            case "server_joined":
                self.joined = self.joined or at
            case "swap":
                self.swaps += 1
                self.swapped = self.swapped or at
                return
            case "eval":
                self.evals.append(event)
            case "end":
                self.ended = event
        self.events.append(event)
        self.events_seen += 1

    def recent(self, key: str) -> float | None:
        """Mean of a metric over the last steps."""
        found = [number for row in list(self.rows)[-RECENT:] if (number := value(row, key)) is not None]
        return sum(found) / len(found) if found else None

    def history(self, key: str) -> list[float]:
        """A metric over the steps that are remembered."""
        return [number for row in self.rows if (number := value(row, key)) is not None]

    def trainer_waits(self) -> float | None:
        """Share of the last steps' time that the trainer waited for the rollout servers."""
        rows = list(self.rows)[-RECENT:]
        total = sum(value(row, "time/step_s") or 0.0 for row in rows)
        return sum(value(row, "time/wait_for_batch_s") or 0.0 for row in rows) / total if total else None

    def seconds_left(self) -> float | None:
        """Until the last step, at the pace of the last steps; None before there is one."""
        rows = list(self.rows)[-RECENT:]
        if self.steps is None or not rows:
            return None
        pace = sum(value(row, "time/step_s") or 0.0 for row in rows) / len(rows)
        return pace * max(0, self.steps - self.step)

    def pass_at_1(self, set_name: str) -> list[tuple[int, float]]:
        """(policy version, pass@1) of the evaluations of one set."""
        return [(int(e["policy_version"]), float(e["pass_at_1"])) for e in self.evals if e.get("set") == set_name]

    def phase(self) -> Phase:
        """What the run is doing and since when."""
        first = self.first_seen or time.time()
        if self.ended is not None:
            return Phase(str(self.ended.get("reason", "the run has ended")), float(self.ended["time"]))
        sets = list(self.config.eval.sets) if self.config else []
        if self.last is not None:
            at = float(self.last["time"])
            if self.steps is None or self.step < self.steps:
                return Phase("training", at)
            done = [event for event in self.evals if event["policy_version"] == self.step]
            if self.config and self.config.eval.at_end and len(done) < len(sets):
                return Phase(f"version {self.step} answers the held-out problems of {sets[len(done)]}", at)
            return Phase("the trainer saves and exports the actor", float(done[-1]["time"]) if done else at)
        if self.started is None:
            return Phase("the trainer is loading its models", first)
        if self.joined is None:
            return Phase("waiting for a rollout server to join", self.started)
        ready = max(self.started, self.joined)
        if self.swapped is None:
            return Phase("SGLang is starting", ready)
        done = [event for event in self.evals if event["policy_version"] == 0]
        since = max([ready, self.swapped, *(float(event["time"]) for event in done)])
        if self.config and self.config.eval.at_start and len(done) < len(sets):
            return Phase(f"version 0 answers the held-out problems of {sets[len(done)]}", since)
        return Phase("the first batch of groups is being generated", since)
