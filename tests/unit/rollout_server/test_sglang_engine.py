"""What `SGLangEngine` sends and how it takes what comes back, against an HTTP server that says what a test wants."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from asyncppo.config import SamplingConfig, from_tree
from asyncppo.errors import EngineError
from asyncppo.messages import Bucket, GroupMember
from rollout_server.engine import UNLOADED, Broadcast
from rollout_server.sglang_engine import SGLangEngine, child_arguments

pytestmark = pytest.mark.unit

PROMPT = np.array([5, 6, 7], np.int32)
Answer = Callable[[dict[str, Any]], Any]


class FakeSGLang:
    """Notes every POST; answers with `answers[path]`, or that all went well."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Answer] = {}
        self.version = "-1"
        self.port = 0

    async def reply(self, request: web.Request) -> web.Response:
        if request.path == "/model_info":
            return web.json_response({"weight_version": self.version})
        if request.path == "/server_info":
            return web.json_response({"tp_size": 1})
        body = await request.json()
        self.posts.append((request.path, body))
        answer = self.answers.get(request.path, lambda _: {"success": True, "message": ""})(body)
        if asyncio.iscoroutine(answer):
            answer = await answer
        if isinstance(answer, web.Response):
            return answer
        if isinstance(answer, dict) and answer.get("success"):
            self.version = body.get("weight_version") or body.get("new_version") or self.version
        return web.json_response(answer)

    def paths(self) -> list[str]:
        return [path for path, _ in self.posts]


@asynccontextmanager
async def serving(
    swap_timeout_s: float = 5.0, request_timeout_s: float = 60.0
) -> AsyncIterator[tuple[FakeSGLang, SGLangEngine]]:
    fake = FakeSGLang()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.reply)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.port = runner.addresses[0][1]
    limits = {"swap_timeout_s": swap_timeout_s, "request_timeout_s": request_timeout_s}
    config = from_tree({"data": {"train": "x"}, "actor": {"path": "x"}, "rollout": {"device": "cpu"} | limits})
    engine = SGLangEngine(config, "a/b", Path("sglang.log"), f"http://127.0.0.1:{fake.port}")
    try:
        await engine.start()
        fake.posts.clear()
        yield fake, engine
    finally:
        await engine.close()
        await runner.cleanup()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await scenario

    asyncio.run(limited())


def no(_: dict[str, Any]) -> dict[str, Any]:
    """HTTP 200, and not done."""
    return {"success": False, "message": "no and no"}


def never(_: dict[str, Any]) -> Coroutine[Any, Any, None]:
    return asyncio.sleep(20)


def a_broadcast(fake: FakeSGLang, name: str = "g1") -> Broadcast:
    """Two buckets; the trainer's address is one that accepts connections."""
    member = GroupMember(name=name, address="127.0.0.1", port=fake.port, rank=3, world_size=5, backend="gloo")
    first = Bucket(names=["a", "b"], dtypes=["bfloat16", "bfloat16"], shapes=[[2, 3], [4]])
    return Broadcast([first, Bucket(names=["c"], dtypes=["float32"], shapes=[[1]])], member)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_broadcast_is_taken_bucket_by_bucket_and_the_last_one_bears_the_version_and_empties_the_cache() -> None:
    async def scenario() -> None:
        async with serving() as (fake, engine):
            await engine.pause()
            await engine.load(a_broadcast(fake), 4)
            await engine.resume()
            assert (engine.policy_version, await engine.healthy()) == (4, True)
            assert fake.paths() == [
                "/pause_generation",
                "/init_weights_update_group",
                "/begin_weight_update",
                "/update_weights_from_distributed",
                "/update_weights_from_distributed",
                "/end_weight_update",
                "/continue_generation",
            ]
            group = fake.posts[1][1]
            assert group["rank_offset"] == 3
            assert (group["world_size"], group["group_name"], group["backend"]) == (5, "g1", "gloo")
            first, last = fake.posts[3][1], fake.posts[4][1]
            assert (first["names"], first["shapes"], first["load_format"]) == (
                ["a", "b"],
                [[2, 3], [4]],
                "flattened_bucket",
            )
            assert (first["flush_cache"], "weight_version" in first) == (False, False)
            assert (last["flush_cache"], last["weight_version"]) == (True, "4")

    run(scenario())


