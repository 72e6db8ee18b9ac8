"""Claims about reward functions: what scores, what steps earn and on which token, what being too long costs."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncppo import chains_task, rewards
from asyncppo.chains_task import process_reward
from asyncppo.config import RewardConfig
from asyncppo.errors import UserError
from asyncppo.rewards import (
    Grade,
    Reward,
    combined,
    find_function,
    grade,
    last_boxed,
    line_rewards,
    math_verify,
    overlong_penalty,
    step_rewards,
    token_of_character,
)
from trainer.tiny_base.tokens import TURN_END, TURN_START, build_tokenizer

FUNCTIONS = """
from asyncppo.rewards import Reward

GIVES = {"one": 1, "half": 0.5, "dense": Reward(0.5, [(2, 1.0), (5, -0.5)]), "bare": Reward(1.0)}

def by_word(text, answer):
    return GIVES[text]

def constant(text, answer):
    return Reward(1, [(3, 0.5)])

not_a_function = 7
"""
ROOT = Path(__file__).parents[3]


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An importable module with reward functions of the user's own."""
    (tmp_path / "reward_probe.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)


# --- the final reward ------------------------------------------------------------------------------------------------


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


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_want_of_memory_inside_math_verify_is_an_error_and_any_other_failure_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parse, gold = rewards._parse, rewards._parse("6")
    monkeypatch.setattr(rewards, "_parse", lambda latex: gold if latex == "6" else parse(latex))
    for place in ("math_verify.parser.extract_target_from_pred", "math_verify.grader.sympy_expr_eq"):
        for error in (MemoryError, RecursionError):

            def fails(*_: object, error: type[Exception] = error, **__: object) -> None:
                raise error

            text = f"\\boxed{{{len(place)}{len(error.__name__)}.0}}"  # no other test's: answers are remembered
            with monkeypatch.context() as patch:
                patch.setattr(place, fails)
                expected = Grade(0.0, error=error is MemoryError)
                assert grade(lambda *given: Reward(math_verify(*given)), text, "6") == expected, place


@pytest.mark.unit
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("verify", "expected `math_verify`, or `package.module:function`"),
        ("no_such_package.module:f", "cannot be imported: ModuleNotFoundError"),
        ("reward_probe:no_such_function", "cannot be imported: AttributeError"),
        ("reward_probe:not_a_function", "that names a function"),
    ],
)
@pytest.mark.usefixtures("functions")
def test_a_reward_function_that_is_none_is_refused_in_one_line(name: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        find_function(name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^reward\.functions "):
        combined(RewardConfig(functions={"reward_probe:by_word": 1.0, name: 0.1}))


@pytest.mark.unit
def test_being_too_long_costs_linearly_up_to_the_whole_penalty() -> None:
    lengths = [1, 80, 81, 90, 100, 120]
    penalties = overlong_penalty(lengths, limit=100, buffer=20, penalty=0.5)
    np.testing.assert_allclose(penalties, [0, 0, -0.025, -0.25, -0.5, -0.5])
    assert penalties.dtype == np.float32
    assert overlong_penalty(lengths, limit=100, buffer=0, penalty=0.5).tolist() == [0] * 6


# --- several functions -----------------------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("one", Reward(1.0, [])),
        ("half", Reward(0.5, [])),
        ("bare", Reward(1.0, [])),
        ("dense", Reward(0.5, [(2, 1.0), (5, -0.5)])),
    ],
)
@pytest.mark.usefixtures("functions")
def test_one_function_gives_its_reward_unchanged(text: str, reward: Reward) -> None:
    assert combined(RewardConfig(function="reward_probe:by_word"))(text, "") == reward


@pytest.mark.unit
@pytest.mark.usefixtures("functions")
def test_several_functions_are_summed_with_their_weights_and_their_steps_too() -> None:
    functions = {"reward_probe:by_word": 0.5, "reward_probe:constant": -2.0}
    reward = combined(RewardConfig(function="not looked at", functions=functions))("dense", "")
    assert reward == Reward(0.25 - 2.0, [(2, 0.5), (5, -0.25), (3, -1.0)])


