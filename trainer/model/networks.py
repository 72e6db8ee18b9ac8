"""The networks: a Hugging Face model with the few lines around it that turn a packed row into log-probs or values.

Sequences are packed into one row without padding. Attention stays within each sequence because positions restart, the
KV cache is off, and the attention function gets the boundaries; packed equals one by one (tests/unit/trainer).
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Sequence
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
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from asyncppo.config import ModelConfig
from asyncppo.errors import ModelError
from trainer.model.packing import Packed

_HEAD_CHUNK = 2048
"""Response tokens whose logits exist at once; the rest is recomputed in the backward pass."""

_PADDING_LIMIT = 1.5
"""Many short sequences are padded to the longest and attend in one call, if that makes no more tokens of them than this
factor; others attend one after the other."""

_LOADING = threading.Lock()
"""transformers patches its classes while it loads, and heads are drawn from the one generator of the process: two
threads (the plain twin's critics) must not load at the same time."""

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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed sequence; [1, heads, l, dim] in, [1, l, heads, dim] out.

    What some models add to attention and this does not is an error, never a wrong number.
    """
    if cu_seq_lens_q is None:
        raise ValueError("packed attention needs the boundaries of the sequences (cu_seq_lens_q)")
    if softcap is not None or s_aux is not None:
        raise ValueError("attention with a soft cap or sinks is not supported by actor.attention=segments")
    longest = int(cu_seq_lens_q.diff().max())
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(
            f"a sequence of {longest} tokens is longer than the model's sliding window of {sliding_window}: keep "
            "prompts and responses below it, or use attention=flash_attention_2"
        )
    grouped = query.shape[1] != key.shape[1]
    attend = functools.partial(F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout, enable_gqa=grouped)
    count, total = len(cu_seq_lens_q) - 1, query.shape[2]
    if count > 1 and count * longest <= _PADDING_LIMIT * total:
        return _attend_padded(attend, query, key, value, cu_seq_lens_q, longest), None
    parts = [
        attend(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], is_causal=end - start > 1)
        for start, end in itertools.pairwise(cu_seq_lens_q.tolist())
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _attend_padded(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """All sequences of a row in one call. They are padded on the right: what is causal never looks there."""
    starts, lengths = boundaries[:-1].long(), boundaries.diff().long()
    count, total = len(starts), int(boundaries[-1])
    device = query.device
    within = torch.arange(longest, device=device)
    spread = (starts[:, None].to(device) + within).clamp(max=total - 1).flatten()  # [count * longest]
    offsets = torch.arange(count, device=starts.device) * longest - starts
    back = torch.repeat_interleave(offsets, lengths).to(device) + torch.arange(total, device=device)

    def padded(x: torch.Tensor) -> torch.Tensor:
        _, heads, _, dim = x.shape
        flat = x[0].transpose(0, 1).reshape(total, heads * dim)
        return flat.index_select(0, spread).view(count, longest, heads, dim).transpose(1, 2)

    out = attend(padded(query), padded(key), padded(value), is_causal=longest > 1)
    heads, dim = out.shape[1], out.shape[3]
    flat = out.transpose(1, 2).reshape(count * longest, heads * dim)
    return flat.index_select(0, back).view(1, total, heads, dim)


AttentionInterface.register("segments", _segments)
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()  # a critic's new head is meant to be new


def check_causal_lm(path: str, heads: Sequence[str] = ("CausalLM", "LMHead")) -> Any:
    """The config of a causal language model.

    Args:
        path: a Hugging Face directory or hub name.
        heads: what the names of its architectures may hold.

    Raises:
        ModelError: nothing there, or another kind of model.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"{path}: expected a Hugging Face model directory, found no config.json in it")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        if not Path(path).exists() and path.count("/") != 1:  # hub names have one
            raise ModelError(f"{path}: there is no such model directory") from None
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{path}: there is no such model directory, and it cannot be had from a hub either: {first}"
        ) from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{path}: expected a causal language model, its model_type is {config.model_type!r}")
    architectures = config.architectures or []
    if architectures and not any(head in name for name in architectures for head in heads):
        raise ModelError(f"{path}: expected a causal language model, it says {', '.join(architectures)}")
    changes = [name for name in _LOGIT_CHANGES if getattr(config, name, None) not in (None, 1, 1.0)]
    if changes:
        raise ModelError(f"{path}: {config.model_type} changes its logits by {', '.join(changes)}; not supported")
    return config


