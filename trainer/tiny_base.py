"""The tiny base models that a new machine, which has no model hub, trains for itself.

    python -m trainer.tiny_base --out artifacts/tiny

writes, after about two minutes on two CPU cores:

    artifacts/tiny/actor/    a 98,752-parameter Qwen3, an ordinary Hugging Face directory
    artifacts/tiny/critic/   its 37,152-parameter sibling, pretrained on the same text: the mini-critics start from it
    artifacts/tiny/data/     train.jsonl, eval_6.jsonl, eval_8.jsonl
    artifacts/tiny/base.json the recipe and its hash, versions, how good the models are, what they cost

The task is `asyncppo.tiny_task`. The models are pretrained in two stages on its noisy solutions: the first teaches
them to calculate, the short second makes the unreliable direct style the most common one. The actor then gets about
a quarter of the held-out problems right when it samples, two thirds in one of four tries, and, as direct answers and
written-out ones are about equally likely, anything from a sixth to two fifths (by seed) when it decodes greedily.

Nothing here is specific to reinforcement learning, and nothing else in the trainer depends on these models: it takes
any Hugging Face directory.
"""

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from asyncppo import tiny_task
from asyncppo.errors import AsyncPPOError, ModelError, UserError

console = Console(highlight=False)

# ---- the recipe ----

REVISION = 1
"""Part of the recipe's hash: raise it when code in this file changes what comes out, so that old bases are replaced."""

PADDED_VOCABULARY = 384
"""Rows of the embedding. The tokenizer has 343 entries; engines like a multiple of 64."""


@dataclass(frozen=True)
class Shape:
    """The sizes of one Qwen3, and the spread of its initial weights.

    Hugging Face's usual spread of 0.02 is far too small for a hidden size of 32 or 64: the model then takes thousands
    of steps to get going, or never does.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    initializer_range: float


@dataclass(frozen=True)
class Stage:
    """One stage of pretraining. Accuracy stays at chance until about step 1,000 and then jumps: do not stop early."""

    mix: tiny_task.Mix
    steps: int
    peak_lr: float


@dataclass(frozen=True)
class Recipe:
    """All that decides what one model becomes, besides the seed."""

    shape: Shape
    stages: tuple[Stage, ...]
    batch: int = 24
    warmup: int = 50
    final_lr: float = 0.05
    """The learning rate falls linearly from `peak_lr` to this share of it."""
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


MINI = Shape(hidden=64, intermediate=128, layers=2, heads=2, kv_heads=1, head_dim=32, initializer_range=0.10)
MICRO = Shape(hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, head_dim=32, initializer_range=0.12)


def recipes(quick: bool) -> dict[str, Recipe]:
    """The recipe of each model. `quick` cuts it to a few dozen steps: real files, a model that knows nothing."""
    steps_1, steps_2 = (24, 8) if quick else (2500, 400)

    def stages(peak_lr: float) -> tuple[Stage, Stage]:
        return Stage(tiny_task.STAGE_1_MIX, steps_1, peak_lr), Stage(tiny_task.STAGE_2_MIX, steps_2, 1e-3)

    return {"actor": Recipe(MINI, stages(4e-3)), "critic": Recipe(MICRO, stages(5e-3))}


def recipe_hash(seed: int, quick: bool) -> str:
    """A hash of what decides how the base comes out: the recipes, the seed, a sample of the text, and `REVISION`.

    The sample stands for the generator's code: whoever changes what it draws gets a new base, and whoever only changes
    a comment does not.
    """
    text = [list(islice(_documents(stage, seed), 64)) for recipe in recipes(quick).values() for stage in recipe.stages]
    parts = [REVISION, {name: asdict(recipe) for name, recipe in recipes(quick).items()}, seed, text, CHAT_TEMPLATE]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _documents(stage: Stage, seed: int) -> Iterator[tuple[str, str]]:
    return tiny_task.draw_documents(random.Random(f"pretraining {seed} {sorted(stage.mix.items())}"), stage.mix)


# ---- the tokenizer ----

PADDING, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML, without a default system message."""

