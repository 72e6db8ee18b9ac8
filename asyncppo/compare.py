"""`asyncppo compare`: several configs, several seeds, equal budgets of samples; one table and one picture.

    consumes      the configs, the exits of `python -m trainer.plain`, their run directories, Ctrl-C and SIGTERM
    produces      DIRECTORY/NAME/table.md, table.json, figure.png, and the table on the terminal
    waits for     the runs, J at a time
    unblocked by  any run's end, or a signal

Each run is one process, synchronous and without SGLang (`trainer.plain`). A finished run is never done again, so the
same command goes on where it was stopped. With a grid every config is first run with each value on seeds of their own;
the value with the best mean training reward over all steps is taken (the held-out sets stay held out).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from asyncppo.config import Config
from asyncppo.errors import ConfigError
from asyncppo.lifetime import stop_flag
from asyncppo.metrics import METRICS_FILE
from asyncppo.plain import is_finished, plain_config
from asyncppo.programs import Program, Programs, command
from asyncppo.report.compare import Method, as_json, markdown, read_run, show

STOPPED = 130
TUNING_SEEDS = 100
"""The first seed of the grid's runs; those of the comparison are 0, 1, …"""
_POLL_S = 0.5
_END_S = 10.0
_TAIL = 12
"""Lines of a failed run's log that are shown."""


@dataclass(frozen=True)
class Job:
    """One run that is wanted."""

    path: Path
    overrides: tuple[str, ...]
    root: Path
    seed: int
    lag: int

    @property
    def config(self) -> Config:
        """Its resolved config."""
        return plain_config(self.path, self.overrides, self.root, self.seed)

    @property
    def method(self) -> str:
        """Its config's name."""
        return self.path.stem

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return self.root / self.method / f"seed-{self.seed}"

    def is_finished(self) -> bool:
        """Whether it has been done, by the same config."""
        return is_finished(self.config, self.lag)


@dataclass(frozen=True)
class Share:
    """Jobs that differ only in their seeds and are done by one process, one after the other."""

    jobs: tuple[Job, ...]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.jobs[0].method}, {'seeds' if len(self.jobs) > 1 else 'seed'} {self._seeds(', ')}"

    @property
    def log(self) -> Path:
        """What its process says."""
        first = self.jobs[0]
        return first.directory.parent / f"seeds-{self._seeds('-')}.log"

    @property
    def argv(self) -> list[str]:
        """Its command line."""
        first = self.jobs[0]
        settings = [part for override in first.overrides for part in ("--set", override)]
        where = ["--directory", str(first.root), "--seeds", self._seeds(","), "--lag", str(first.lag)]
        return command("trainer", ["--config", str(first.path), *settings, *where], "trainer.plain")

    def _seeds(self, separator: str) -> str:
        return separator.join(str(job.seed) for job in self.jobs)


