"""The embedded task: chains of arithmetic modulo a small number.

    user:       Compute (9*3-2)*7-9 modulo 10 step by step. Put your final answer within \\boxed{}.
    assistant:  9*3=7
                7-2=5
                5*7=5
                5-9=6
                \\boxed{6}

A new machine has no model hub and no data sets, so the project carries a task that a 0.1 M-parameter model can learn
on one CPU core. Two kinds of text come from here: *problems* for reinforcement learning (a prompt and its answer), and
*solutions* to pretrain the base model on. The solutions are noisy on purpose, in three styles, so that the base model
is often wrong when it samples (low pass@1) and often right in one of several tries (high pass@k): it leaves something
for reinforcement learning to do.

Standard library only: both ends import this, and neither needs an array to make a sum.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Literal

MODULUS = 10
"""The default modulus: every running value is one digit, and guessing scores one in ten."""

PRETRAINING_OPS = range(2, 9)
"""Lengths of the chains that the base models are pretrained on: 2 to 8 operations."""

TRAINING_OPS = range(5, 9)
"""Lengths of the chains in `train.jsonl`: 5 to 8 operations."""

EVALUATION_OPS = (6, 8)
"""Each of these lengths has an evaluation file of its own, `eval_6.jsonl` and `eval_8.jsonl`."""

TRAINING_PROBLEMS = 8192
EVALUATION_PROBLEMS = 128

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Step:
    """One operation of a chain: `left operator right = result`, taken modulo the problem's modulus."""

    left: int
    operator: str
    right: int
    result: int


@dataclass(frozen=True)
class Problem:
    """An expression, the answer to it, and the steps that lead there from left to right."""

    expression: str
    modulus: int
    answer: int
    steps: tuple[Step, ...]


class Style(StrEnum):
    """How a solution is written, from the most to the least reliable."""

    CAREFUL = "careful"
    """One operation a line."""
    HASTY = "hasty"
    """Two operations a line."""
    DIRECT = "direct"
    """The answer at once, no lines."""


LINE_NOISE: Mapping[Style, float] = {Style.CAREFUL: 0.10, Style.HASTY: 0.30, Style.DIRECT: 0.80}
"""How likely a line of each style is wrong (for `direct`, the answer itself). A wrong value is carried on."""

Mix = Mapping[Style, float]

STAGE_1_MIX: Mix = {Style.CAREFUL: 0.50, Style.HASTY: 0.25, Style.DIRECT: 0.25}
"""Pretraining: the share of each style while the model learns to calculate."""

STAGE_2_MIX: Mix = {Style.CAREFUL: 0.32, Style.HASTY: 0.14, Style.DIRECT: 0.54}
"""A short second stage with the bad style in the majority. Noise alone only hurts sampling and leaves greedy decoding
nearly perfect; after this stage greedy decoding often starts with a direct answer and is wrong as well."""


# ---- problems ----


def make_problem(rng: random.Random, ops: int, modulus: int = MODULUS) -> Problem:
    """Draw a chain of `ops` operations.

    Operands are 1..modulus-1. A factor is coprime to the modulus and not 1, so that a multiplication is a bijection:
    a slip earlier in the chain is never wiped out by `*0` or `*5`, and what went wrong nearly always ends wrong.
    """
    factors = [n for n in range(2, modulus) if math.gcd(n, modulus) == 1]
    start = value = rng.randrange(1, modulus)
    steps: list[Step] = []
    for _ in range(ops):
        operator = rng.choice("+-*")
        right = rng.choice(factors) if operator == "*" else rng.randrange(1, modulus)
        result = apply(value, operator, right, modulus)
        steps.append(Step(value, operator, right, result))
        value = result
    return Problem(write_expression(start, steps), modulus, value, tuple(steps))


def apply(left: int, operator: str, right: int, modulus: int) -> int:
    """`left operator right` modulo `modulus`."""
    match operator:
        case "+":
            return (left + right) % modulus
        case "-":
            return (left - right) % modulus
        case "*":
            return left * right % modulus
    raise ValueError(f"operator {operator!r}: expected one of + - *")


def write_expression(start: int, steps: Iterable[Step]) -> str:
    """Write a chain so that ordinary precedence gives the same value as going from left to right.

    Parentheses are needed only where a `*` follows a `+` or `-`: 9, *3, -2, *7 is written `(9*3-2)*7`.
    """
    text, is_sum = str(start), False
    for step in steps:
        if step.operator == "*":
            if is_sum:
                text = f"({text})"
            is_sum = False
        else:
            is_sum = True
        text += f"{step.operator}{step.right}"
    return text


