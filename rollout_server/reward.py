"""Grading: the responses of a group against the gold answer, in processes that can be killed.

A grading that hangs (`\\boxed{9^{9^{9^9}}}`) is ended with its process and scored 0; a thread could not be ended. The
only importer of math_verify, and only inside the workers. math_verify's own time limits are signals and stay off: the
pool's deadline is the limit.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pebble import ProcessExpired, ProcessPool

from asyncppo.config import RewardConfig
from asyncppo.errors import UserError
from asyncppo.lifetime import die_with_parent

log = logging.getLogger("rollout_server.reward")

RewardFunction = Callable[[str, str], float]
"""(response text, gold answer) -> reward in [0, 1]."""

_START_S = 60.0
"""A worker must be up, with its imports, within this time."""


@dataclass(frozen=True)
class Grade:
    """What a response got; `error` where grading failed or timed out, and the reward is 0 for that reason."""

    reward: float
    error: bool


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


def math_verify(text: str, answer: str) -> float:
    """1 where the last boxed part of a response equals the gold answer as mathematics, else 0."""
    boxed = last_boxed(text)
    if boxed is None or not boxed.strip():
        return 0.0
    gold = last_boxed(answer)
    return float(_equal(boxed.strip(), (gold if gold is not None else answer).strip()))


@functools.lru_cache(maxsize=4096)
def _equal(boxed: str, gold: str) -> bool:
    """Responses of one group often agree: the second of two equal ones costs nothing."""
    if boxed == gold:
        return True
    from math_verify import verify

    parsed = _parse(gold)
    if not parsed:
        raise ValueError(f"the gold answer {gold!r} cannot be parsed")
    return bool(verify(parsed, _parse(boxed), timeout_seconds=None))


def _parse(latex: str) -> list[object]:
    from math_verify import LatexExtractionConfig, parse

    boxed = LatexExtractionConfig(boxed_match_priority=0)
    return list(parse(f"\\boxed{{{latex}}}", extraction_config=[boxed], parsing_timeout=None))


def find_function(name: str) -> RewardFunction:
    """The reward function of `reward.function`.

    Raises:
        UserError: it cannot be imported.
    """
    if name == "math_verify":
        try:
            importlib.import_module("math_verify")
        except ImportError as error:
            raise UserError(
                f"reward.function is math_verify, but that cannot be imported ({error}): install "
                "asyncppo[rollout-loop] into this environment"
            ) from None
        return math_verify
    module, colon, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute) if colon else None
    except Exception as error:  # whatever a user's module raises when it is imported
        raise UserError(f"reward.function {name}: cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise UserError(
            f"reward.function is {name!r}: expected `math_verify`, or `package.module:function` that names a function"
        )
    return function  # type: ignore[no-any-return]


def _start_worker(parent: int, function: str) -> None:
    """Runs first in each worker: die with the server, leave signals to it, and import before the clock ticks."""
    die_with_parent(parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    find_function(function)


def _grade(function: str, texts: Sequence[str], answer: str) -> list[Grade]:
    """Runs in a worker: every text on its own, so that one that raises costs no other."""
    call = find_function(function)
    return [_grade_one(call, text, answer) for text in texts]


def _grade_one(function: RewardFunction, text: str, answer: str) -> Grade:
    try:
        reward = float(function(text, answer))
    except Exception:  # an answer that cannot be graded scores 0, and is counted
        return Grade(0.0, error=True)
    if not (math.isfinite(reward) and 0 <= reward <= 1):
        return Grade(0.0, error=True)
    return Grade(reward, error=False)


class Grader:
    """The pool of grading processes.

    Example:
        grader = Grader(config.reward)
        await grader.self_test()
        grades = await grader.grade(["so \\\\boxed{4}", "so 4"], "4")  # rewards 1.0 and 0.0
    """

    def __init__(self, config: RewardConfig) -> None:
        find_function(config.function)
        self._function = config.function
        self._timeout_s = config.timeout_s
        self._pool = ProcessPool(
            max_workers=config.workers,
            initializer=_start_worker,
            initargs=(os.getpid(), config.function),
            context=multiprocessing.get_context("spawn"),
        )

    async def grade(self, texts: Sequence[str], answer: str) -> list[Grade]:
        """Grades of a group's responses.

        The group goes to a worker as one job. Only if that takes longer than `reward.timeout_s` is each response graded
        by itself, with a limit of its own, so that the one that hangs is alone with its timeout.
        """
        grades = await self._submit(texts, answer)
        if grades is None and len(texts) > 1:
            alone = await asyncio.gather(*(self._submit([text], answer) for text in texts))
            grades = [grade[0] if grade else Grade(0.0, error=True) for grade in alone]
        return grades or [Grade(0.0, error=True)] * len(texts)

    async def _submit(self, texts: Sequence[str], answer: str) -> list[Grade] | None:
        job = self._pool.schedule(_grade, args=(self._function, list(texts), answer), timeout=self._timeout_s)
        try:
            grades: list[Grade] = await asyncio.wrap_future(job)
        except TimeoutError:
            log.warning("grading %d responses took longer than %g s: worker killed", len(texts), self._timeout_s)
            return None
        except ProcessExpired as error:
            log.warning("a grading worker died (exit code %s) on %d responses", error.exitcode, len(texts))
            return None
        return grades

    async def self_test(self) -> None:
        """Start the workers; with math_verify, also grade a known-right and a known-wrong answer.

        Raises:
            UserError: it scores anything but 1 and 0, or no worker comes up.
        """
        try:
            async with asyncio.timeout(_START_S):
                texts = ["so it is \\boxed{\\frac{1}{2}}", "so it is \\boxed{0.3}"]
                right, wrong = await self.grade(texts, "0.5")
        except TimeoutError:
            raise UserError(f"no grading worker came up within {_START_S:.0f} s: is this machine overloaded?") from None
        if self._function == "math_verify" and (right, wrong) != (Grade(1.0, False), Grade(0.0, False)):
            raise UserError(
                f"the reward's self-test failed: \\boxed{{\\frac{{1}}{{2}}}} for 0.5 gave {right}, expected 1, and "
                f"\\boxed{{0.3}} gave {wrong}, expected 0: check the installed math-verify and antlr4 runtime"
            )

    def close(self) -> None:
        """End the workers, whatever they do."""
        self._pool.stop()
        self._pool.join(timeout=10)
