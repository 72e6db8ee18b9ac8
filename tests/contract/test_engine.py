"""What every generation engine has to do; the same claims for the scripted twin and for a real SGLang on the CPU."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from msgspec.structs import replace

from asyncppo import ports
from asyncppo.config import Config, SamplingConfig, from_tree
from asyncppo.errors import ConfigError, EngineError
from asyncppo.messages import Bucket, Float32, GroupMember, Int32
from rollout_server.engine import UNLOADED, Broadcast, Engine, Response, ScriptedEngine
from rollout_server.self_test import self_test
from rollout_server.sglang_engine import KEY_VARIABLE, SGLangEngine, child_arguments

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "0123456789abcdef"
LONG = 400
"""Tokens of a response that a swap finds in progress."""
AT_ONCE = 8
"""Responses that the real SGLang generates at once; others wait."""
PROMPT = np.array([1, 50, 60, 70, 80, 90], np.int32)


@dataclass
class Kind:
    """How to get an engine of one kind, and published weights for it."""

    open: Callable[[], Engine]
    weights: Callable[[int], Path]
    is_real: bool
    sender: Sender
    """Who broadcasts to it."""


@dataclass
class Sender:
    """A trainer's end of broadcasts, by gloo; for a scripted engine it says only what it would send."""

    weights: Callable[[int], Path]
    is_real: bool
    ranks: int = 1
    name: str = ""
    """Of the group that is open; another one is opened where it is empty."""
    _group: Any = None
    _port: int = 0

    async def swap(self, engine: Engine, version: int, *, stop_after: int | None = None) -> None:
        """Broadcast a version into the engine; `stop_after` so many buckets the sender goes away."""
        await engine.pause()
        load = engine.load(self.open(version), version)
        sending = asyncio.to_thread(self.send, version, stop_after)
        for outcome in await asyncio.gather(load, sending, return_exceptions=True):
            if outcome is not None:
                raise outcome
        await engine.resume()

    def open(self, version: int) -> Broadcast:
        """What a version is announced as, in the group that is open or a new one."""
        if not self.name:
            self.name, self._port, self._group = f"test {time.time_ns()}", ports.free_port(), None
        member = GroupMember(
            name=self.name,
            address="127.0.0.1",
            port=self._port,
            rank=1,
            world_size=1 + self.ranks,
            backend="gloo",
        )
        buckets = [
            Bucket(
                names=[name for name, _ in bucket],
                dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                shapes=[list(tensor.shape) for _, tensor in bucket],
            )
            for bucket in self.buckets(version)
        ]
        return Broadcast(buckets, member)

    def buckets(self, version: int) -> list[list[tuple[str, Any]]]:
        """The version's tensors, some seven a bucket."""
        if not self.is_real:
            return []
        from safetensors.torch import load_file

        tensors = list(load_file(self.weights(version) / "model.safetensors").items())
        return [tensors[start : start + 7] for start in range(0, len(tensors), 7)]

    def send(self, version: int, stop_after: int | None = None) -> None:
        if not self.is_real:
            return
        import torch
        from torch.distributed import broadcast, destroy_process_group

        if self._group is None:
            self._group = self._join()
        for bucket in self.buckets(version)[:stop_after]:
            flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])
            broadcast(flat, src=0, group=self._group)
        if stop_after is not None:
            destroy_process_group(self._group)
            self.name, self._group = "", None  # its connections end with the last reference to it

    def _join(self) -> object:
        """As rank 0, of a group made as SGLang makes its end of it."""
        from torch.distributed import Backend, PrefixStore, TCPStore, distributed_c10d

        limit = timedelta(seconds=30)
        store = TCPStore("127.0.0.1", self._port, None, is_master=True, timeout=limit, wait_for_workers=False)
        group, _ = distributed_c10d._new_process_group_helper(
            1 + self.ranks,
            0,
            [],
            Backend("gloo"),
            PrefixStore(self.name, store),
            group_name=self.name,
            timeout=limit,
        )
        distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(1 + self.ranks)}
        return group


def a_config(model: Path, tensor_parallel: int = 1) -> Config:
    return from_tree(
        {
            "data": {"train": "x", "max_prompt_tokens": 32},
            "actor": {"path": str(model)},
            "sampling": {"group_size": 8, "max_response_tokens": LONG},
            "rollout": {
                "device": "cpu",
                "dtype": "float32",
                "max_groups": 8,
                "start_timeout_s": 240,
                "tensor_parallel": tensor_parallel,
                "engine_args": {"max_running_requests": AT_ONCE},
            },
        }
    )