VOCABULARY = 343

PIECES = r"\\boxed\{|[A-Za-z. ]+|[0-9]|[^A-Za-z. 0-9]"
"""Text is cut into `\\boxed{`, runs of letters, dots and spaces, single digits, and other single characters."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 343 entries: 256 bytes, 3 special tokens and 84 merges.

    Digits are always single tokens and each half of the fixed instruction is one. As every byte has an entry, any text
    survives encoding and decoding.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PADDING, TURN_START, TURN_END],
        show_progress=False,
    )
    prompt = tiny_task.prompt_text(tiny_task.make_problem(random.Random(0), ops=2))
    bpe.train_from_iterator(["user", "assistant", prompt] * 2 + ["system", "You are a helpful assistant."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PADDING,
        eos_token=TURN_END,
        padding_side="left",
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save so that transformers 4 loads it too: version 5 writes a class name that only version 5 knows."""
    tokenizer.save_pretrained(directory)
    config_file = directory / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_file.write_text(json.dumps(config, indent=2) + "\n")


# ---- the text as token ids ----


@dataclass(frozen=True)
class Document:
    """One pretraining document. The loss is on the response only, its end-of-turn token included."""

    prompt: list[int]
    response: list[int]


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]]) -> list[Document]:
    """Token ids of (prompt, solution) pairs, exactly as the chat template gives them."""
    before, after = _around_the_prompt(tokenizer)
    backend = tokenizer.backend_tokenizer
    prompts = backend.encode_batch_fast([before + prompt + after for prompt, _ in texts])
    responses = backend.encode_batch_fast([solution + TURN_END for _, solution in texts])
    return [Document(prompt.ids, response.ids) for prompt, response in zip(prompts, responses, strict=True)]


