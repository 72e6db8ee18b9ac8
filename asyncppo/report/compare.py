"""Methods compared: the runs of several configs and seeds as one table of means, and of differences paired by seed.

A run is one number a measure; a method is the mean ± standard deviation of its runs over seeds. Two methods are
compared by the differences of runs of the same seed, which share prompts, sampling seeds and evaluation problems: mean
difference ± t · sd/√n, Student's t at 95 %. The intervals are not corrected for how many comparisons the table makes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncppo.metrics import EVENTS_FILE, METRICS_FILE, read
from asyncppo.monitor.follow import value

_EDGE = 5
"""Steps that "at the end" means."""

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)

MEASURES: dict[str, tuple[str, str]] = {
    "reward": ("reward", "mean training reward over all steps"),
    "reward_last": ("last third", "mean training reward over the last third of the steps"),
    "tokens": ("tokens", "response tokens generated for training"),
    "cpu_s": ("CPU s/step", "CPU seconds of a step: sampling, critics, update; without warm start and evaluation"),
    "ev_first": ("EV 1st half", "explained variance of the aggregated value, median over the first half of the steps"),
    "ev_second": ("EV 2nd half", "the same, second half"),
    "value_std": ("value std", "standard deviation over critics, mean over tokens and steps"),
    "correlation": ("corr.", "correlation of the first two critics' values, mean over steps"),
    "entropy": ("entropy", f"policy entropy in nats, last {_EDGE} steps"),
    "grad_norm": ("grad norm", "the actor's gradient norm before clipping, mean over steps"),
}
"""What a run is measured by: heading and meaning. Held-out sets come besides, as `eval/<set>`."""
_OUTCOME = ("reward", "reward_last", "tokens", "cpu_s")
_INSIDE = ("ev_first", "ev_second", "value_std", "correlation", "entropy", "grad_norm")
_EVAL = "eval/"


@dataclass(frozen=True)
class Run:
    """One finished run, read."""

    seed: int
    rows: tuple[dict[str, Any], ...]
    measures: dict[str, float]
    """Those of `MEASURES` that the run has, and `eval/<set>`: pass@1 after the last step."""


@dataclass(frozen=True)
class Method:
    """All finished runs of one config."""

    name: str
    runs: tuple[Run, ...]
    tuned: str | None = None
    """The value that the grid chose."""

    def values(self, measure: str) -> dict[int, float]:
        """A measure by seed."""
        return {run.seed: run.measures[measure] for run in self.runs if measure in run.measures}


class Spread(msgspec.Struct, frozen=True):
    """Mean and standard deviation over n runs."""

    n: int
    mean: float
    sd: float | None
    """Of the sample (n − 1); None for one run."""


class Difference(msgspec.Struct, frozen=True):
    """A method less the baseline, paired by seed."""

    n: int
    mean: float
    low: float | None
    """End of the 95 % confidence interval; None for one pair."""
    high: float | None


def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t, to four digits."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)  # Cornish-Fisher, whose error is below 1e-5 from here on
    first = (z**3 + z) / (4 * degrees)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return z + first + second + third


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation; None for no values."""
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(len(values), statistics.fmean(values), sd)


def paired(method: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """The mean difference over the seeds that both have, with its interval; None if there are none."""
    differences = [method[seed] - baseline[seed] for seed in sorted(method.keys() & baseline.keys())]
    if not differences:
        return None
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return Difference(1, mean, None, None)
    reach = t_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(n, mean, mean - reach, mean + reach)


def read_run(directory: Path, seed: int) -> Run:
    """A finished run, from its files."""
    rows = tuple(read(directory / METRICS_FILE))
    events = list(read(directory / EVENTS_FILE))
    third, half = max(1, len(rows) // 3), len(rows) // 2
    found = {
        "reward": _mean(rows, "reward/mean"),
        "reward_last": _mean(rows[-third:], "reward/mean"),
        "ev_first": _median(rows[:half], "value/explained_variance_fresh"),
        "ev_second": _median(rows[half:], "value/explained_variance_fresh"),
        "value_std": _mean(rows, "value/std_mean") if value(rows[-1] if rows else None, "value/correlation") else None,
        "correlation": _mean(rows, "value/correlation"),
        "entropy": _mean(rows[-_EDGE:], "policy/entropy"),
        "grad_norm": _mean(rows, "policy/grad_norm"),
    }
    for event in events:
        if event["event"] == "end" and rows:
            found["tokens"] = value(event, "tokens")
            found["cpu_s"] = (value(event, "train_cpu_s") or math.nan) / len(rows)
        if event["event"] == "eval" and rows and event["policy_version"] == rows[-1]["step"]:
            found[f"{_EVAL}{event['set']}"] = value(event, "pass_at_1")
    measures = {name: number for name, number in found.items() if number is not None and math.isfinite(number)}
    return Run(seed, rows, measures)


def show(methods: Sequence[Method], baseline: str, notes: Sequence[str], console: Console) -> None:
    """Print the tables."""
    for title, header, lines in tables(methods, baseline):
        table = Table(box=None, pad_edge=False)
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left", header_style="dim", no_wrap=index == 0)
        for line in lines:
            table.add_row(*line)
        console.print(Text(f"\n{title}", style="bold"))
        console.print(table)
    for note in notes:
        console.print(Text(f"\n{note}"), soft_wrap=True)


def markdown(methods: Sequence[Method], baseline: str, notes: Sequence[str]) -> str:
    """The tables, what their columns mean, and the notes."""
    parts = ["# Comparison"]
    for title, header, lines in tables(methods, baseline):
        grid = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in grid)]
    meanings = [f"- {heading}: {meaning}" for heading, meaning in MEASURES.values()]
    parts += ["\n".join([*meanings, "- other columns: pass@1 of the held-out set after the last step"])]
    return "\n\n".join([*parts, *notes]) + "\n"