@pytest.fixture(scope="session")
def versions(quick_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Weights of a version: those of the base, its last norm scaled, so that every version has other log-probs."""
    from safetensors.numpy import load_file, save_file

    root = tmp_path_factory.mktemp("versions")

    def weights(version: int) -> Path:
        directory = root / f"v{version}"
        if not directory.exists():
            shutil.copytree(quick_base / "actor", directory)
            tensors = load_file(directory / "model.safetensors")
            tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(0.25 + 0.1 * version)
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return weights


@contextlib.contextmanager
def a_server(python: str, model: Path, log: Path, tensor_parallel: int = 1) -> Iterator[str]:
    """A real SGLang; yields its URL."""
    port = ports.free_port()
    arguments = child_arguments(a_config(model, tensor_parallel), str(model), "cpu", port)
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", KEY_VARIABLE: KEY}
    if tensor_parallel > 1:
        cores = sorted(os.sched_getaffinity(0))
        bound = "|".join(str(cores[rank % len(cores)]) for rank in range(tensor_parallel))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = bound
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, "-m", "rollout_server.sglang_process", *arguments],
            cwd=ROOT,
            env=os.environ | environment | {"ASYNCPPO_ENGINE_PARENT": str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def sglang_url(
    quick_base: Path, rollout_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """A real SGLang, one for all claims, and its log."""
    log = tmp_path_factory.mktemp("sglang") / "sglang.log"
    with a_server(rollout_python, quick_base / "actor", log) as url:
        yield url, log


@pytest.fixture(
    params=[pytest.param("scripted", marks=pytest.mark.unit), pytest.param("sglang", marks=pytest.mark.real)]
)
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    if request.param == "scripted":

        def script(prompt: tuple[int, ...], index: int, version: int) -> list[tuple[int, float]]:
            length = 5 if version < 1 and index == 0 else LONG + 100
            return [(prompt[0] + index, -0.1 * (version + 2))] * length

        def scores(ids: tuple[int, ...], version: int) -> list[float]:
            return [-0.1 * (version + 2)] * (len(ids) - 1)

        def on_load(weights: Path | Broadcast, version: int) -> None:
            if isinstance(weights, Path) and not weights.is_dir():
                raise EngineError(f"{weights} is not there")

        def weights(version: int) -> Path:
            return tmp_path

        sender = Sender(weights, is_real=False)
        return Kind(lambda: ScriptedEngine(script, str, 0.0005, on_load, scores), weights, False, sender)
    found: Kind = request.getfixturevalue("sglang")
    return found


@pytest.fixture
def sglang(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    url, log = request.getfixturevalue("sglang_url")
    model = request.getfixturevalue("quick_base") / "actor"
    weights = request.getfixturevalue("versions")
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    return Kind(lambda: SGLangEngine(a_config(model), str(model), log, url), weights, True, Sender(weights, True))


@asynccontextmanager
async def started(kind: Kind) -> AsyncIterator[Engine]:
    engine = kind.open()
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def swap(kind: Kind, engine: Engine, version: int) -> None:
    await engine.pause()
    await engine.load(kind.weights(version), version)
    await engine.resume()


async def swapped_in_progress(
    kind: Kind,
    engine: Engine,
    sampling: SamplingConfig,
    second_swap: Callable[[Engine, int], Awaitable[None]] | None = None,
) -> list[Response]:
    """Eight responses that began under version 1 and, some of them, went on under version 2."""
    for patience in (0.1, 0.2, 0.4, 0.8, 0.05, 0.02):  # a slow machine has not begun yet, a fast one has ended
        await swap(kind, engine, 1)
        answers = asyncio.create_task(engine.generate(PROMPT, 8, sampling))
        await asyncio.sleep(patience)
        await (second_swap(engine, 2) if second_swap else swap(kind, engine, 2))
        responses = await answers
        if any([version for version, _ in response.spans] == [1, 2] for response in responses):
            return responses
    raise AssertionError("no swap met a response in progress")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(270):
            await scenario

    asyncio.run(limited())


def check(responses: list[Response], limit: int) -> None:
    """What holds for every response."""
    for response in responses:
        assert (response.ids.dtype.name, response.logprobs.dtype.name) == ("int32", "float32")
        assert response.ids.shape == response.logprobs.shape
        assert 1 <= response.ids.size <= limit
        assert np.isfinite(response.logprobs).all()
        assert (response.logprobs <= 0).all()
        assert sum(tokens for _, tokens in response.spans) == response.ids.size
        versions = [version for version, _ in response.spans]
        assert versions == sorted(set(versions))
        assert not response.truncated or response.ids.size == limit


def test_a_group_has_n_responses_under_the_version_that_was_loaded(kind: Kind) -> None:
    async def scenario() -> None:
        async with started(kind) as engine:
            assert engine.policy_version == UNLOADED
            assert await engine.healthy()
            await swap(kind, engine, 1)
            assert engine.policy_version == 1
            responses = await engine.generate(PROMPT, 8, SamplingConfig(max_response_tokens=20))
            assert len(responses) == 8
            check(responses, 20)
            assert {version for response in responses for version, _ in response.spans} == {1}
            assert all(response.text for response in responses)

    run(scenario())


def test_the_tokens_of_a_response_decode_to_its_text(kind: Kind) -> None:
    async def scenario() -> None:
        async with started(kind) as engine:
            await swap(kind, engine, 1)
            # so hot that special tokens and single bytes of characters are drawn
            sampling = SamplingConfig(max_response_tokens=60, temperature=20.0)
            responses = await engine.generate(PROMPT, 8, sampling)
            assert [engine.decode(response.ids.tolist()) for response in responses] == [r.text for r in responses]
            assert not kind.is_real or any("\ufffd" in response.text for response in responses)

    run(scenario())


def test_a_response_that_reaches_the_limit_is_truncated_and_one_that_ends_is_not(kind: Kind) -> None:
    async def scenario() -> None:
        async with started(kind) as engine:
            await swap(kind, engine, 0)
            responses: list[Response] = []
            while len({response.truncated for response in responses}) < 2:
                responses += await engine.generate(PROMPT, 8, SamplingConfig(max_response_tokens=200))
            check(responses, 200)
            if kind.is_real:  # 2 is end-of-sequence, and is a token of the response that it ends
                assert all(response.truncated == (response.ids[-1] != 2) for response in responses)

    run(scenario())


def test_requests_in_progress_survive_a_swap_and_every_token_bears_its_version(kind: Kind) -> None:
    async def scenario() -> None:
        async with started(kind) as engine:
            await swap(kind, engine, 1)
            responses = await swapped_in_progress(kind, engine, SamplingConfig(max_response_tokens=LONG))
            check(responses, LONG)
            assert len(responses) == 8

    run(scenario())


def test_a_paused_engine_makes_no_token(kind: Kind) -> None:
    async def scenario() -> None:
        async with started(kind) as engine:
            await swap(kind, engine, 1)
            await engine.pause()
            answers = asyncio.create_task(engine.generate(PROMPT, 1, SamplingConfig(max_response_tokens=4)))
            await asyncio.sleep(0.5)
            assert not answers.done()
            await engine.resume()
            check(await answers, 4)

    run(scenario())


def test_weights_that_are_not_there_are_an_error_and_the_old_ones_stay(kind: Kind) -> None:
    async def scenario() -> None:
        async with started(kind) as engine:
            await swap(kind, engine, 1)
            await engine.pause()
            with pytest.raises(EngineError):
                await engine.load(Path("/nowhere/at/all"), 2)
            await engine.resume()
            assert engine.policy_version == 1
            assert await engine.healthy()
            responses = await engine.generate(PROMPT, 1, SamplingConfig(max_response_tokens=4))
            assert [version for version, _ in responses[0].spans] == [1]

    run(scenario())


def test_a_score_is_what_generate_says_of_the_same_tokens_and_follows_the_weights(kind: Kind) -> None:
    async def scenario() -> None:
        async with started(kind) as engine:
            scores = {}
            for version in (1, 2):
                await swap(kind, engine, version)
                response = (await engine.generate(PROMPT, 1, SamplingConfig(max_response_tokens=40)))[0]
                score = await engine.score(whole(response))
                assert (score.dtype.name, score.shape) == ("float32", (len(PROMPT) + response.ids.size - 1,))
                np.testing.assert_allclose(score[len(PROMPT) - 1 :], response.logprobs, atol=1e-5)
                scores[version] = await engine.score(PROMPT)
            assert np.abs(scores[1] - scores[2]).max() > 0.01
            assert (await engine.score(PROMPT[:1])).size == 0

    run(scenario())


def test_a_paused_engine_scores_nothing_and_says_so(kind: Kind) -> None:
    async def scenario() -> None:
        async with started(kind) as engine:
            await swap(kind, engine, 1)
            await engine.pause()
            with pytest.raises(EngineError, match="paused"):
                await engine.score(PROMPT)
            await engine.resume()
            assert (await engine.score(PROMPT)).size == len(PROMPT) - 1

    run(scenario())


def test_what_is_broadcast_is_what_the_same_version_is_from_disk_also_in_the_group_of_the_last_one(kind: Kind) -> None:
    async def scenario() -> None:
        async with started(kind) as engine:
            scores = {}
            for version in (1, 2, 3):
                await swap(kind, engine, version)
                scores[version] = await engine.score(PROMPT)
            for version, new_group in ((1, False), (2, False), (3, True)):
                if new_group:
                    kind.sender.name = ""
                await kind.sender.swap(engine, version)
                assert engine.policy_version == version
                assert await engine.healthy()
                np.testing.assert_array_equal(await engine.score(PROMPT), scores[version])

    run(scenario())


def test_requests_in_progress_survive_a_broadcast(kind: Kind) -> None:
    async def scenario() -> None:
        async with started(kind) as engine:
            responses = await swapped_in_progress(
                kind, engine, SamplingConfig(max_response_tokens=LONG), kind.sender.swap
            )
            check(responses, LONG)
            for response in responses[:3] if kind.is_real else []:
                assert np.abs(response.logprobs - expected_logprobs(kind, response)).max() < 1e-4

    run(scenario())


def test_a_cancelled_request_leaves_the_engine_to_the_others(kind: Kind) -> None:
    async def scenario() -> None:
        async with started(kind) as engine:
            await swap(kind, engine, 1)
            unwanted = asyncio.create_task(engine.generate(PROMPT, 8, SamplingConfig(max_response_tokens=LONG)))
            await asyncio.sleep(0.1)
            unwanted.cancel()
            with pytest.raises(asyncio.CancelledError):
                await unwanted
            check(await engine.generate(PROMPT, 2, SamplingConfig(max_response_tokens=4)), 4)

    run(scenario())


def test_an_engine_that_was_started_again_has_its_starting_weights(kind: Kind) -> None:
    async def scenario() -> None:
        async with started(kind) as engine:
            await swap(kind, engine, 1)
            await engine.restart()
            assert engine.policy_version == UNLOADED
            await swap(kind, engine, 0)
            check(await engine.generate(PROMPT, 1, SamplingConfig(max_response_tokens=4)), 4)

    run(scenario())


# --- SGLang alone ----------------------------------------------------------------------------------------------------


def logprobs_of(directory: Path, ids: Int32, temperature: float = 1.0) -> Float32:
    """Float32 log-probs of ids[1:] by transformers, with nothing of SGLang in it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0] / temperature
    rows = torch.log_softmax(logits, dim=-1)[:-1]
    values: Float32 = rows.gather(1, tokens[1:, None])[:, 0].numpy()
    return values


