"""A run directory as one frozen `Summary`: what the report, the pictures and the demo's verdict are made from."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncppo.config import Config, load
from asyncppo.errors import ConfigError, UserError
from asyncppo.metrics import EVENTS_FILE, METRICS_FILE, read
from asyncppo.monitor.follow import value

PARTS: dict[str, str] = {
    "wait_for_batch": "waiting for the rollout servers",
    "proximal": "proximal log-probs (critics learn meanwhile)",
    "wait_for_critics": "waiting for the critics",
    "targets": "advantages and masks",
    "update": "updating the actor",
    "publish": "publishing the new version",
    "checkpoint": "saving checkpoints",
}
"""What a step's time is split into: the key in `time/…_s`, and in words."""
_EDGE = 5
"""Steps that "first" and "last" mean."""


@dataclass(frozen=True)
class Score:
    """One evaluation of one held-out set."""

    set_name: str
    policy_version: int
    pass_at_1: float
    standard_error: float
    """Of pass@1, over problems. Where the event does not say, its upper bound √(p(1−p)/problems)."""
    problems: int
    samples: int


@dataclass(frozen=True)
class Comparison:
    """A held-out set before the first step and after the last."""

    set_name: str
    before: Score | None
    after: Score | None

    @property
    def gain(self) -> float | None:
        """pass@1 after less pass@1 before."""
        return None if self.before is None or self.after is None else self.after.pass_at_1 - self.before.pass_at_1

    @property
    def standard_error(self) -> float | None:
        """Of the gain, as if the two were independent; the problems are the same, so it is rather too large."""
        if self.before is None or self.after is None:
            return None
        return math.hypot(self.before.standard_error, self.after.standard_error)


@dataclass(frozen=True)
class Phase:
    """A stretch of wall clock, or a part of one."""

    name: str
    seconds: float
    part: bool = False
    """Whether it is a part of the phase above it."""


