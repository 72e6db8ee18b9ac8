"""`asyncppo demo`: one trainer and one rollout server on this machine, watched from start to verdict.

    consumes      the two programs' exits, their run directory, Ctrl-C and SIGTERM
    produces      the report, a verdict as the last line of stdout, the exit code
    waits for     the tiny base models, the trainer, the rollout server
    unblocked by  any program's end, or a signal

The programs are started by module name, each in its environment; nothing of them is imported here. Whatever happens,
none of them is left behind (`programs.Programs`).
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from asyncppo.config import Config, load
from asyncppo.errors import ConfigError
from asyncppo.metrics import Journal
from asyncppo.monitor.follow import Run
from asyncppo.monitor.live import POLL_S, open_view
from asyncppo.monitor.words import duration
from asyncppo.ports import free_port
from asyncppo.programs import Program, Programs, command
from asyncppo.report.summary import Summary, summarize
from asyncppo.report.text import draw_plots, show

STOPPED = 130
_TAIL = 20
"""Lines of a failed program's log that are shown."""
_STOP_LIMIT_S = 60.0
"""After Ctrl-C the trainer finishes its step and saves, within this time."""
_LEAVE_LIMIT_S = 60.0
"""After the trainer has ended, the rollout server leaves within this time."""
_MIN_GAIN = 0.1
_MIN_STANDARD_ERRORS = 3.0
_BASES = {"tiny": "two", "chains": "four"}
"""The embedded tasks: each has its models in `artifacts/<task>`, which take this many minutes to make."""


class Verdict(msgspec.Struct, frozen=True):
    """The last line that the demo prints."""

    pass_at_1_before: float | None
    pass_at_1_after: float | None
    steps: int
    groups: int
    dropped: int
    max_staleness_seen: int | None
    swaps: int
    train_wall_s: float


def run_demo(config_path: Path, overrides: Sequence[str], name: str | None, console: Console) -> int:
    """Run the demo to its verdict.

    Args:
        config_path: the run's YAML file.
        overrides: `a.b=c`, as of `--set`.
        name: the run's name; without one it is the config's, numbered when that run exists.
        console: where to show it.

    Returns:
        0 if the model learned, 1 if it did not or a program failed, 130 after Ctrl-C or SIGTERM.

    Raises:
        UserError: what was given cannot work.
    """
    config = load(config_path, overrides)
    if not (config.eval.sets and config.eval.at_start and config.eval.at_end):
        raise ConfigError(f"{config_path}: the demo compares before and after: give eval.sets, at_start and at_end")
    settings = [*overrides, f"run.name={name or _free_name(config)}"]
    if not any(override.startswith("stream.address=") for override in overrides):
        settings.append(f"stream.address=tcp://127.0.0.1:{free_port()}")
    config = load(config_path, settings)
    if name is not None and config.run_directory.exists():
        raise ConfigError(f"--name {name}: {config.run_directory} exists already; choose another")
    stops = _Stops()
    with Programs() as programs:
        code = _make_base(config, programs, stops, console)
        if code == 0:
            code = _train(config, config_path, settings, programs, stops, console)
        if code == STOPPED:
            _end_in_order(programs, stops, console)
    if code != 0:
        return code
    return _judge(config, console)


# ---- the programs ----


def _make_base(config: Config, programs: Programs, stops: _Stops, console: Console) -> int:
    """Make the tiny base models, if the config is about them and some of them are missing."""
    directory = Path(config.actor.path).parent
    task = directory.name
    if directory.parts[-2:-1] != ("artifacts",) or task not in _BASES:
        return 0
    wanted = [Path(config.actor.path), *map(Path, config.critic_paths), Path(config.data.train)]
    if all(path.exists() for path in [*wanted, *map(Path, config.eval.sets.values())]):
        console.print(f"the tiny base models are in {directory} already")
        return 0
    console.print(f"making the tiny base models and their data: about {_BASES[task]} minutes, once")
    module = "trainer.tiny_base"
    program = programs.start(module, command("trainer", ["--out", str(directory), "--task", task], module))
    while program.code is None and not stops.count:
        time.sleep(POLL_S)
    if stops.count:
        return STOPPED
    if program.code:
        console.print(f"[bold red]{module} ended with exit code {program.code}[/]; its own words are above")
        return 1
    return 0


def _train(
    config: Config, config_path: Path, settings: Sequence[str], programs: Programs, stops: _Stops, console: Console
) -> int:
    directory = config.run_directory
    logs = directory / "logs"
    journal = Journal(directory)
    journal.event("launched")
    journal.close()
    common = ["--config", str(config_path), *(part for setting in settings for part in ("--set", setting))]
    console.print(f"run directory: {directory}   logs: {logs}", soft_wrap=True)
    trainer = programs.start("the trainer", command("trainer", common), logs / "trainer.log")
    where = ["--trainer", config.stream.address, "--name", "rollout-0", "--log-directory", str(logs)]
    server = programs.start("the rollout server", command("rollout", [*common, *where]), logs / "rollout.log")
    failed = _watch(config, trainer, server, stops, console)
    if stops.count:
        return STOPPED
    if failed is not None:
        _show_failure(failed, logs, console)
        return 1
    return 0


