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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from msgspec.structs import replace

from asyncppo import ports
from asyncppo.config import Config, SamplingConfig, from_tree
from asyncppo.errors import ConfigError, EngineError
from rollout_server.engine import UNLOADED, Engine, Response, ScriptedEngine
from rollout_server.sglang_engine import KEY_VARIABLE, SGLangEngine, child_arguments

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "0123456789abcdef"
LONG = 400
"""Tokens of a response that a swap finds in progress."""
PROMPT = np.array([1, 50, 60, 70, 80, 90], np.int32)


@dataclass
class Kind:
    """How to get an engine of one kind, and published weights for it."""

    open: Callable[[], Engine]
    weights: Callable[[int], Path]
    is_real: bool


def a_config(model: Path) -> Config:
    return from_tree(
        {
            "data": {"train": "x", "max_prompt_tokens": 32},
            "actor": {"path": str(model)},
            "sampling": {"group_size": 8, "max_response_tokens": LONG},
            "rollout": {"device": "cpu", "dtype": "float32", "max_groups": 8, "start_timeout_s": 240},
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


@pytest.fixture(scope="module")
def sglang_url(
    quick_base: Path, rollout_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """A real SGLang, one for all claims, and its log."""
    port = ports.free_port()
    model = quick_base / "actor"
    log = tmp_path_factory.mktemp("sglang") / "sglang.log"
    arguments = child_arguments(a_config(model), str(model), "cpu", port)
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", KEY_VARIABLE: KEY}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [rollout_python, "-m", "rollout_server.sglang_process", *arguments],
            cwd=ROOT,
            env=os.environ | environment | {"ASYNCPPO_ENGINE_PARENT": str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    yield f"http://127.0.0.1:{port}", log
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(
    params=[pytest.param("scripted", marks=pytest.mark.unit), pytest.param("sglang", marks=pytest.mark.real)]
)
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    if request.param == "scripted":

        def script(prompt: tuple[int, ...], index: int, version: int) -> list[tuple[int, float]]:
            length = 5 if version < 1 and index == 0 else LONG + 100
            return [(prompt[0] + index, -0.1 * (version + 2))] * length

        def on_load(directory: Path, version: int) -> None:
            if not directory.is_dir():
                raise EngineError(f"{directory} is not there")

        return Kind(lambda: ScriptedEngine(script, str, 0.0005, on_load), lambda version: tmp_path, False)
    url, log = request.getfixturevalue("sglang_url")
    model = request.getfixturevalue("quick_base") / "actor"
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    weights = request.getfixturevalue("versions")
    return Kind(lambda: SGLangEngine(a_config(model), str(model), log, url), weights, True)


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


async def swapped_in_progress(kind: Kind, engine: Engine, sampling: SamplingConfig) -> list[Response]:
    """Eight responses that began under version 1 and, some of them, went on under version 2."""
    for patience in (0.1, 0.2, 0.4, 0.8, 0.05, 0.02):  # a slow machine has not begun yet, a fast one has ended
        await swap(kind, engine, 1)
        answers = asyncio.create_task(engine.generate(PROMPT, 8, sampling))
        await asyncio.sleep(patience)
        await swap(kind, engine, 2)
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


@pytest.fixture
def sglang(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    url, log = request.getfixturevalue("sglang_url")
    model = request.getfixturevalue("quick_base") / "actor"
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    return Kind(lambda: SGLangEngine(a_config(model), str(model), log, url), request.getfixturevalue("versions"), True)


def logprobs_of(directory: Path, response: Response, temperature: float) -> np.ndarray[Any, Any]:
    """Float32 log-probs of a response's tokens by transformers, with nothing of SGLang in it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([*PROMPT.tolist(), *response.ids.tolist()])
    with torch.no_grad():
        logits = model(ids[None]).logits[0] / temperature
    rows = torch.log_softmax(logits, dim=-1)[len(PROMPT) - 1 : -1]
    values: np.ndarray[Any, Any] = rows.gather(1, ids[len(PROMPT) :, None])[:, 0].numpy()
    return values


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
                old, new = (logprobs_of(sglang.weights(version), response, sampling.temperature) for version in (1, 2))
                before = sum(tokens for version, tokens in response.spans if version == 1)
                expected = np.concatenate([old[:before], new[before:]])
                assert np.abs(response.logprobs - expected).max() < 1e-4
                differences.append(np.abs(old - new).max())
            assert max(differences) > 0.01  # the claim is not empty; a response of one token may differ by less

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