def is_held_out(expression: str) -> bool:
    """Whether an expression belongs to the evaluation split, about one in ten.

    Decided by a hash of the text alone, so no list has to be kept: nothing drawn for training, by whichever seed,
    is ever an evaluation problem.
    """
    return hashlib.md5(expression.encode(), usedforsecurity=False).digest()[0] < 26


def draw_problems(
    rng: random.Random, ops: Sequence[int], split: Split = "train", modulus: int = MODULUS
) -> Iterator[Problem]:
    """Problems of one split without end, each with a number of operations drawn from `ops`."""
    while True:
        problem = make_problem(rng, rng.choice(ops), modulus)
        if is_held_out(problem.expression) == (split == "eval"):
            yield problem


def prompt_text(problem: Problem) -> str:
    """What the user asks."""
    return (
        f"Compute {problem.expression} modulo {problem.modulus} step by step. Put your final answer within \\boxed{{}}."
    )


# ---- solutions ----


def draw_style(rng: random.Random, mix: Mix) -> Style:
    """One style, with the probabilities of `mix`."""
    return rng.choices(list(mix), weights=list(mix.values()))[0]


def write_solution(rng: random.Random, problem: Problem, style: Style) -> str:
    """A solution in `style`, with as many slips as the style has; a slip is carried on to the end."""
    noise = LINE_NOISE[style]
    if style is Style.DIRECT:
        return f"\\boxed{{{slip(rng, problem.answer, problem.modulus, noise)}}}"
    ops_per_line = 1 if style is Style.CAREFUL else 2
    lines: list[str] = []
    value = problem.steps[0].left
    for first in range(0, len(problem.steps), ops_per_line):
        steps = problem.steps[first : first + ops_per_line]
        left = write_expression(value, steps)
        for step in steps:
            value = apply(value, step.operator, step.right, problem.modulus)
        value = slip(rng, value, problem.modulus, noise)
        lines.append(f"{left}={value}")
    return "\n".join([*lines, f"\\boxed{{{value}}}"])


def draw_documents(rng: random.Random, mix: Mix) -> Iterator[tuple[str, str]]:
    """Pretraining documents without end: (prompt, solution), in the styles of `mix`, never a held-out problem."""
    for problem in draw_problems(rng, PRETRAINING_OPS):
        yield prompt_text(problem), write_solution(rng, problem, draw_style(rng, mix))


def slip(rng: random.Random, value: int, modulus: int, probability: float) -> int:
    """`value`, or with `probability` one of the other values modulo `modulus`."""
    return (value + rng.randrange(1, modulus)) % modulus if rng.random() < probability else value


# ---- data sets ----


def write_datasets(directory: Path, seed: int) -> None:
    """Write `train.jsonl`, `eval_6.jsonl` and `eval_8.jsonl`: one problem a line with id, prompt and answer.

    No problem appears twice in a file, and none in two files. The same seed writes the same bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    train = distinct(draw_problems(random.Random(f"train {seed}"), TRAINING_OPS, "train"))
    write_jsonl(directory / "train.jsonl", "train", islice(train, TRAINING_PROBLEMS), prompt_text)
    for ops in EVALUATION_OPS:
        held_out = distinct(draw_problems(random.Random(f"eval {ops} {seed}"), [ops], "eval"))
        problems = islice(held_out, EVALUATION_PROBLEMS)
        write_jsonl(directory / f"eval_{ops}.jsonl", f"eval-{ops}", problems, prompt_text)


def distinct(problems: Iterable[Problem]) -> Iterator[Problem]:
    """The problems without repetitions."""
    seen: set[str] = set()
    for problem in problems:
        if problem.expression not in seen:
            seen.add(problem.expression)
            yield problem


def write_jsonl(path: Path, prefix: str, problems: Iterable[Problem], prompt: Callable[[Problem], str]) -> None:
    """Write one problem a line: its id, made from `prefix` and a number, its prompt and its answer."""
    rows = (
        {"id": f"{prefix}-{number:05d}", "prompt": prompt(problem), "answer": str(problem.answer)}
        for number, problem in enumerate(problems)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