@dataclass(frozen=True)
class Summary:
    """A run, read."""

    directory: Path
    config: Config | None
    rows: tuple[dict[str, Any], ...]
    """The metrics of every step, in order; of steps that were done twice, the second time."""
    scores: tuple[Score, ...]
    phases: tuple[Phase, ...]
    steps: int
    """Steps done."""
    end_reason: str | None
    """Why it ended; None while it runs or when it was killed."""
    train_wall_s: float
    """From the trainer's start to its end, over all of its lives."""
    groups: int
    swaps: int
    pauses_s: tuple[float, ...]
    """Seconds that generation stood still, swap by swap; the first of each server, to version 0, paused nothing."""
    staleness_histogram: tuple[int, ...]
    """Groups by staleness 0, 1, …, over all steps."""
    max_staleness_seen: int | None
    dropped: int
    dropped_by_reason: dict[str, int]
    servers: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.directory.name

    @property
    def steps_wanted(self) -> int | None:
        """Steps that the config asks for."""
        return self.config.run.steps if self.config else None

    @property
    def max_staleness(self) -> int | None:
        """The bound that the config sets."""
        return self.config.stream.max_staleness if self.config else None

    @property
    def critics(self) -> tuple[int, ...]:
        """Indices of the critics that left metrics."""
        keys = self.rows[-1] if self.rows else {}
        return tuple(sorted({int(key.split("/")[1]) for key in keys if key.startswith("critic/")}))

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Each held-out set before and after, in the order of the config."""
        found = list(dict.fromkeys(score.set_name for score in self.scores))
        named = list(self.config.eval.sets) if self.config else []
        names = list(dict.fromkeys([*named, *found]))

        def at(name: str, version: int) -> Score | None:
            matching = [s for s in self.scores if (s.set_name, s.policy_version) == (name, version)]
            return matching[-1] if matching else None

        return tuple(Comparison(name, at(name, 0), at(name, self.steps) if self.steps else None) for name in names)

    @property
    def pause_median_s(self) -> float | None:
        """Median pause of a swap."""
        return statistics.median(self.pauses_s) if self.pauses_s else None

    @property
    def exported_actor(self) -> Path | None:
        """The trained actor as a Hugging Face directory."""
        path = self.directory / "actor"
        return path if path.is_dir() else None

    def first(self, key: str) -> float | None:
        """Mean of a metric over the first steps."""
        return _mean([value(row, key) for row in self.rows[:_EDGE]])

    def last(self, key: str) -> float | None:
        """Mean of a metric over the last steps."""
        return _mean([value(row, key) for row in self.rows[-_EDGE:]])

    def mean(self, key: str) -> float | None:
        """Mean of a metric over all steps."""
        return _mean([value(row, key) for row in self.rows])

    def total(self, key: str) -> float:
        """Sum of a metric over all steps."""
        return sum(value(row, key) or 0.0 for row in self.rows)


def summarize(directory: Path) -> Summary:
    """Read a run directory, whether the run goes on, has ended or was killed.

    Raises:
        UserError: there is no run in it.
    """
    if not any((directory / name).exists() for name in (METRICS_FILE, EVENTS_FILE)):
        raise UserError(f"{directory} holds no {METRICS_FILE} and no {EVENTS_FILE}: name a run directory, runs/NAME")
    by_step = {int(row["step"]): row for row in read(directory / METRICS_FILE)}
    rows = tuple(by_step[step] for step in sorted(by_step))
    events = list(read(directory / EVENTS_FILE))
    named: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        named.setdefault(event["event"], []).append(event)
    scores = tuple(_score(event) for event in named.get("eval", []))
    steps = int(rows[-1]["step"]) if rows else 0
    histograms = [row["staleness/histogram"] for row in rows if row.get("staleness/histogram")]
    highest = [int(row["staleness/max"]) for row in rows if row.get("staleness/max") is not None]
    last_life = [event["event"] for event in events if event["event"] in ("start", "end")]
    return Summary(
        directory=directory,
        config=_config(directory),
        rows=rows,
        scores=scores,
        phases=_phases(rows, named, steps),
        steps=steps,
        end_reason=str(named["end"][-1]["reason"]) if last_life and last_life[-1] == "end" else None,
        train_wall_s=_train_wall_s(rows, events),
        groups=int(rows[-1].get("stream/consumed") or 0) if rows else 0,
        swaps=len(named.get("swap", [])),
        pauses_s=tuple(
            event["pause_s"] + event["load_s"] + event["resume_s"]
            for event in named.get("swap", [])
            if event["policy_version"] > 0
        ),
        staleness_histogram=tuple(
            sum(row[age] for row in histograms if age < len(row)) for age in range(_longest(histograms))
        ),
        max_staleness_seen=max(highest, default=None),
        dropped=int(rows[-1].get("stream/dropped") or 0) if rows else 0,
        dropped_by_reason=dict(Counter(str(event["reason"]) for event in named.get("dropped", []))),
        servers=tuple(dict.fromkeys(str(event["server"]) for event in named.get("server_joined", []))),
    )


def _config(directory: Path) -> Config | None:
    """The config the run was started with; None for one that this version does not read."""
    try:
        return load(directory / "config.yaml")
    except ConfigError:
        return None


def _score(event: dict[str, Any]) -> Score:
    p, problems = float(event["pass_at_1"]), int(event["problems"])
    given = event.get("standard_error")
    bound = math.sqrt(p * (1 - p) / problems) if 0 <= p <= 1 and problems else 0.0
    return Score(
        set_name=str(event["set"]),
        policy_version=int(event["policy_version"]),
        pass_at_1=p,
        standard_error=bound if given is None else float(given),
        problems=problems,
        samples=int(event["samples"]),
    )


def _phases(rows: Sequence[dict[str, Any]], named: dict[str, list[dict[str, Any]]], steps: int) -> tuple[Phase, ...]:
    """The wall clock of the run's first life up to the steps, then the steps' own times, then what followed."""

    def times(kind: str, version: int | None = None) -> list[float]:
        events = named.get(kind, [])
        return [float(e["time"]) for e in events if version is None or e.get("policy_version") == version]

    started, joined, served = times("start")[:1], times("server_joined")[:1], times("swap")[:1]
    launched = times("launched")[:1] or started
    phases: list[Phase] = []
    if launched and started and joined and served:
        phases.append(Phase("start-up, until version 0 is served", served[0] - launched[0]))
        engine_from = max(started[0], joined[0])
        for name, seconds in {
            "the trainer loads its models": started[0] - launched[0],
            "until a rollout server joins": engine_from - started[0],
            "SGLang starts and loads version 0": served[0] - engine_from,
        }.items():
            if seconds >= 0.05:
                phases.append(Phase(name, seconds, part=True))
    if served and times("eval", 0):
        phases.append(Phase("held-out problems, before", times("eval", 0)[-1] - served[0]))
    if rows:
        total = sum(value(row, "time/step_s") or 0.0 for row in rows)
        parts = {name: sum(value(row, f"time/{name}_s") or 0.0 for row in rows) for name in PARTS}
        phases.append(Phase(f"{len(rows)} training steps", total))
        phases += [Phase(PARTS[name], seconds, part=True) for name, seconds in parts.items() if seconds]
        phases.append(Phase("the rest", max(0.0, total - sum(parts.values())), part=True))
        done = float(rows[-1]["time"])
        after = [time for time in times("eval", steps) if time >= done]
        if after:
            phases.append(Phase("held-out problems, after", after[-1] - done))
        if ended := [time for time in times("end")[-1:] if time >= done]:
            phases.append(Phase("saving and exporting", ended[0] - max([done, *after])))
    return tuple(phases)


def _train_wall_s(rows: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> float:
    """Sum over the trainer's lives: from each `start` to its `end`, or to its last sign of life."""
    starts = [float(event["time"]) for event in events if event["event"] == "start"]
    if not starts and rows:
        starts = [float(rows[0]["time"]) - (value(rows[0], "time/step_s") or 0.0)]
    signs = sorted([*(float(event["time"]) for event in events), *(float(row["time"]) for row in rows)])
    ends = [float(event["time"]) for event in events if event["event"] == "end"]
    total = 0.0
    for index, start in enumerate(starts):
        until = starts[index + 1] if index + 1 < len(starts) else math.inf
        end = [time for time in ends if start <= time < until] or [time for time in signs if start <= time < until]
        total += end[-1] - start
    return total


def _longest(lists: Sequence[Sequence[Any]]) -> int:
    return max((len(items) for items in lists), default=0)


def _mean(values: Sequence[float | None]) -> float | None:
    found = [number for number in values if number is not None]
    return sum(found) / len(found) if found else None
