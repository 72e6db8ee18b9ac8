"""Grading: the responses of a group against the gold answer, in processes that can be killed.

What a model writes is not to be trusted: a grading that hangs (`\\boxed{9^{9^{9^9}}}`), or wants more memory than
`reward.memory_mb`, ends with its process, and is a reward error (`reward.on_error`); a thread could not be ended. The
next grading has a new process. math_verify's own time limits are signals and stay off: the pool's deadline is the
limit. What is called is in `asyncppo.rewards`.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from pebble import ProcessExpired, ProcessPool

from asyncppo.config import RewardConfig
from asyncppo.errors import UserError
from asyncppo.lifetime import die_with_parent
from asyncppo.rewards import Grade, Reward, combined, grade, weights

log = logging.getLogger("rollout_server.reward")

_START_S = 60.0
"""A worker must be up, with its imports, within this time."""
_NEAR = 0.95
"""A worker whose memory came to this part of `reward.memory_mb` may have been refused some: its grade says nothing."""
_OUT_OF_MEMORY = 77
"""Exit code of a worker that has met `reward.memory_mb`."""


def _start_worker(parent: int, config: RewardConfig) -> None:
    """Runs first in each worker: die with the server, leave signals to it, import before the clock ticks, and take no
    more memory than `reward.memory_mb`."""
    die_with_parent(parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    combined(config)
    limit = config.memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _grade_texts(config: RewardConfig, texts: Sequence[str], answer: str) -> list[Grade]:
    """Runs in a worker: every text on its own, so that one that raises costs no other."""
    function = _bounded(combined(config))
    return [grade(function, text, answer) for text in texts]


def _bounded(function: Callable[[str, str], Reward]) -> Callable[[str, str], Reward]:
    """A worker that has run out of memory ends: what it still holds would fail the gradings that come after.

    sympy and math_verify swallow many a MemoryError and go on: so the peak is looked at, too.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]

    def reward(text: str, answer: str) -> Reward:
        before = _peak()
        try:
            result = function(text, answer)
            peak = _peak()
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        if peak > before and peak >= _NEAR * limit:
            os._exit(_OUT_OF_MEMORY)
        return result

    return reward


def _peak() -> int:
    """The most address space that this process has had, in bytes; 0 where the kernel does not say (not Linux)."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmPeak:"):
                return int(line.split()[1]) << 10
    return 0


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
        self._waiting = 0
        self._limits: set[asyncio.Timeout] = set()
        """Of the jobs that wait for the pool."""
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._config.workers,
            initializer=_start_worker,
            initargs=(os.getpid(), self._config),
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

    async def _submit(
        self, config: RewardConfig, texts: Sequence[str], answer: str, *, again: bool = True
    ) -> list[Grade] | None:
        """One job; None where its worker was killed or died. If the pool itself fails, the job has another one."""
        self._waiting += 1
        limit = _START_S + self._waiting * (_START_S + self._timeout_s)  # should every job before it kill its worker
        pool = self._pool
        waiting = asyncio.timeout(limit)
        try:
            async with waiting:
                self._limits.add(waiting)
                try:
                    job = pool.schedule(_grade_texts, args=(config, list(texts), answer), timeout=self._timeout_s)
                    grades: list[Grade] = await asyncio.wrap_future(job)
                finally:
                    self._limits.discard(waiting)
        except TimeoutError:
            if not waiting.expired():
                log.warning("grading %d responses took longer than %g s: worker killed", len(texts), self._timeout_s)
                return None
            await self._replace(pool, f"no answer within {limit:.0f} s")
        except ProcessExpired as error:
            why = "reward.memory_mb" if error.exitcode == _OUT_OF_MEMORY else f"exit code {error.exitcode}"
            log.warning("a grading worker died (%s) on %d responses", why, len(texts))
            return None
        except RuntimeError as error:  # pebble's word for a pool whose workers all died at a bad moment
            await self._replace(pool, f"{type(error).__name__}: {error}")
        else:
            return grades
        finally:
            self._waiting -= 1
        return await self._submit(config, texts, answer, again=False) if again else None

    async def _replace(self, pool: ProcessPool, why: str) -> None:
        """A new pool for one that is of no more use. It answers nobody any more, so the limit of whoever still waits
        for it passes now."""
        if self._pool is pool:
            log.error("the grading workers are replaced: %s", why)
            self._pool = self._new_pool()
            for limit in self._limits:
                if not limit.expired():
                    limit.reschedule(asyncio.get_running_loop().time())
            await asyncio.to_thread(_end, pool)

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
                f"\\boxed{{0.3}} gave {wrong}, expected 0: check the installed math-verify and antlr4 runtime, and "
                "that reward.memory_mb is enough for them"
            )

    def close(self) -> None:
        """End the workers, whatever they do."""
        _end(self._pool)


def _end(pool: ProcessPool) -> None:
    pool.stop()
    pool.join(timeout=10)
