"""The picture of a comparison: learning curves, std over critics, explained variance and entropy of every method."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from asyncppo.monitor.follow import value
from asyncppo.report.compare import Method

_PANELS = (
    ("reward/mean", "Training reward", "mean reward"),
    ("value/std_mean", "Standard deviation over critics", "std"),
    ("value/explained_variance_fresh", "Explained variance", "fraction"),
    ("policy/entropy", "Entropy", "nats"),
)
_WINDOW = 16
"""A curve is smoothed over so large a part of the run: 1/16 to either side."""


def draw(methods: Sequence[Method], path: Path) -> Path:
    """Write the picture: a line for each method, mean over seeds, and a band of one standard deviation."""
    colors = matplotlib.colormaps["tab10" if len(methods) <= 10 else "tab20"]
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}):
        figure = Figure(figsize=(12.0, 8.0), layout="constrained")
        for index, (key, title, unit) in enumerate(_PANELS):
            axes = figure.add_subplot(2, 2, index + 1)
            for number, method in enumerate(methods):
                _curve(axes, method, key, colors(number % colors.N))
            axes.set(title=title, xlabel="step", ylabel=unit)
            if key == "value/explained_variance_fresh":
                axes.set_ylim(bottom=max(-0.5, axes.get_ylim()[0]))
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        partial = path.with_suffix(".partial.png")
        figure.savefig(partial, dpi=120)
    os.replace(partial, path)
    return path


def _curve(axes: Any, method: Method, key: str, color: Any) -> None:
    series = [curve for run in method.runs if (curve := smoothed([value(row, key) for row in run.rows])) is not None]
    if not series or not any(curve.any() for curve in series):  # a std of fewer than two critics is 0
        return
    steps = min(len(curve) for curve in series)
    table = np.stack([curve[:steps] for curve in series])
    x, mean = np.arange(1, steps + 1), table.mean(axis=0)
    axes.plot(x, mean, color=color, label=method.name, linewidth=1.6)
    if len(series) > 1:
        sd = table.std(axis=0, ddof=1)
        axes.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.12, linewidth=0)


def smoothed(numbers: Sequence[float | None]) -> NDArray[np.float64] | None:
    """The median of a window around each step, shrinking at both ends; None where a number is missing in all of it.

    A median, because explained variance is a huge negative number in a batch of nearly equal rewards.
    """
    values = np.array([np.nan if number is None else number for number in numbers])
    half = max(1, len(values) // _WINDOW)
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    if not windows or any(np.isnan(window).all() for window in windows):
        return None
    return np.array([np.nanmedian(window) for window in windows])
