"""Claims about the embedded task: its sums are right, its splits are apart, its slips are as many as stated."""

import ast
import json
import operator
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from asyncppo import tiny_task
from asyncppo.tiny_task import LINE_NOISE, STAGE_1_MIX, STAGE_2_MIX, Mix, Problem, Style

pytestmark = pytest.mark.unit

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value_of(expression: str) -> int:
    """The value of an expression of integers, `+`, `-`, `*` and parentheses, under Python's own precedence."""

    def walk(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left=left, op=op, right=right):
                return OPERATORS[type(op)](walk(left), walk(right))
        raise AssertionError(f"{expression} holds {ast.dump(node)}")

    return walk(ast.parse(expression, mode="eval").body)


def some_problems(number: int, ops: range = range(1, 13), modulus: int = 10) -> list[Problem]:
    rng = random.Random(7)
    return [tiny_task.make_problem(rng, rng.choice(ops), modulus) for _ in range(number)]


@pytest.mark.parametrize("modulus", [10, 97, 9973])
def test_answers_are_right_under_ordinary_precedence(modulus: int) -> None:
    for problem in some_problems(500, modulus=modulus):
        assert value_of(problem.expression) % modulus == problem.answer


def test_steps_lead_from_left_to_right_to_the_answer() -> None:
    for problem in some_problems(200):
        for step, following in zip(problem.steps, problem.steps[1:], strict=False):
            assert step.result == following.left
        assert problem.steps[-1].result == problem.answer


def test_parentheses_stand_only_where_a_product_follows_a_sum() -> None:
    steps = [tiny_task.Step(0, operator_, right, 0) for operator_, right in [("*", 3), ("-", 2), ("*", 7), ("-", 9)]]
    assert tiny_task.write_expression(9, steps) == "(9*3-2)*7-9"


def test_a_slip_before_a_product_is_never_wiped_out() -> None:
    for problem in some_problems(200):
        for step in problem.steps:
            results = {tiny_task.apply(left, step.operator, step.right, problem.modulus) for left in range(10)}
            assert len(results) == problem.modulus


def test_the_same_seed_draws_the_same_problems_and_another_seed_others() -> None:
    def draw(seed: int) -> list[Problem]:
        return list(islice(tiny_task.draw_problems(random.Random(seed), range(5, 9)), 50))

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_about_one_problem_in_ten_is_held_out() -> None:
    held_out = [tiny_task.is_held_out(problem.expression) for problem in some_problems(5000)]
    assert sum(held_out) / len(held_out) == pytest.approx(26 / 256, abs=0.015)


def test_pretraining_documents_never_hold_an_evaluation_problem() -> None:
    for prompt, _ in islice(tiny_task.draw_documents(random.Random(0), STAGE_1_MIX), 2000):
        assert not tiny_task.is_held_out(prompt.split()[1])


@pytest.mark.parametrize("style", Style)
def test_lines_are_wrong_as_often_as_their_style_says(style: Style) -> None:
    rng = random.Random(1)
    lines = wrong = 0
    for problem in some_problems(1500, range(2, 9)):
        *working, box = tiny_task.write_solution(rng, problem, style).split("\n")
        if style is Style.DIRECT:
            working = [f"{problem.answer}=" + box.removeprefix("\\boxed{").removesuffix("}")]
        for line in working:
            left, _, result = line.partition("=")
            lines += 1
            wrong += value_of(left) % problem.modulus != int(result)
    assert wrong / lines == pytest.approx(LINE_NOISE[style], abs=0.04)


def test_a_careful_solution_without_slips_is_the_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_task, "LINE_NOISE", dict.fromkeys(Style, 0.0))
    chain = [(9, "*", 3, 7), (7, "-", 2, 5), (5, "*", 7, 5), (5, "-", 9, 6)]
    problem = Problem("(9*3-2)*7-9", 10, 6, tuple(tiny_task.Step(*step) for step in chain))
    rng = random.Random(0)
    assert tiny_task.write_solution(rng, problem, Style.CAREFUL) == "9*3=7\n7-2=5\n5*7=5\n5-9=6\n\\boxed{6}"
    assert tiny_task.write_solution(rng, problem, Style.HASTY) == "9*3-2=5\n5*7-9=6\n\\boxed{6}"
    assert tiny_task.write_solution(rng, problem, Style.DIRECT) == "\\boxed{6}"


@pytest.mark.parametrize("mix", [STAGE_1_MIX, STAGE_2_MIX], ids=["stage 1", "stage 2"])
def test_styles_are_drawn_with_the_shares_of_their_mix(mix: Mix) -> None:
    assert sum(mix.values()) == pytest.approx(1)
    rng = random.Random(2)
    drawn = Counter(tiny_task.draw_style(rng, mix) for _ in range(5000))
    for style in Style:
        assert drawn[style] / 5000 == pytest.approx(mix[style], abs=0.03)


def test_the_data_sets_are_distinct_apart_and_of_the_stated_lengths(tmp_path: Path) -> None:
    tiny_task.write_datasets(tmp_path, seed=0)
    files = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*.jsonl")
    }
    assert {name: len(rows) for name, rows in files.items()} == {"train": 8192, "eval_6": 128, "eval_8": 128}
    rows = [row for file in files.values() for row in file]
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    for name, file in files.items():
        for row in file:
            expression = row["prompt"].split()[1]
            operations = sum(expression.count(symbol) for symbol in "+-*")
            assert operations in {"train": range(5, 9), "eval_6": [6], "eval_8": [8]}[name]
            assert tiny_task.is_held_out(expression) == (name != "train")
            assert row["answer"] == str(value_of(expression) % 10)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for directory in ("a", "b"):
        tiny_task.write_datasets(tmp_path / directory, seed=5)
    tiny_task.write_datasets(tmp_path / "c", seed=6)
    first, second, other = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert first == second != other