def test_a_group_is_joined_once_and_left_for_another() -> None:
    async def scenario() -> None:
        async with serving() as (fake, engine):
            for version, name in ((1, "g1"), (2, "g1"), (3, "g2")):
                await engine.load(a_broadcast(fake, name), version)
            groups = [(path, body["group_name"]) for path, body in fake.posts if path.endswith("_weights_update_group")]
            assert groups == [
                ("/init_weights_update_group", "g1"),
                ("/destroy_weights_update_group", "g1"),
                ("/init_weights_update_group", "g2"),
            ]

    run(scenario())


@pytest.mark.parametrize(
    "path", ["/begin_weight_update", "/update_weights_from_distributed", "/end_weight_update", "disk"]
)
def test_a_load_that_sglang_refuses_with_http_200_leaves_an_engine_that_will_not_go_on(
    path: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with serving() as (fake, engine):
            fake.answers[path if path != "disk" else "/update_weights_from_disk"] = no
            await engine.pause()
            with pytest.raises(EngineError, match="no and no"):
                await engine.load(tmp_path if path == "disk" else a_broadcast(fake), 4)
            assert engine.policy_version == UNLOADED
            with pytest.raises(EngineError, match="a part of the weights of version 4"):
                await engine.resume()
            assert "/continue_generation" not in fake.paths()
            if path != "disk":  # what is left in SGLang is closed
                assert fake.paths()[-2:] == ["/end_weight_update", "/destroy_weights_update_group"]
            fake.answers.clear()
            await engine.restart()
            assert await engine.healthy()

    run(scenario())


def test_a_group_that_sglang_does_not_join_leaves_the_old_weights_and_the_engine_goes_on() -> None:
    async def scenario() -> None:
        async with serving() as (fake, engine):
            fake.answers["/init_weights_update_group"] = no
            await engine.pause()
            with pytest.raises(EngineError, match="no and no"):
                await engine.load(a_broadcast(fake), 4)
            await engine.resume()
            assert (engine.policy_version, await engine.healthy()) == (UNLOADED, True)
            assert "/begin_weight_update" not in fake.paths()

    run(scenario())


@pytest.mark.parametrize("path", ["/update_weights_from_disk", "/init_weights_update_group", "/end_weight_update"])
def test_a_load_that_is_never_answered_ends_at_its_limit_and_the_engine_is_not_healthy(
    path: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with serving(swap_timeout_s=0.3) as (fake, engine):
            fake.answers[path] = never
            await engine.pause()
            with pytest.raises(EngineError, match=f"SGLang did not answer {path} within 0.3 s"):
                await engine.load(tmp_path if path == "/update_weights_from_disk" else a_broadcast(fake), 4)
            assert fake.paths()[-1] == path  # a hung SGLang is asked nothing more
            with pytest.raises(EngineError, match="started again"):
                await engine.resume()
            assert not await engine.healthy()

    run(scenario())


def test_weights_that_cannot_be_looked_at_are_an_error_and_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: Any, **__: Any) -> None:
        raise OSError(116, "Stale file handle")

    async def scenario() -> None:
        async with serving() as (_, engine):
            await engine.pause()
            monkeypatch.setattr(os, "stat", stale)
            with pytest.raises(EngineError, match="there is no such directory"):
                await engine.load(tmp_path / "v1", 1)
            monkeypatch.undo()
            await engine.resume()
            assert await engine.healthy()

    run(scenario())


def test_a_load_that_is_cancelled_leaves_an_engine_that_will_not_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving() as (fake, engine):
            fake.answers["/update_weights_from_disk"] = never
            await engine.pause()
            loading = asyncio.create_task(engine.load(tmp_path, 4))
            await asyncio.sleep(0.2)
            loading.cancel()
            with suppress(asyncio.CancelledError):
                await loading
            with pytest.raises(EngineError, match="a part of the weights of version 4"):
                await engine.resume()

    run(scenario())


def test_an_engine_that_reports_another_version_than_was_loaded_is_not_trusted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving() as (fake, engine):
            fake.answers["/update_weights_from_disk"] = lambda body: web.json_response({"success": True})
            with pytest.raises(EngineError, match="reports weight version -1 after loading 4"):
                await engine.load(tmp_path, 4)
            assert not await engine.healthy()

    run(scenario())


# --- scoring ---------------------------------------------------------------------------------------------------------


def scored(ids: list[int], values: list[float | None]) -> list[dict[str, Any]]:
    pairs = [[value, token, None] for value, token in zip(values, ids, strict=True)]
    return [{"meta_info": {"input_token_logprobs": pairs}}]


def test_a_score_generates_nothing_is_at_temperature_1_and_shares_no_cache() -> None:
    async def scenario() -> None:
        async with serving() as (fake, engine):
            fake.answers["/generate"] = lambda body: scored([5, 6, 7], [None, -1.5, -2.5])
            for _ in range(2):
                np.testing.assert_array_equal(await engine.score(PROMPT), np.array([-1.5, -2.5], np.float32))
            first, second = (body for _, body in fake.posts)
            assert first["input_ids"] == [[5, 6, 7]]
            assert first["logprob_start_len"] == 0
            assert first["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0}
            assert first["extra_key"] != second["extra_key"]

    run(scenario())


def test_a_score_goes_before_all_requests_and_these_have_no_priority() -> None:
    async def scenario() -> None:
        async with serving() as (fake, engine):
            fake.answers["/generate"] = lambda body: scored([5, 6, 7], [None, -1.5, -2.5])
            await engine.score(PROMPT)
            fake.answers["/generate"] = lambda body: [a_reply([11], 0, "stop")]
            await engine.generate(PROMPT, 1, SamplingConfig(max_response_tokens=10))
            assert [body.get("priority") for _, body in fake.posts] == [0, None]

    run(scenario())


@pytest.mark.parametrize(
    ("engine_args", "has_priorities"),
    [({}, True), ({"schedule-policy": "lof"}, True), ({"schedule_policy": "lpm"}, False)],
)
def test_sglang_is_started_with_priorities_unless_its_schedule_policy_knows_none(
    engine_args: dict[str, str], has_priorities: bool
) -> None:
    tree = {"data": {"train": "x"}, "actor": {"path": "x"}, "rollout": {"engine_args": engine_args}}
    arguments = child_arguments(from_tree(tree), "a/b", "cpu", 1)
    assert ("--enable-priority-scheduling" in arguments) == has_priorities


def test_a_request_whose_deadline_has_passed_ends_at_once() -> None:
    async def scenario() -> None:
        async with serving(request_timeout_s=1e-9) as (fake, engine):
            fake.answers["/generate"] = never
            started = time.monotonic()
            with pytest.raises(EngineError, match="SGLang did not answer /generate within"):
                await engine.generate(PROMPT, 1, SamplingConfig(max_response_tokens=10))
            assert time.monotonic() - started < 5

    run(scenario())


@pytest.mark.parametrize(
    "answer", [scored([5, 6], [None, -1.5]), scored([5, 6, 7], [None, -1.5, None]), [], {"meta_info": {}}]
)
def test_a_score_that_does_not_fit_its_tokens_is_an_error(answer: Any) -> None:
    async def scenario() -> None:
        async with serving() as (fake, engine):
            fake.answers["/generate"] = lambda body: answer
            with pytest.raises(EngineError, match="SGLang"):
                await engine.score(PROMPT)

    run(scenario())


# --- resubmitting ----------------------------------------------------------------------------------------------------


def a_reply(ids: list[int], version: int, reason: str, *, queued: bool = False) -> dict[str, Any]:
    """`queued`: as SGLang answers for a request that it aborts in its queue, without log-probs and versions."""
    meta: dict[str, Any] = {"finish_reason": {"type": reason}}
    if not queued:
        meta["output_token_logprobs"] = [[-0.1 * token, token, None] for token in ids]
        meta["weight_versions"] = [{"version": str(version), "start": 0, "end": len(ids)}]
    return {"text": "text", "output_ids": ids, "meta_info": meta}


class Resubmitting:
    """Answers the first request with what it has when it is aborted, and the second one to the end."""

    def __init__(self, fake: FakeSGLang, first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
        self.aborted = asyncio.Event()
        self.asked: list[dict[str, Any]] = []
        self._replies = [first, second]
        fake.answers["/generate"] = self._generate
        fake.answers["/abort_request"] = self._abort

    async def _generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        self.asked.append(body)
        if len(self.asked) == 1:
            await self.aborted.wait()
        return self._replies[len(self.asked) - 1]

    def _abort(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body == {"abort_all": True}
        self.aborted.set()
        return {}


def test_an_aborted_answer_goes_on_after_its_tokens_but_the_last_one_under_a_fresh_cache_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SGLangEngine, "decode", lambda self, ids: "-".join(map(str, ids)))

    async def scenario() -> None:
        async with serving() as (fake, engine):
            engine.swap_mode = "resubmit"
            sglang = Resubmitting(
                fake,
                # 2 may be an end-of-sequence that the abort hid; the third was in SGLang's queue
                [a_reply([11, 12, 2], 0, "abort"), a_reply([13, 2], 0, "stop"), a_reply([8], 0, "abort", queued=True)],
                [a_reply([14, 15], 1, "stop"), a_reply([16], 1, "stop")],
            )
            answering = asyncio.create_task(engine.generate(PROMPT, 3, SamplingConfig(max_response_tokens=10)))
            while not sglang.asked:
                await asyncio.sleep(0.01)
            await engine.pause()
            assert fake.paths()[-1] == "/pause_generation"
            await engine.load(tmp_path, 1)
            assert len(sglang.asked) == 1  # nothing is sent before it is resumed
            await engine.resume()
            one, two, three = await answering
            assert (one.ids.tolist(), one.spans, one.text) == ([11, 12, 14, 15], [(0, 2), (1, 2)], "11-12-14-15")
            np.testing.assert_allclose(one.logprobs, [-1.1, -1.2, -1.4, -1.5], rtol=1e-6)
            assert (two.ids.tolist(), two.spans, two.text) == ([13, 2], [(0, 2)], "text")
            assert (three.ids.tolist(), three.spans) == ([16], [(1, 1)])
            first, second = sglang.asked
            assert second["input_ids"] == [[5, 6, 7, 11, 12], [5, 6, 7]]
            assert [p["max_new_tokens"] for p in second["sampling_params"]] == [8, 10]
            assert first["extra_key"] != second["extra_key"]

    run(scenario())


def test_an_answer_that_somebody_else_aborted_is_an_error_in_either_mode() -> None:
    async def scenario() -> None:
        async with serving() as (fake, engine):
            fake.answers["/generate"] = lambda body: [a_reply([11], 0, "abort")]
            for mode in ("retract", "resubmit"):
                engine.swap_mode = mode
                with pytest.raises(EngineError, match="expected stop or length"):
                    await engine.generate(PROMPT, 1, SamplingConfig(max_response_tokens=10))

    run(scenario())


def test_requests_that_do_not_come_back_when_they_are_aborted_fail_the_swap_at_its_limit() -> None:
    async def scenario() -> None:
        async with serving(swap_timeout_s=0.3) as (fake, engine):
            engine.swap_mode = "resubmit"
            fake.answers["/generate"] = never
            answering = asyncio.create_task(engine.generate(PROMPT, 1, SamplingConfig(max_response_tokens=10)))
            await asyncio.sleep(0.1)
            with pytest.raises(EngineError, match=r"1 requests did not end within 0.3 s of being aborted"):
                await engine.pause()
            assert not await engine.healthy()
            answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering

    run(scenario())