def _watch(config: Config, trainer: Program, server: Program, stops: _Stops, console: Console) -> Program | None:
    """Show the run until the trainer has ended and the server has left; returns the program that failed."""
    run = Run(config.run_directory, config)
    view = open_view(console)
    trainer_ended: float | None = None
    try:
        while not stops.count:
            run.refresh()
            view.show(run, time.time(), [f"{p.name}: {line}" for p in (trainer, server) for line in p.tail(1)])
            if trainer.code:
                return trainer
            if server.code is not None and (server.code != 0 or (trainer.code is None and run.ended is None)):
                return server
            if trainer.code == 0:
                trainer_ended = trainer_ended or time.monotonic()
                if server.code == 0:
                    run.refresh()
                    view.show(run, time.time())
                    return None
                if time.monotonic() - trainer_ended > _LEAVE_LIMIT_S:
                    return server
            time.sleep(POLL_S)
        return None
    finally:
        view.close()


def _show_failure(program: Program, logs: Path, console: Console) -> None:
    how = (
        "did not leave after the trainer had ended" if program.code is None else f"ended with exit code {program.code}"
    )
    console.print(f"\n{program.name} {how}; the end of {program.log}:", style="bold red", soft_wrap=True)
    for line in program.tail(_TAIL):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print(f"all logs: {', '.join(str(path) for path in sorted(logs.glob('*.log')))}", soft_wrap=True)


def _end_in_order(programs: Programs, stops: _Stops, console: Console) -> None:
    """Ask the programs to end and wait; a second signal, or the limit, ends them by force."""
    asked = time.monotonic()
    names = " and ".join(program.name for program in programs.running())
    if names:
        console.print(f"\nstopping {names}: the trainer finishes its step and saves (Ctrl-C again to end at once)")
    for program in programs.ask_to_end(_STOP_LIMIT_S, give_up=lambda: stops.count > 1):
        console.print(f"{program.name} had to be ended by force")
    programs.end(limit_s=2.0)
    console.print(f"stopped, after {duration(time.monotonic() - asked)}; nothing is left running")


class _Stops:
    """Counts SIGINT and SIGTERM."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        self.count += 1


def _free_name(config: Config) -> str:
    """`demo`, or `demo-2`, `demo-3`, … when that run exists already."""
    name, number = config.run.name, 1
    while (Path(config.run.directory) / name).exists():
        number += 1
        name = f"{config.run.name}-{number}"
    return name


# ---- the verdict ----


def _judge(config: Config, console: Console) -> int:
    summary = summarize(config.run_directory)
    show(summary, draw_plots(summary, console), console)
    failures = unmet(summary)
    console.print()
    for failure in failures:
        console.print(f"not met: {failure}", style="bold red", soft_wrap=True)
    if not failures:
        console.print("the model learned: every condition of the demo is met", style="bold green")
    sys.stdout.flush()
    print(msgspec.json.encode(verdict(summary)).decode(), flush=True)
    return 1 if failures else 0


def verdict(summary: Summary) -> Verdict:
    """What the demo prints as its last line; pass@1 is that of the config's first held-out set."""
    first = summary.comparisons[0] if summary.comparisons else None
    return Verdict(
        pass_at_1_before=first.before.pass_at_1 if first and first.before else None,
        pass_at_1_after=first.after.pass_at_1 if first and first.after else None,
        steps=summary.steps,
        groups=summary.groups,
        dropped=summary.dropped,
        max_staleness_seen=summary.max_staleness_seen,
        swaps=summary.swaps,
        train_wall_s=round(summary.train_wall_s, 1),
    )


def unmet(summary: Summary) -> list[str]:
    """The conditions of a successful demo that do not hold, in words; empty when the model learned."""
    failures = []
    if summary.steps_wanted is not None and summary.steps < summary.steps_wanted:
        failures.append(f"every step: {summary.steps} of {summary.steps_wanted} are done")
    seen, bound = summary.max_staleness_seen, summary.max_staleness
    if seen is not None and bound is not None and seen > bound:
        failures.append(f"staleness: {seen} was seen, above the bound of {bound}")
    first = summary.comparisons[0] if summary.comparisons else None
    if first is None or first.before is None or first.after is None:
        return [*failures, "learning: the held-out problems were not answered both before and after"]
    gain, error = first.after.pass_at_1 - first.before.pass_at_1, first.standard_error or 0.0
    what = f"learning: pass@1 of {first.set_name} went from {first.before.pass_at_1:.3f} to {first.after.pass_at_1:.3f}"
    if gain <= _MIN_STANDARD_ERRORS * error:
        failures.append(f"{what}, a gain of {gain:.3f}, not more than 3 standard errors ({3 * error:.3f})")
    if gain < _MIN_GAIN:
        failures.append(f"{what}, a gain of {gain:.3f}, less than {_MIN_GAIN}")
    return failures