def whole(response: Response) -> Int32:
    """The prompt and the response."""
    return np.concatenate([PROMPT, response.ids])


def expected_logprobs(kind: Kind, response: Response, temperature: float = 1.0) -> Float32:
    """Of a response's tokens, each by the weights that its span names."""
    parts, start = [], len(PROMPT) - 1
    for version, tokens in response.spans:
        parts.append(logprobs_of(kind.weights(version), whole(response), temperature)[start : start + tokens])
        start += tokens
    return np.concatenate(parts)


@pytest.mark.real
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(max_response_tokens=LONG),
        SamplingConfig(max_response_tokens=LONG, temperature=0.7),
        SamplingConfig(max_response_tokens=LONG, temperature=1.3, top_p=0.8, top_k=20),
    ],
    ids=["plain", "temperature", "truncated sampling"],
)
def test_logprobs_are_those_of_the_spans_weights_at_the_temperature_and_before_top_p_and_top_k(
    sglang: Kind, sampling: SamplingConfig
) -> None:
    async def scenario() -> None:
        async with started(sglang) as engine:
            differences = []
            for response in await swapped_in_progress(sglang, engine, sampling):
                expected = expected_logprobs(sglang, response, sampling.temperature)
                assert np.abs(response.logprobs - expected).max() < 1e-4
                old, new = (logprobs_of(sglang.weights(version), whole(response)) for version in (1, 2))
                differences.append(np.abs(old - new).max())
            assert max(differences) > 0.01  # the claim is not empty; a response of one token may differ by less

    run(scenario())


