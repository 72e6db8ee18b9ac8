"""The publisher: the actor's weights as a Hugging Face directory with a manifest, whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

from asyncppo.config import Config
from asyncppo.errors import WeightsError
from asyncppo.messages import WeightsReady
from asyncppo.waits import waiting
from asyncppo.weights import write_manifest
from trainer.model.export import export
from trainer.model.policy import Policy

log = logging.getLogger("asyncppo.publish")

RETRY_S = 300.0
"""A version that cannot be written is tried again for so long."""
PAUSE_S = 5.0
_WRITE_S = 600.0
"""What one attempt may take."""


class Publisher:
    """Writes versions under `Config.weights_directory`, and removes those that no server can want any more."""

    def __init__(self, config: Config, tokenizer_directory: Path) -> None:
        self._root = config.weights_directory
        self._tokenizer_directory = tokenizer_directory
        shutil.rmtree(self._root, ignore_errors=True)  # left by a run of the same name that was killed
        self._root.mkdir(parents=True)

    def publish(self, policy: Policy, weights: dict[str, torch.Tensor], version: int) -> WeightsReady:
        """Write a version beside its place, then rename it, so that it is there whole or not at all.

        Where it cannot be written (a full disk) it is tried again for some minutes, in which somebody may make room.

        Raises:
            WeightsError: it could not be written in that time.
        """
        final = self._root / f"v{version:08d}"
        partial = self._root / f".partial-{version:08d}"
        deadline = time.monotonic() + RETRY_S
        with waiting(f"room for version {version} in {self._root}", RETRY_S + _WRITE_S):
            while True:
                try:
                    export(policy.network.hf, weights, partial, self._tokenizer_directory)
                    manifest = write_manifest(partial, version)
                    os.replace(partial, final)
                    return WeightsReady(policy_version=version, directory=str(final), manifest=manifest)
                except (OSError, SafetensorError) as error:
                    shutil.rmtree(partial, ignore_errors=True)
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise WeightsError(
                            f"version {version} could not be written to {self._root} for {RETRY_S:.0f} s: {error}: "
                            "make room there, or choose another publish.directory"
                        ) from error
                    log.warning("version %d is not published yet, trying for %.0f s more: %s", version, left, error)
                    time.sleep(min(PAUSE_S, left))

    def remove_before(self, version: int) -> None:
        """Remove versions below this one: every server serves it or a newer one."""
        for path in self._root.glob("v*"):
            if int(path.name[1:]) < version:
                try:
                    shutil.rmtree(path)
                except OSError as error:  # a late server on a shared file system may hold a file of it open
                    log.warning("%s is not removed yet: %s", path, error)

    def close(self) -> None:
        """Remove all of this run's versions."""
        shutil.rmtree(self._root, ignore_errors=True)
