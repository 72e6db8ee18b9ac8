"""The publisher: the actor's weights as a Hugging Face directory with a manifest, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from asyncppo.config import Config
from asyncppo.messages import WeightsReady
from asyncppo.weights import write_manifest
from trainer.model.export import export
from trainer.model.policy import Policy


class Publisher:
    """Writes versions under `Config.weights_directory`, and removes those that no server can want any more."""

    def __init__(self, config: Config, tokenizer_directory: Path) -> None:
        self._root = config.weights_directory
        self._tokenizer_directory = tokenizer_directory
        shutil.rmtree(self._root, ignore_errors=True)  # left by a run of the same name that was killed
        self._root.mkdir(parents=True)

    def publish(self, policy: Policy, weights: dict[str, torch.Tensor], version: int) -> WeightsReady:
        """Write a version beside its place, then rename it, so that it is there whole or not at all."""
        final = self._root / f"v{version:08d}"
        partial = self._root / f".partial-{version:08d}"
        export(policy.network.hf, weights, partial, self._tokenizer_directory)
        manifest = write_manifest(partial, version)
        os.replace(partial, final)
        return WeightsReady(policy_version=version, directory=str(final), manifest=manifest)

    def remove_before(self, version: int) -> None:
        """Remove versions below this one: every server serves it or a newer one."""
        for path in self._root.glob("v*"):
            if int(path.name[1:]) < version:
                shutil.rmtree(path)

    def close(self) -> None:
        """Remove all of this run's versions."""
        shutil.rmtree(self._root, ignore_errors=True)
