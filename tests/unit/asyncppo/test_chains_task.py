"""Claims about the second embedded task: its sums, its systematic slips, the checker and the graded transcripts."""

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from asyncppo import chains_task, tiny_task
from asyncppo.chains_task import BAD, GOOD, HARD, LONG, SHORT, Lengths
from asyncppo.tiny_task import Problem

pytestmark = pytest.mark.unit

OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def value_of(expression: str) -> int:
    """The value modulo 7, from left to right."""
    value = int(expression[0])
    for operator, right in zip(expression[1::2], expression[2::2], strict=True):
        value = OPERATIONS[operator](value, int(right)) % 7
    return value


def some_solutions(number: int, ops: range = range(1, 13)) -> list[tuple[Problem, str]]:
    return list(islice(chains_task.draw_solutions(random.Random(7), ops), number))


def the_example() -> Problem:
    return chains_task.read_prompt(
        "Take 4, then -1-5+4*3 modulo 7, step by step. Put your final answer within \\boxed{}."
    )


RIGHT = ["4-1=3", "3-5=5", "5+4=2", "2*3=6", "\\boxed{6}"]


def test_answers_are_right_from_left_to_right() -> None:
    for problem, _ in some_solutions(500):
        assert value_of(problem.expression) == problem.answer == problem.steps[-1].result


def test_the_prompt_tells_the_whole_problem() -> None:
    for problem, _ in some_solutions(200):
        assert chains_task.read_prompt(chains_task.prompt_text(problem)) == problem


@pytest.mark.parametrize(
    "prompt",
    ["Compute 3+4 modulo 10 step by step.", "Take 4, then -1 modulo 10, step by step.", "Take 4, then -1- modulo 7,"],
)
def test_a_prompt_of_another_task_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="expected 'Take 4"):
        chains_task.read_prompt(prompt)


def test_33_of_the_119_sums_that_occur_are_hard_and_their_slip_is_always_wrong() -> None:
    steps = {
        (step.left, step.operator, step.right): step.result
        for problem, _ in some_solutions(5000)
        for step in problem.steps
    }
    assert len(steps) == 119
    assert len(HARD) == 33
    assert set(steps) >= HARD
    assert all(steps[entry] != entry[0] for entry in HARD)


def test_the_hard_sums_never_change() -> None:
    assert sorted(HARD)[:4] == [(0, "+", 3), (0, "+", 4), (0, "-", 1), (0, "-", 6)]


def test_hard_lines_skip_their_operation_as_often_as_stated_and_other_lines_seldom_slip() -> None:
    lines, wrong, skipped = Counter[bool](), Counter[bool](), Counter[bool]()
    for problem, solution in some_solutions(6000, range(5, 9)):
        assert len(solution.split("\n")) == len(problem.steps) + 1
        value = problem.steps[0].left
        for step, line in zip(problem.steps, solution.split("\n"), strict=False):
            left, _, result = line.partition("=")
            assert left == f"{value}{step.operator}{step.right}"
            hard = (value, step.operator, step.right) in HARD
            lines[hard] += 1
            wrong[hard] += int(result) != value_of(left)
            skipped[hard] += int(result) == value != value_of(left)
            value = int(result)
        assert solution.endswith(f"\n\\boxed{{{value}}}")
    assert wrong[True] / lines[True] == pytest.approx(0.55, abs=0.02)
    assert wrong[False] / lines[False] == pytest.approx(0.02, abs=0.004)
    assert skipped[True] == wrong[True]
    assert 0 < skipped[False] < wrong[False] / 3


def test_about_a_third_of_the_corpus_ends_right() -> None:
    """What reinforcement learning starts from; a slip may be undone by another, as there are only seven values."""
    solutions = some_solutions(4000, SHORT.training)
    right = [solution.endswith(f"\\boxed{{{problem.answer}}}") for problem, solution in solutions]
    assert sum(right) / len(right) == pytest.approx(0.35, abs=0.03)


# ---- the checker ----


@pytest.mark.parametrize(
    ("lines", "slip"),
    [
        (RIGHT, None),
        (["4-1=4", "4-5=6", "6+4=3", "3*3=2", "\\boxed{2}"], 0),
        (["4-1=3", "3-5=5", "5+4=5", "5*3=1", "\\boxed{1}"], 2),
        (["4-1=3", "3-5=3", "3+4=2", "2*3=6", "\\boxed{6}"], 1),
        (["4-1=3", "2-5=4", *RIGHT[2:]], 1),
        (["4-1=3", "3-4=6", *RIGHT[2:]], 1),
        ([*RIGHT[:4], "\\boxed{5}"], 4),
        (RIGHT[:4], 4),
        (RIGHT[:2], 2),
        (RIGHT[4:], 0),
        ([*RIGHT, "\\boxed{5}"], 5),
        ([""], 0),
    ],
)
def test_the_first_slip_is_the_first_line_that_differs_from_a_right_solution(
    lines: list[str], slip: int | None
) -> None:
    assert chains_task.first_slip(the_example(), "\n".join(lines)) == slip