@pytest.mark.unit
@pytest.mark.parametrize(
    "result",
    [
        1.5,
        -0.1,
        float("nan"),
        "no",
        None,
        (1.0, [(1, 1.0)]),
        Reward(2.0),
        Reward(1.0, [(0, 1.0)]),
        Reward(1.0, [(5, 1.0)]),
        Reward(1.0, [(-1, 1.0)]),
        Reward(1.0, [(1.5, 1.0)]),  # type: ignore[list-item]
        Reward(1.0, [(1, 1.5)]),
        Reward(1.0, [(1, -1.5)]),
        Reward(1.0, [(1, float("nan"))]),
        Reward(1.0, [1]),  # type: ignore[list-item]
    ],
)
@pytest.mark.usefixtures("functions")
def test_what_is_no_reward_is_a_reward_error(result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import reward_probe  # type: ignore[import-not-found]

    function = combined(RewardConfig(function="reward_probe:by_word"))
    monkeypatch.setitem(reward_probe.GIVES, "four", result)
    assert grade(function, "four", "") == Grade(0.0, error=True)
    monkeypatch.setitem(reward_probe.GIVES, "four", Reward(1.0, [(4, -1.0)]))
    assert grade(function, "four", "") == Grade(1.0, error=False, steps=((4, -1.0),))


# --- process rewards -------------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_a_line_earns_where_it_ends_and_empty_lines_are_counted_but_not_judged() -> None:
    text = "ab\n\ncde\nf\n"
    judged: list[tuple[int, str]] = []

    def judge(index: int, line: str) -> float:
        judged.append((index, line))
        return {"ab": 0.5, "cde": 0.0, "f": -1.0}[line]

    assert line_rewards(text, judge) == [(2, 0.5), (9, -1.0)]
    assert judged == [(0, "ab"), (2, "cde"), (3, "f")]
    assert [text[:end].rpartition("\n")[2] for end, _ in line_rewards(text, judge)] == ["ab", "f"]


@pytest.mark.unit
def test_the_chains_task_punishes_each_line_that_is_wrong_by_itself() -> None:
    text = "4-1=3\n3-5=3\n5+4=2\n2*3=\n\\boxed{6}"
    ends = [text.index("3-5=3") + 5, text.index("5+4=2") + 5, text.index("2*3=") + 4, len(text)]
    assert process_reward(text, "6") == Reward(0.0, [(end, -1.0) for end in ends])
    assert process_reward(text.replace("3-5=3", "3-5=5").replace("3=\n", "3=6\n"), "6") == Reward(0.0, [])


@pytest.mark.unit
def test_the_first_line_that_the_chains_task_punishes_is_the_first_slip() -> None:
    slipped = 0
    for problem, solution in islice(chains_task.draw_solutions(random.Random(0), [3, 8]), 200):
        steps = process_reward(solution, str(problem.answer)).steps
        first = solution[: steps[0][0]].count("\n") if steps else None
        assert first == chains_task.first_slip(problem, solution)
        slipped += first is not None
    assert 50 < slipped < 190


TOKENIZER = build_tokenizer().backend_tokenizer
SPECIAL = [TOKENIZER.token_to_id(token) for token in (TURN_START, TURN_END)]


@functools.cache
def decode_all(ids: tuple[int, ...]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=True))


def decode(ids: Sequence[int]) -> str:
    return decode_all(tuple(ids))


def naive_tokens(ids: list[int], text: str, positions: list[int]) -> list[int]:
    """Every prefix is decoded."""
    return [
        next(t for t in range(len(ids)) if decode(ids[: t + 1]).startswith(text[: position + 1]))
        for position in positions
    ]


IDS = st.lists(
    st.integers(0, 400)  # some are half a character, and some no token at all
    | st.sampled_from(SPECIAL)
    | st.text(max_size=3).map(lambda text: TOKENIZER.encode(text).ids)
    | st.sampled_from(["🙂", "中", "\ufffd", "👩‍👩‍👧", "Compute", "\n"]).map(lambda text: TOKENIZER.encode(text).ids),
    min_size=1,
    max_size=30,
).map(lambda parts: [int(token) for part in parts for token in (part if isinstance(part, list) else [part])])