def _around_the_prompt(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """What the chat template writes before and after a prompt: rendering it 70,000 times would take a minute."""
    messages = [{"role": "user", "content": "@prompt@"}]
    rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    before, after = rendered.split("@prompt@")
    return before, after


def make_batches(documents: Sequence[Document], size: int, rng: random.Random) -> Iterator[tuple[torch.Tensor, ...]]:
    """(ids, labels) of `size` documents at a time, [B, T], padded on the right; labels are -100 outside the response.

    Batches hold prompts of about the same length, to save padding. Never sort by *response* length: the styles would
    fall into batches of their own.
    """
    window = 64 * size
    for start in range(0, len(documents), window):
        near = sorted(documents[start : start + window], key=lambda document: len(document.prompt))
        batches = [near[i : i + size] for i in range(0, len(near), size)]
        rng.shuffle(batches)
        for batch in batches:
            longest = max(len(document.prompt) + len(document.response) for document in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            labels = torch.full_like(ids, -100)
            for row, document in enumerate(batch):
                start_of_response = len(document.prompt)
                end = start_of_response + len(document.response)
                ids[row, :end] = torch.tensor(document.prompt + document.response)
                labels[row, start_of_response:end] = ids[row, start_of_response:end]
            yield ids, labels


# ---- the models ----


def build_model(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 with tied embeddings, in float32."""
    config = Qwen3Config(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=shape.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    seed: int,
    report: Callable[[int, float], None],
) -> None:
    """Run the stages of `recipe` one after the other; `report(step, loss)` is called now and then."""
    done = 0
    for stage in recipe.stages:
        texts = list(islice(_documents(stage, seed), stage.steps * recipe.batch))
        documents = encode_documents(tokenizer, texts)
        # A constant denominator: a mean over each batch would give short, direct answers a far larger weight.
        tokens_per_batch = recipe.batch * sum(len(document.response) for document in documents) / len(documents)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=stage.peak_lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate(stage, recipe))
        for step, (ids, labels) in enumerate(make_batches(documents, recipe.batch, random.Random(seed)), start=1):
            loss = response_loss(model, ids, labels) / tokens_per_batch
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 10 == 0 or step == stage.steps:
                report(done + step, loss.item())
        done += stage.steps


def _learning_rate(stage: Stage, recipe: Recipe) -> Callable[[int], float]:
    """A linear warm-up, then a linear fall to `final_lr`, as a factor of the peak."""

    def factor(step: int) -> float:
        rising = (step + 1) / recipe.warmup
        falling = 1 - (1 - recipe.final_lr) * step / stage.steps
        return min(rising, falling)

    return factor


def response_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy of the labelled tokens. Logits are computed only where there is a label.

    Padding is on the right and attention is causal, so no attention mask is needed.
    """
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    labelled = targets != -100
    return functional.cross_entropy(model.lm_head(hidden[labelled]), targets[labelled], reduction="sum")


def pin_padding(model: Qwen3ForCausalLM, documents: Sequence[Document]) -> None:
    """Make the ids that stand for no text (343 to 383) next to impossible to sample.

    The embedding is tied, so a row e of it gives the logit h·e of every hidden state h. All padded ids get one common
    row, fitted to make the sum over h of exp(h·e) / sum of exp(logits of h) small. Sixty steps take their probability
    from about 1e-6 to 1e-9 a token; many more would only buy a long row, which is worse on text unlike `documents`.
    """
    ids, labels = next(make_batches(documents, len(documents), random.Random(0)))
    with torch.no_grad():
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[labels[:, 1:] != -100]
        normaliser = model.lm_head(hidden)[:, :VOCABULARY].logsumexp(dim=-1)
    row = torch.zeros(hidden.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([row], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (hidden @ row - normaliser).logsumexp(dim=0).backward()
        optimizer.step()
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = row


# ---- how good a model is ----


@dataclass(frozen=True)
class Score:
    """Shares of held-out problems: solved by one sample (the mean over all), by one of four samples, and greedily."""

    sampled_pass_at_1: float
    sampled_pass_at_4: float
    greedy: float


@torch.no_grad()
def evaluate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, file: Path, problems: int, seed: int
) -> Score:
    """Answer the first `problems` of `file`: four samples of each at temperature 1, and one greedy answer."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:problems]]
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": row["prompt"]}] for row in rows],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    torch.manual_seed(seed)

    def solved(samples: int, **how: Any) -> torch.Tensor:
        """Which responses are right, [problem, sample]."""
        ids = model.generate(**prompts, max_new_tokens=64, num_return_sequences=samples, **how)
        texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [row["answer"] for row in rows for _ in range(samples)]
        right = [boxed(text) == answer for text, answer in zip(texts, answers, strict=True)]
        return torch.tensor(right, dtype=torch.float).view(len(rows), samples)

    sampled = solved(4, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return Score(
        sampled_pass_at_1=round(sampled.mean().item(), 4),
        sampled_pass_at_4=round(sampled.amax(dim=1).mean().item(), 4),
        greedy=round(solved(1, do_sample=False).mean().item(), 4),
    )


def boxed(text: str) -> str | None:
    """What the last `\\boxed{}` of a text holds."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return found[-1] if found else None


# ---- both models, with progress bars ----

Report = Callable[[int, str], None]
"""Called with the step that was reached and a few words for the end of the progress bar."""


@dataclass(frozen=True)
class Job:
    """One model to make: it goes to `directory`, and is judged by the first `problems` of each file in `data`."""

    name: str
    recipe: Recipe
    seed: int
    directory: Path
    data: Path
    problems: int

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.recipe.stages)


def make_model(job: Job, report: Report) -> dict[str, Any]:
    """Pretrain one model, save it, evaluate it; what `base.json` says about it."""
    started = time.process_time()
    tokenizer = build_tokenizer()
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = build_model(job.recipe.shape, tokenizer)
        pretrain(model, tokenizer, job.recipe, job.seed, lambda step, loss: report(step, f"loss {loss:.3f}"))
        texts = list(islice(_documents(job.recipe.stages[0], job.seed), 1024))
        pin_padding(model, encode_documents(tokenizer, texts))
        trained = time.process_time()
        model.save_pretrained(job.directory)
        save_tokenizer(tokenizer, job.directory)
        report(job.steps, "held-out problems …")
        scores = {
            f"eval_{ops}": asdict(
                evaluate(model.eval(), tokenizer, job.data / f"eval_{ops}.jsonl", job.problems, job.seed)
            )
            for ops in tiny_task.EVALUATION_OPS
        }
    report(job.steps, "done")
    return {
        "parameters": model.num_parameters(),
        "held_out": scores,
        "cpu_seconds": {
            "pretraining": round(trained - started, 1),
            "evaluation": round(time.process_time() - trained, 1),
        },
    }


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
        TextColumn("{task.description:7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]:20}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars = {job.name: progress.add_task(job.name, total=job.steps, note="") for job in jobs}

        def report_for(job: Job) -> Report:
            return lambda step, note: progress.update(bars[job.name], completed=step, note=note)

        if side_by_side:
            return _in_processes(jobs, report_for)
        return {job.name: make_model(job, report_for(job)) for job in jobs}


def _in_processes(jobs: Sequence[Job], report_for: Callable[[Job], Report]) -> dict[str, dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, tuple[Job, Any]] = {}
    for job in jobs:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(job, theirs), name=f"pretrain-{job.name}", daemon=True)
        process.start()
        theirs.close()
        running[ours] = job, process
    results: dict[str, dict[str, Any]] = {}
    try:
        while running:
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


# ---- the base ----


def make_base(directory: Path, *, seed: int = 0, quick: bool = False) -> None:
    """Make both models and the data sets in `directory`, or reuse what is there if it was made by the same recipe.

    Everything is written beside `directory` and renamed at the end, so `directory` is never half full. A base made by
    another recipe is replaced; a directory that is not a base is left alone.

    Args:
        directory: where `actor/`, `critic/`, `data/` and `base.json` go.
        seed: decides the initial weights, the pretraining text and the data sets.
        quick: a few dozen steps in this process, for tests. The files are real, the models know nothing.
    """
    wanted = recipe_hash(seed, quick)
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
        _write_base(staging, wanted, seed, quick)
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


def _write_base(directory: Path, recipe: str, seed: int, quick: bool) -> None:
    data = directory / "data"
    tiny_task.write_datasets(data, seed)
    problems = 16 if quick else tiny_task.EVALUATION_PROBLEMS
    jobs = [Job(name, model, seed, directory / name, data, problems) for name, model in recipes(quick).items()]
    results = make_models(jobs, side_by_side=not quick)
    for job in jobs:
        for file, score in results[job.name]["held_out"].items():
            console.print(
                f"{job.name:7} {file}: sampled pass@1 {score['sampled_pass_at_1']:.1%}, "
                f"pass@4 {score['sampled_pass_at_4']:.1%}, greedy {score['greedy']:.1%}"
            )
    base = {
        "recipe_hash": recipe,
        "seed": seed,
        "quick": quick,
        "models": {job.name: {"recipe": asdict(job.recipe), **results[job.name]} for job in jobs},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
    }
    (directory / "base.json").write_text(json.dumps(base, indent=2) + "\n")


def main(
    out: Annotated[Path, typer.Option(help="Where the base goes: actor/, critic/, data/ and base.json.")],
    seed: Annotated[int, typer.Option(help="Decides the weights, the text and the data sets.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few dozen steps: real files, models that know nothing.")] = False,
) -> None:
    """Train the tiny base models and write the data sets of the embedded task."""
    disable_progress_bar()
    try:
        make_base(out, seed=seed, quick=quick)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
