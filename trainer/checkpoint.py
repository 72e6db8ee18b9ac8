"""Checkpoints: one directory each, written beside its place and renamed, with everything that a resume needs.

    checkpoints/step_00000040/
        actor/ critic_0/ critic_1/   what the engines write: weights, optimiser, schedule
        trainer.json                 policy_version, ledger, the agreement with the config; written last

A directory without a whole trainer.json, or with a part missing, is not a checkpoint and is never resumed from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from asyncppo.config import Config
from asyncppo.errors import CheckpointError
from trainer.stream.ledger import LedgerState

_STATE = "trainer.json"


class TrainerState(msgspec.Struct, frozen=True, kw_only=True):
    """What the learner itself has to remember."""

    policy_version: int
    critics: int
    actor_path: str
    critic_paths: list[str]
    critic_errors: list[float]
    """Running squared error of each critic (`algorithm.aggregation: confidence`); empty before the first step."""
    ledger: LedgerState

    def parts(self) -> list[str]:
        """The directories that belong to it."""
        return ["actor", *(f"critic_{index}" for index in range(self.critics))]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._root = config.run_directory / "checkpoints"

    def save(self, state: TrainerState, write_parts: Callable[[Path], None], *, first_rank: bool) -> Path:
        """Write a checkpoint; the last good one stays until this one is whole.

        Args:
            state: the learner's own part.
            write_parts: writes `actor` and `critic_m` under the directory given; all ranks call it.
            first_rank: whether this process makes the directory and renames it.
        """
        final = self._root / f"step_{state.policy_version:08d}"
        partial = self._root / f".partial-{state.policy_version:08d}"
        if first_rank:
            for left_by_a_killed_save in self._root.glob(".partial-*"):
                shutil.rmtree(left_by_a_killed_save)
            partial.mkdir(parents=True)
        write_parts(partial)
        if first_rank:
            (partial / _STATE).write_bytes(msgspec.json.format(msgspec.json.encode(state)))
            _flush_to_disk(partial)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for old in self._whole()[: -self._config.run.keep_checkpoints]:
                shutil.rmtree(old)
        return final

    def latest(self) -> tuple[Path, TrainerState] | None:
        """The newest whole checkpoint, or None.

        Raises:
            CheckpointError: it belongs to other models than the config names.
        """
        for path in reversed(self._whole()):
            state = msgspec.json.decode((path / _STATE).read_bytes(), type=TrainerState)
            ours = (self._config.algorithm.critics, self._config.actor.path, self._config.critic_paths)
            theirs = (state.critics, state.actor_path, state.critic_paths)
            if ours != theirs:
                raise CheckpointError(
                    f"{path}: made with {theirs[0]} critics, actor {theirs[1]}, critics {theirs[2]}; the config says "
                    f"{ours[0]}, {ours[1]}, {ours[2]}: choose another run.name"
                )
            return path, state
        return None

    def _whole(self) -> list[Path]:
        found = []
        for path in sorted(self._root.glob("step_*")):
            try:
                state = msgspec.json.decode((path / _STATE).read_bytes(), type=TrainerState)
            except (OSError, msgspec.DecodeError):
                continue
            if all((path / part).is_dir() for part in state.parts()):
                found.append(path)
        return found


def _flush_to_disk(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