def check_critic(path: str) -> Any:
    """The config of a causal language model that can be given a scalar head, or has one (an exported critic).

    Raises:
        ModelError: nothing there, another kind of model, or one that transformers has no such head for.
    """
    config = check_causal_lm(path, ("CausalLM", "LMHead", "TokenClassification"))  # the last: a critic of another run
    if config.model_type not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES:
        raise ModelError(
            f"{path}: cannot be a critic, because transformers has no token classification for {config.model_type}: "
            "choose another critic.path"
        )
    return config


def files_of(path: str) -> Path:
    """Where a model's files are: its directory, or a hub model's snapshot in the cache."""
    return Path(path) if Path(path).is_dir() else Path(cached_file(path, "tokenizer.json")).parent


def _load(kind: Any, path: str, model: ModelConfig, config: Any) -> tuple[Any, list[str]]:
    """A model in training mode and the names of weights that its checkpoint lacks, which are drawn at random."""
    try:
        network, report = kind.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, model.dtype),
            attn_implementation=model.attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{path}: cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    if model.gradient_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return network, sorted(report["missing_keys"])


def _refuse_random(path: str, names: list[str]) -> None:
    if names:
        raise ModelError(f"{path}: its weights lack {names[0]}" + f" and {len(names) - 1} more" * (len(names) > 1))


class PolicyNet(nn.Module):
    """A causal language model that gives log-probs and entropies of response tokens.

    Raises:
        ModelError: the checkpoint is no causal language model, or its weights are missing.
    """

    def __init__(self, path: str, model: ModelConfig) -> None:
        super().__init__()
        with _LOADING:
            self.hf, drawn = _load(AutoModelForCausalLM, path, model, check_causal_lm(path))
        _refuse_random(path, drawn)

    def forward(self, packed: Packed, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the response tokens, and entropies of their distributions, both [t] float32, in nats.

        Both are of softmax(logits / temperature) over the whole vocabulary.
        """
        hidden = self.hf.base_model(**_inputs(packed)).last_hidden_state[0]
        states = hidden.index_select(0, packed.predict)
        # Taken once, and not by calling the head for each chunk: ZeRO-3 gathers it on all ranks whenever it is called,
        # and ranks have different numbers of chunks.
        head = self.hf.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if not states.shape[0]:  # a rank's empty micro-batch still takes part in every collective
            nothing = F.linear(hidden[:1], weight, bias).sum().float() * 0
            return nothing.expand(0), nothing.expand(0)

        def chunk(states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = F.linear(states, weight, bias).float() / temperature
            logprobs = logits.log_softmax(-1)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            return logprobs.gather(-1, labels[:, None])[:, 0], entropy

        results = [
            checkpoint(chunk, *pair, use_reentrant=False) if torch.is_grad_enabled() else chunk(*pair)
            for pair in zip(torch.split(states, _HEAD_CHUNK), torch.split(packed.labels, _HEAD_CHUNK), strict=True)
        ]
        return torch.cat([first for first, _ in results]), torch.cat([second for _, second in results])


class ValueNet(nn.Module):
    """Any checkpoint with a scalar head: the value of the state before each response token.

    Raises:
        ModelError: the checkpoint cannot be given such a head, or its weights are missing.
    """

    def __init__(self, path: str, model: ModelConfig, seed: int) -> None:
        super().__init__()
        config = check_critic(path)
        config.num_labels = 1
        config.classifier_dropout = 0.0  # transformers' default of 0.1 would make values random
        with _LOADING:
            torch.manual_seed(seed)  # the new head is drawn from it: critics must not start equal
            self.hf, drawn = _load(AutoModelForTokenClassification, path, model, config)
            self._draw_small(name for name in drawn if not name.startswith(f"{self.hf.base_model_prefix}."))
        _refuse_random(path, [name for name in drawn if name.startswith(f"{self.hf.base_model_prefix}.")])

    @torch.no_grad()
    def _draw_small(self, head: Iterable[str]) -> None:
        """A new head with values near 0. One of a model's usual spread starts far off, and may stay there."""
        for parameter in (self.hf.get_parameter(name) for name in head):
            if parameter.ndim > 1:  # transformers begins a bias with 0
                parameter.normal_(std=1 / (parameter.shape[1] + 1))

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
        "use_cache": False,  # with a KV cache packed sequences leak into each other
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
