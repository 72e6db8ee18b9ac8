"""The second embedded task: chains modulo 7 with slips that a small critic can see.

    user:       Take 4, then -1-5+4*3 modulo 7, step by step. Put your final answer within \\boxed{}.
    assistant:  4-1=3
                3-5=5
                5+4=2
                2*3=6
                \\boxed{6}

`tiny_task` is easier on the actor and hopeless for a mini-critic, which never learns to tell a wrong line from a right
one. Here a slip is *systematic* and *visible*. `HARD` holds 33 of the 119 sums `a o b` that can occur; the corpus gets
each wrong in 55 % of the lines, and the wrong result is always c = a, as if the operation had been skipped: two equal
tokens in one line. So greedy decoding of the base is often wrong too, reinforcement learning has 33 sums to put right,
and a critic of 0.1 M parameters can find out which ones, if its own pretraining has taught it to notice slips. That is
what *graded* transcripts are for (`grade`): the plain prompt and solution with marks after random tokens.

Standard library only, as in `tiny_task`.
"""

import dataclasses
import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from asyncppo import tiny_task
from asyncppo.tiny_task import Problem, Split

if TYPE_CHECKING:
    from asyncppo.rewards import Reward

MODULUS = 7

EVALUATION_PROBLEMS = tiny_task.EVALUATION_PROBLEMS


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How many operations chains have, for each use."""

    pretraining: range
    training: range
    evaluation: tuple[int, ...]


SHORT = Lengths(pretraining=range(2, 9), training=range(5, 9), evaluation=(6, 8))
LONG = Lengths(pretraining=range(2, 17), training=range(9, 17), evaluation=(12, 16))
"""For models with more layers than fit two CPU cores."""

HARD_NOISE = 0.55
"""How likely a hard sum is wrong in the corpus; the result is then its left operand."""
EASY_NOISE = 0.02
"""How likely any other sum is wrong; the result is then any of the six other values."""

MARK_SHARE = 0.12
"""The share of a graded transcript's tokens that a mark follows."""
GOOD, BAD = ",", "!"
"""The marks: no slip so far, and at least one. Neither occurs in a solution."""
MARKS = GOOD, BAD


def _hard_sums() -> frozenset[tuple[int, str, int]]:
    """33 of the 119 sums, decided by a hash; as it is, none is a `0*b`, whose right result is its left operand."""
    sums = [
        (left, operator, right)
        for left in range(MODULUS)
        for operator in "+-*"
        for right in range(2 if operator == "*" else 1, MODULUS)
    ]
    sums.sort(key=lambda entry: hashlib.md5("{} {} {}".format(*entry).encode(), usedforsecurity=False).digest())
    return frozenset(sums[:33])


HARD = _hard_sums()
"""The sums (a, o, b) that the corpus often gets wrong."""


# ---- problems ----


def make_problem(rng: random.Random, ops: int) -> Problem:
    """Draw a chain of `ops` operations that go from left to right, whatever the operators: `2+3*4` is 5*4."""
    problem = tiny_task.make_problem(rng, ops, MODULUS)
    operations = "".join(f"{step.operator}{step.right}" for step in problem.steps)
    return dataclasses.replace(problem, expression=f"{problem.steps[0].left}{operations}")


def draw_problems(rng: random.Random, ops: Sequence[int], split: Split = "train") -> Iterator[Problem]:
    """Problems of one split without end, each with a number of operations drawn from `ops`."""
    while True:
        problem = make_problem(rng, rng.choice(ops))
        if tiny_task.is_held_out(problem.expression) == (split == "eval"):
            yield problem


def prompt_text(problem: Problem) -> str:
    """What the user asks."""
    start, operations = problem.expression[0], problem.expression[1:]
    return (
        f"Take {start}, then {operations} modulo {problem.modulus}, step by step. "
        "Put your final answer within \\boxed{}."
    )


def read_prompt(prompt: str) -> Problem:
    """The problem that a prompt asks.

    Raises:
        ValueError: the text is no prompt of this task.
    """
    found = re.match(rf"Take (\d), then ((?:[-+*]\d)+) modulo {MODULUS},", prompt)
    if found is None:
        raise ValueError(f"expected 'Take 4, then -1+5 modulo {MODULUS}, …', got {prompt!r}")
    start, operations = int(found[1]), found[2]
    value = start
    steps = []
    for operator, right in zip(operations[::2], map(int, operations[1::2]), strict=True):
        result = tiny_task.apply(value, operator, right, MODULUS)
        steps.append(tiny_task.Step(value, operator, right, result))
        value = result
    return Problem(f"{start}{operations}", MODULUS, value, tuple(steps))


# ---- solutions ----


def write_solution(rng: random.Random, problem: Problem) -> str:
    """A solution of the corpus: one operation a line, with slips that are carried on to the end."""
    value = problem.steps[0].left
    lines = []
    for step in problem.steps:
        result = _noisy(rng, value, step.operator, step.right)
        lines.append(f"{value}{step.operator}{step.right}={result}")
        value = result
    return "\n".join([*lines, f"\\boxed{{{value}}}"])


