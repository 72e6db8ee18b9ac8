"""Claims about `asyncppo checkpoint export`: the weights that were saved, as an ordinary Hugging Face directory."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from asyncppo.config import Config
from asyncppo.errors import CheckpointError, ConfigError
from tests.model_maker import a_config, a_world, largest_difference, weights_of
from tests.unit.trainer.test_checkpoint import a_state
from trainer.checkpoint import Checkpoints
from trainer.export_checkpoint import export_checkpoint
from trainer.model.critic import Critic
from trainer.model.policy import Policy

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]


def a_checkpoint(config: Config) -> tuple[Path, Policy, list[Critic]]:
    """Of weights that are not those of the models that the run began with."""
    policy, critics = Policy(config, a_world()), [Critic(config, index, a_world()) for index in range(2)]
    with torch.no_grad():
        for number, network in enumerate((policy.network, *(critic.network for critic in critics))):
            for parameter in network.parameters():
                parameter.mul_(1.25 + number)

    def write_parts(directory: Path) -> None:
        policy.save(directory / "actor")
        for index, critic in enumerate(critics):
            critic.save(directory / f"critic_{index}")

    return Checkpoints(config).save(a_state(config, 3), write_parts, first_rank=True), policy, critics


def test_the_actor_is_exported_with_the_weights_that_were_saved_and_its_tokenizer(tmp_path: Path) -> None:
    path, policy, _ = a_checkpoint(a_config(tmp_path))
    export_checkpoint(path, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert largest_difference(weights_of(loaded), policy.weights()) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert not list(tmp_path.glob(".partial-*"))


def test_a_critic_is_exported_by_the_command_with_its_head(tmp_path: Path) -> None:
    path, _, critics = a_checkpoint(a_config(tmp_path))
    arguments = ["checkpoint", "export", str(path), "--to", str(tmp_path / "out"), "--critic", "1"]
    ended = subprocess.run(
        [sys.executable, "-m", "asyncppo.cli", *arguments],
        cwd=ROOT,
        env=os.environ | {"ASYNCPPO_TRAINER_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == str(tmp_path / "out")
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    saved = {name.removeprefix("hf."): weights for name, weights in weights_of(critics[1].network).items()}
    assert largest_difference(weights_of(loaded), saved) == 0


def test_an_export_is_in_the_dtype_that_the_run_trains_with(tmp_path: Path) -> None:
    path, policy, _ = a_checkpoint(a_config(tmp_path, "actor.dtype=bfloat16"))
    export_checkpoint(path, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert largest_difference(weights_of(loaded), policy.weights()) == 0


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path) -> None:
    path, _, _ = a_checkpoint(a_config(tmp_path))
    with pytest.raises(CheckpointError, match=r"has no critic_2: it has actor, critic_0, critic_1"):
        export_checkpoint(path, tmp_path / "out", critic=2)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        export_checkpoint(path, tmp_path / "taken")
    state = next((path / "actor").glob("state-*"))
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is not whole: actor/state-.* differs from its checksum"):
        export_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert msgspec.json.decode((path / "manifest.json").read_bytes())["policy_version"] == 3
