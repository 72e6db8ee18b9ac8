"""Samples: one group of a batch with everything that decided its update, kept for `asyncppo inspect`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from asyncppo.config import AlgorithmConfig, Config, at
from asyncppo.messages import Float32
from asyncppo.samples import Response, Sample, Settings, encode, file_of, files_in
from trainer.stream.batch import Batch
from trainer.targets import Targets

KEPT_FILES = 100
"""Files kept, the newest: 1000 steps at the default interval. The largest configs (32 responses of up to 8000 tokens,
some 45 bytes a token) then hold about 1 GB at worst, and the demo less than 2 MB."""


class Samples:
    """Writes the samples of one run. On rank 0 alone.

    Args:
        config: of the run.
        tokenizer_directory: a Hugging Face directory; its tokenizer makes the texts, so that a reader needs none.
    """

    def __init__(self, config: Config, tokenizer_directory: Path) -> None:
        self._config = config
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
        self._texts: dict[int, str] = {}

    def keep(
        self,
        batch: Batch,
        targets: Targets,
        values: torch.Tensor,
        proximal: torch.Tensor | None,
        entropy: torch.Tensor | None = None,
    ) -> None:
        """Write one group of the batch as `samples/step_N.msgpack`, whole or not at all, and remove the oldest files.

        It is the first group whose responses differ in reward (right and wrong ones: a group with something to learn),
        or the first of all: the same for the same batch.

        Args:
            batch: N responses with T tokens.
            targets: what they were trained towards.
            values: [M, T] of the critics; [0, 0] without any.
            proximal: [T] log-probs when the batch's update began; None where no forward pass made them.
            entropy: [T] of the policy, in nats; None where nobody computed it.
        """
        group = _choose(batch)
        ends = np.cumsum(batch.response_lengths)
        ranks = _ranks(targets.value_std.numpy())
        members = np.flatnonzero(batch.group_index == group).tolist()
        sample = Sample(
            step=batch.version + 1,
            policy_version=batch.version,
            prompt_id=batch.prompt_ids[group],
            epoch=batch.epochs[group],
            prompt=self._prompt(batch, members[0]),
            staleness=int(batch.staleness[group]),
            settings=_settings(self._config.algorithm, batch.version),
            responses=[
                self._response(
                    batch,
                    targets,
                    values,
                    proximal,
                    entropy,
                    ranks,
                    member,
                    slice(int(ends[member] - batch.response_lengths[member]), int(ends[member])),
                )
                for member in members
            ],
        )
        self._write(sample)

    def _response(
        self,
        batch: Batch,
        targets: Targets,
        values: torch.Tensor,
        proximal: torch.Tensor | None,
        entropy: torch.Tensor | None,
        ranks: Float32,
        member: int,
        own: slice,
    ) -> Response:
        """One response; `own` are its tokens among the batch's T."""
        ids = batch.response_ids[own]
        return Response(
            reward=float(batch.rewards[member]),
            truncated=bool(batch.truncated[member]),
            shard=int(batch.shard[member]),
            texts=[self._text(token) for token in ids.tolist()],
            token_ids=ids,
            versions=batch.token_versions[own],
            behaviour_logprobs=batch.behaviour_logprobs[own],
            proximal_logprobs=None if proximal is None else proximal[own].numpy(),
            values=values[:, own].reshape(-1).numpy(),
            value=targets.value[own].numpy(),
            value_std=targets.value_std[own].numpy(),
            std_ranks=ranks[own],
            advantages=targets.advantages[own].numpy(),
            keep_policy=targets.keep_policy[own].numpy().astype(np.uint8),
            keep_entropy=targets.keep_entropy[own].numpy().astype(np.uint8),
            entropy=None if entropy is None else entropy[own].numpy(),
        )

    def _prompt(self, batch: Batch, member: int) -> str:
        end = int(batch.sequence_lengths[: member + 1].sum()) - int(batch.response_lengths[member])
        start = int(batch.sequence_lengths[:member].sum())
        return str(self._tokenizer.decode(batch.input_ids[start:end].tolist()))

    def _text(self, token: int) -> str:
        """A token decoded alone: a piece of a character is U+FFFD, an id that the tokenizer lacks is empty."""
        if token not in self._texts:
            self._texts[token] = str(self._tokenizer.decode([token]))
        return self._texts[token]

    def _write(self, sample: Sample) -> None:
        path = file_of(self._config.run_directory, sample.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(".partial")
        partial.write_bytes(encode(sample))
        os.replace(partial, path)
        for old in files_in(self._config.run_directory)[:-KEPT_FILES]:
            old.unlink()


def _choose(batch: Batch) -> int:
    """The first group whose rewards differ, else the first."""
    groups: list[int] = np.unique(batch.group_index).tolist()
    for group in groups:
        rewards = batch.rewards[batch.group_index == group]
        if rewards.min() < rewards.max():
            return group
    return groups[0]


def _ranks(std: Float32) -> Float32:
    """[T]: for each token the fraction of all T whose std is lower."""
    return (np.searchsorted(np.sort(std), std) / len(std)).astype(np.float32)


def _settings(algorithm: AlgorithmConfig, version: int) -> Settings:
    own = {name: getattr(algorithm, name) for name in Settings.__struct_fields__}
    own["mask_fraction"] = at(algorithm.mask_fraction, version)
    own["entropy_filter"] = at(algorithm.entropy_filter, version)
    return Settings(**own)
