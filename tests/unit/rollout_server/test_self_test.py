"""The self-test of swaps: what it lets pass, what it finds, what it falls back to."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from asyncppo.config import Config, SamplingConfig, from_tree
from asyncppo.errors import EngineError
from asyncppo.messages import Int32
from rollout_server.engine import UNLOADED, Broadcast, Response, ScriptedEngine
from rollout_server.self_test import OTHER, Tensor, find_tensor, self_test, write_tensor

pytestmark = pytest.mark.unit

NAME = "model.layers.0.input_layernorm.weight"
CONFIG: Config = from_tree(
    {
        "data": {"train": "x", "max_prompt_tokens": 32},
        "actor": {"path": "x"},
        "sampling": {"group_size": 4, "max_response_tokens": 100},
        "rollout": {"dtype": "float32"},
    }
)


def logprob(token: int, version: int) -> float:
    return -0.2 * (version + 2) - 0.001 * token


class FakeEngine(ScriptedEngine):
    """A scripted engine that can be wrong in the ways that a swap goes wrong; it follows the weights it is given.

    Args:
        stale: in these modes the log-probs after a swap are those of a cache of the old weights.
        relabelled: what the spans of an answer are turned into.
        length: tokens of an answer.
        noise: every log-prob of an answer differs so much from its score.
    """

    def __init__(
        self,
        *,
        stale: Sequence[str] = (),
        relabelled: Callable[[list[tuple[int, int]]], list[tuple[int, int]]] | None = None,
        length: int = 100,
        noise: float = 0.0,
    ) -> None:
        super().__init__(self._script_of, str, 0.001, self._note, self._scores_of)
        self.self_tested = False
        self.loaded: list[tuple[int, float]] = []
        self._stale, self._relabelled, self._length, self._noise = stale, relabelled, length, noise

    def _script_of(self, prompt: tuple[int, ...], index: int, version: int) -> list[tuple[int, float]]:
        error = 0.02 if version != UNLOADED and self.swap_mode in self._stale else self._noise
        return [(token % 60, logprob(token % 60, version) + error) for token in range(self._length)]

    def _scores_of(self, ids: tuple[int, ...], version: int) -> list[float]:
        return [logprob(token, version) for token in ids[1:]]

    def _note(self, weights: Path | Broadcast, version: int) -> None:
        assert isinstance(weights, Path)
        assert [path.name for path in weights.iterdir()] == ["model.safetensors"]
        with safe_open(weights / "model.safetensors", framework="numpy") as file:
            assert list(file.keys()) == [NAME]
            self.loaded.append((version, float(file.get_tensor(NAME)[1])))

    async def generate(self, prompt_ids: Int32, n: int, sampling: SamplingConfig) -> list[Response]:
        responses = await super().generate(prompt_ids, n, sampling)
        if self._relabelled is None:
            return responses
        relabel = self._relabelled
        return [Response(r.ids, r.logprobs, relabel(r.spans), r.truncated, r.text) for r in responses]


@pytest.fixture
def model(tmp_path: Path) -> str:
    directory = tmp_path / "model"
    write_tensor(directory, Tensor(NAME, "F32", [2], np.array([0.5, 1.5], np.float32).tobytes(), 64))
    (directory / "config.json").write_text(json.dumps({"vocab_size": 64}))
    return str(directory)


def run_on(engine: FakeEngine, model: str) -> FakeEngine:
    async def scenario() -> None:
        await engine.start()
        async with asyncio.timeout(30):
            await self_test(engine, model, CONFIG)

    asyncio.run(scenario())
    return engine


def test_a_clean_engine_passes_and_has_its_starting_weights_again(model: str) -> None:
    engine = run_on(FakeEngine(), model)
    assert (engine.self_tested, engine.swap_mode, engine.policy_version) == (True, "retract", UNLOADED)
    assert {version for version, _ in engine.loaded} == {UNLOADED, OTHER}
    assert engine.loaded[-1] == (UNLOADED, 1.5)
    assert (OTHER, 6.0) in engine.loaded


def test_an_engine_that_has_other_weights_than_its_starting_ones_is_given_them_first(model: str) -> None:
    class Attached(FakeEngine):
        """Its log-probs are those of its norm; another server has left it a later version's."""

        norm = 2.5

        def _note(self, weights: Path | Broadcast, version: int) -> None:
            super()._note(weights, version)
            self.norm = self.loaded[-1][1]

        def _script_of(self, prompt: tuple[int, ...], index: int, version: int) -> list[tuple[int, float]]:
            return [(token % 60, -0.05 * self.norm) for token in range(100)]

        def _scores_of(self, ids: tuple[int, ...], version: int) -> list[float]:
            return [-0.05 * self.norm] * (len(ids) - 1)

    assert run_on(Attached(), model).swap_mode == "retract"


def test_a_token_that_is_far_off_by_itself_is_no_fault(model: str) -> None:
    class CutsOneShort(FakeEngine):
        """The first answer that a swap meets ends with the first token after it."""

        async def generate(self, prompt_ids: Int32, n: int, sampling: SamplingConfig) -> list[Response]:
            first, *others = await super().generate(prompt_ids, n, sampling)
            if len(first.spans) > 1:
                version, tokens = first.spans[0]
                logprobs = first.logprobs[: tokens + 1].copy()
                logprobs[-1] -= 0.02
                spans = [(version, tokens), (first.spans[1][0], 1)]
                first = Response(first.ids[: tokens + 1], logprobs, spans, False, first.text)
            return [first, *others]

    assert run_on(CutsOneShort(), model).swap_mode == "retract"


