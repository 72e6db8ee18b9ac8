"""Transport `disk`: each version a Hugging Face directory with a manifest, whole or not there at all."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from asyncppo.checkpoints import flush_names
from asyncppo.config import Config
from asyncppo.errors import WeightsError
from asyncppo.messages import WeightsReady
from asyncppo.weights import write_manifest
from trainer.model.export import checkpoint_weights, export
from trainer.publish.publisher import Weights, entries

log = logging.getLogger("asyncppo.publish")


class Disk:
    """Writes versions under `Config.weights_directory`, and removes those that no server can want any more."""

    name = "disk"

    def __init__(self, config: Config, tokenizer_directory: Path) -> None:
        self._root = config.weights_directory.resolve()  # servers run in directories of their own
        self._tokenizer_directory = tokenizer_directory
        shutil.rmtree(self._root, ignore_errors=True)  # left by a run of the same name that was killed
        self._root.mkdir(parents=True)

    def put(self, version: int, weights: Weights, model: Any) -> WeightsReady:
        """Write a version beside its place, flush it to the disk, then rename it.

        Raises:
            WeightsError: it could not be written; nothing of it is left.
        """
        final = self._root / f"v{version:08d}"
        partial = self._root / f".partial-{version:08d}"
        tensors = checkpoint_weights(model, weights)
        try:
            export(model, weights, partial, self._tokenizer_directory)
            manifest = write_manifest(partial, version, entries(tensors))
            os.replace(partial, final)
            flush_names(self._root)
        except (OSError, SafetensorError) as error:
            for left in (partial, final):  # it was not announced
                shutil.rmtree(left, ignore_errors=True)
            raise WeightsError(
                f"version {version} could not be written to {self._root}: {error}: make room there, or choose another "
                "publish.directory"
            ) from error
        return WeightsReady(policy_version=version, directory=str(final), manifest=manifest)

    def remove_before(self, version: int) -> None:
        """Remove versions below this one."""
        for path in self._root.glob("v*"):
            if int(path.name[1:]) < version:
                try:
                    shutil.rmtree(path)
                except OSError as error:  # a late server on a shared file system may hold a file of it open
                    log.warning("%s is not removed yet: %s", path, error)

    def close(self) -> None:
        """Remove all of this run's versions."""
        shutil.rmtree(self._root, ignore_errors=True)
