"""Grading: the responses of a group against the gold answer, in processes that can be killed.

A grading that hangs (`\\boxed{9^{9^{9^9}}}`) is ended with its process and scored 0; a thread could not be ended.
math_verify's own time limits are signals and stay off: the pool's deadline is the limit. What is called is in
`asyncppo.rewards`.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import warnings
from collections.abc import Sequence

from pebble import ProcessExpired, ProcessPool

from asyncppo.config import RewardConfig
from asyncppo.errors import UserError
from asyncppo.lifetime import die_with_parent
from asyncppo.rewards import Grade, combined, grade, weights

log = logging.getLogger("rollout_server.reward")

_START_S = 60.0
"""A worker must be up, with its imports, within this time."""


def _start_worker(parent: int, config: RewardConfig) -> None:
    """Runs first in each worker: die with the server, leave signals to it, and import before the clock ticks."""
    die_with_parent(parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    combined(config)


def _grade_texts(config: RewardConfig, texts: Sequence[str], answer: str) -> list[Grade]:
    """Runs in a worker: every text on its own, so that one that raises costs no other."""
    function = combined(config)
    return [grade(function, text, answer) for text in texts]


class Grader:
    """The pool of grading processes.

    Example:
        grader = Grader(config.reward)
        await grader.self_test()
        grades = await grader.grade(["so \\\\boxed{4}", "so 4"], "4")  # rewards 1.0 and 0.0
    """

    def __init__(self, config: RewardConfig) -> None:
        combined(config)
        self._config = config
        self._timeout_s = config.timeout_s
        self._pool = ProcessPool(
            max_workers=config.workers,
            initializer=_start_worker,
            initargs=(os.getpid(), config),
            context=multiprocessing.get_context("spawn"),
        )

    async def grade(self, texts: Sequence[str], answer: str) -> list[Grade]:
        """Grades of a group's responses.

        The group goes to a worker as one job. Only if that takes longer than `reward.timeout_s` is each response graded
        by itself, with a limit of its own, so that the one that hangs is alone with its timeout.
        """
        return await self._grade(self._config, texts, answer)

    async def _grade(self, config: RewardConfig, texts: Sequence[str], answer: str) -> list[Grade]:
        grades = await self._submit(config, texts, answer)
        if grades is None and len(texts) > 1:
            alone = await asyncio.gather(*(self._submit(config, [text], answer) for text in texts))
            grades = [one[0] if one else Grade(0.0, error=True) for one in alone]
        return grades or [Grade(0.0, error=True)] * len(texts)

    async def _submit(self, config: RewardConfig, texts: Sequence[str], answer: str) -> list[Grade] | None:
        job = self._pool.schedule(_grade_texts, args=(config, list(texts), answer), timeout=self._timeout_s)
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
        """Start the workers; with math_verify, also grade a known-right and a known-wrong answer by that alone.

        Raises:
            UserError: it scores anything but 1 and 0, or no worker comes up.
        """
        is_math = "math_verify" in weights(self._config)
        config = RewardConfig(function="math_verify") if is_math else self._config
        try:
            async with asyncio.timeout(_START_S):
                texts = ["so it is \\boxed{\\frac{1}{2}}", "so it is \\boxed{0.3}"]
                right, wrong = await self._grade(config, texts, "0.5")
        except TimeoutError:
            raise UserError(f"no grading worker came up within {_START_S:.0f} s: is this machine overloaded?") from None
        if is_math and (right, wrong) != (Grade(1.0, False), Grade(0.0, False)):
            raise UserError(
                f"the reward's self-test failed: \\boxed{{\\frac{{1}}{{2}}}} for 0.5 gave {right}, expected 1, and "
                f"\\boxed{{0.3}} gave {wrong}, expected 0: check the installed math-verify and antlr4 runtime"
            )

    def close(self) -> None:
        """End the workers, whatever they do."""
        self._pool.stop()
        self._pool.join(timeout=10)
