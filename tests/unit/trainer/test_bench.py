"""The bench's own judgement: it has to see a wrong version, wrong spans, and what it is held to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncppo.errors import EngineError, MessageError, ModelError
from tests.stream_maker import a_buffered, a_group, a_hello, a_status
from trainer.bench.__main__ import app as bench_app
from trainer.bench.bandwidth import copy_bandwidth, loopback_bandwidth
from trainer.bench.check import Checker, Sample, samples_of
from trainer.bench.models import Versions, make_model
from trainer.bench.session import WatchedHub
from trainer.bench.swap import Plan, Servers, config_of

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
PROMPT = np.array([11, 12, 13], np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "model"
    make_model(directory, "0.1M", "float32")
    return directory


def logprobs(model: Path, version: int, tokens: list[int], dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Of tokens after PROMPT, by a version as it is published in a dtype; computed one prefix at a time."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    Versions(dict(network.named_parameters())).take(version)
    values = []
    for parameter in network.parameters():  # and no buffer: rotary frequencies are not published
        parameter.data = parameter.data.to(dtype).float()
    for place in range(len(tokens)):
        with torch.no_grad():
            logits = network(torch.tensor([[*PROMPT.tolist(), *tokens[:place]]])).logits[0, -1]
        values.append(float(logits.log_softmax(-1)[tokens[place]]))
    return np.array(values, np.float32)


def a_sample(model: Path, spans: list[tuple[int, int]], truth: list[tuple[int, int]], **dtype: torch.dtype) -> Sample:
    """Ten tokens that say `spans`, and were made by the versions of `truth`."""
    tokens = [20 + 7 * place for place in range(10)]
    made, start = [], 0
    for version, count in truth:
        made.append(logprobs(model, version, tokens, **dtype)[start : start + count])
        start += count
    return Sample(PROMPT, np.array(tokens, np.int32), np.concatenate(made), tuple(spans))


def test_tokens_of_the_versions_that_their_spans_name_have_no_gap(model: Path) -> None:
    spans = [(0, 3), (1, 1), (4, 6)]
    gaps = Checker(model, "float32").gaps([a_sample(model, spans, spans), a_sample(model, [(2, 10)], [(2, 10)])], 1.0)
    assert gaps.tokens == 20
    assert gaps.largest < 1e-5
    assert gaps.wrong > 0.01


@pytest.mark.parametrize("truth", [[(3, 3), (4, 7)], [(3, 5), (4, 5)], [(3, 10)]])
def test_a_token_that_another_version_made_is_seen(model: Path, truth: list[tuple[int, int]]) -> None:
    gaps = Checker(model, "float32").gaps([a_sample(model, [(3, 4), (4, 6)], truth)], 1.0)
    assert gaps.largest > 0.01


def test_a_version_is_compared_as_it_is_rounded_when_it_is_published(model: Path) -> None:
    sample = a_sample(model, [(1, 10)], [(1, 10)], dtype=torch.bfloat16)
    assert Checker(model, "bfloat16").gaps([sample], 1.0).largest < 1e-5
    assert Checker(model, "float32").gaps([sample], 1.0).largest > 1e-4


@pytest.mark.parametrize("spans", [[(0, 9)], [(0, 11)], [(1, 5), (0, 5)], [(1, 5), (1, 5)], [(0, 10), (1, 0)], []])
def test_spans_that_do_not_partition_the_tokens_or_do_not_rise_are_refused(spans: list[tuple[int, int]]) -> None:
    sample = Sample(PROMPT, np.arange(10, dtype=np.int32), np.zeros(10, np.float32), tuple(spans))
    with pytest.raises(MessageError, match="a response of 10 tokens has the spans"):
        sample.check()


def test_the_responses_of_a_group_are_taken_apart() -> None:
    held = a_buffered(0, 1, group=a_group(1, [[(0, 3)], [(0, 1), (1, 2)]]))
    first, second = samples_of([held])
    assert (first.ids.tolist(), first.spans) == ([0, 1, 2], ((0, 3),))
    assert (second.ids.tolist(), second.spans) == ([100, 101, 102], ((0, 1), (1, 2)))
    assert second.logprobs.tolist() == held.group.behaviour_logprobs[3:].tolist()


def test_versions_differ_from_each_other_and_come_back_exactly(model: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(model)
    versions = Versions(dict(network.named_parameters()))
    seen = []
    for version in (0, 1, 2, 0):
        versions.take(version)
        seen.append(network.model.norm.weight.detach().clone())
    assert torch.equal(seen[0], seen[3])
    assert all(not torch.equal(seen[a], seen[b]) for a, b in ((0, 1), (1, 2), (0, 2)))
    with pytest.raises(ModelError, match="0 parameters called"):
        Versions({"lm_head.weight": seen[0]})


def test_a_size_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no random model of size 3M: expected one of 0\.1M, 10M"):
        make_model(tmp_path, "3M", "float32")


def test_the_hub_limits_what_a_server_has_in_flight_and_lets_everything_else_through() -> None:
    class Twin:
        def __init__(self) -> None:
            self.messages = [(b"a", a_hello(capacity=64)), (b"a", a_hello(capacity=1)), (b"a", a_status(3)), None]

        def receive(self, timeout_s: float) -> object:
            return self.messages.pop(0)

    hub = WatchedHub(Twin(), 16)  # type: ignore[arg-type]
    hellos = [hub.receive(0.0) for _ in range(2)]
    assert [item and item[1].capacity for item in hellos] == [16, 16]
    status = hub.receive(0.0)
    assert status
    assert status[1].policy_version == 3
    assert hub.receive(0.0) is None


def test_servers_may_always_have_as_many_requests_in_flight_as_are_wanted(tmp_path: Path) -> None:
    for servers, requests in ((1, 64), (3, 64), (1, 256)):
        plan = Plan("python", tmp_path, requests=(1, requests), servers=servers)
        stream = config_of(plan, tmp_path, tmp_path, "disk", requests).stream
        assert stream.prompts_per_batch * (stream.max_staleness + 1) > 2 * servers * requests


def test_a_server_that_ends_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho said $2\nexit 3\n")
    python.chmod(0o755)
    servers = Servers(Plan(str(python), tmp_path), tmp_path / "config.yaml", tmp_path)
    servers.end()
    with pytest.raises(EngineError, match=r"exit code 3; the end of .*server-0.log:\nsaid rollout_server"):
        servers.check()


def test_bandwidths_are_those_of_a_copy(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(8 << 20))
    (tmp_path / "b.safetensors").write_bytes(bytes(1 << 20))
    assert 1e7 < copy_bandwidth(tmp_path) < 1e12
    assert 1e7 < loopback_bandwidth() < 1e12


def test_the_command_becomes_the_bench_in_the_trainers_environment(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    interpreters = {"ASYNCPPO_TRAINER_PYTHON": str(python), "ASYNCPPO_ROLLOUT_PYTHON": str(python)}
    arguments = ["bench", "swap", "--sizes", "4B", "--swaps", "200", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "asyncppo.cli", *arguments], cwd=ROOT, env=os.environ | interpreters, capture_output=True
    )
    said = done.stdout.decode()
    assert said.startswith(f"-m trainer.bench --rollout {python} --sizes 4B --transports disk,broadcast"), said
    assert "--swaps 200" in said
    assert said.endswith("--json\n")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--transports", "disk,pigeon"], "error: --transports disk,pigeon: expected disk, broadcast, or both"),
        (["--requests", "1,0"], "error: --requests 1,0: expected whole numbers from 1 up"),
        (["--sizes", "3M"], "error: there is no random model of size 3M"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(
    wrong: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.bench.__main__.set_up_logging", lambda who: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        bench_app(["--rollout", "python", *wrong])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(message)
