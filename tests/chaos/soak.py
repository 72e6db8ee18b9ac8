"""`python -m tests.chaos.soak`: a run without faults, for long: memory, files and disk of every process, and slopes.

Sampled every few seconds; what is judged is the time after the first quarter, in which caches fill:

    flat        by the straight line through all samples it would change by less than 5 % (or 4 MB, 2 files) in an hour
    bounded     not flat, but the most of the last third is no more than the most of the third before
    GROWING     neither

`metrics.jsonl`, `events.jsonl`, `ledger.jsonl` and logs grow by design, a line a step or more: they are told apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from tests.chaos.cluster import Cluster
from tests.chaos.harness import Chaos

EVERY_S = 5.0
_SKIPPED = 0.25
"""Of all samples."""
_SHARE_PER_HOUR = 0.05
_LEAST = {"MB": 4.0, "files": 2.0, "threads": 2.0, "bytes a step": float("inf")}


@dataclass
class Series:
    """One thing that was measured again and again."""

    unit: str
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def judged(self) -> dict[str, Any]:
        """Its slope per hour, and what it is called."""
        first = int(len(self.values) * _SKIPPED)
        times, values = np.array(self.times[first:]) / 3600, np.array(self.values[first:])
        if len(values) < 6:
            return {"unit": self.unit, "judgement": "too short"}
        slope = float(np.polyfit(times, values, 1)[0])
        third = len(values) // 3
        before, last = float(values[third : 2 * third].max()), float(values[2 * third :].max())
        if abs(slope) <= max(_LEAST[self.unit], _SHARE_PER_HOUR * float(values.mean())):
            judgement = "flat"
        else:
            judgement = "bounded" if slope < 0 or last <= before else "GROWING"
        return {
            "unit": self.unit,
            "first": round(float(values[0]), 1),
            "last": round(float(values[-1]), 1),
            "most": round(float(values.max()), 1),
            "per_hour": round(slope, 2),
            "judgement": judgement,
        }


class Sampler:
    """Looks at a cluster every `EVERY_S`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._began = time.monotonic()
        self._next = 0.0
        self.series: dict[str, Series] = {}
        self.by_design: dict[str, int] = {}
        """Bytes of the files that grow with the run."""

    def look(self) -> None:
        """Sample, if it is time to."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + EVERY_S
        for member in self._cluster.members:
            family = member.family()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._process(_name(member.name, process, family[0]), process)
        self._note("publish directory", "MB", _bytes(Path(self._cluster.config.publish.directory)) / 1e6)
        run = self._cluster.run
        logs = [*run.glob("*.jsonl"), *run.glob("logs/*")]
        self.by_design = {str(path.relative_to(run)): path.stat().st_size for path in logs if path.exists()}
        self._note("run directory, without lines and logs", "MB", (_bytes(run) - sum(self.by_design.values())) / 1e6)

    def _process(self, name: str, process: psutil.Process) -> None:
        with process.oneshot():
            self._note(f"{name}: memory", "MB", process.memory_info().rss / 1e6)
            self._note(f"{name}: open files", "files", process.num_fds())
            self._note(f"{name}: threads", "threads", process.num_threads())

    def _note(self, name: str, unit: str, value: float) -> None:
        series = self.series.setdefault(name, Series(unit))
        series.times.append(time.monotonic() - self._began)
        series.values.append(value)


def _name(member: str, process: psutil.Process, first: psutil.Process) -> str:
    words = process.cmdline()
    if "--role" in words:
        role = words[words.index("--role") + 1]
        return f"critic {words[words.index('--index') + 1]}" if role == "critic" else role
    if process.pid == first.pid:
        return "supervisor" if member == "trainer" else f"server {member}"
    what = "resource tracker" if "resource_tracker" in " ".join(words) else "grading worker"
    return f"{what} of {'server ' if member != 'trainer' else ''}{member}"


def _bytes(directory: Path) -> int:
    """Of all files; what goes while it looks counts as gone."""
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Of the run; an odd one trains with replay.")] = 0,
    engine: Annotated[str, typer.Option(help="deepspeed or plain")] = "deepspeed",
    token_s: Annotated[float, typer.Option(help="Seconds of a token: 8 of them are a group.")] = 0.02,
) -> None:
    """Tells the slopes; the last line is JSON. Exit code 0: nothing grows, and the run kept its promises."""
    place = Path(tempfile.mkdtemp(prefix="asyncppo-soak-"))
    published = Path(tempfile.mkdtemp(prefix="asyncppo-soak-", dir="/dev/shm"))
    changes = {"publish": {"directory": str(published)}}
    cluster = Cluster(place, seed, engine, token_s=token_s, changes=changes)
    sampler = Sampler(cluster)
    summary = Chaos(
        cluster, 60 * minutes, iter(()), say=lambda line: print(line, flush=True), observe=sampler.look
    ).run()
    judged = {name: series.judged() for name, series in sampler.series.items()}
    print(f"\n{'':44s} {'first':>9s} {'last':>9s} {'most':>9s} {'per hour':>9s}")
    for name, one in judged.items():
        if "first" in one:
            numbers = " ".join(f"{one[key]:9.1f}" for key in ("first", "last", "most", "per_hour"))
            print(f"{name:44s} {numbers} {one['unit']:8s} {one['judgement']}")
    for name, size in sampler.by_design.items():
        print(f"{name:44s} {size / max(1, summary.steps):9.0f} bytes a step, by design")
    growing = [name for name, one in judged.items() if one["judgement"] == "GROWING"]
    good = summary.good and not growing
    shutil.rmtree(published)
    if good:
        shutil.rmtree(place)
    else:
        print(f"everything is in {place}", flush=True)
    whole = {"good": good, "growing": growing, "minutes": minutes, "run": summary.line(), "series": judged}
    print(json.dumps(whole), flush=True)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