def test_a_cached_prompt_that_spoils_only_short_answers_is_found_among_the_long_ones(model: str) -> None:
    class KeepsThePrompt(FakeEngine):
        """Wrong by 0.01 nats is what begins after a swap; 8 tokens an answer would be little among hundreds."""

        async def generate(self, prompt_ids: Int32, n: int, sampling: SamplingConfig) -> list[Response]:
            error = np.float32(0.005) if self.policy_version == OTHER else np.float32(0)
            answers = await super().generate(prompt_ids, n, sampling)
            return [Response(a.ids, a.logprobs + error, a.spans, a.truncated, a.text) for a in answers]

    with pytest.raises(EngineError, match=r"32 tokens of version 0 have log-probs that differ by 0\.005 nats"):
        run_on(KeepsThePrompt(), model)


def test_an_engine_that_keeps_a_stale_cache_is_swapped_by_resubmitting_and_it_is_said(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = run_on(FakeEngine(stale=["retract"]), model)
    assert (engine.self_tested, engine.swap_mode, engine.policy_version) == (True, "resubmit", UNLOADED)
    assert "does not swap cleanly by retract: " in caplog.text
    assert "tokens of version 0 have log-probs that differ by 0.02 nats from those of its weights" in caplog.text


def test_an_engine_that_is_clean_in_neither_way_is_an_error_that_says_what_was_seen(model: str) -> None:
    engine = FakeEngine(stale=["retract", "resubmit"])
    with pytest.raises(
        EngineError, match=r"does not swap weights cleanly. By retracting: .*0\.02.*resubmitting: .*0\.02"
    ):
        run_on(engine, model)
    assert not engine.self_tested


@pytest.mark.parametrize(
    ("relabelled", "seen"),
    [
        (lambda spans: [(spans[-1][0], sum(tokens for _, tokens in spans))], "spans never name both versions"),
        (
            lambda spans: [(7, tokens) if version == OTHER else (version, tokens) for version, tokens in spans],
            "version 7",
        ),
        (
            lambda spans: [(spans[0][0], spans[0][1] + 20), (spans[1][0], spans[1][1] - 20)] if spans[1:] else spans,
            "tokens of version -1 have log-probs that differ",
        ),
    ],
    ids=["one version for all", "a version that was never loaded", "the boundary late"],
)
def test_an_engine_that_labels_its_tokens_wrongly_is_found_out(
    model: str, relabelled: Callable[[list[tuple[int, int]]], list[tuple[int, int]]], seen: str
) -> None:
    with pytest.raises(EngineError, match=seen):
        run_on(FakeEngine(relabelled=relabelled), model)


def test_answers_that_end_before_any_swap_tell_nothing_and_that_is_said(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = run_on(FakeEngine(length=1), model)
    assert (engine.self_tested, engine.swap_mode, engine.policy_version) == (True, "retract", UNLOADED)
    assert "tells nothing: no answer was in progress" in caplog.text


def test_the_noise_of_an_engine_is_no_fault_and_a_fault_of_a_noisy_one_is_found(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_on(FakeEngine(noise=0.003), model).swap_mode == "retract"
    assert "tells little" not in caplog.text
    assert run_on(FakeEngine(noise=0.003, stale=["retract"]), model).swap_mode == "resubmit"
    caplog.clear()
    run_on(FakeEngine(noise=0.05), model)
    assert "tells little: the changed weights differ by 0.2 nats, and an answer without a swap by 0.05" in caplog.text


@pytest.mark.parametrize("name", ["nowhere/at-all", ""])
def test_a_model_that_is_no_directory_of_such_tensors_is_not_tested_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    engine = run_on(FakeEngine(), name or str(tmp_path))
    assert engine.self_tested
    assert engine.loaded == []
    assert "no self-test of swaps" in caplog.text


def test_an_engine_that_fails_meanwhile_is_an_error(model: str) -> None:
    class Dies(FakeEngine):
        async def resume(self) -> None:
            raise EngineError("no answer to resume")

    engine = Dies()
    with pytest.raises(EngineError, match="no answer to resume"):
        run_on(engine, model)
    assert not engine.self_tested


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_tensor_that_is_written_is_the_models_times_four_exactly(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    weights = {NAME: torch.randn(8).to(kind), "lm_head.weight": torch.randn(3, 8).to(kind)}
    (tmp_path / "model").mkdir()
    save_file(weights, tmp_path / "model" / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "config.json").write_text(json.dumps({"vocab_size": 3}))
    tensor = find_tensor(tmp_path / "model")
    assert tensor is not None
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.vocabulary) == (NAME, dtype, [8], 3)
    write_tensor(tmp_path / "scaled", tensor.scaled(4))
    found = load_file(tmp_path / "scaled" / "model.safetensors")
    assert list(found) == [NAME]
    assert found[NAME].dtype == kind
    assert torch.equal(found[NAME], weights[NAME] * 4)


@pytest.fixture(autouse=True)
def _logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
