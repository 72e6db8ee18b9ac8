"""`asyncppo checkpoint`: what people see of checkpoints."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from asyncppo import config
from asyncppo.checkpoints import (
    CONFIG,
    DAMAGED,
    MANIFEST,
    STEP,
    Manifest,
    in_run,
    is_old,
    kept,
    listing,
    problems,
    read_manifest,
)
from asyncppo.errors import CheckpointError, ConfigError, ResumeError


def show(run_directory: Path, console: Console) -> None:
    """The table of a run's checkpoints.

    Raises:
        ResumeError: there is no such run.
    """
    try:
        lines = listing(run_directory)
    except CheckpointError as error:
        raise ResumeError(str(error)) from None
    if not lines:
        console.print(f"{run_directory} has no checkpoints")
        return
    whole = {line.manifest.policy_version for line in lines if line.manifest and not line.problems}
    why = _retention(run_directory, whole)
    table = Table(box=None)
    for heading in ("checkpoint", "version", "age", "size", "state", "kept because"):
        table.add_column(heading, justify="right" if heading in ("version", "age", "size") else "left")
    for line in lines:
        manifest = line.manifest
        table.add_row(
            line.path.name,
            str(manifest.policy_version) if manifest else "",
            age(time.time() - manifest.time) if manifest else "",
            f"{manifest.bytes / 1e6:.1f} MB" if manifest else "",
            "DAMAGED: " + line.problems[0] if line.problems else "whole",
            "" if manifest is None or line.problems else why.get(manifest.policy_version, ""),
        )
    console.print(table)
    console.print("whole: every file is there in its size; `asyncppo checkpoint verify` reads them all")


def verify(place: Path, console: Console) -> int:
    """Read all files of a checkpoint, or of all checkpoints of a run; 1 if anything is wrong with any of them.

    Raises:
        ResumeError: there is neither.
    """
    paths = in_run(place)
    if not paths and place.is_dir() and ((place / MANIFEST).is_file() or place.name.startswith((STEP, DAMAGED))):
        paths = [place]
    if not paths:
        raise ResumeError(f"{place}: expected a run directory with checkpoints, or one checkpoint")
    failed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for path in paths:
            wrong = _read_all(path, progress)
            console.print(f"{path}: {'whole' if not wrong else 'DAMAGED'}", soft_wrap=True)
            for problem in wrong:
                console.print(f"    {problem}", soft_wrap=True, markup=False)
            failed += bool(wrong)
    return int(failed > 0)


def _read_all(path: Path, progress: Progress) -> list[str]:
    if is_old(path):
        return ["of an earlier version of asyncppo, without checksums"]
    manifest = _manifest_of(path)
    task = progress.add_task(path.name, total=manifest.bytes if manifest else None)
    try:
        return problems(path, progress=lambda done: progress.advance(task, done))
    except OSError as error:
        return [f"cannot be read: {error}"]
    finally:
        progress.remove_task(task)


def check_export(checkpoint: Path, to: Path) -> None:
    """Refuse, before torch is loaded, what cannot be exported.

    Raises:
        ResumeError: there is no such checkpoint.
        ConfigError: something is at `to`.
    """
    if not (checkpoint / MANIFEST).is_file():
        raise ResumeError(
            f"{checkpoint}: expected a checkpoint, found no {MANIFEST} in it; `asyncppo checkpoint ls RUN` names those "
            "of a run"
        )
    if to.exists():
        raise ConfigError(f"{to} exists: choose another directory")


def age(seconds: float) -> str:
    """`40 s`, `12 min`, `5.0 h`, `3.2 days`."""
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _retention(run_directory: Path, whole: set[int]) -> dict[int, str]:
    if not (run_directory / CONFIG).is_file():
        return {}
    try:
        run = config.load(run_directory / CONFIG).run
    except ConfigError:  # of another version of asyncppo; the table does without the reason
        return {}
    return kept(whole, run.keep_checkpoints, run.keep_every)


def _manifest_of(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except CheckpointError:  # `problems` says so
        return None