def shares(jobs: Sequence[Job], processes: int) -> list[Share]:
    """Jobs in as few processes as keep `processes` of them busy: each takes seconds to start."""
    alike: dict[tuple[Path, tuple[str, ...], Path], list[Job]] = {}
    for job in jobs:
        alike.setdefault((job.path, job.overrides, job.root), []).append(job)
    parts = -(-processes // max(1, len(alike)))
    return [Share(tuple(group[start::parts])) for group in alike.values() for start in range(min(parts, len(group)))]


@dataclass(frozen=True)
class Grid:
    """Values of one key to choose from."""

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Grid:
        """From `section.key=value,value`.

        Raises:
            ConfigError: not of that form.
        """
        key, equals, values = text.partition("=")
        found = tuple(part.strip() for part in values.split(",") if part.strip())
        if not (key and equals and len(found) > 1):
            raise ConfigError(f"--grid {text!r}: expected section.key=value,value,…")
        return cls(key, found)


@dataclass(frozen=True)
class Plan:
    """What is compared, and how."""

    configs: tuple[Path, ...]
    directory: Path
    overrides: tuple[str, ...] = ()
    seeds: int = 5
    jobs: int = 2
    lag: int = 0
    grid: Grid | None = None
    tune_seeds: int = 2
    baseline: str | None = None

    def check(self) -> None:
        """Refuse what cannot work, before anything is started.

        Raises:
            ConfigError: a config that is wrong, two of one name, a baseline that is none of them.
        """
        names = [path.stem for path in self.configs]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two configs are called {name}: the table would not tell them apart")
        if self.baseline is not None and self.baseline not in names:
            raise ConfigError(f"--baseline {self.baseline}: expected one of {', '.join(names)}")
        for job in [*self.tests({}), *self.tunings()]:
            _ = job.config

    @property
    def base(self) -> str:
        """The method that the others are compared with."""
        return self.baseline or self.configs[0].stem

    def tunings(self) -> list[Job]:
        """The grid's runs; they are not evaluated."""
        if self.grid is None:
            return []
        seeds = range(TUNING_SEEDS, TUNING_SEEDS + self.tune_seeds)
        return [
            self._tuning(path, value, seed) for seed in seeds for path in self.configs for value in self.grid.values
        ]

    def _tuning(self, path: Path, value: str, seed: int) -> Job:
        assert self.grid is not None
        setting = f"{self.grid.key}={value}"
        overrides = (*self.overrides, setting, "eval.at_start=false", "eval.at_end=false")
        return Job(path, overrides, self.directory / "tuning" / setting, seed, self.lag)

    def tests(self, chosen: dict[str, str]) -> list[Job]:
        """The comparison's runs, seed by seed, with what the grid chose for each method."""
        return [
            Job(
                path,
                (*self.overrides, *([chosen[path.stem]] if path.stem in chosen else [])),
                self.directory,
                seed,
                self.lag,
            )
            for seed in range(self.seeds)
            for path in self.configs
        ]

    def scores(self) -> dict[str, dict[str, float]]:
        """Of each method and value of the grid: the mean over tuning runs of their mean training reward."""
        found: dict[str, dict[str, list[float]]] = {}
        for job in self.tunings():
            if job.is_finished():
                value = job.root.name
                reward = read_run(job.directory, job.seed).measures["reward"]
                found.setdefault(job.method, {}).setdefault(value, []).append(reward)
        return {
            method: {value: sum(rewards) / len(rewards) for value, rewards in values.items()}
            for method, values in found.items()
        }


def run_compare(plan: Plan, console: Console) -> int:
    """Do all runs that are not there yet, then write and show the table.

    Returns:
        0, 1 if a run failed, 130 after Ctrl-C or SIGTERM; the table is of whatever runs are there.

    Raises:
        UserError: what was given cannot work.
    """
    plan.check()
    should_stop = stop_flag()
    failed: list[Job] = []
    with Programs() as programs, _progress(console) as progress:
        runner = _Runner(plan, programs, progress, should_stop)
        failed += runner.run("tuning", plan.tunings())
        scores = plan.scores()
        chosen = {method: max(values, key=lambda value: values[value]) for method, values in scores.items()}
        tests = plan.tests(chosen)
        if not should_stop():
            failed += runner.run("comparison", tests)
        for program in programs.ask_to_end(_END_S):
            console.print(f"{program.name} had to be ended by force")
    _conclude(plan, tests, scores, chosen, failed, console)
    if should_stop():
        console.print("\nstopped; the same command goes on from here", style="bold")
        return STOPPED
    return 1 if failed else 0


class _Runner:
    """Keeps J runs going, and shows them."""

    def __init__(self, plan: Plan, programs: Programs, progress: Progress, should_stop: Callable[[], bool]) -> None:
        self._plan = plan
        self._programs = programs
        self._progress = progress
        self._should_stop = should_stop

    def run(self, title: str, jobs: Sequence[Job]) -> list[Job]:
        """Do the jobs that are not done; returns those that failed."""
        if not jobs:
            return []
        steps = {job: job.config.run.steps for job in jobs}
        done = {job: steps[job] if job.is_finished() else 0 for job in jobs}
        waiting = shares([job for job in jobs if done[job] == 0], self._plan.jobs)
        overall = self._progress.add_task(title, total=sum(steps.values()))
        of_method = {
            method: self._progress.add_task(
                f"  {method}", total=sum(steps[job] for job in jobs if job.method == method)
            )
            for method in dict.fromkeys(job.method for job in jobs)
        }
        running: dict[Share, Program] = {}
        failed: list[Job] = []
        while (waiting or running) and not self._should_stop():
            while waiting and len(running) < self._plan.jobs:
                share = waiting.pop(0)
                running[share] = self._programs.start(share.name, share.argv, share.log)
            for share, program in list(running.items()):
                done |= {job: _steps_done(job) for job in share.jobs}
                if program.code is not None:
                    del running[share]
                    lost = [job for job in share.jobs if not job.is_finished()]
                    if lost:
                        failed += lost
                        self._show_failure(program)
            for method, task in of_method.items():
                self._progress.update(task, completed=sum(done[job] for job in jobs if job.method == method))
            self._progress.update(overall, completed=sum(done.values()))
            time.sleep(_POLL_S)
        return failed

    def _show_failure(self, program: Program) -> None:
        console = self._progress.console
        console.print(
            f"{program.name}: ended with exit code {program.code}; the end of {program.log}:", style="bold red"
        )
        for line in program.tail(_TAIL):
            console.print(f"  {line}", markup=False, soft_wrap=True)


def _steps_done(job: Job) -> int:
    path = job.directory / METRICS_FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _conclude(
    plan: Plan,
    tests: Sequence[Job],
    scores: dict[str, dict[str, float]],
    chosen: dict[str, str],
    failed: Sequence[Job],
    console: Console,
) -> None:
    finished = [job for job in tests if job.is_finished()]
    methods = [
        Method(
            name=path.stem,
            runs=tuple(read_run(job.directory, job.seed) for job in finished if job.path == path),
            tuned=chosen[path.stem].partition("=")[2] if path.stem in chosen else None,
        )
        for path in plan.configs
    ]
    if not finished:
        return
    notes = [*_budget(tests), *_tuning(plan, scores, chosen), *_failures(failed)]
    (plan.directory / "table.md").write_text(markdown(methods, plan.base, notes))
    (plan.directory / "table.json").write_bytes(as_json(methods, plan.base, notes))
    show(methods, plan.base, notes, console)
    written = ["table.md", "table.json"]
    try:
        from asyncppo.report.compare_plots import draw
    except ImportError:
        console.print("no picture: matplotlib is not installed (pip install 'asyncppo[monitor]')")
    else:
        written.append(draw(methods, plan.directory / "figure.png").name)
    console.print(f"\nin {plan.directory}: {', '.join(written)}", soft_wrap=True)


def _budget(tests: Sequence[Job]) -> list[str]:
    """How much each run was given, and whether all were given the same."""
    budgets = {}
    for job in tests:
        config = job.config
        budgets[job.method] = (config.run.steps, config.responses_per_batch)
    steps, responses = next(iter(budgets.values()))
    notes = [f"Budget of each run: {steps} steps of {responses} responses; lag {tests[0].lag} versions."]
    others = {name: budget for name, budget in budgets.items() if budget != (steps, responses)}
    if others:
        listed = ", ".join(f"{name} {steps} × {responses}" for name, (steps, responses) in others.items())
        notes.append(f"NOT EQUAL BUDGETS: {listed}.")
    warm = {job.method: config.critic.warmup_batches for job in tests if (config := job.config).warmup_groups}
    if warm:
        listed = ", ".join(f"{name} {batches}" for name, batches in warm.items())
        notes.append(f"On top of it, batches of the critics' warm start, by the first policy version: {listed}.")
    return notes


def _tuning(plan: Plan, scores: dict[str, dict[str, float]], chosen: dict[str, str]) -> list[str]:
    if plan.grid is None:
        return []
    lines = [
        f"Tuned: {plan.grid.key} in {', '.join(plan.grid.values)}, by the mean training reward over all steps, "
        f"{plan.tune_seeds} seeds from {TUNING_SEEDS} on (none of the comparison's):"
    ]
    ends = {f"{plan.grid.key}={value}" for value in (plan.grid.values[0], plan.grid.values[-1])}
    for method, values in scores.items():
        found = ", ".join(f"{value.partition('=')[2]}: {score:.3f}" for value, score in values.items())
        edge = " (at the edge of the grid)" if chosen[method] in ends else ""
        lines.append(f"- {method}: {found}; taken {chosen[method].partition('=')[2]}{edge}")
    return ["\n".join(lines)]


def _failures(failed: Sequence[Job]) -> list[str]:
    groups = itertools.groupby(sorted(failed, key=lambda job: job.method), key=lambda job: job.method)
    listed = [f"{method}, seeds {', '.join(str(job.seed) for job in jobs)}" for method, jobs in groups]
    return [f"FAILED RUNS, not in the table: {'; '.join(listed)}."] if listed else []
