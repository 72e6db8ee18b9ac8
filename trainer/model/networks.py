"""The networks: a Hugging Face model with the few lines around it that turn a packed row into log-probs or values.

Sequences are packed into one row without padding. Attention stays within each sequence because positions restart, the KV
cache is off, and the attention function gets the boundaries; packed equals one by one (tests/unit/trainer).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from asyncppo.config import ModelConfig
from asyncppo.errors import ModelError
from trainer.model.packing import Packed

_HEAD_CHUNK = 2048
"""Response tokens whose logits exist at once; the rest is recomputed in the backward pass."""

_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def _segments(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed sequence; [1, heads, l, dim] in, [1, l, heads, dim] out."""
    if cu_seq_lens_q is None:
        raise ValueError("packed attention needs the boundaries of the sequences (cu_seq_lens_q)")
    bounds = cu_seq_lens_q.tolist()
    grouped = query.shape[1] != key.shape[1]
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            is_causal=end - start > 1,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=grouped,
        )
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("segments", _segments)
transformers_logging.disable_progress_bar()


def check_causal_lm(path: str) -> Any:
    """The config of a causal language model.

    Raises:
        ModelError: nothing there, or another kind of model.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"{path}: expected a Hugging Face model directory, found no config.json in it")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{path}: there is no such model directory, and it cannot be had from a hub either: {first}"
        ) from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{path}: expected a causal language model, its model_type is {config.model_type!r}")
    architectures = config.architectures or []
    if architectures and not any("CausalLM" in name or "LMHead" in name for name in architectures):
        raise ModelError(f"{path}: expected a causal language model, it says {', '.join(architectures)}")
    changes = [name for name in _LOGIT_CHANGES if getattr(config, name, None) not in (None, 1, 1.0)]
    if changes:
        raise ModelError(f"{path}: {config.model_type} changes its logits by {', '.join(changes)}; not supported")
    return config


def _prepare(path: str, model: ModelConfig) -> tuple[Any, dict[str, Any]]:
    config = check_causal_lm(path)
    config.use_cache = False  # packed sequences leak into each other with a KV cache
    config.classifier_dropout = 0.0  # transformers' default of 0.1 would make values random
    attention = model.attention
    return config, {"config": config, "dtype": getattr(torch, model.dtype), "attn_implementation": attention}


class PolicyNet(nn.Module):
    """A causal language model that gives log-probs and entropies of response tokens."""

    def __init__(self, path: str, model: ModelConfig) -> None:
        super().__init__()
        _, arguments = _prepare(path, model)
        self.hf = AutoModelForCausalLM.from_pretrained(path, **arguments)
        if model.gradient_checkpointing:
            self.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward(self, packed: Packed, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the response tokens, and entropies of their distributions, both [t] float32, in nats.

        Both are of softmax(logits / temperature) over the whole vocabulary.
        """
        hidden = self.hf.base_model(**_inputs(packed)).last_hidden_state[0]
        states = hidden.index_select(0, packed.predict)
        head = self.hf.get_output_embeddings()
        if not states.shape[0]:  # a rank's empty micro-batch still takes part in every collective
            nothing = head(hidden[:1]).sum().float() * 0
            return nothing.expand(0), nothing.expand(0)

        def chunk(states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = head(states).float() / temperature
            logprobs = logits.log_softmax(-1)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            return logprobs.gather(-1, labels[:, None])[:, 0], entropy

        results = [
            checkpoint(chunk, *pair, use_reentrant=False) if torch.is_grad_enabled() else chunk(*pair)
            for pair in zip(torch.split(states, _HEAD_CHUNK), torch.split(packed.labels, _HEAD_CHUNK), strict=True)
        ]
        return torch.cat([first for first, _ in results]), torch.cat([second for _, second in results])


class ValueNet(nn.Module):
    """Any checkpoint with a scalar head: the value of the state before each response token."""

    def __init__(self, path: str, model: ModelConfig, seed: int) -> None:
        super().__init__()
        config, arguments = _prepare(path, model)
        config.num_labels = 1
        torch.manual_seed(seed)  # the new head is drawn from it: critics must not start equal
        self.hf = AutoModelForTokenClassification.from_pretrained(path, **arguments)
        if model.gradient_checkpointing:
            self.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward(self, packed: Packed) -> torch.Tensor:
        """Values, [t] float32."""
        logits: torch.Tensor = self.hf(**_inputs(packed)).logits
        return logits[0, :, 0].index_select(0, packed.predict).float()


def _inputs(packed: Packed) -> dict[str, Any]:
    longest = int(packed.boundaries.diff().max())
    bounds = packed.boundaries.to(packed.input_ids.device) if packed.input_ids.is_cuda else packed.boundaries
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "use_cache": False,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
