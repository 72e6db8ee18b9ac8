"""The live view of a run: a panel that fits 80 columns in a terminal, one readable line a step anywhere else.

consumes      a run's metrics.jsonl and events.jsonl (`follow.Run`)
waits for     nothing: it looks four times a second
unblocked by  the run's end, or the one who watches
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asyncppo.errors import UserError
from asyncppo.metrics import EVENTS_FILE, METRICS_FILE
from asyncppo.monitor.follow import Run, value
from asyncppo.monitor.words import bar, duration, number, plural, share, sparkline

POLL_S = 0.25
PLAIN_EVERY_S = 3.0
"""Without a terminal: at most one step's line in this time."""
PLAIN_WAIT_EVERY_S = 15.0
"""Without a terminal: while something starts, a line this often."""
SILENT_AFTER_S = 60.0
"""A run without news for this long is said to be silent."""
_WIDTH = 96
"""The panel is not drawn wider."""


class View(Protocol):
    """Shows a run."""

    def show(self, run: Run, now: float, notes: Sequence[str] = ()) -> None:
        """Show the run as it is; `notes` are further lines for while it starts."""

    def close(self) -> None:
        """Leave the last state standing."""


def open_view(console: Console) -> View:
    """The view that suits where the output goes."""
    return TerminalView(console) if console.is_terminal else PlainView(console)


def watch(directory: Path, console: Console, should_stop: Callable[[], bool]) -> None:
    """`asyncppo monitor`: show a run until it ends or the watcher leaves; one that has ended is shown once.

    Raises:
        UserError: there is no run in this directory.
    """
    if not any((directory / name).exists() for name in (METRICS_FILE, EVENTS_FILE)):
        raise UserError(f"{directory} holds no {METRICS_FILE} and no {EVENTS_FILE}: name a run directory, runs/NAME")
    run = Run(directory)
    view = open_view(console)
    try:
        while True:
            run.refresh()
            view.show(run, time.time())
            if run.ended is not None or should_stop():
                return
            time.sleep(POLL_S)
    finally:
        view.close()


class TerminalView:
    """A panel that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def show(self, run: Run, now: float, notes: Sequence[str] = ()) -> None:
        self._live.update(panel(run, now, notes), refresh=True)

    def close(self) -> None:
        self._live.stop()


class PlainView:
    """Lines without control characters: what happened, and the newest step every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._events_seen: int | None = None
        self._step_shown = 0
        self._step_at = 0.0
        self._phase = ""
        self._phase_at = 0.0

    def show(self, run: Run, now: float, notes: Sequence[str] = ()) -> None:
        fresh = run.events_seen if self._events_seen is None else run.events_seen - self._events_seen
        self._events_seen = run.events_seen
        for event in list(run.events)[-fresh:] if fresh else []:
            if line := event_line(event):
                self._print(line)
        at_end = run.ended is not None or (run.steps is not None and run.step >= run.steps)
        if run.last and run.step > self._step_shown and (at_end or now - self._step_at >= PLAIN_EVERY_S):
            self._step_shown, self._step_at = run.step, now
            self._print(step_line(run))
        phase = run.phase()
        if run.ended is None and phase.text != "training":
            changed = phase.text != self._phase
            if changed or now - self._phase_at >= PLAIN_WAIT_EVERY_S:
                self._phase, self._phase_at = phase.text, now
                self._print(phase.text if changed else f"{phase.text} … {duration(now - phase.since)}")

    def close(self) -> None:
        """Nothing is held."""

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


# ---- lines ----


def step_line(run: Run) -> str:
    """The newest step for people, in one line."""
    row = run.last
    left = run.seconds_left()
    parts = [
        f"step {run.step}/{run.steps or '?'}",
        f"reward {_fixed(row, 'reward/mean')}",
        f"staleness {_fixed(row, 'staleness/mean', 1)} (max {_count(row, 'staleness/max')})",
    ]
    if value(row, "value/std_p50") is not None:
        parts.append(
            f"critic std {number(value(row, 'value/std_p50'))} EV {_fixed(row, 'value/explained_variance', 2)}"
        )
    parts += [
        f"entropy {number(value(row, 'policy/entropy'))}",
        f"KL {number(value(row, 'policy/kl_behaviour'))}",
        f"trainer waits {share(run.trainer_waits())}",
        f"servers idle {share(run.recent('rollout/idle'))}",
    ]
    if left:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def event_line(event: dict[str, Any]) -> str | None:
    """An event for people; None for one that the steps tell better."""
    match event.get("event"):
        case "start":
            return f"the trainer is ready, at version {event['version']}"
        case "server_joined":
            return f"rollout server {event['server']} joined ({event['engine']})"
        case "server_left":
            return f"rollout server {event['server']} left: {event['reason']}"
        case "refused":
            return f"rollout server {event['server']} was turned away: {event['reason']}"
        case "swap_failed" if event.get("quarantined"):
            version = event["policy_version"]
            return f"{event['server']} is quarantined: its engine answers the probe of version {version} wrongly"
        case "swap_failed":
            return f"{event['server']} could not load version {event['policy_version']}: {event['reason']}"
        case "eval":
            return f"held-out {event['set']}: pass@1 {event['pass_at_1']:.1%} at version {event['policy_version']}"
        case "end":
            return f"{event['reason']}, at version {event['version']}"
        case _:
            return None


