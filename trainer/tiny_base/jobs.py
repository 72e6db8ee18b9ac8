"""Making the models: one process each, two at a time, a progress bar for each."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from asyncppo.errors import AsyncPPOError
from trainer.tiny_base.pretrain import build_model, pin_padding, pretrain
from trainer.tiny_base.recipes import TASKS, Recipe, Task
from trainer.tiny_base.scores import evaluate, evaluate_marks
from trainer.tiny_base.tokens import build_tokenizer, encode_documents, save_tokenizer

console = Console(highlight=False)

AT_ONCE = 2
"""Processes that run at the same time."""

Report = Callable[[int, str], None]
"""Called with the step that was reached and a few words for the end of the progress bar."""


@dataclass(frozen=True)
class Job:
    """One model to make: it goes to `directory`, and is judged by `problems` held-out problems of each length."""

    name: str
    task: tuple[str, str]
    """A key of `TASKS`: a task itself does not go through a pipe."""
    recipe: Recipe
    seed: int
    directory: Path
    data: Path
    problems: int


def make_model(job: Job, report: Report) -> dict[str, Any]:
    """Pretrain one model, save it, evaluate it; what `base.json` says about it."""
    started = time.process_time()
    task = TASKS[job.task]
    tokenizer = build_tokenizer(task.prompt)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = build_model(job.recipe.shape, tokenizer)
        pretrain(model, tokenizer, task, job.recipe, job.seed, lambda step, loss: report(step, f"loss {loss:.3f}"))
        first = job.recipe.stages[0]
        texts = list(islice(task.texts[first.text](job.seed), min(1024, first.steps * job.recipe.batch)))
        pin_padding(model, len(tokenizer), encode_documents(tokenizer, texts))
        trained = time.process_time()
        model.save_pretrained(job.directory)
        save_tokenizer(tokenizer, job.directory)
        report(job.recipe.steps, "held-out problems …")
        scores = {f"eval_{ops}": _judge(model.eval(), tokenizer, task, job, ops) for ops in task.evaluation_ops}
    report(job.recipe.steps, "done")
    return {
        "parameters": model.num_parameters(),
        "held_out": scores,
        "cpu_seconds": {
            "pretraining": round(trained - started, 1),
            "evaluation": round(time.process_time() - trained, 1),
        },
    }


def _judge(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, job: Job, ops: int
) -> dict[str, float]:
    """The model's scores on held-out problems of one length."""
    if job.recipe.grades:
        return asdict(evaluate_marks(model, tokenizer, ops, job.problems, job.seed))
    file = job.data / f"eval_{ops}.jsonl"
    return asdict(evaluate(model, tokenizer, file, job.problems, task.max_response_tokens, job.seed))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and on a busy machine lose minutes to waiting for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_models(jobs: Sequence[Job], side_by_side: bool) -> dict[str, dict[str, Any]]:
    """Make every model, each in a process of its own if `side_by_side`; shows one progress bar for each."""
    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]:20}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars = {job.name: progress.add_task(job.name, total=job.recipe.steps, note="", start=False) for job in jobs}

        def report_for(job: Job) -> Report:
            def report(step: int, note: str) -> None:
                progress.start_task(bars[job.name])  # its clock; does nothing once it runs
                progress.update(bars[job.name], completed=step, note=note)

            return report

        if side_by_side:
            return _in_processes(jobs, report_for)
        return {job.name: make_model(job, report_for(job)) for job in jobs}


def _in_processes(jobs: Sequence[Job], report_for: Callable[[Job], Report]) -> dict[str, dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, tuple[Job, Any]] = {}
    waiting = list(jobs)
    results: dict[str, dict[str, Any]] = {}
    try:
        while running or waiting:
            while waiting and len(running) < AT_ONCE:
                job = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(job, theirs), name=f"pretrain-{job.name}", daemon=True)
                process.start()
                theirs.close()
                running[ours] = job, process
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                job, process = running[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    process.join()
                    raise AsyncPPOError(
                        f"the process that pretrains the {job.name} ended early, with exit code {process.exitcode}; "
                        "its own message is above"
                    ) from None
                if isinstance(message, dict):
                    results[job.name] = message
                    process.join()
                    del running[connection]
                else:
                    report_for(job)(*message)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return {job.name: results[job.name] for job in jobs}


def _child(job: Job, connection: Connection) -> None:
    """The whole of a pretraining process: it sends its progress as (step, note), and at last the result."""
    disable_progress_bar()
    connection.send(make_model(job, lambda step, note: connection.send((step, note))))
