"""Claims about grading: what scores, what does not, and that nothing that a response says can stop the server."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from asyncppo.config import RewardConfig
from asyncppo.rewards import Grade
from rollout_server.reward import Grader

FUNCTIONS = """
import os, time
from asyncppo.rewards import Reward

def by_word(text, answer):
    if text == "hang":
        time.sleep(60)
    if text == "die":
        os._exit(3)
    if text == "memory":
        return float(len([bytearray(1 << 24) for _ in range(200)]))
    if text == "swallow":
        try:
            [bytearray(1 << 24) for _ in range(200)]
        except MemoryError:
            return 0.0
    if text == "pid":
        return 1 / os.getpid()
    if text == "raise":
        raise ValueError("no")
    if text == "nan":
        return float("nan")
    if text == "two":
        return 2.0
    if text == "steps":
        return Reward(0.5, [(2, 1.0), (5, -0.5)])
    return 1.0 if text == answer else 0.0
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
    grades = grade(config, ["yes", "hang", "no", "die", "raise", "nan", "two", "steps"], "yes")
    assert [g.reward for g in grades] == [1, 0, 0, 0, 0, 0, 0, 0.5]
    assert [g.error for g in grades] == [False, True, False, True, True, True, True, False]
    assert [g.steps for g in grades] == [()] * 7 + [((2, 1.0), (5, -0.5))]
    assert time.monotonic() - started < 30


@pytest.mark.real
def test_several_functions_are_summed_in_the_workers_and_math_verify_is_tested_alone(functions: str) -> None:
    async def scenario() -> list[Grade]:
        grader = Grader(RewardConfig(functions={"math_verify": 0.5, functions: 0.25}))
        try:
            await grader.self_test()
            return await grader.grade(["\\boxed{4}", "4", "raise", "steps"], "4")
        finally:
            grader.close()

    halved = Grade(0.125, False, ((2, 0.25), (5, -0.125)))
    assert asyncio.run(scenario()) == [Grade(0.5, False), Grade(0.25, False), Grade(0.0, True), halved]


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


BOMBS = {
    "a tower of powers": "\\boxed{9^{9^{9^9}}}",
    "nested braces": "\\boxed{" + "{" * 20_000 + "1" + "}" * 20_000 + "}",
    "a megabyte of digits": "\\boxed{" + "7" * 1_000_000 + "}",
    "boxes that never close": "\\boxed{" * 50_000,
}


@pytest.mark.real
def test_whatever_a_model_writes_is_graded_or_a_reward_error_in_time_and_the_next_answer_is_graded() -> None:
    limit = 1.0

    async def scenario() -> None:
        grader = Grader(RewardConfig(timeout_s=limit, memory_mb=1024))
        try:
            await grader.self_test()
            before = psutil.Process().memory_info().rss
            for name, text in BOMBS.items():
                started = time.monotonic()
                (bomb,) = await grader.grade([text], "8")
                took = time.monotonic() - started
                assert bomb.reward == 0, name
                assert took < limit + 8, f"{name}: {took} s with the start of a worker that the last one had killed"
                assert await grader.grade(["\\boxed{8.0}", "\\boxed{9}"], "8") == [Grade(1.0, False), Grade(0.0, False)]
            assert psutil.Process().memory_info().rss - before < 64 << 20
        finally:
            grader.close()

    asyncio.run(scenario())


@pytest.mark.real
@pytest.mark.parametrize("text", ["memory", "swallow"])
def test_a_response_that_wants_more_memory_than_is_allowed_is_alone_a_reward_error(functions: str, text: str) -> None:
    async def scenario() -> None:
        grader = Grader(RewardConfig(function=functions, memory_mb=1024))
        try:
            before = await grader.grade(["pid", text, "yes"], "yes")
            assert [(g.reward, g.error) for g in before[1:]] == [(0, True), (1, False)]
            (after,) = await grader.grade(["pid"], "yes")
            assert after.reward not in (0, before[0].reward)  # another process: the full one has ended
        finally:
            grader.close()

    asyncio.run(scenario())


@pytest.mark.real
@pytest.mark.parametrize("how", ["killed when idle", "stopped for good"])
def test_workers_that_are_gone_are_replaced(functions: str, how: str) -> None:
    async def scenario() -> None:
        grader = Grader(RewardConfig(function=functions))
        try:
            (grade,) = await grader.grade(["pid"], "yes")
            if how == "killed when idle":
                os.kill(round(1 / grade.reward), signal.SIGKILL)
            else:
                grader._pool.stop()
            async with asyncio.timeout(30):
                assert await grader.grade(["yes"], "yes") == [Grade(1.0, False)]
        finally:
            grader.close()

    asyncio.run(scenario())


class Pool:
    """One that answers at once, or never."""

    def __init__(self, answers: bool) -> None:
        self.answers, self.stopped = answers, False

    def schedule(self, _: object, args: tuple[RewardConfig, list[str], str], timeout: float) -> Future[list[Grade]]:
        if self.stopped:
            raise RuntimeError("The Pool is not active")
        job: Future[list[Grade]] = Future()
        if self.answers:
            job.set_result([Grade(1.0, False) for _ in args[1]])
        return job

    def stop(self) -> None:
        self.stopped = True

    def join(self, timeout: float) -> None:
        pass


@pytest.mark.unit
def test_jobs_of_workers_that_are_replaced_have_the_new_ones_at_once(
    functions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = iter([Pool(answers=False), Pool(answers=True)])
    monkeypatch.setattr(Grader, "_new_pool", lambda _: next(pools))

    async def scenario() -> None:
        grader = Grader(RewardConfig(function=functions))
        waiting = [asyncio.create_task(grader.grade(["a"], "a")) for _ in range(3)]
        await asyncio.sleep(0)
        grader._pool.stop()
        async with asyncio.timeout(10):
            assert await asyncio.gather(grader.grade(["a"], "a"), *waiting) == [[Grade(1.0, False)]] * 4

    asyncio.run(scenario())
