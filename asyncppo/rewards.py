"""Reward functions: what a response is worth, as pure functions of its text; no process, no torch.

    text ── combined(config.reward) ──▶ Reward(value, steps) ── grade ──▶ Grade ── step_rewards ──▶ [T], one per token

The rollout server calls them in worker processes that it can kill (`rollout_server.reward`), the plain twin in its own.
The only importer of math_verify, and only inside the functions: it takes a second, and the trainer can do without.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from asyncppo.config import RewardConfig
from asyncppo.errors import UserError
from asyncppo.messages import Float32, Int32

Step = tuple[int, float]
"""(end, reward): a process reward for the step of a response that ends just before the character `text[end]`."""


class Reward(NamedTuple):
    """What a reward function gives who also rewards single steps of a response (process rewards).

    Example: a response `2+2=4\\n4+4=9`, right in its first line alone, and wrong in the end:

        Reward(0.0, [(5, 0.5), (11, -0.5)])
    """

    value: float
    """The final reward of the whole response, in [0, 1]."""
    steps: Sequence[Step] = ()
    """Rewards in [−1, 1], in any order, with 1 ≤ end ≤ len(text). Each is earned by the token that completes the step's
    last character; those of one token are summed."""


RewardFunction = Callable[[str, str], float | Reward]
"""(response text, gold answer) -> reward in [0, 1], or such a reward with process rewards."""


@dataclass(frozen=True)
class Grade:
    """What a response got. `error`: grading failed or timed out, so the reward, 0, says nothing (`reward.on_error`)."""

    reward: float
    error: bool
    steps: tuple[Step, ...] = ()


# --- which function --------------------------------------------------------------------------------------------------


def weights(config: RewardConfig) -> dict[str, float]:
    """The names of the reward functions, each with its weight in the sum."""
    return config.functions or {config.function: 1.0}


def combined(config: RewardConfig) -> Callable[[str, str], Reward]:
    """The reward functions of a config as one: value = Σ_f weight_f · value_f, and the steps of all, so weighted too.

    The returned function raises whatever a reward function raises, and ValueError or TypeError where one gives what is
    no reward: a value outside [0, 1], a step outside the text, a step's reward outside [−1, 1].

    Raises:
        UserError: one cannot be imported.
    """
    key = "reward.functions" if config.functions else "reward.function"
    functions = [(find_function(name, key), weight) for name, weight in weights(config).items()]

    def reward(text: str, answer: str) -> Reward:
        value, steps = 0.0, []
        for function, weight in functions:
            one = _checked(function(text, answer), text)
            value += weight * one.value
            steps += [(end, weight * step) for end, step in one.steps]
        return Reward(value, steps)

    return reward


def grade(function: Callable[[str, str], Reward], text: str, answer: str) -> Grade:
    """The grade of one response by a `combined` function; whatever that raises makes it a reward error."""
    try:
        value, steps = function(text, answer)
    except Exception:  # whatever a response does to a grader is a state of it, and counted
        return Grade(0.0, error=True)
    return Grade(value, error=False, steps=tuple(steps))


def find_function(name: str, key: str = "reward.function") -> RewardFunction:
    """The reward function of that name: `math_verify`, or one by import path.

    Args:
        name: what the config says.
        key: where it says so, for the error.

    Raises:
        UserError: it cannot be imported.
    """
    if name == "math_verify":
        try:
            importlib.import_module("math_verify")
        except ImportError as error:
            raise UserError(
                f"{key} is math_verify, but that cannot be imported ({error}): install "
                "asyncppo[rollout-loop] into this environment"
            ) from None
        return math_verify
    module, colon, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute) if colon else None
    except Exception as error:  # whatever a user's module raises when it is imported
        raise UserError(f"{key} {name}: cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise UserError(
            f"{key} is {name!r}: expected `math_verify`, or `package.module:function` that names a function"
        )
    return function  # type: ignore[no-any-return]


def _checked(result: float | Reward, text: str) -> Reward:
    value, steps = result if isinstance(result, Reward) else (result, ())
    checked = Reward(float(value), [(operator.index(end), float(step)) for end, step in steps])
    if not 0 <= checked.value <= 1:
        raise ValueError(f"a reward of {value}: expected a number in [0, 1]")
    for end, step in checked.steps:
        if not (1 <= end <= len(text) and -1 <= step <= 1):
            raise ValueError(f"a step that ends at {end} of {len(text)} characters with reward {step}")
    return checked


# --- the final reward ------------------------------------------------------------------------------------------------


def math_verify(text: str, answer: str) -> float:
    """1 where the last boxed part of a response equals the gold answer as mathematics, else 0."""
    boxed = last_boxed(text)
    if boxed is None or not boxed.strip():
        return 0.0
    gold = last_boxed(answer)
    return float(_equal(boxed.strip(), (gold if gold is not None else answer).strip()))


_REMEMBERED = 1000
"""Longer answers, in characters, are not remembered: a megabyte of digits each would fill the memory."""


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{…}` with balanced braces, or None."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth = 0
        for position in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : position]
        end = start
    return None


def _equal(boxed: str, gold: str) -> bool:
    """Responses of one group often agree: the second of two equal ones costs nothing."""
    return _compare(boxed, gold) if len(boxed) > _REMEMBERED else _remembered(boxed, gold)


@functools.lru_cache(maxsize=4096)
def _remembered(boxed: str, gold: str) -> bool:
    return _compare(boxed, gold)


def _compare(boxed: str, gold: str) -> bool:
    if boxed == gold:
        return True
    parsed = _parse(gold)
    if not parsed:
        raise ValueError(f"the gold answer {gold!r} cannot be parsed")
    given = _parse(boxed)
    return any(_same(one, other) for one in parsed for other in given)


def _same(gold: object, other: object) -> bool:
    """math_verify's word on two expressions. What cannot be compared is not equal, but want of memory is no answer."""
    from math_verify import verify

    try:
        return bool(verify(gold, other, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # as math_verify itself does by default
        return False


def _parse(latex: str) -> list[object]:
    from math_verify import LatexExtractionConfig, parse

    boxed = LatexExtractionConfig(boxed_match_priority=0)
    try:
        found = parse(f"\\boxed{{{latex}}}", extraction_config=[boxed], parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # as math_verify itself does by default: what cannot be parsed is no answer
        return []
    return list(found)


def overlong_penalty(lengths: ArrayLike, limit: int, buffer: int, penalty: float) -> Float32:
    """DAPO's soft overlong punishment, to be added to the final rewards.

        −penalty · clip((length − (limit − buffer)) / buffer, 0, 1)

    Args:
        lengths: [N], tokens of each response.
        limit: `sampling.max_response_tokens`.
        buffer: `reward.overlong_buffer`, in tokens; 0 punishes nothing.
        penalty: `reward.overlong_penalty`, in units of reward.

    Returns:
        [N], in [−penalty, 0].

    Paper: DAPO, arXiv 2503.14476, equation 13.
    """
    beyond = np.maximum(np.asarray(lengths) - (limit - buffer), 0)
    if buffer == 0:
        return np.zeros(beyond.shape, np.float32)
    return np.asarray(-penalty * np.minimum(beyond / buffer, 1), np.float32)


# --- process rewards -------------------------------------------------------------------------------------------------


def line_rewards(text: str, judge: Callable[[int, str], float]) -> list[Step]:
    """A process reward for each line of a response, as the steps of a `Reward`.

    Args:
        text: the response.
        judge: (index of the line from 0, the line without its end) -> its reward in [−1, 1]; 0 is none. Empty lines
            count in the index, and are not asked about: they have no character that could earn a reward.
    """
    steps, end = [], 0
    for index, line in enumerate(text.split("\n")):
        end += len(line)
        reward = judge(index, line) if line else 0.0
        if reward:
            steps.append((end, reward))
        end += 1  # the line's end
    return steps


def step_rewards(steps: Sequence[Step], ids: Int32, text: str, decode: Callable[[Sequence[int]], str]) -> Float32:
    """The steps' rewards on the tokens of one response.

    Args:
        steps: as `Reward.steps`.
        ids: [T], the response's tokens.
        text: the response.
        decode: token ids to text; see `token_of_character`.

    Returns:
        [T], 0 on tokens that complete no step.

    Raises:
        ValueError: as `token_of_character`.
    """
    rewards = np.zeros(len(ids), np.float32)
    if steps:
        ends, values = zip(*sorted(steps), strict=True)
        np.add.at(rewards, token_of_character(ids.tolist(), text, [end - 1 for end in ends], decode), values)
    return rewards


def token_of_character(
    ids: Sequence[int], text: str, positions: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> list[int]:
    """For each character, the token that completes it: the first t for which ids[0..t] decode to text up to there.

    A character of several bytes may be spread over tokens, and half of one decodes to U+FFFD; a special token may be no
    text at all. Nothing is tokenised again, and no token decoded alone: the tokens are bisected by what they decode to,
    in windows that double from the last place at which a character ended together with a token. Exact for byte-level
    BPE, and for any tokenizer whose texts of two parts, cut between characters, are together the text of both.

    Args:
        ids: T tokens.
        text: what they decode to, or the beginning of it: an engine may leave out a stop token.
        positions: indices into `text`, rising.
        decode: token ids to text.

    Raises:
        ValueError: the tokens do not decode to this text.
    """
    found = []
    first = start = 0  # ids[:first] are text[:start]
    for position in positions:
        wanted = text[start : position + 1]
        window = 1
        while not decode(ids[first : first + window]).startswith(wanted):
            if first + window >= len(ids):
                raise ValueError(f"the {len(ids)} tokens do not decode to the text of the response that was graded")
            window *= 2
        token, last = first + window // 2, first + window - 1
        while token < last:
            middle = (token + last) // 2
            if decode(ids[first : middle + 1]).startswith(wanted):
                last = middle
            else:
                token = middle + 1
        found.append(token)
        before = decode(ids[first:token])
        if not before.endswith("\ufffd"):  # which may become another character with the next token
            first, start = token, start + len(before)
    return found