@pytest.mark.real
def test_resubmitted_requests_have_the_logprobs_of_their_spans_and_lose_no_token(sglang: Kind) -> None:
    async def scenario() -> None:
        async with started(sglang) as engine:
            engine.swap_mode = "resubmit"
            assert engine.description.endswith("swapped by resubmitting")
            responses = await swapped_in_progress(sglang, engine, SamplingConfig(max_response_tokens=LONG))
            check(responses, LONG)
            assert len(responses) == 8
            for response in responses:
                assert response.truncated == (response.ids[-1] != 2)
                assert 2 not in response.ids[:-1]  # none went on after its end-of-sequence
                assert response.text == engine.decode(response.ids.tolist())
                assert np.abs(response.logprobs - expected_logprobs(sglang, response)).max() < 1e-4

    run(scenario())


@pytest.mark.real
def test_a_broadcast_that_ends_in_the_middle_leaves_an_engine_that_does_not_go_on_with_half_of_it(sglang: Kind) -> None:
    async def scenario() -> None:
        async with started(sglang) as engine:
            await swap(sglang, engine, 1)
            with pytest.raises(EngineError, match="/update_weights_from_distributed"):
                await sglang.sender.swap(engine, 2, stop_after=1)
            assert not await engine.healthy()
            with pytest.raises(EngineError, match=r"a part of the weights of version 2.* started again"):
                await engine.resume()
            await engine.restart()
            await sglang.sender.swap(engine, 2)  # in a new group
            assert await engine.healthy()

    run(scenario())