def who_waits(run: Run) -> str:
    """Which end is the slower one, in words."""
    trainer, idle = run.trainer_waits(), run.recent("rollout/idle")
    if trainer is None:
        return "no step is done yet"
    waits = f"the trainer waits for the rollout servers {share(trainer)} of the time"
    return waits if idle is None else f"{waits}; rollout servers idle {share(idle)}"


# ---- the panel ----


def panel(run: Run, now: float, notes: Sequence[str] = ()) -> RenderableType:
    """Everything about a run, 80 columns or wider."""
    phase = run.phase()
    body: list[RenderableType] = []
    if run.last is None or phase.text != "training":
        waited = "" if run.ended is not None else f" … {duration(now - phase.since)}"
        body.append(Text(f"{phase.text}{waited}", style="bold green" if run.ended is not None else "bold yellow"))
    if run.last is None and run.ended is None:
        body += [Text(note, style="dim", overflow="ellipsis", no_wrap=True) for note in notes]
    if run.last is not None:
        body += [_progress(run), _rows(run), Text(_capital(who_waits(run)) + ".", style="bold cyan")]
        silence = now - float(run.last["time"])
        if run.ended is None and phase.text == "training" and silence > SILENT_AFTER_S:
            body.append(Text(f"No news for {duration(silence)}: see {run.directory / 'logs'}", style="bold red"))
    elif run.evals:
        body.append(Text(_evals(run)))
    return Panel(
        Group(*body),
        title=f"[bold]AsyncPPO[/] {run.name}",
        title_align="left",
        border_style="blue",
        width=_WIDTH,
        expand=False,
    )


def _progress(run: Run) -> RenderableType:
    left = run.seconds_left()
    line = Table.grid(padding=(0, 1))
    line.add_column(no_wrap=True)
    line.add_column(width=36)
    line.add_column(no_wrap=True)
    words = f"{share(run.step / run.steps)}  {duration(left)} left" if run.steps and left else ""
    line.add_row(f"step {run.step}/{run.steps or '?'}", ProgressBar(total=run.steps or 0, completed=run.step), words)
    return line


def _rows(run: Run) -> RenderableType:
    row = run.last
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rewards = run.history("reward/mean")
    table.add_row("reward", f"{_fixed(row, 'reward/mean')}  [green]{sparkline(rewards)}[/]")
    if run.evals:
        table.add_row("held out", _evals(run))
    table.add_row("staleness", _staleness(run))
    if value(row, "value/explained_variance") is not None:
        quantiles = "  ".join(f"{name} {number(value(row, f'value/std_{name}'))}" for name in ("p10", "p50", "p90"))
        table.add_row("critic std", quantiles)
        table.add_row(
            "values",
            f"explained variance {_fixed(row, 'value/explained_variance', 2)}  "
            f"correlation of the critics {_fixed(row, 'value/correlation', 2)}",
        )
    table.add_row(
        "policy",
        f"entropy {number(value(row, 'policy/entropy'))}  KL {number(value(row, 'policy/kl_behaviour'))}  "
        f"clipped {share(value(row, 'policy/clip_fraction'))}  "
        f"log-prob gap {number(run.recent('logprob_gap/mean'))}",
    )
    malformed = int(value(row, "stream/malformed") or 0)
    table.add_row(
        "stream",
        f"{plural(int(value(row, 'stream/servers') or 0), 'server')}  {_count(row, 'stream/in_flight')} in flight  "
        f"{_count(row, 'stream/buffered')} buffered  {_count(row, 'stream/dropped')} dropped"
        + (f"  [red]{malformed} malformed[/]" if malformed else ""),
    )
    pause = value(row, "swap/pause_s")
    table.add_row(
        "swaps", f"{run.swaps}" + (f"  last pause {duration(pause)}" if run.swaps and pause is not None else "")
    )
    tokens, step_s = run.recent("rollout/tokens_per_s"), run.recent("time/step_s")
    speed = f"{duration(step_s)} a step" if step_s is not None else "–"
    table.add_row("speed", speed + (f"  {number(tokens)} response tokens/s" if tokens is not None else ""))
    return table


def _staleness(run: Run) -> str:
    row = run.last or {}
    bound = f" of {run.config.stream.max_staleness}" if run.config else ""
    words = (
        f"{_count(row, 'staleness/min')}–{_count(row, 'staleness/max')}{bound}  mean {_fixed(row, 'staleness/mean', 1)}"
    )
    bins = [int(count) for count in row.get("staleness/histogram") or []]
    if not any(bins):
        return words
    if len(bins) > 6:
        return f"{words}  0 [magenta]{sparkline(bins)}[/] {len(bins) - 1}"
    bars = "  ".join(f"[dim]{age}[/] [magenta]{bar(count / max(bins), 4)}[/]{count}" for age, count in enumerate(bins))
    return f"{words}   {bars}"


def _evals(run: Run) -> str:
    names = list(dict.fromkeys(event["set"] for event in run.evals))
    texts = []
    for name in names:
        scores = run.pass_at_1(name)
        texts.append(f"{name} {scores[0][1]:.1%}" + (f" → {scores[-1][1]:.1%}" if len(scores) > 1 else ""))
    return f"pass@1 {', '.join(texts)}" if texts else ""


def _fixed(row: dict[str, Any] | None, key: str, digits: int = 3) -> str:
    found = value(row, key)
    return "–" if found is None else f"{found:.{digits}f}"


def _count(row: dict[str, Any] | None, key: str) -> str:
    found = value(row, key)
    return "–" if found is None else f"{found:.0f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
