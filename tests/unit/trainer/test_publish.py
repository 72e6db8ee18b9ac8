"""Claims about published versions: an ordinary Hugging Face directory, whole or not there at all, beside training."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from asyncppo.config import Config
from asyncppo.errors import WeightsError
from asyncppo.fingerprints import model_fingerprint, tokenizer_fingerprint
from asyncppo.messages import WeightsReady
from asyncppo.metrics import EVENTS_FILE, Journal, read
from asyncppo.weights import MANIFEST, Manifest, verify
from tests.model_maker import a_config, a_model, a_world, largest_difference, make_model, weights_of
from trainer.model.export import _TOKENIZER_FILES, export
from trainer.model.policy import Policy
from trainer.preflight import load_data, probe_ids
from trainer.publish import disk, publisher
from trainer.publish.disk import Disk
from trainer.publish.publisher import Publisher, Weights, is_published, tolerance

pytestmark = pytest.mark.unit


def a_policy(config: Config) -> Policy:
    """One whose weights are not those of its checkpoint any more."""
    policy = Policy(config, a_world())
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.mul_(1.25)
    return policy


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_in_transformers_with_the_same_weights_and_logits(tmp_path: Path, tied: bool) -> None:
    policy = a_policy(a_config(tmp_path, model=make_model(tmp_path / "model", tied=tied)))
    export(policy.network.hf, policy.weights(), tmp_path / "out", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert largest_difference(weights_of(loaded), policy.weights()) == 0
    tokens = torch.arange(10, 25)[None]
    bounds = torch.tensor([0, 15], dtype=torch.int32)
    with torch.no_grad():
        ours = policy.network.hf(input_ids=tokens, position_ids=torch.arange(15)[None], cu_seq_lens_q=bounds).logits
        torch.testing.assert_close(loaded(input_ids=tokens).logits, ours, atol=1e-5, rtol=0)


def test_an_export_leaves_the_weights_to_their_owner_also_of_a_model_that_was_never_a_checkpoint(
    tmp_path: Path,
) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(a_model()))
    weights = weights_of(model)
    export(model, weights, tmp_path / "out", a_model())
    assert weights.keys() == weights_of(model).keys()


@pytest.mark.parametrize(("tied", "heads"), [(True, 0), (False, 1)])
def test_tied_embeddings_are_written_once(tmp_path: Path, tied: bool, heads: int) -> None:
    model = make_model(tmp_path / "model", tied=tied)
    policy = a_policy(a_config(tmp_path, model=model))
    export(policy.network.hf, policy.weights(), tmp_path / "out", model)

    def names(directory: Path) -> set[str]:
        with safe_open(directory / "model.safetensors", "pt") as file:
            return set(file.keys())

    assert names(tmp_path / "out") == names(model)
    assert len([name for name in names(tmp_path / "out") if "lm_head" in name]) == heads


def test_a_bfloat16_actor_is_exported_in_bfloat16(tmp_path: Path) -> None:
    policy = Policy(a_config(tmp_path, "actor.dtype=bfloat16"), a_world())
    export(policy.network.hf, policy.weights(), tmp_path / "out", a_model())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_tokenizers_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    policy = Policy(a_config(tmp_path), a_world())
    export(policy.network.hf, policy.weights(), tmp_path / "out", a_model())
    copied = sorted(path.name for path in (tmp_path / "out").iterdir() if path.name in _TOKENIZER_FILES)
    assert copied == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (a_model() / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_an_export_is_the_same_model_to_a_rollout_server_and_keeps_nothing_of_training(tmp_path: Path) -> None:
    policy = Policy(a_config(tmp_path), a_world())
    export(policy.network.hf, policy.weights(), tmp_path / "out", a_model())
    assert model_fingerprint(str(tmp_path / "out")) == model_fingerprint(str(a_model()))
    assert tokenizer_fingerprint(str(tmp_path / "out")) == tokenizer_fingerprint(str(a_model()))
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (a_model(), tmp_path / "out"))
    assert ours == theirs  # the KV cache too, which training turns off and generation wants


# --- transport disk --------------------------------------------------------------------------------------------------


def published(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def put(transport: Disk, policy: Policy, version: int, dtype: torch.dtype | None = None) -> WeightsReady:
    return transport.put(version, policy.weights(dtype), policy.network.hf)


def test_a_published_version_is_the_one_announced_and_its_manifest_verifies(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    policy = a_policy(config)
    ready = put(Disk(config, a_model()), policy, 3)
    directory = Path(ready.directory)
    assert (ready.policy_version, directory) == (3, config.weights_directory / "v00000003")
    assert not ready.buckets
    verify(directory, 3, ready.manifest)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert largest_difference(weights_of(loaded), policy.weights()) == 0
    with pytest.raises(WeightsError):
        verify(directory, 4, ready.manifest)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(WeightsError, match=r"model\.safetensors: differs"):
        verify(directory, 3, ready.manifest)


def test_the_manifest_has_dtype_shape_and_checksum_of_each_tensor_that_was_meant(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    policy = a_policy(config)
    ready = put(Disk(config, a_model()), policy, 3, torch.bfloat16)
    manifest = msgspec.json.decode((Path(ready.directory) / MANIFEST).read_bytes(), type=Manifest)
    weights = policy.weights()
    assert manifest.tensors.keys() == weights.keys()
    assert {name: tensor.shape for name, tensor in manifest.tensors.items()} == {
        name: list(tensor.shape) for name, tensor in weights.items()
    }
    assert {tensor.dtype for tensor in manifest.tensors.values()} == {"bfloat16"}
    assert len({tensor.xxh3 for tensor in manifest.tensors.values()}) > 5


def test_what_is_rounded_for_the_engine_is_what_the_engine_would_round_to(tmp_path: Path) -> None:
    """SGLang copies what it loads into parameters of its own dtype (`default_weight_loader`)."""
    config = a_config(tmp_path)
    policy = a_policy(config)
    ready = put(Disk(config, a_model()), policy, 1, torch.bfloat16)
    assert json.loads((Path(ready.directory) / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(Path(ready.directory) / "model.safetensors", "pt") as file:
        for name, whole in policy.weights().items():
            engine = torch.empty(whole.shape, dtype=torch.bfloat16)
            engine.copy_(whole)
            assert torch.equal(file.get_tensor(name), engine)


def test_versions_below_the_oldest_wanted_one_are_removed_and_no_others(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    policy, transport = Policy(config, a_world()), Disk(config, a_model())
    for version in range(4):
        put(transport, policy, version)
    transport.remove_before(-1)
    assert len(published(config.weights_directory)) == 4
    transport.remove_before(2)
    assert published(config.weights_directory) == ["v00000002", "v00000003"]
    transport.close()
    assert not config.weights_directory.exists()


@pytest.mark.parametrize("error", [OSError("no space left"), SafetensorError("no space left")])
def test_a_version_that_is_half_written_is_never_visible_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config = a_config(tmp_path)
    policy, transport = Policy(config, a_world()), Disk(config, a_model())
    seen = []

    def stop_before_the_manifest(directory: Path, *_: Any) -> str:
        seen.append(published(config.weights_directory))
        raise error

    monkeypatch.setattr(disk, "write_manifest", stop_before_the_manifest)
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"version 1 could not be written .* no space left: make room"):
            put(transport, policy, 1)
    assert seen == [[".partial-00000001"]] * 2  # each attempt begins from nothing
    assert published(config.weights_directory) == []


def test_a_version_whose_name_could_not_be_flushed_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config(tmp_path)
    policy, transport = Policy(config, a_world()), Disk(config, a_model())
    flush_names, failures = disk.flush_names, [OSError(5, "Input/output error")]

    def flaky(directory: Path) -> None:
        if failures:
            raise failures.pop()
        flush_names(directory)

    monkeypatch.setattr(disk, "flush_names", flaky)
    with pytest.raises(WeightsError, match="Input/output error"):
        put(transport, policy, 1)
    assert list(config.weights_directory.iterdir()) == []
    ready = put(transport, policy, 1)
    verify(Path(ready.directory), 1, ready.manifest)


def test_what_a_killed_run_of_the_same_name_left_is_removed(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    (config.weights_directory / "v00000009").mkdir(parents=True)
    (config.weights_directory / ".partial-00000010").mkdir()
    Disk(config, a_model())
    assert published(config.weights_directory) == []


# --- the publisher ---------------------------------------------------------------------------------------------------


class Slow:
    """A transport that takes a version when it is told to."""

    name = "slow"

    def __init__(self) -> None:
        self.free = threading.Semaphore(0)
        self.begun: list[int] = []
        self.kept_from: list[int] = []
        self.fails = 0

    def put(self, version: int, weights: Weights, model: object) -> WeightsReady:
        self.begun.append(version)
        assert self.free.acquire(timeout=10)
        if self.fails:
            self.fails -= 1
            raise WeightsError("no room")
        return WeightsReady(policy_version=version, manifest=f"m{version}", directory="there")

    def remove_before(self, version: int) -> None:
        self.kept_from.append(version)

    def close(self) -> None:
        pass


LOGPROBS = torch.tensor([-1.0, -2.0])


class Publishing:
    """A publisher, what it announced, and a learner's calls."""

    def __init__(self, config: Config, journal: Journal | None = None) -> None:
        self.transport = Slow()
        self.announced: list[WeightsReady] = []
        ids = np.array([5, 6, 7], np.int32)
        self.publisher = Publisher(
            config, self.transport, None, self.announced.append, lambda newest: newest - 1, ids, journal
        )

    def publish(self, *versions: int, logprobs: torch.Tensor = LOGPROBS) -> None:
        for version in versions:
            self.publisher.publish(version, {}, logprobs)

    def until(self, done: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + 10
        while not done():
            assert time.monotonic() < give_up_at
            time.sleep(0.005)

    @property
    def versions(self) -> list[int]:
        return [ready.policy_version for ready in self.announced]


@pytest.fixture
def publishing(tmp_path: Path) -> Iterator[Publishing]:
    one = Publishing(a_config(tmp_path))
    yield one
    one.transport.free.release(100)
    one.publisher.close()


def test_publishing_does_not_wait_for_the_bytes_and_the_newest_of_those_that_wait_wins(publishing: Publishing) -> None:
    publishing.publish(0)
    publishing.until(lambda: publishing.transport.begun == [0])
    publishing.publish(1, 2, 3)  # nothing is free: it would hang here
    assert publishing.versions == []
    publishing.transport.free.release(100)
    publishing.publisher.flush()
    assert publishing.versions == publishing.transport.begun == [0, 3]
    assert publishing.publisher.skipped == 2


def test_a_version_is_announced_with_its_own_probe_and_older_ones_are_let_go_afterwards(
    publishing: Publishing,
) -> None:
    publishing.transport.free.release(100)
    publishing.publish(4)
    publishing.publisher.flush()
    (ready,) = publishing.announced
    assert ready.probe_ids.tolist() == [5, 6, 7]
    assert ready.probe_logprobs.tolist() == [-1.0, -2.0]
    assert ready.probe_logprobs.dtype == np.float32
    assert (ready.tolerance, ready.manifest, ready.directory) == (0.05, "m4", "there")
    assert publishing.transport.kept_from == [3]


def test_without_a_probe_nothing_is_asked(publishing: Publishing) -> None:
    publishing.transport.free.release(100)
    publishing.publish(4, logprobs=torch.zeros(0))
    publishing.publisher.flush()
    assert (publishing.announced[0].probe_ids.size, publishing.announced[0].probe_logprobs.size) == (0, 0)


def test_flush_waits_until_the_newest_is_announced(publishing: Publishing) -> None:
    publishing.publish(1)
    publishing.until(lambda: publishing.transport.begun == [1])
    publishing.publish(2)
    ended = threading.Event()

    def flush() -> None:
        publishing.publisher.flush()
        ended.set()

    threading.Thread(target=flush, daemon=True).start()
    publishing.transport.free.release()
    publishing.until(lambda: publishing.transport.begun == [1, 2])
    assert not ended.wait(0.1)
    publishing.transport.free.release()
    assert ended.wait(10)
    assert publishing.versions == [1, 2]


def test_a_version_is_published_as_soon_as_there_is_room_again(
    publishing: Publishing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(publisher, "PAUSE_S", 0.01)
    publishing.transport.fails = 2
    publishing.transport.free.release(100)
    publishing.publish(1)
    publishing.publisher.flush()
    assert publishing.transport.begun == [1, 1, 1]
    assert publishing.versions == [1]
    assert caplog.text.count("version 1 is not published yet") == 2


def test_a_version_that_finds_no_room_is_overtaken_by_the_next(publishing: Publishing) -> None:
    publishing.transport.fails = 1
    publishing.transport.free.release()
    publishing.publish(1)
    publishing.until(lambda: publishing.transport.fails == 0)
    publishing.publish(2)  # the pause between two attempts is longer than this test may take
    publishing.transport.free.release()
    publishing.until(lambda: publishing.versions == [2])
    assert publishing.publisher.skipped == 1


def test_where_there_is_never_room_the_learner_hears_of_it_in_its_next_call(
    publishing: Publishing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "RETRY_S", 0.1)
    monkeypatch.setattr(publisher, "PAUSE_S", 0.02)
    publishing.transport.fails = 1000
    publishing.transport.free.release(1000)
    publishing.publish(1)
    with pytest.raises(WeightsError, match=r"no room \(tried for 0 s\)"):
        publishing.publisher.flush()
    assert len(publishing.transport.begun) > 2
    for call in (publishing.publisher.raise_failure, publishing.publisher.flush, lambda: publishing.publish(2)):
        with pytest.raises(WeightsError, match="no room"):
            call()


def test_an_end_does_not_wait_for_room_and_publishes_nothing_more(publishing: Publishing) -> None:
    publishing.transport.fails = 1
    publishing.transport.free.release()
    publishing.publish(1)
    publishing.until(lambda: publishing.transport.fails == 0)
    began = time.monotonic()
    publishing.publisher.close()
    assert time.monotonic() - began < 2
    assert publishing.versions == []


def test_each_version_that_is_out_is_an_event(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    publishing = Publishing(a_config(tmp_path), journal)
    publishing.transport.free.release(100)
    publishing.publisher.publish(3, {"a": torch.zeros(3, dtype=torch.bfloat16)}, LOGPROBS)
    publishing.publisher.flush()
    publishing.publisher.close()
    journal.close()
    (event,) = read(tmp_path / EVENTS_FILE)
    assert (event["event"], event["policy_version"], event["transport"], event["bytes"]) == ("published", 3, "slow", 6)
    assert event["skipped"] == 0
    assert event["put_s"] >= 0


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6, 7])])
def test_every_kth_version_and_the_last_one_are_published(tmp_path: Path, every: int, expected: list[int]) -> None:
    config = a_config(tmp_path, "run.steps=7", f"publish.every={every}")
    assert [version for version in range(8) if is_published(config, version)] == expected


# --- the probe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("actor.dtype=float32", "rollout.dtype=float32"), 0.001),
        (("actor.dtype=float32", "rollout.dtype=bfloat16"), 0.05),
        (("actor.dtype=bfloat16", "rollout.dtype=float32"), 0.05),
        (("actor.dtype=bfloat16", "rollout.dtype=bfloat16", "publish.tolerance=0.2"), 0.2),
    ],
)
def test_the_tolerance_is_set_by_the_dtypes_of_both_ends(
    tmp_path: Path, overrides: tuple[str, ...], expected: float
) -> None:
    assert tolerance(a_config(tmp_path, *overrides)) == expected


def test_the_probe_is_the_first_prompts_one_after_the_other(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    prompts = load_data(config).train * 2
    ids = probe_ids(config, prompts)
    everything = np.concatenate([prompt.prompt_ids for prompt in prompts])
    assert len(everything) > 64
    assert len(prompts[0].prompt_ids) < 64
    assert ids.tolist() == everything[:64].tolist()
    assert ids.dtype == np.int32
    assert probe_ids(config, prompts[:1]).tolist() == prompts[0].prompt_ids.tolist()
    assert probe_ids(a_config(tmp_path, "publish.probe=false"), prompts).size == 0
