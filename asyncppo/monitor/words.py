"""Small words and pictures for people: durations, shares, sparklines and bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def duration(seconds: float) -> str:
    """`0.21 s`, `3.2 s`, `42 s`, `4:05`, `2:03:10`."""
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def share(value: float | None) -> str:
    """`35 %`, `3.1 %`, or `–` for a share that is not known."""
    if value is None:
        return "–"
    percent = 100 * value
    return f"{percent:.1f} %" if 0 < percent < 9.95 else f"{percent:.0f} %"


def number(value: float | None) -> str:
    """Three significant digits; `–` for a number that is not known."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A line of small bars from the least to the most of the values; more values than `width` are averaged."""
    if not values:
        return ""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        parts = [values[low:high] for low, high in pairwise(edges)]
        values = [sum(part) / len(part) for part in parts]
    low, high = min(values), max(values)
    if high == low:
        return _LEVELS[0] * len(values)
    return "".join(_LEVELS[min(7, int(8 * (value - low) / (high - low)))] for value in values)


def bar(fraction: float, width: int) -> str:
    """A horizontal bar, `width` characters for 1, at least a sliver for anything above 0."""
    eighths = round(8 * width * min(1.0, max(0.0, fraction)))
    if fraction > 0:
        eighths = max(1, eighths)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def plural(count: int, what: str) -> str:
    """`1 server`, `2 servers`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