@pytest.mark.real
def test_a_broadcast_without_a_trainer_is_an_error_in_seconds_and_the_old_weights_stay(sglang: Kind) -> None:
    async def scenario() -> None:
        async with started(sglang) as engine:
            await swap(sglang, engine, 1)
            before = await engine.score(PROMPT)
            await engine.pause()
            started_at = time.monotonic()
            with pytest.raises(EngineError, match=r"no trainer broadcasts at 127.0.0.1, port \d+ \(publish.address\)"):
                await engine.load(sglang.sender.open(2), 2)
            assert time.monotonic() - started_at < 20
            await engine.resume()
            assert (engine.policy_version, await engine.healthy()) == (1, True)
            np.testing.assert_array_equal(await engine.score(PROMPT), before)

    run(scenario())


class ScoresInTurn(SGLangEngine):
    """An SGLang whose scores are requests like all others."""

    async def _post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> bytes:
        return await super()._post(path, {key: body[key] for key in body if key != "priority"}, timeout_s)


@pytest.mark.real
def test_a_score_waits_for_none_of_the_responses_that_a_swap_has_retracted_and_spoils_none(
    sglang: Kind, sglang_url: tuple[str, Path], quick_base: Path
) -> None:
    url, log = sglang_url
    model = quick_base / "actor"
    in_turn = Kind(lambda: ScoresInTurn(a_config(model), str(model), log, url), sglang.weights, True, sglang.sender)

    async def scenario() -> None:
        async with started(sglang) as engine, started(in_turn) as other:
            await swap(sglang, engine, 2)
            expected = await engine.score(PROMPT)
            await swap(sglang, engine, 1)
            sampling = SamplingConfig(max_response_tokens=LONG)
            groups = [asyncio.create_task(engine.generate(PROMPT, AT_ONCE, sampling)) for _ in range(3)]
            await asyncio.sleep(0.5)
            await swap(sglang, engine, 2)
            waiting = asyncio.create_task(other.score(PROMPT))
            await asyncio.sleep(0.1)  # its turn comes after all these responses
            for _ in range(4):  # whatever runs makes room
                np.testing.assert_allclose(await engine.score(PROMPT), expected, atol=1e-5)
                assert not waiting.done()
                await asyncio.sleep(0.05)
            responses = [response for group in groups for response in await group]
            np.testing.assert_allclose(await waiting, expected, atol=1e-5)
        assert len(responses) == 3 * AT_ONCE
        check(responses, LONG)
        for response in responses:
            assert np.abs(response.logprobs - expected_logprobs(sglang, response)).max() < 1e-4

    run(scenario())


