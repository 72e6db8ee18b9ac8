"""Whether every token was made by the weights that its span names: against a Hugging Face forward of those weights."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from asyncppo.errors import MessageError
from asyncppo.messages import Float32, Int32
from trainer.bench.models import Versions
from trainer.stream.buffer import BufferedGroup

_ROWS = 16
"""Sequences of one forward."""


@dataclass(frozen=True)
class Sample:
    """One response of T tokens."""

    prompt_ids: Int32
    ids: Int32  # [T]
    logprobs: Float32  # [T] the engine's
    spans: tuple[tuple[int, int], ...]  # (version, tokens)

    def check(self) -> None:
        """Its spans partition its tokens, and rise.

        Raises:
            MessageError: they do not.
        """
        versions = [version for version, _ in self.spans]
        lengths = [tokens for _, tokens in self.spans]
        if versions != sorted(set(versions)) or min(lengths, default=0) < 1 or sum(lengths) != len(self.ids):
            raise MessageError(f"a response of {len(self.ids)} tokens has the spans {list(self.spans)}")


def samples_of(groups: Iterable[BufferedGroup]) -> Iterator[Sample]:
    """The responses of groups."""
    for held in groups:
        group = held.group
        ids = np.split(group.response_ids, np.cumsum(group.lengths)[:-1])
        logprobs = np.split(group.behaviour_logprobs, np.cumsum(group.lengths)[:-1])
        spans = iter(zip(group.span_versions.tolist(), group.span_lengths.tolist(), strict=True))
        for count, tokens, values in zip(group.span_counts.tolist(), ids, logprobs, strict=True):
            yield Sample(held.prompt.prompt_ids, tokens, values, tuple(itertools.islice(spans, count)))


@dataclass(frozen=True)
class Gaps:
    """|engine − Hugging Face| of the tokens' log-probs, nats; and the same against the version before the right one."""

    tokens: int
    mean: float
    largest: float
    wrong: float
    """Mean gap against the next older version: what a swap that did not happen would show."""


class Checker:
    """A Hugging Face model, float32 on the CPU, of the weights as published.

    Args:
        path: the model that version 0 was made from.
        dtype: that versions are published in.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._dtype = getattr(torch, dtype)
        self._norms = Versions(dict(self._model.named_parameters()))  # of the exact weights: a version is rounded last
        self._round()

    def gaps(self, samples: Sequence[Sample], temperature: float) -> Gaps:
        """Compare all tokens of these responses."""
        of_version: dict[int, list[tuple[Sample, int, int]]] = defaultdict(list)
        for sample in samples:
            start = 0
            for version, tokens in sample.spans:
                of_version[version].append((sample, start, start + tokens))
                start += tokens
        right: list[Float32] = []
        wrong: list[Float32] = []
        for version, parts in of_version.items():
            right += self._differences(version, parts, temperature)
            wrong += self._differences(version - 1, parts[:_ROWS], temperature)
        if not right:
            return Gaps(0, 0.0, 0.0, 0.0)
        values = np.concatenate(right)
        return Gaps(values.size, float(values.mean()), float(values.max()), float(np.concatenate(wrong).mean()))

    def _differences(
        self, version: int, parts: Sequence[tuple[Sample, int, int]], temperature: float
    ) -> Iterator[Float32]:
        self._norms.take(version)
        self._round()
        for start in range(0, len(parts), _ROWS):
            yield from self._batch(parts[start : start + _ROWS], temperature)

    @torch.no_grad()
    def _round(self) -> None:
        """To what the dtype can hold, as a published file does."""
        for parameter in self._model.parameters():
            parameter.copy_(parameter.to(self._dtype))

    @torch.no_grad()
    def _batch(self, parts: Sequence[tuple[Sample, int, int]], temperature: float) -> Iterator[Float32]:
        whole = [np.concatenate([sample.prompt_ids, sample.ids[:end]]) for sample, _, end in parts]
        ids = torch.zeros(len(parts), max(map(len, whole)), dtype=torch.long)  # padded behind: what is causal is right
        for row, tokens in zip(ids, whole, strict=True):
            row[: len(tokens)] = torch.from_numpy(tokens)
        logprobs = (self._model(ids).logits / temperature).log_softmax(-1)
        for row, (sample, start, end) in zip(logprobs, parts, strict=True):
            first = len(sample.prompt_ids) + start
            predicted = row[first - 1 : first - 1 + end - start]
            labels = torch.from_numpy(sample.ids[start:end].astype(np.int64))
            values = predicted.gather(-1, labels[:, None])[:, 0].numpy()
            yield np.abs(values - sample.logprobs[start:end])
