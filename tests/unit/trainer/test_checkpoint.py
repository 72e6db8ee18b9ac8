"""Claims about checkpoints: one is whole or does not count, and the last good one outlives a killed save."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from asyncppo.config import Config
from asyncppo.errors import CheckpointError
from tests.model_maker import a_batch, a_config
from trainer.checkpoint import Checkpoints, TrainerState
from trainer.stream.ledger import Ledger
from trainer.stream.prompts import Prompt, Prompts
from trainer.targets import TargetBuilder

pytestmark = pytest.mark.unit

PARTS = ("actor", "critic_0", "critic_1")


def a_state(config: Config, version: int) -> TrainerState:
    return TrainerState(
        policy_version=version,
        critics=config.algorithm.critics,
        actor_path=config.actor.path,
        critic_paths=config.critic_paths,
        critic_errors=[0.1, 1 / 3],
        ledger=a_ledger().state(),
    )


def a_ledger() -> Ledger:
    """Three prompts leased, one of them lost with its server."""
    prompts = Prompts([Prompt(f"p{n}", np.array([n], dtype=np.int32), "1") for n in range(4)], seed=0, shuffle=True)
    ledger = Ledger(prompts, max_staleness=2)
    leases = [ledger.lease(b"server", 0, 0.0).lease for _ in range(3)]
    ledger.drop(leases[1], "server left")
    return ledger


def save(config: Config, version: int, parts: Sequence[str] = PARTS, content: str = "") -> Path:
    def write_parts(directory: Path) -> None:
        for part in parts:
            (directory / part).mkdir()
            (directory / part / "weights").write_text(content or f"{part} {version}")

    return Checkpoints(config).save(a_state(config, version), write_parts, first_rank=True)


def names(config: Config) -> list[str]:
    return sorted(path.name for path in (config.run_directory / "checkpoints").iterdir())


def test_the_latest_checkpoint_is_what_was_saved(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    save(config, 9)
    path = save(config, 10)
    found = Checkpoints(config).latest()
    assert found == (path, a_state(config, 10))
    assert (path / "critic_1" / "weights").read_text() == "critic_1 10"


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert Checkpoints(a_config(tmp_path)).latest() is None


def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    config = a_config(tmp_path, "run.keep_checkpoints=9")
    good = save(config, 1)
    save(config, 2, PARTS[:2])  # a critic is missing
    (save(config, 3) / "trainer.json").unlink()
    half = save(config, 4) / "trainer.json"
    half.write_bytes(half.read_bytes()[:40])
    save(config, 5).rename(config.run_directory / "checkpoints" / ".partial-00000005")
    assert Checkpoints(config).latest() == (good, a_state(config, 1))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_the_others_removed(tmp_path: Path, keep: int) -> None:
    config = a_config(tmp_path, f"run.keep_checkpoints={keep}")
    for version in (2, 10, 100, 1000):
        save(config, version)
    assert names(config) == [f"step_{version:08d}" for version in (2, 10, 100, 1000)][-keep:]


def test_saving_a_version_again_replaces_it(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    save(config, 7, content="first")
    path = save(config, 7, content="second")
    assert names(config) == ["step_00000007"]
    assert (path / "actor" / "weights").read_text() == "second"


def test_ranks_above_the_first_write_their_parts_and_rename_nothing(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    seen: list[Path] = []
    final = Checkpoints(config).save(a_state(config, 3), seen.append, first_rank=False)
    assert seen == [config.run_directory / "checkpoints" / ".partial-00000003"]
    assert not final.exists()


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.critics=1",
        "actor.path=another/actor",
        "critic.path=another/critic",
        "critic.each=[{}, {path: another/critic}]",
    ],
)
def test_a_checkpoint_of_other_models_is_refused_with_what_differs(tmp_path: Path, override: str) -> None:
    path = save(a_config(tmp_path), 3)
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(a_config(tmp_path, override)).latest()
    message = str(caught.value)
    assert message.startswith(str(path))
    assert ("config says 1" if "critics=1" in override else "another/") in message
    assert "\n" not in message


KILLED = """
import os, sys
from asyncppo.config import load
from trainer.checkpoint import Checkpoints, TrainerState
from trainer.stream.ledger import Ledger
from trainer.stream.prompts import Prompts

config = load(sys.argv[1])

def write_parts(directory):
    (directory / "actor").mkdir()
    (directory / "actor" / "weights").write_text("half")
    os._exit(9)

state = TrainerState(
    policy_version=int(sys.argv[2]), critics=2, actor_path=config.actor.path, critic_paths=config.critic_paths,
    critic_errors=[], ledger=Ledger(Prompts([], seed=0, shuffle=False), max_staleness=0).state(),
)
Checkpoints(config).save(state, write_parts, first_rank=True)
"""


@pytest.mark.parametrize("version", [6, 5])
def test_a_process_killed_in_the_middle_of_a_save_leaves_the_last_good_one(tmp_path: Path, version: int) -> None:
    config = a_config(tmp_path, "run.keep_checkpoints=1")
    good = save(config, 5)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), str(version)]
    killed = subprocess.run(command, capture_output=True, timeout=60, cwd=Path(__file__).parents[3])
    assert killed.returncode == 9, killed.stderr.decode()
    assert Checkpoints(config).latest() == (good, a_state(config, 5))
    assert (good / "actor" / "weights").read_text() == "actor 5"
    save(config, 6)  # and what it left is in nobody's way
    assert names(config) == ["step_00000006"]


def test_running_errors_of_the_critics_come_back_to_the_last_bit(tmp_path: Path) -> None:
    config = a_config(tmp_path, "algorithm.aggregation=confidence")
    batch = a_batch()
    builder = TargetBuilder(config)
    builder.build(batch, torch.stack((torch.linspace(0, 1, 23), torch.linspace(1, -1, 23))), None)
    state = msgspec.structs.replace(a_state(config, 4), critic_errors=builder.errors)
    Checkpoints(config).save(state, lambda to: [(to / part).mkdir() for part in PARTS], first_rank=True)
    found = Checkpoints(config).latest()
    assert found
    assert len(builder.errors) == 2
    assert TargetBuilder(config, found[1].critic_errors).errors == builder.errors