class KeepsItsCache(SGLangEngine):
    """An SGLang whose retracting swap leaves cached prefixes of the old weights."""

    async def _command(self, path: str, body: Any) -> None:
        if path == "/update_weights_from_disk":
            body = {**body, "flush_cache": False}
        await super()._command(path, body)


@pytest.mark.real
@pytest.mark.parametrize("is_clean", [True, False])
def test_the_self_test_tells_a_clean_swap_from_one_that_keeps_its_cache(
    sglang: Kind, sglang_url: tuple[str, Path], quick_base: Path, is_clean: bool
) -> None:
    url, log = sglang_url
    model = quick_base / "actor"

    async def scenario() -> None:
        engine = (SGLangEngine if is_clean else KeepsItsCache)(a_config(model), str(model), log, url)
        await engine.start()
        await engine.pause()
        await engine.load(sglang.weights(1), UNLOADED)  # what it started with; this SGLang has served other tests
        await engine.resume()
        before = await engine.score(PROMPT)
        assert not engine.self_tested
        try:
            await self_test(engine, str(sglang.weights(1)), a_config(model))
            assert engine.self_tested
            assert engine.swap_mode == ("retract" if is_clean else "resubmit")
            assert engine.policy_version == UNLOADED
            np.testing.assert_array_equal(await engine.score(PROMPT), before)
        finally:
            await engine.close()

    run(scenario())


@pytest.fixture(scope="module")
def qwen2(rollout_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, list[Path]]]:
    """A real SGLang of two ranks, its log, and versions of a model whose every shape is awkward.

    Each version is the one before with other biases (1), another embedding (2), other matrices (3).
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trainer.tiny_base.tokens import build_tokenizer, save_tokenizer

    root = tmp_path_factory.mktemp("qwen2")
    config = Qwen2Config(
        vocab_size=389,  # SGLang pads it to 448, and gives each rank a half
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(7)
    model = Qwen2ForCausalLM(config)

    directories = []
    for version, changed in enumerate(("bias", "bias", "embed_tokens", "_proj.weight")):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if changed in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        directories.append(root / f"v{version}")
        model.save_pretrained(directories[-1])
        save_tokenizer(build_tokenizer(), directories[-1])
    with a_server(rollout_python, directories[0], root / "sglang.log", tensor_parallel=2) as url:
        yield url, root / "sglang.log", directories


@pytest.mark.real
@pytest.mark.parametrize(
    "version", [0, 1, 2, 3], ids=["vocabulary padding", "biases", "tied embeddings", "sharded matrices"]
)
def test_awkward_weights_arrive_whole_in_two_ranks_by_either_transport(
    qwen2: tuple[str, Path, list[Path]], version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, log, versions = qwen2
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    config, model = a_config(versions[0], tensor_parallel=2), str(versions[0])
    sender = Sender(versions.__getitem__, is_real=True, ranks=2)
    kind = Kind(lambda: SGLangEngine(config, model, log, url), versions.__getitem__, True, sender)
    ids = np.array([*PROMPT, 383, 384, 387, 388, 0, 388], np.int32)

    async def scenario() -> None:
        async with started(kind) as engine:
            assert engine.ranks == 2
            expected = logprobs_of(versions[version], ids)
            await swap(kind, engine, version)
            np.testing.assert_allclose(await engine.score(ids), expected, atol=1e-4)
            await swap(kind, engine, version - 1 if version else 3)
            assert np.abs(await engine.score(ids) - expected).max() > 0.01
            await kind.sender.swap(engine, version)
            np.testing.assert_allclose(await engine.score(ids), expected, atol=1e-4)
            # so hot that every id of the vocabulary is about as likely: none of the padding may be drawn
            drawn = await engine.generate(PROMPT, 8, SamplingConfig(max_response_tokens=100, temperature=50.0))
            assert max(response.ids.max() for response in drawn) in range(360, 389)

    run(scenario())


@pytest.mark.real
def test_an_engine_of_other_ranks_than_the_config_says_is_refused(
    sglang_url: tuple[str, Path], quick_base: Path, sglang: Kind
) -> None:
    url, log = sglang_url
    model = quick_base / "actor"

    async def scenario() -> None:
        engine = SGLangEngine(a_config(model, 2), str(model), log, url)
        try:
            with pytest.raises(EngineError, match=r"tensor parallelism 1, and rollout\.tensor_parallel is 2"):
                await engine.start()
        finally:
            await engine.close()

    run(scenario())


@pytest.mark.real
def test_a_token_outside_the_vocabulary_is_refused_before_it_can_kill_the_engine(sglang: Kind) -> None:
    async def scenario() -> None:
        async with started(sglang) as engine:
            await swap(sglang, engine, 1)
            for prompt in ([1, 384], [-1], []):
                with pytest.raises(EngineError, match="expected at least one, from 0 to 383"):
                    await engine.generate(np.array(prompt, np.int32), 2, SamplingConfig())
            with pytest.raises(EngineError, match=r"HTTP 400: .*maximum context length"):
                await engine.generate(PROMPT, 2, SamplingConfig(max_response_tokens=9999))
            assert await engine.healthy()

    run(scenario())


@pytest.mark.unit
def test_sglang_listens_on_loopback_and_its_key_is_on_no_command_line(tmp_path: Path) -> None:
    arguments = child_arguments(a_config(tmp_path), str(tmp_path), "cpu", 1234)
    assert "--host=127.0.0.1" in arguments
    assert not [argument for argument in arguments if "key" in argument]
    for name in ("host", "api_key", "api-key"):
        changed = replace(a_config(tmp_path).rollout, engine_args={name: "x"})
        with pytest.raises(ConfigError, match="the rollout server sets this itself"):
            child_arguments(replace(a_config(tmp_path), rollout=changed), str(tmp_path), "cpu", 1234)


@pytest.mark.real
def test_the_api_key_is_wanted_and_is_in_no_log(sglang: Kind, sglang_url: tuple[str, Path]) -> None:
    url, log = sglang_url

    async def scenario() -> None:
        async with started(sglang):
            pass
        os.environ[KEY_VARIABLE] = "wrong"
        config = from_tree({"data": {"train": "x"}, "actor": {"path": "x"}, "rollout": {"start_timeout_s": 1.0}})
        engine = SGLangEngine(config, "a/b", log, url)
        with pytest.raises(EngineError, match=r"waited 1 s for sglang at .* \(rollout.start_timeout_s\): .*HTTP 401"):
            await engine.start()
        await engine.close()

    run(scenario())
    assert KEY not in log.read_text(errors="replace")


HOLDER = """
import asyncio, sys
from pathlib import Path
from asyncppo.config import load
from rollout_server.sglang_engine import SGLangEngine

