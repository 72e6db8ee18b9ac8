"""The directory of a base as a whole: made once, reused, replaced when the recipe has changed."""

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import tokenizers
import torch
import transformers

from asyncppo import tiny_task
from asyncppo.errors import ConfigError, ModelError
from trainer.tiny_base.jobs import Job, console, make_models
from trainer.tiny_base.recipes import TASKS, chosen_recipes, recipe_hash


def make_base(directory: Path, *, task: str = "tiny", size: str = "small", seed: int = 0, quick: bool = False) -> None:
    """Make the models and the data sets in `directory`, or reuse what is there if it was made by the same recipe.

    Everything is written beside `directory` and renamed at the end, so `directory` is never half full. A base made by
    another recipe is replaced; a directory that is not a base is left alone.

    Args:
        directory: where `actor/`, `critic/` (and more critics, as the task has them), `data/` and `base.json` go.
        task: `tiny` or `chains`.
        size: `small`, or for `chains` also `large`, which is for a GPU and was never trained to the end.
        seed: decides the initial weights, the pretraining text and the data sets.
        quick: a few dozen steps in this process, for tests. The files are real, the models know nothing.

    Raises:
        ConfigError: there is no such task or size.
        ModelError: `directory` holds something else.
    """
    key = (task, size)
    if key not in TASKS:
        known = ", ".join(f"--task {name} --size {size}" for name, size in TASKS)
        raise ConfigError(f"--task {task} --size {size}: there is no such task; expected one of: {known}")
    wanted = recipe_hash(TASKS[key], seed, quick)
    if directory.exists() and any(directory.iterdir()):
        if _recipe_of(directory) == wanted:
            console.print(
                f"{directory}: the base models of recipe {wanted} are there already, reusing them", soft_wrap=True
            )
            return
        console.print(f"{directory}: was made by another recipe, making it anew")
    started = time.monotonic()
    staging = directory.absolute().with_name(f".{directory.name}-{os.getpid()}")
    try:
        _write_base(staging, key, wanted, seed, quick)
        if directory.exists():
            shutil.rmtree(directory)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    console.print(f"{directory}: ready after {time.monotonic() - started:.0f} s")


def _recipe_of(directory: Path) -> str:
    """The recipe hash of the base in `directory`."""
    try:
        return str(json.loads((directory / "base.json").read_text())["recipe_hash"])
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(
            f"{directory} holds files but no base.json, so it is not a base that may be replaced; "
            "name an empty or a new directory"
        ) from None


def _write_base(directory: Path, key: tuple[str, str], recipe: str, seed: int, quick: bool) -> None:
    data = directory / "data"
    task = TASKS[key]
    task.write_datasets(data, seed)
    problems = 4 if quick else tiny_task.EVALUATION_PROBLEMS
    jobs = [
        Job(name, key, recipe, seed, directory / name, data, problems)
        for name, recipe in chosen_recipes(task, quick).items()
    ]
    results = make_models(jobs, side_by_side=not quick)
    for job in jobs:
        for file, score in results[job.name]["held_out"].items():
            shares = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in score.items())
            console.print(f"{job.name:16} {file}: {shares}", soft_wrap=True)
    base = {
        "task": key[0],
        "size": key[1],
        "recipe_hash": recipe,
        "seed": seed,
        "quick": quick,
        "models": {job.name: {"recipe": asdict(job.recipe), **results[job.name]} for job in jobs},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
    }
    (directory / "base.json").write_text(json.dumps(base, indent=2) + "\n")
