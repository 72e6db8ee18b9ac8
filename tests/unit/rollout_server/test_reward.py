"""Claims about grading: what scores, what does not, and that nothing that a response says can stop the server."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from asyncppo.config import RewardConfig
from asyncppo.errors import UserError
from rollout_server.reward import Grade, Grader, find_function, last_boxed, math_verify

FUNCTIONS = """
import os, time

def by_word(text, answer):
    if text == "hang":
        time.sleep(60)
    if text == "die":
        os._exit(3)
    if text == "raise":
        raise ValueError("no")
    if text == "nan":
        return float("nan")
    if text == "two":
        return 2.0
    return 1.0 if text == answer else 0.0

not_a_function = 7
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable module with a reward function of the user's own."""
    (tmp_path / "grading_probe.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return "grading_probe:by_word"


def grade(config: RewardConfig, texts: list[str], answer: str) -> list[Grade]:
    grader = Grader(config)
    try:
        return asyncio.run(grader.grade(texts, answer))
    finally:
        grader.close()


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("so \\boxed{6}", "6"),
        ("\\boxed{1} or rather \\boxed{2}.", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{a\\boxed{b}}", "b"),
        ("\\boxed{1} and then \\boxed{2", "1"),
        ("\\boxed{", None),
        ("6", None),
        ("", None),
        ("\\boxed{}", ""),
    ],
)
def test_the_last_balanced_box_counts(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.real
@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("\\boxed{6}", "6", 1.0),
        ("\\boxed{7}", "6", 0.0),
        ("6", "6", 0.0),
        ("", "6", 0.0),
        ("\\boxed{}", "6", 0.0),
        ("\\boxed{6} no, \\boxed{7}", "6", 0.0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("\\boxed{1/2}", "\\frac12", 1.0),
        ("\\boxed{x=6}", "6", 1.0),
        ("\\boxed{-6}", "6", 0.0),
        ("\\boxed{3{,}000}", "3000", 1.0),
        ("\\boxed{\\{2,1\\}}", "\\{1,2\\}", 1.0),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", 1.0),
        ("\\boxed{42}", "$42$", 1.0),
        ("\\boxed{42}", "so \\boxed{42}", 1.0),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_math_verify_compares_as_mathematics_and_only_what_is_boxed(text: str, answer: str, reward: float) -> None:
    assert math_verify(text, answer) == reward


@pytest.mark.unit
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("verify", "expected `math_verify`, or `package.module:function`"),
        ("no_such_package.module:f", "cannot be imported: ModuleNotFoundError"),
        ("grading_probe:no_such_function", "cannot be imported: AttributeError"),
        ("grading_probe:not_a_function", "that names a function"),
    ],
)
def test_a_reward_function_that_is_none_is_refused_in_one_line(functions: str, name: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        find_function(name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.real
def test_the_self_test_passes_with_math_verify_and_a_group_is_graded_in_order() -> None:
    async def scenario() -> list[Grade]:
        grader = Grader(RewardConfig())
        try:
            await grader.self_test()
            return await grader.grade(["\\boxed{4}", "4", "\\boxed{2+2}", "\\boxed{5}"], "4")
        finally:
            grader.close()

    assert [(g.reward, g.error) for g in asyncio.run(scenario())] == [(1, False), (0, False), (1, False), (0, False)]


@pytest.mark.real
def test_a_gold_answer_that_cannot_be_parsed_is_an_error_and_not_a_wrong_answer() -> None:
    assert grade(RewardConfig(), ["\\boxed{4}", "4"], "") == [Grade(0.0, True), Grade(0.0, False)]


@pytest.mark.real
def test_whatever_a_function_of_the_users_own_does_the_group_is_graded(functions: str) -> None:
    config = RewardConfig(function=functions, timeout_s=1.0, workers=2)
    started = time.monotonic()
    grades = grade(config, ["yes", "hang", "no", "die", "raise", "nan", "two"], "yes")
    assert [g.reward for g in grades] == [1, 0, 0, 0, 0, 0, 0]
    assert [g.error for g in grades] == [False, True, False, True, True, True, True]
    assert time.monotonic() - started < 30


@pytest.mark.real
def test_a_hanging_answer_costs_its_time_limit_and_the_next_group_is_graded() -> None:
    async def scenario() -> tuple[list[Grade], list[Grade]]:
        grader = Grader(RewardConfig(timeout_s=2.0))
        try:
            await grader.self_test()
            hanging = await grader.grade(["\\boxed{9^{9^{9^{9^9}}}}", "\\boxed{8}"], "8")
            return hanging, await grader.grade(["\\boxed{8}"], "8")
        finally:
            grader.close()

    hanging, after = asyncio.run(scenario())
    assert hanging == [Grade(0.0, True), Grade(1.0, False)]
    assert after == [Grade(1.0, False)]
