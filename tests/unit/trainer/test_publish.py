"""Claims about published versions: an ordinary Hugging Face directory, whole or not there at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncppo.config import Config
from asyncppo.errors import WeightsError
from asyncppo.fingerprints import model_fingerprint, tokenizer_fingerprint
from asyncppo.weights import verify
from tests.model_maker import a_config, a_model, a_world, largest_difference, make_model, weights_of
from trainer import publish
from trainer.model.export import _TOKENIZER_FILES, export
from trainer.model.policy import Policy
from trainer.publish import Publisher

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


def published(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_published_version_is_the_one_announced_and_its_manifest_verifies(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    policy = a_policy(config)
    ready = Publisher(config, a_model()).publish(policy, policy.weights(), 3)
    directory = Path(ready.directory)
    assert (ready.policy_version, directory) == (3, config.weights_directory / "v00000003")
    verify(directory, 3, ready.manifest)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert largest_difference(weights_of(loaded), policy.weights()) == 0
    with pytest.raises(WeightsError):
        verify(directory, 4, ready.manifest)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(WeightsError, match=r"model\.safetensors: differs"):
        verify(directory, 3, ready.manifest)


def test_versions_below_the_oldest_wanted_one_are_removed_and_no_others(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    policy, publisher = Policy(config, a_world()), Publisher(config, a_model())
    for version in range(4):
        publisher.publish(policy, policy.weights(), version)
    publisher.remove_before(-1)
    assert len(published(config.weights_directory)) == 4
    publisher.remove_before(2)
    assert published(config.weights_directory) == ["v00000002", "v00000003"]
    publisher.close()
    assert not config.weights_directory.exists()


def test_a_version_that_is_half_written_is_never_visible_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config(tmp_path)
    policy, publisher = Policy(config, a_world()), Publisher(config, a_model())
    seen = []

    def stop_before_the_manifest(directory: Path, version: int) -> str:
        seen.append(published(config.weights_directory))
        raise OSError("no space left")

    monkeypatch.setattr(publish, "write_manifest", stop_before_the_manifest)
    monkeypatch.setattr(publish, "RETRY_S", 0.2)
    monkeypatch.setattr(publish, "PAUSE_S", 0.05)
    with pytest.raises(WeightsError, match=r"version 1 could not be written .* no space left: make room"):
        publisher.publish(policy, policy.weights(), 1)
    assert len(seen) > 2
    assert all(names == [".partial-00000001"] for names in seen)  # each attempt begins from nothing
    assert published(config.weights_directory) == []


def test_a_version_is_published_as_soon_as_there_is_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = a_config(tmp_path)
    policy, publisher = Policy(config, a_world()), Publisher(config, a_model())
    attempts = []

    def full_at_first(model: object, weights: object, directory: Path, tokenizer_directory: Path) -> None:
        attempts.append(directory)
        if len(attempts) < 3:
            directory.mkdir()
            raise SafetensorError("No space left on device")
        export(model, weights, directory, tokenizer_directory)  # type: ignore[arg-type]

    monkeypatch.setattr(publish, "export", full_at_first)
    monkeypatch.setattr(publish, "PAUSE_S", 0.01)
    ready = publisher.publish(policy, policy.weights(), 1)
    verify(Path(ready.directory), 1, ready.manifest)
    assert published(config.weights_directory) == ["v00000001"]
    assert caplog.text.count("version 1 is not published yet") == 2


def test_what_a_killed_run_of_the_same_name_left_is_removed(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    (config.weights_directory / "v00000009").mkdir(parents=True)
    (config.weights_directory / ".partial-00000010").mkdir()
    Publisher(config, a_model())
    assert published(config.weights_directory) == []
