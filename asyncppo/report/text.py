"""The report for a terminal: what was learned, where the time went, what the stream did, where everything is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncppo.monitor.words import bar, duration, number, plural, share
from asyncppo.report.summary import Comparison, Score, Summary

_BAR = 24


def draw_plots(summary: Summary, console: Console) -> list[Path]:
    """Draw the pictures; without matplotlib say how to get it, and return none."""
    try:
        from asyncppo.report.plots import draw
    except ImportError:
        console.print("no pictures: matplotlib is not installed (pip install 'asyncppo[monitor]')")
        return []
    return draw(summary)


def show(summary: Summary, plots: Sequence[Path], console: Console) -> None:
    """Print the report.

    Args:
        summary: the run.
        plots: the pictures that were written.
        console: where to.
    """
    console.print()
    console.rule(f"[bold]{summary.name}[/]: {_headline(summary)}", align="left")
    for title, table in (
        ("Held-out problems: pass@1 ± standard error", _scores(summary)),
        ("Training: means over 5 steps", _learning(summary)),
        ("Wall clock", _clock(summary)),
        (_staleness_title(summary), _staleness(summary)),
    ):
        if table.row_count:
            console.print(Text(f"\n{title}", style="bold"))
            console.print(table)
    console.print()
    for name, text in _facts(summary, plots):
        console.print(Text.assemble((f"{name:<15}", "bold"), text), soft_wrap=True)


def _headline(summary: Summary) -> str:
    wanted = f" of {summary.steps_wanted}" if summary.steps_wanted else ""
    end = summary.end_reason or "it has not ended"
    return f"{summary.steps}{wanted} steps in {duration(summary.train_wall_s)} ({end})"


def _scores(summary: Summary) -> Table:
    table = _table("set", "before (version 0)", "after (the last)", "gain", "problems × samples")
    for comparison in summary.comparisons:
        score = comparison.after or comparison.before
        if score is not None:
            table.add_row(
                comparison.set_name,
                _pass_at_1(comparison.before),
                _pass_at_1(comparison.after),
                _gain(comparison),
                f"{score.problems} × {score.samples}",
            )
    return table


def _pass_at_1(score: Score | None) -> str:
    return "–" if score is None else f"{score.pass_at_1:.1%} ± {100 * score.standard_error:.1f}"


def _gain(comparison: Comparison) -> str:
    if comparison.gain is None or comparison.standard_error is None:
        return "–"
    return f"{100 * comparison.gain:+.1f} ± {100 * comparison.standard_error:.1f}"


_LEARNING = {
    "reward/mean": "reward",
    "response/length_mean": "response length, tokens",
    "policy/entropy": "entropy, nats",
    "policy/kl_behaviour": "KL(behaviour‖current), nats",
    "policy/clip_fraction": "fraction clipped",
    "value/std_mean": "std over critics",
    "value/explained_variance": "explained variance",
    "value/correlation": "correlation of the critics",
    "logprob_gap/mean": "log-prob gap, trainer to engine",
}


def _learning(summary: Summary) -> Table:
    table = _table("", "first", "last")
    for key, name in _LEARNING.items():
        if summary.first(key) is not None or summary.last(key) is not None:
            table.add_row(name, number(summary.first(key)), number(summary.last(key)))
    return table


def _clock(summary: Summary) -> Table:
    table = _table("", "time", "")
    whole = sum(phase.seconds for phase in summary.phases if not phase.part)
    for phase in summary.phases:
        fraction = phase.seconds / whole if whole else 0.0
        name = Text(f"  {phase.name}", style="dim") if phase.part else Text(phase.name)
        style = "blue" if phase.part else "bold blue"
        table.add_row(name, duration(phase.seconds), Text(bar(fraction, _BAR), style=style))
    return table


def _staleness_title(summary: Summary) -> str:
    bound = "" if summary.max_staleness is None else f", bound {summary.max_staleness}"
    return f"Staleness of the groups trained on: most seen {summary.max_staleness_seen}{bound}"


def _staleness(summary: Summary) -> Table:
    table = _table("versions", "groups", "")
    most = max(summary.staleness_histogram, default=0)
    for age, count in enumerate(summary.staleness_histogram):
        table.add_row(str(age), str(count), Text(bar(count / most if most else 0.0, _BAR), style="magenta"))
    return table


def _facts(summary: Summary, plots: Sequence[Path]) -> Iterator[tuple[str, str]]:
    step_s = summary.total("time/step_s")
    if step_s:
        trainer = share(summary.total("time/wait_for_batch_s") / step_s)
        servers = share(summary.mean("rollout/idle"))
        yield "who waits", f"the trainer waits for the rollout servers {trainer} of the time; they idle {servers}"
    pauses = (
        ""
        if not summary.pauses_s
        else (
            f", pause {duration(summary.pause_median_s or 0.0)} (median), {duration(max(summary.pauses_s))} (longest)"
        )
    )
    yield "swaps", f"{summary.swaps}{pauses}"
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary.dropped_by_reason.items())
    yield "groups", f"{summary.groups} trained on, {summary.dropped} dropped" + (f" ({reasons})" if reasons else "")
    yield "servers", f"{plural(len(summary.servers), 'rollout server')}: {', '.join(summary.servers) or 'none joined'}"
    if summary.exported_actor:
        yield "trained actor", f"{summary.exported_actor} (an ordinary Hugging Face directory)"
    yield "run directory", str(summary.directory)
    if (summary.directory / "logs").is_dir():
        yield "logs", str(summary.directory / "logs")
    if plots:
        yield "pictures", f"{plots[0].parent}: {', '.join(path.name for path in plots)}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        is_number = index > 0 and bool(column)
        table.add_column(column, justify="right" if is_number else "left", header_style="dim", no_wrap=True)
    return table
