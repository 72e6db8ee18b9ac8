"""A network's weights as an ordinary Hugging Face directory, whatever engine trains it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from trainer.model.engine import TrainableEngine
from trainer.model.world import World

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def whole_weights(engine: TrainableEngine, world: World, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """All weights by their Hugging Face names, on the CPU; rank 0 gets them, the others an empty dict.

    Every rank of the world has to call it.

    Args:
        engine: has the weights.
        world: its ranks.
        dtype: rounded to it (to nearest, ties to even, as an engine rounds what it loads); without it as they are.
    """
    whole = {}
    for name, parameter in engine.parameters_in_full():
        if world.rank == 0:
            whole[name.removeprefix("hf.")] = parameter.to("cpu", dtype or parameter.dtype, copy=True)
    return whole


def checkpoint_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights by the names and in the shapes of the model's checkpoints, which engines load: transformers may
    have renamed or joined some."""
    converted: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(weights))
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def export(model: Any, weights: Mapping[str, torch.Tensor], directory: Path, tokenizer_directory: Path) -> None:
    """Write an ordinary Hugging Face directory that transformers (and, for an actor, SGLang) loads.

    Args:
        model: the Hugging Face model, which says how its weights are saved.
        weights: from `whole_weights`; `config.json` says their dtype.
        directory: made here; must not exist.
        tokenizer_directory: where the tokenizer's files are copied from, byte for byte.
    """
    directory.mkdir(parents=True)
    model.save_pretrained(directory, state_dict=dict(weights), max_shard_size="4GB")  # which empties what it gets
    _set_dtype(directory / "config.json", next(iter(weights.values())).dtype)
    for name in _TOKENIZER_FILES:
        if (tokenizer_directory / name).is_file():
            shutil.copyfile(tokenizer_directory / name, directory / name)


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """transformers writes the dtype of the model, and the weights may be rounded."""
    config = json.loads(path.read_bytes())
    name = str(dtype).removeprefix("torch.")
    if config.get("dtype") != name:
        config["dtype"] = name
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