def test_the_first_slip_of_a_corpus_solution_is_its_first_wrong_sum() -> None:
    seen = set()
    for problem, solution in some_solutions(500):
        wrong = [
            index
            for index, line in enumerate(solution.split("\n")[:-1])
            if value_of(line.partition("=")[0]) != int(line[-1])
        ]
        slip = chains_task.first_slip(problem, solution)
        assert slip == (wrong[0] if wrong else None)
        seen.add(slip)
        token = chains_task.slip_token(problem, solution)
        if slip is None:
            assert token is None
        else:
            text = "".join(chains_task.split_tokens(solution)[: token + 1])
            assert text == "\n".join(solution.split("\n")[: slip + 1])
    assert {None, 0, 1, 5} <= seen


# ---- graded transcripts ----


def test_marks_say_whether_a_wrong_result_is_written_already() -> None:
    rng = random.Random(3)
    marks, tokens = Counter[str](), 0
    for problem, solution in some_solutions(1500):
        graded = chains_task.grade(rng, problem, solution)
        assert graded.replace(GOOD, "").replace(BAD, "") == solution
        tokens += len(chains_task.split_tokens(solution))
        for index, mark in enumerate(graded):
            if mark in (GOOD, BAD):
                written = graded[:index].replace(GOOD, "").replace(BAD, "")
                sums = [line for line in written.split("\n") if len(line) == 5 and "=" in line]
                slipped = any(value_of(line[:3]) != int(line[4]) for line in sums)
                assert mark == (BAD if slipped else GOOD)
                marks[mark] += 1
    assert marks.total() / tokens == pytest.approx(0.12, abs=0.01)
    assert min(marks.values()) > 1000


def test_marks_come_after_every_kind_of_token() -> None:
    after = Counter(
        graded[index - 1]
        for problem, solution in some_solutions(800)
        for graded in [chains_task.grade(random.Random(problem.expression), problem, solution)]
        for index, mark in enumerate(graded)
        if mark in (GOOD, BAD)
    )
    assert set("0123456+-*=\n{}") <= set(after)
    assert "d" not in after  # never inside of \boxed{


@pytest.mark.parametrize("graded", [False, True])
def test_documents_are_plain_or_graded_and_never_of_a_held_out_problem(graded: bool) -> None:
    documents = list(islice(chains_task.draw_documents(random.Random(0), SHORT.pretraining, graded), 1500))
    problems = [chains_task.read_prompt(prompt) for prompt, _ in documents]
    assert not any(tiny_task.is_held_out(problem.expression) for problem in problems)
    assert {len(problem.steps) for problem in problems} == set(range(2, 9))
    share = sum(GOOD in text or BAD in text for _, text in documents) / len(documents)
    assert share > 0.9 if graded else share == 0


# ---- data sets ----


@pytest.mark.parametrize(("lengths", "most"), [(SHORT, 8), (LONG, 16)])
def test_the_data_sets_are_distinct_apart_and_of_the_stated_lengths(
    tmp_path: Path, lengths: Lengths, most: int
) -> None:
    chains_task.write_datasets(tmp_path, seed=0, lengths=lengths)
    files = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*.jsonl")
    }
    middle = most * 3 // 4
    assert {name: len(rows) for name, rows in files.items()} == {
        "train": 8192,
        f"eval_{middle}": 128,
        f"eval_{most}": 128,
    }
    rows = [row for file in files.values() for row in file]
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    for name, file in files.items():
        counts = set()
        for row in file:
            problem = chains_task.read_prompt(row["prompt"])
            counts.add(len(problem.steps))
            assert tiny_task.is_held_out(problem.expression) == (name != "train")
            assert row["answer"] == str(value_of(problem.expression))
        assert counts == (set(range(most // 2 + 1, most + 1)) if name == "train" else {int(name[5:])})


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for directory, seed in (("a", 5), ("b", 5), ("c", 6)):
        chains_task.write_datasets(tmp_path / directory, seed)
    first, second, other = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert first == second != other