async def main():
    config = load(sys.argv[1], sys.argv[2].split())
    engine = SGLangEngine(config, config.actor.path, Path(sys.argv[3]))
    await engine.start()
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.real
def test_a_rollout_server_that_is_killed_leaves_no_process_behind(
    quick_base: Path, rollout_python: str, tmp_path: Path
) -> None:
    settings = f"actor.path={quick_base / 'actor'} rollout.device=cpu"
    command = [rollout_python, "-c", HOLDER, str(ROOT / "configs/demo.yaml"), settings, str(tmp_path / "sglang.log")]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"ready\n", (tmp_path / "sglang.log").read_text()[-3000:]
        family = psutil.Process(holder.pid).children(recursive=True)
        assert len(family) >= 3
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    _, left = psutil.wait_procs(family, timeout=10)
    assert left == []


@pytest.mark.unit
def test_an_engine_that_dies_while_it_starts_says_so_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child of this test is a Python without sglang: it ends at its import."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = from_tree({"data": {"train": "x"}, "actor": {"path": "x"}, "rollout": {"device": "cuda"}})

    async def scenario() -> None:
        engine = SGLangEngine(config, "a/b", tmp_path / "logs" / "sglang.log")
        try:
            with pytest.raises(EngineError, match="ended with exit code 1 while it started") as caught:
                await engine.start()
        finally:
            await engine.close()
        assert "No module named 'sglang'" in str(caught.value)

    if _importable("sglang"):
        pytest.skip("sglang is installed here, so its import does not fail")
    started_at = time.monotonic()
    run(scenario())
    assert time.monotonic() - started_at < 60


def _importable(module: str) -> bool:
    with contextlib.suppress(ImportError):
        __import__(module)
    return module in sys.modules