@pytest.mark.unit
@settings(max_examples=500, deadline=None)
@given(ids=IDS, data=st.data(), left_out=st.integers(0, 3))
def test_each_character_is_completed_by_the_token_that_decoding_every_prefix_finds(
    ids: list[int], data: st.DataObject, left_out: int
) -> None:
    text = decode(ids)[: -left_out or None]
    positions = sorted(data.draw(st.lists(st.integers(0, len(text) - 1), max_size=6))) if text else []
    assert token_of_character(ids, text, positions, decode) == naive_tokens(ids, text, positions)


@pytest.mark.unit
def test_a_character_of_several_bytes_is_completed_by_its_last_token() -> None:
    ids = [*SPECIAL, *TOKENIZER.encode("é🙂!").ids, SPECIAL[1]]
    assert len(ids) == 2 + 2 + 4 + 1 + 1
    assert token_of_character(ids, "é🙂!", [0, 1, 2], decode) == [3, 7, 8]


@pytest.mark.unit
def test_a_long_response_is_never_decoded_whole_for_one_of_its_lines() -> None:
    ids = TOKENIZER.encode("1+1=2\n" * 500).ids
    decoded: list[int] = []

    def counting(part: Sequence[int]) -> str:
        decoded.append(len(part))
        return decode(part)

    positions = list(range(5, 3000, 6))
    assert token_of_character(ids, "1+1=2\n" * 500, positions, counting) == positions
    assert max(decoded) <= 8
    assert len(decoded) <= 10 * 500


@pytest.mark.unit
def test_tokens_that_are_not_the_text_are_refused() -> None:
    ids = TOKENIZER.encode("1+1=2").ids
    with pytest.raises(ValueError, match="the 5 tokens do not decode to the text"):
        token_of_character(ids, "1+1=3", [0, 4], decode)
    with pytest.raises(ValueError, match="the 5 tokens do not decode to the text"):
        token_of_character(ids, "1+1=22", [5], decode)


@pytest.mark.unit
def test_steps_in_any_order_are_summed_on_the_tokens_that_complete_them() -> None:
    text = "é\n12"
    ids = np.array([*TOKENIZER.encode(text).ids, SPECIAL[1]], np.int32)
    assert len(ids) == 2 + 1 + 2 + 1
    rewards = step_rewards([(4, -0.5), (1, 0.25), (4, 1.0), (3, 0.125)], ids, text, decode)
    assert rewards.tolist() == [0, 0.25, 0, 0.125, 0.5, 0]
    assert rewards.dtype == np.float32
    assert step_rewards([], ids, text, decode).tolist() == [0] * 6


# --- the documentation -----------------------------------------------------------------------------------------------


def documented() -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The Python files and the YAML of the section on rewards in docs/extending.md."""
    page = (ROOT / "docs/extending.md").read_text()
    section = page.partition("## A reward\n")[2].partition("\n## ")[0]
    files = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", section, re.DOTALL)
    return dict(files), [msgspec.yaml.decode(line) for line in re.findall(r"^    (reward: .*)$", section, re.MULTILINE)]


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_the_examples_of_the_documentation_do_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, configs = documented()
    for name, source in files.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    one, several, dense = (combined(msgspec.convert(tree["reward"], RewardConfig)) for tree in configs)

    assert [one(text, "4").value for text in ("Please take 4.", "Take 4.", "Please!")] == [1, 0, 0]
    assert several("\\boxed{4}", "4").value == pytest.approx(1.0 + 0.1 * (1 - 9 / 1000))
    assert several("\\boxed{5}", "4").value == pytest.approx(0.1 * (1 - 9 / 1000))
    text = "2+2=4\n4+4=9\nso \\boxed{8}"
    assert dense(text, "8") == Reward(1.0, [(5, 0.1), (11, -0.1)])
    assert (text[:5], text[6:11]) == ("2+2=4", "4+4=9")