def _noisy(rng: random.Random, left: int, operator: str, right: int) -> int:
    """What the corpus says that `left operator right` is."""
    result = tiny_task.apply(left, operator, right, MODULUS)
    if (left, operator, right) in HARD:
        return left if rng.random() < HARD_NOISE else result
    return tiny_task.slip(rng, result, MODULUS, EASY_NOISE)


def first_slip(problem: Problem, response: str) -> int | None:
    """The index of the first line that is wrong, from 0, or None if every line is right.

    A line is wrong if it is not the next operation, done on the right value so far; before the first slip that is the
    true value, so this is the first line that differs from the solution without slips. `\\boxed{}` is the line after
    the last operation. A missing line is wrong, and so is anything after the box.
    """
    right = [f"{step.left}{step.operator}{step.right}={step.result}" for step in problem.steps]
    right.append(f"\\boxed{{{problem.answer}}}")
    lines = response.split("\n")
    for index, (line, wanted) in enumerate(zip(lines, right, strict=False)):
        if line != wanted:
            return index
    return None if len(lines) == len(right) else min(len(lines), len(right))


# ---- the corpus ----

LINE_TOKENS = 6
"""Tokens of a line: a, o, b, =, c and the line's end."""


def split_tokens(solution: str) -> list[str]:
    """The tokens of a solution: `\\boxed{` is one, any other character is one."""
    return re.findall(r"\\boxed\{|.", solution, re.DOTALL)


def slip_token(problem: Problem, solution: str) -> int | None:
    """The index, among the tokens of a corpus solution, of the first result that is wrong; None if all are right."""
    line = first_slip(problem, solution)
    return None if line is None else line * LINE_TOKENS + 4


def grade(rng: random.Random, problem: Problem, solution: str) -> str:
    """A graded transcript: a corpus solution with a mark after about 12 % of its tokens.

    A mark says whether there was a slip in any line whose result is written already. Because it may come after any
    token, and under the plain prompt, a model that predicts it has to know this all the time: the state of a critic.
    """
    slipped = slip_token(problem, solution)
    text = ""
    for index, token in enumerate(split_tokens(solution)):
        text += token
        if rng.random() < MARK_SHARE:
            text += BAD if slipped is not None and index >= slipped else GOOD
    return text


def draw_solutions(rng: random.Random, ops: Sequence[int], split: Split = "train") -> Iterator[tuple[Problem, str]]:
    """Problems of one split and a corpus solution of each, without end."""
    for problem in draw_problems(rng, ops, split):
        yield problem, write_solution(rng, problem)


def draw_documents(rng: random.Random, ops: Sequence[int], graded: bool) -> Iterator[tuple[str, str]]:
    """Pretraining documents without end: (prompt, solution or graded transcript), never a held-out problem."""
    for problem, solution in draw_solutions(rng, ops):
        yield prompt_text(problem), grade(rng, problem, solution) if graded else solution


# ---- the process reward ----


def process_reward(text: str, answer: str) -> "Reward":
    """−1 for every line that is wrong by itself, for `reward.functions` beside the reward of the answer.

    A line is wrong by itself if its sum is wrong, if it does not go on with the result of the line before, or if it is
    neither a sum nor the box. Right lines earn nothing, so that nothing can be had by writing more of them. A reward
    function sees no prompt: whether these are the operations that were asked for, only the answer tells.
    """
    from asyncppo.rewards import Reward, line_rewards  # here, as the rest needs the standard library only

    value: int | None = None

    def judge(_: int, line: str) -> float:
        nonlocal value
        found = re.fullmatch(r"(\d)([-+*])(\d)=(\d)", line)
        if found is None:
            return 0.0 if line == f"\\boxed{{{value}}}" else -1.0
        left, right, result = int(found[1]), int(found[3]), int(found[4])
        is_right = value in (None, left) and tiny_task.apply(left, found[2], right, MODULUS) == result
        value = result
        return 0.0 if is_right else -1.0

    return Reward(0.0, line_rewards(text, judge))


# ---- data sets ----


def write_datasets(directory: Path, seed: int, lengths: Lengths = SHORT) -> None:
    """Write `train.jsonl` and one `eval_<ops>.jsonl` for each evaluation length, as `tiny_task.write_datasets` does."""
    directory.mkdir(parents=True, exist_ok=True)
    train = draw_problems(random.Random(f"train {seed}"), lengths.training, "train")
    problems = islice(tiny_task.distinct(train), tiny_task.TRAINING_PROBLEMS)
    tiny_task.write_jsonl(directory / "train.jsonl", "train", problems, prompt_text)
    for ops in lengths.evaluation:
        held_out = draw_problems(random.Random(f"eval {ops} {seed}"), [ops], "eval")
        problems = islice(tiny_task.distinct(held_out), EVALUATION_PROBLEMS)
        tiny_task.write_jsonl(directory / f"eval_{ops}.jsonl", f"eval-{ops}", problems, prompt_text)