def as_json(methods: Sequence[Method], baseline: str, notes: Sequence[str]) -> bytes:
    """Everything that the tables are made of: each seed's value, spreads, differences."""
    base = {method.name: method for method in methods}[baseline]
    out = {
        "baseline": baseline,
        "measures": {name: meaning for name, (_, meaning) in MEASURES.items()},
        "notes": list(notes),
        "methods": {
            method.name: {
                "tuned": method.tuned,
                "measures": {
                    name: {
                        "by_seed": {str(seed): number for seed, number in method.values(name).items()},
                        "spread": spread(list(method.values(name).values())),
                        "difference": paired(method.values(name), base.values(name)),
                    }
                    for name in [*MEASURES, *held_out(methods)]
                    if method.values(name)
                },
            }
            for method in methods
        },
    }
    return msgspec.json.format(msgspec.json.encode(out), indent=2) + b"\n"


def held_out(methods: Sequence[Method]) -> list[str]:
    """The measures `eval/<set>` that any run has."""
    names = [name for method in methods for run in method.runs for name in run.measures if name.startswith(_EVAL)]
    return list(dict.fromkeys(names))


def tables(methods: Sequence[Method], baseline: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, lines) of each table; the first cell of a line is the method."""
    evals = held_out(methods)
    outcome = [*_OUTCOME[:2], *evals, *_OUTCOME[2:]]
    tuned = any(method.tuned for method in methods)
    base = {method.name: method for method in methods}[baseline]
    compared = [*_OUTCOME[:2], *evals]
    found = [
        (
            "Outcome: mean ± sd over seeds",
            ["method", "n", *["tuned"] * tuned, *map(_heading, outcome)],
            [
                [
                    method.name,
                    str(len(method.runs)),
                    *[method.tuned or "–"] * tuned,
                    *(_spread(method, name) for name in outcome),
                ]
                for method in methods
            ],
        ),
        (
            "Critics and policy: mean ± sd over seeds",
            ["method", *map(_heading, _INSIDE)],
            [[method.name, *(_spread(method, name) for name in _INSIDE)] for method in methods],
        ),
        (
            f"Difference to {baseline}, paired by seed, with its 95 % confidence interval",
            ["method", "pairs", *map(_heading, compared)],
            [
                [
                    method.name,
                    str(len(_seeds(method) & _seeds(base))),
                    *(_difference(method, base, m) for m in compared),
                ]
                for method in methods
                if method is not base
            ],
        ),
    ]
    return [table for table in found if table[2]]


def _seeds(method: Method) -> set[int]:
    return {run.seed for run in method.runs}


def _heading(measure: str) -> str:
    return MEASURES[measure][0] if measure in MEASURES else measure.removeprefix(_EVAL)


def _spread(method: Method, measure: str) -> str:
    found = spread(list(method.values(measure).values()))
    if found is None:
        return "–"
    if measure == "tokens":
        return f"{found.mean:,.0f}"
    return f"{found.mean:.3f}" if found.sd is None else f"{found.mean:.3f} ± {found.sd:.3f}"


def _difference(method: Method, baseline: Method, measure: str) -> str:
    found = paired(method.values(measure), baseline.values(measure))
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{found.mean:+.3f}"
    mark = " *" if found.low > 0 or found.high < 0 else ""
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{mark}"


def _numbers(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [number for row in rows if (number := value(row, key)) is not None]


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    found = _numbers(rows, key)
    return statistics.fmean(found) if found else None


def _median(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Not the mean: where nearly all rewards of a batch are equal, explained variance is a huge negative number."""
    found = _numbers(rows, key)
    return statistics.median(found) if found else None
