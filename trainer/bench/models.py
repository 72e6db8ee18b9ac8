"""Random models of a wanted size, and versions of them that differ in their log-probs and in their KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncppo.errors import ModelError
from trainer.tiny_base.tokens import PADDED_VOCABULARY, build_tokenizer, save_tokenizer

_FRACTION = 0.6180339887
"""Golden ratio: neighbouring versions are far apart, and none comes twice."""
_NORMS = ("layers.0.input_layernorm.weight", "norm.weight")
"""The first changes every key or value of the cache, the last every log-prob; so do those of Llama, Qwen2 and Qwen3."""


@dataclass(frozen=True)
class Shape:
    """A Qwen3 with tied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = PADDED_VOCABULARY


SHAPES = {
    "0.1M": Shape(64, 128, 2, 2, 1, 32),
    "10M": Shape(384, 1024, 6, 6, 2, 64),
    "100M": Shape(768, 3072, 12, 12, 4, 64),
    "0.6B": Shape(1024, 3072, 28, 16, 8, 128, 151936),
    "1.7B": Shape(2048, 6144, 28, 16, 8, 128, 151936),
    "4B": Shape(2560, 9728, 36, 32, 8, 128, 151936),
}
"""The last three are Qwen3's own."""


def make_model(directory: Path, size: str, dtype: str) -> None:
    """Write a random model with the tiny task's tokenizer.

    Args:
        directory: made here.
        size: a key of `SHAPES`.
        dtype: of the file.

    Raises:
        ModelError: another size.
    """
    if size not in SHAPES:
        raise ModelError(f"there is no random model of size {size}: expected one of {', '.join(SHAPES)}")
    shape = SHAPES[size]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=shape.hidden**-0.5,  # logits of standard deviation 1: no distribution is flat
        dtype=getattr(torch, dtype),
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    save_tokenizer(build_tokenizer(), directory)


class Versions:
    """The versions of one model: two of its norms are scaled by factors that follow from the version's number.

    Args:
        parameters: the model's, by name; `take` changes them.

    Raises:
        ModelError: it has no such norms.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._norms = {}
        for ending in _NORMS:
            found = [name for name in parameters if name.endswith(f"model.{ending}")]
            if len(found) != 1:
                raise ModelError(f"this model has {len(found)} parameters called model.{ending}, expected one")
            self._norms[found[0]] = parameters[found[0]]
        self._base = {name: norm.detach().clone() for name, norm in self._norms.items()}

    @torch.no_grad()
    def take(self, version: int) -> None:
        """Make the model this version."""
        factor = 1 + 0.5 * (version * _FRACTION % 1)
        for name, norm in self._norms.items():
            norm.copy_(self._base[name] * factor)
