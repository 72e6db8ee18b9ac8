"""A network's weights as an ordinary Hugging Face directory, whatever engine trains it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

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


def whole_weights(engine: TrainableEngine, world: World) -> dict[str, torch.Tensor]:
    """All weights by their Hugging Face names, on the CPU; rank 0 gets them, the others an empty dict.

    Every rank of the world has to call it.
    """
    whole = {}
    for name, parameter in engine.parameters_in_full():
        if world.rank == 0:
            whole[name.removeprefix("hf.")] = parameter.to("cpu", copy=True)
    return whole


def export(model: Any, weights: dict[str, torch.Tensor], directory: Path, tokenizer_directory: Path) -> None:
    """Write an ordinary Hugging Face directory that transformers (and, for an actor, SGLang) loads.

    Args:
        model: the Hugging Face model, which says how its weights are saved.
        weights: from `whole_weights`.
        directory: made here; must not exist.
        tokenizer_directory: where the tokenizer's files are copied from, byte for byte.
    """
    directory.mkdir(parents=True)
    model.save_pretrained(directory, state_dict=weights, max_shard_size="4GB")
    for name in _TOKENIZER_FILES:
        if (tokenizer_directory / name).is_file():
            shutil.copyfile(tokenizer_directory / name, directory / name)
