"""What is made for each task: models, their sizes, the text and the steps of their pretraining."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from asyncppo import chains_task, tiny_task
from trainer.tiny_base.tokens import CHAT_TEMPLATE, TINY_PROMPT

REVISION = 2
"""Part of the recipe's hash: raise it when code in this package changes what comes out, so that old bases go."""


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

    text: str
    """Which of the task's texts."""
    steps: int
    peak_lr: float
    mark_weight: float = 1.0
    """The weight of a mark's loss; that of any other token is 1."""


@dataclass(frozen=True)
class Recipe:
    """All that decides what one model becomes, besides the seed."""

    shape: Shape
    stages: tuple[Stage, ...]
    grades: bool = False
    """Whether the model ends on graded transcripts: it is then judged by its marks, as it does not write answers."""
    batch: int = 24
    warmup: int = 50
    final_lr: float = 0.05
    """The learning rate falls linearly from `peak_lr` to this share of it."""
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)


Documents = Iterator[tuple[str, str]]
"""(prompt, response) without end."""


@dataclass(frozen=True)
class Task:
    """One embedded task: its texts, its data sets, and the models that are made for it."""

    recipes: Mapping[str, Recipe]
    texts: Mapping[str, Callable[[int], Documents]]
    """Pretraining documents of a seed, by name."""
    write_datasets: Callable[[Path, int], None]
    """Writes the files of a seed to a directory."""
    prompt: str
    """An example: the tokenizer is made from it."""
    evaluation_ops: tuple[int, ...]
    """Each has a file `eval_<ops>.jsonl`."""
    max_response_tokens: int
    quick_steps: int = 16
    """Steps of each stage of a quick base, for tests."""


def chosen_recipes(task: Task, quick: bool) -> dict[str, Recipe]:
    """The recipe of each model. `quick` cuts it to a few steps a stage: real files, a model that knows nothing."""
    if not quick:
        return dict(task.recipes)

    def shortened(recipe: Recipe) -> Recipe:
        return replace(recipe, stages=tuple(replace(stage, steps=task.quick_steps) for stage in recipe.stages))

    return {name: shortened(recipe) for name, recipe in task.recipes.items()}


def recipe_hash(task: Task, seed: int, quick: bool) -> str:
    """A hash of what decides how the base comes out: the recipes, the seed, a sample of the text, and `REVISION`.

    The sample stands for the generator's code: whoever changes what it draws gets a new base, and whoever only changes
    a comment does not.
    """
    recipes = {name: asdict(recipe) for name, recipe in chosen_recipes(task, quick).items()}
    text = {name: list(islice(documents(seed), 64)) for name, documents in task.texts.items()}
    parts = [REVISION, recipes, seed, text, task.prompt, CHAT_TEMPLATE]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ---- the first task ----

MINI = Shape(hidden=64, intermediate=128, layers=2, heads=2, kv_heads=1, head_dim=32, initializer_range=0.10)
MICRO = Shape(hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, head_dim=32, initializer_range=0.12)


def _two_stages(shape: Shape, peak_lr: float) -> Recipe:
    return Recipe(shape, (Stage("stage 1", 2500, peak_lr), Stage("stage 2", 400, 1e-3)))


def _styles(mix: tiny_task.Mix) -> Callable[[int], Documents]:
    def documents(seed: int) -> Documents:
        return tiny_task.draw_documents(random.Random(f"pretraining {seed} {sorted(mix.items())}"), mix)

    return documents


TINY = Task(
    recipes={"actor": _two_stages(MINI, 4e-3), "critic": _two_stages(MICRO, 5e-3)},
    texts={"stage 1": _styles(tiny_task.STAGE_1_MIX), "stage 2": _styles(tiny_task.STAGE_2_MIX)},
    write_datasets=tiny_task.write_datasets,
    prompt=TINY_PROMPT,
    evaluation_ops=tiny_task.EVALUATION_OPS,
    max_response_tokens=64,
)


# ---- chains ----

CHAINS_ACTOR = Shape(hidden=64, intermediate=192, layers=3, heads=4, kv_heads=2, head_dim=16, initializer_range=0.10)
CHAINS_CRITIC = Shape(hidden=48, intermediate=80, layers=3, heads=4, kv_heads=2, head_dim=16, initializer_range=0.10)
CHAINS_SMALL = Shape(hidden=32, intermediate=64, layers=3, heads=4, kv_heads=2, head_dim=16, initializer_range=0.12)
LARGE_ACTOR = Shape(hidden=256, intermediate=768, layers=6, heads=4, kv_heads=2, head_dim=64, initializer_range=0.05)
LARGE_CRITIC = Shape(hidden=128, intermediate=384, layers=4, heads=2, kv_heads=1, head_dim=64, initializer_range=0.08)


def _plain(shape: Shape, steps: int, peak_lr: float) -> Recipe:
    return Recipe(shape, (Stage("plain", steps, peak_lr),))


def _graded(shape: Shape, steps: int, peak_lr: float) -> Recipe:
    return Recipe(shape, (Stage("graded", steps, peak_lr, mark_weight=4.0),), grades=True)


def _chains(
    recipes: Mapping[str, Recipe], lengths: chains_task.Lengths, max_response_tokens: int, quick_steps: int
) -> Task:
    def text(graded: bool) -> Callable[[int], Documents]:
        def documents(seed: int) -> Documents:
            rng = random.Random(f"pretraining {seed} {'graded' if graded else 'plain'}")
            return chains_task.draw_documents(rng, lengths.pretraining, graded)

        return documents

    return Task(
        recipes=recipes,
        texts={"plain": text(False), "graded": text(True)},
        write_datasets=lambda directory, seed: chains_task.write_datasets(directory, seed, lengths),
        prompt=chains_task.prompt_text(chains_task.make_problem(random.Random(0), ops=2)),
        evaluation_ops=lengths.evaluation,
        max_response_tokens=max_response_tokens,
        quick_steps=quick_steps,
    )


CHAINS = _chains(
    {
        "actor": _plain(CHAINS_ACTOR, 2000, 4e-3),
        "critic_symmetric": _graded(CHAINS_ACTOR, 1800, 4e-3),
        "critic": _graded(CHAINS_CRITIC, 1800, 5e-3),
        "critic_small": _graded(CHAINS_SMALL, 3000, 5e-3),
    },
    chains_task.SHORT,
    max_response_tokens=64,
    quick_steps=16,
)

CHAINS_LARGE = _chains(
    {
        "actor": _plain(LARGE_ACTOR, 4000, 1e-3),
        "critic_symmetric": _graded(LARGE_ACTOR, 6000, 1e-3),
        "critic": _graded(LARGE_CRITIC, 6000, 2e-3),
        "critic_small": _graded(CHAINS_ACTOR, 6000, 4e-3),
    },
    chains_task.LONG,
    max_response_tokens=128,
    quick_steps=2,
)
"""For a GPU: never trained to the end here, only a few steps of it, so its steps and learning rates are guesses."""

TASKS: Mapping[tuple[str, str], Task] = {
    ("tiny", "small"): TINY,
    ("chains", "small"): CHAINS,
    ("chains", "large"): CHAINS_LARGE,
}
"""By task and size."""
