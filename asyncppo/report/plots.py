"""The pictures of a run, written to its `plots/`; matplotlib is imported here and in `compare_plots`.

Each small function below fills one axes from the rows of a `Summary`; the files are combinations of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from asyncppo.monitor.follow import value
from asyncppo.monitor.words import duration
from asyncppo.report.summary import PARTS, Summary

Draw = Callable[[Any, Summary], None]
Floats = NDArray[np.float64]

_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _GREY = "#2f6fb5", "#e0812b", "#3a9a5b", "#c8473f", "#8559a8", "#8c8c8c"
_SETS = (_RED, _GREEN, _PURPLE, _ORANGE)
_CRITICS = (_BLUE, _ORANGE, _GREEN, _PURPLE)
_PARTS = {
    "wait_for_batch": ("wait for rollouts", "#c9ced6"),
    "wait_for_critics": ("wait for critics", "#e9b872"),
    "proximal": ("proximal log-probs", "#8fc1a9"),
    "targets": ("targets", "#b79fd0"),
    "update": ("update", _BLUE),
    "publish": ("publish", "#d9776f"),
    "checkpoint": ("checkpoint", "#6b5b53"),
}
_STYLE = {
    "figure.facecolor": "white",
    "axes.edgecolor": "#555555",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "grid.color": "#e6e6e6",
    "legend.fontsize": 10,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "lines.linewidth": 2.0,
    "font.size": 11,
}


def draw(summary: Summary) -> list[Path]:
    """Write all pictures of a run; returns their paths, the overview first. Before the first step there are none."""
    if not summary.rows:
        return []
    directory = summary.directory / "plots"
    directory.mkdir(exist_ok=True)
    figures: dict[str, tuple[Sequence[Draw], int]] = {
        "overview": ((_learning, _staleness, _time, _std, _explained, _entropy), 3),
        "learning": ((_learning,), 1),
        "staleness": ((_staleness, _staleness_total), 2),
        "critics": ((_std, _explained, _correlation), 3),
        "policy": ((_entropy, _kl, _clipped, _sample_size, _grad_norm, _gap), 3),
        "time": ((_time,), 1),
    }
    with matplotlib.rc_context(_STYLE):
        return [
            _write(directory / f"{name}.png", draws, columns, summary) for name, (draws, columns) in figures.items()
        ]


def _write(path: Path, draws: Sequence[Draw], columns: int, summary: Summary) -> Path:
    lines = -(-len(draws) // columns)
    figure = Figure(
        figsize=(5.0 * columns if columns > 1 else 9.0, 3.9 * lines + 0.5),
        layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1),
    )
    for index, fill in enumerate(draws):
        axes = figure.add_subplot(lines, columns, index + 1)
        fill(axes, summary)
    figure.suptitle(_headline(summary), fontsize=12, color="#555555", x=0.012, ha="left")
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    os.replace(partial, path)
    return path


def _headline(summary: Summary) -> str:
    parts = [summary.name, f"{summary.steps} steps in {duration(summary.train_wall_s)}"]
    if summary.config:
        stream, sampling = summary.config.stream, summary.config.sampling
        parts.append(f"{stream.prompts_per_batch} groups × {sampling.group_size} responses a step")
        parts.append(f"{summary.config.algorithm.critics} critics")
        parts.append(f"staleness ≤ {stream.max_staleness}")
    return " · ".join(parts)


# ---- series ----


def _steps(summary: Summary) -> Floats:
    return np.array([row["step"] for row in summary.rows], dtype=float)


def _series(summary: Summary, key: str) -> Floats:
    """A metric, step by step; not a number where it is missing."""
    found = [value(row, key) for row in summary.rows]
    return np.array([np.nan if number is None else number for number in found], dtype=float)


def _smooth(values: Floats) -> Floats:
    """Mean of a window around each step; the window is an eighth of the run, and shrinks towards its ends."""
    half = max(1, len(values) // 16)
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        means.append(np.nan if np.isnan(window).all() else float(np.nanmean(window)))
    return np.array(means)


def _line(axes: Any, summary: Summary, key: str, label: str | None, color: str, style: str = "-") -> None:
    """The smoothed metric over a faint raw one."""
    x, y = _steps(summary), _series(summary, key)
    if np.isnan(y).all():
        return
    sparse = np.isnan(y).mean() > 0.5
    if sparse:
        axes.plot(x, y, "o", color=color, label=label, markersize=4)
        return
    axes.plot(x, y, color=color, alpha=0.25, linewidth=1.0, linestyle=style)
    axes.plot(x, _smooth(y), color=color, label=label, linestyle=style)


def _finish(axes: Any, summary: Summary, title: str, unit: str, legend: str | None = None) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.set_xlim(0, max(2, summary.steps + 0.5))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=legend or "best", handlelength=1.4)
    elif not axes.has_data():
        axes.text(0.5, 0.5, "no such metric in this run", transform=axes.transAxes, ha="center", color=_GREY)


def _stack(
    axes: Any, x: Floats, layers: Sequence[Floats] | Floats, colors: Any, labels: Sequence[str | None]
) -> Floats:
    """Layers on top of each other, one column a step; returns the height of each column."""
    edges = np.append(x - 0.5, x[-1] + 0.5)
    bottom = np.zeros(len(x))
    for layer, color, label in zip(layers, colors, labels, strict=True):
        low, high = np.append(bottom, bottom[-1]), np.append(bottom + layer, bottom[-1] + layer[-1])
        axes.fill_between(edges, low, high, step="post", color=color, linewidth=0, label=label)
        bottom = bottom + layer
    return bottom


# ---- one axes each ----


def _learning(axes: Any, summary: Summary) -> None:
    _line(axes, summary, "reward/mean", "training reward", _BLUE)
    for index, comparison in enumerate(summary.comparisons):
        scores = [score for score in summary.scores if score.set_name == comparison.set_name]
        if scores:
            axes.errorbar(
                [score.policy_version + 0.008 * index * summary.steps for score in scores],  # side by side
                [score.pass_at_1 for score in scores],
                yerr=[score.standard_error for score in scores],
                fmt="D",
                color=_SETS[index % len(_SETS)],
                capsize=3,
                markersize=6,
                label=f"held-out {comparison.set_name}, pass@1",
                clip_on=False,
                zorder=5,
            )
    rewards = _series(summary, "reward/mean")  # outside [0, 1] by the weights of reward.functions, or overlong_penalty
    axes.set_ylim(np.nanmin(np.append(rewards, 0.0)), np.nanmax(np.append(rewards, 1.0)))
    _finish(axes, summary, "Reward", "mean reward", "lower right")
    axes.set_xlim(-0.02 * summary.steps, summary.steps * 1.02 + 0.5)


def _staleness(axes: Any, summary: Summary) -> None:
    x = _steps(summary)
    table = np.zeros((len(summary.staleness_histogram), len(x)))
    for column, row in enumerate(summary.rows):
        counts = row.get("staleness/histogram") or []
        table[: len(counts), column] = counts
    highest = max(1, (summary.max_staleness_seen or 0) + 1)
    colors = matplotlib.colormaps["viridis_r"](np.linspace(0.05, 0.9, max(2, highest)))
    few = highest <= 9
    labels = [str(age) if few or age % (highest // 5) == 0 else None for age in range(highest)]
    top = _stack(axes, x, table[:highest], colors, labels)
    axes.set_ylim(0, (float(top.max(initial=0.0)) or 1.0) * 1.24)
    bound = "" if summary.max_staleness is None else f" (bound {summary.max_staleness})"
    _finish(axes, summary, f"Staleness of each batch{bound}", "groups")
    axes.legend(
        title="versions behind", ncols=highest if few else 6, loc="upper center", handlelength=0.9, columnspacing=0.9
    )


def _staleness_total(axes: Any, summary: Summary) -> None:
    counts = summary.staleness_histogram
    axes.bar(range(len(counts)), counts, color=_PURPLE)
    if summary.max_staleness is not None:
        axes.axvline(summary.max_staleness + 0.5, color=_RED, linestyle="--", label=f"bound {summary.max_staleness}")
    axes.set_title("Staleness over the whole run")
    axes.set_xlabel("versions behind")
    axes.set_ylabel("groups")
    axes.set_xticks(range(len(counts)) if len(counts) <= 12 else range(0, len(counts), max(1, len(counts) // 8)))
    if summary.max_staleness is not None:
        axes.legend(loc="upper right")


def _time(axes: Any, summary: Summary) -> None:
    x = _steps(summary)
    assert set(_PARTS) == set(PARTS)
    names = [name for name in _PARTS if np.nansum(_series(summary, f"time/{name}_s")) > 0]
    parts = [np.nan_to_num(_series(summary, f"time/{name}_s")) for name in names]
    total = float(np.nansum(_series(summary, "time/step_s"))) or 1.0
    shares = [100 * float(seconds.sum()) / total for seconds in parts]
    labels = [
        f"{_PARTS[name][0]} {share:.0f} %" if share >= 1 else None for name, share in zip(names, shares, strict=True)
    ]
    top = _stack(axes, x, parts, [_PARTS[name][1] for name in names], labels)
    axes.set_ylim(0, _roof(top) * 1.38)
    _finish(axes, summary, "Time of each step", "seconds")
    axes.legend(loc="upper center", ncols=2, handlelength=0.9, columnspacing=0.9)


def _roof(values: Floats) -> float:
    """Where to cut the axis so that a few outliers do not flatten the rest."""
    most, usual = float(values.max(initial=0.0)), float(np.quantile(values, 0.95)) if len(values) else 0.0
    return (1.6 * usual if usual and most > 2 * usual else most) or 1.0


def _std(axes: Any, summary: Summary) -> None:
    x = _steps(summary)
    low, high = _smooth(_series(summary, "value/std_p10")), _smooth(_series(summary, "value/std_p90"))
    if not np.isnan(low).all():
        axes.fill_between(x, low, high, color=_PURPLE, alpha=0.2, linewidth=0, label="10th to 90th percentile")
    _line(axes, summary, "value/std_p50", "median", _PURPLE)
    axes.set_ylim(bottom=0)
    _finish(axes, summary, "Disagreement of the critics", "std of the values over critics", "upper right")


def _explained(axes: Any, summary: Summary) -> None:
    own = [f"critic/{index}/explained_variance" for index in summary.critics]
    other = [f"critic/{index}/explained_variance_other" for index in summary.critics]
    for index, (mine, others) in enumerate(zip(own, other, strict=True)):
        color = _CRITICS[index % len(_CRITICS)]
        _line(axes, summary, mine, f"critic {index}, own shard", color)
        _line(axes, summary, others, f"critic {index}, other shards", color, ":")
    if not summary.critics:
        _line(axes, summary, "value/explained_variance", "ensemble", _BLUE)
    axes.axhline(0, color=_GREY, linewidth=1)
    drawn = [_smooth(_series(summary, key)) for key in [*own, *other]]
    low = min((float(np.nanquantile(y, 0.1)) for y in drawn if not np.isnan(y).all()), default=0.0)
    high = max((float(np.nanmax(y)) for y in drawn if not np.isnan(y).all()), default=1.0)
    axes.set_ylim(max(-1.0, min(-0.05, 1.3 * low)), min(1.0, max(0.1, 1.35 * high)))
    _finish(axes, summary, "Explained variance of the critics", "1 − Var(R − V) / Var(R)", "lower right")


def _correlation(axes: Any, summary: Summary) -> None:
    _line(axes, summary, "value/correlation", None, _GREEN)
    axes.set_ylim(min(0.0, float(np.nanmin(np.append(_series(summary, "value/correlation"), 0.0)))), 1.02)
    _finish(axes, summary, "Correlation of the critics' values", "correlation")


def _entropy(axes: Any, summary: Summary) -> None:
    _line(axes, summary, "policy/entropy", None, _ORANGE)
    axes.set_ylim(bottom=0)
    _finish(axes, summary, "Entropy of the policy", "nats per token")


def _kl(axes: Any, summary: Summary) -> None:
    _line(axes, summary, "policy/kl_behaviour", "behaviour‖current", _BLUE)
    _line(axes, summary, "policy/kl_proximal", "proximal‖current", _ORANGE)
    axes.set_ylim(0, _roof(np.nan_to_num(_series(summary, "policy/kl_behaviour"))) * 1.1)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _finish(axes, summary, "KL divergence", "nats per token", "upper right")


def _clipped(axes: Any, summary: Summary) -> None:
    _line(axes, summary, "policy/clip_fraction", "clipped by PPO", _RED)
    _line(axes, summary, "policy/capped_fraction", "behaviour weight capped", _PURPLE)
    axes.set_ylim(bottom=0, top=max(0.01, axes.get_ylim()[1]))
    _finish(axes, summary, "Tokens that the ratio limits bind", "fraction of tokens", "upper right")


def _sample_size(axes: Any, summary: Summary) -> None:
    _line(axes, summary, "policy/ess", None, _GREEN)
    axes.set_ylim(0, 1.05)
    _finish(axes, summary, "Effective sample size", "fraction of the tokens")


def _grad_norm(axes: Any, summary: Summary) -> None:
    _line(axes, summary, "policy/grad_norm", "actor", _BLUE)
    for index in summary.critics:
        _line(axes, summary, f"critic/{index}/grad_norm", f"critic {index}", _CRITICS[(index + 1) % len(_CRITICS)])
    roofs = [_roof(np.nan_to_num(line.get_ydata())) for line in axes.get_lines()]
    axes.set_ylim(0, 1.1 * max(roofs, default=1.0))
    _finish(axes, summary, "Gradient norm before clipping", "norm", "upper right")


def _gap(axes: Any, summary: Summary) -> None:
    _line(axes, summary, "logprob_gap/mean", "mean", _BLUE)
    _line(axes, summary, "logprob_gap/max", "largest", _RED)
    if axes.get_lines():
        axes.set_yscale("log")
    _finish(axes, summary, "Log-prob gap, trainer to engine", "nats")
