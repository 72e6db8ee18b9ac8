"""Prompts: a dataset, tokenised once with the chat template, in a seeded order each epoch, resumable by position."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from asyncppo.config import DataConfig
from asyncppo.errors import DataError
from asyncppo.messages import Int32

log = logging.getLogger("asyncppo.prompts")

Tokenize = Callable[[list[dict[str, str]]], Sequence[int]]
"""Chat messages to token ids, with the chat template and its generation prompt."""


class Prompt(msgspec.Struct, frozen=True, eq=False):
    """One problem."""

    prompt_id: str
    prompt_ids: Int32
    answer: str


def read_rows(source: str, split: str) -> list[dict[str, Any]]:
    """All rows of a `.jsonl` or `.parquet` file, or of a dataset on the hub.

    Raises:
        DataError: nothing there, not readable, or empty.
    """
    path = Path(source)
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise DataError(f"{source}: there is no such dataset file")
        try:
            rows = [msgspec.json.decode(line) for line in path.read_bytes().splitlines() if line.strip()]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{source}: expected one JSON object a line: {error}") from None
        if not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{source}: expected one JSON object a line")
    else:
        rows = _read_with_datasets(source, split)
    if not rows:
        raise DataError(f"{source}: the dataset is empty")
    return rows


def _read_with_datasets(source: str, split: str) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: only .jsonl is read without the `data` extra: pip install 'asyncppo[data]'"
        ) from None
    if source.endswith(".parquet") and not Path(source).is_file():
        raise DataError(f"{source}: there is no such dataset file")
    try:
        if source.endswith(".parquet"):
            return list(datasets.load_dataset("parquet", data_files=source, split="train"))
        return list(datasets.load_dataset(source, split=split))
    except Exception as error:  # the library raises many kinds; each means that the dataset cannot be had
        raise DataError(f"{source} (split {split}): cannot be loaded: {error}") from error


def load_prompts(source: str, data: DataConfig, tokenize: Tokenize, limit: int | None = None) -> list[Prompt]:
    """The prompts of a dataset whose tokens fit into `data.max_prompt_tokens`.

    Raises:
        DataError: no rows, a missing column, malformed chat messages, two rows with one id, or every prompt too long.
    """
    rows = read_rows(source, data.split)
    for column in filter(None, (data.prompt_column, data.answer_column, data.id_column)):
        for number, row in enumerate(rows):
            if row.get(column) in (None, ""):
                raise DataError(
                    f"{source}: row {number} has no {column!r}; its columns are {', '.join(row)} "
                    "(data.prompt_column, data.answer_column, data.id_column)"
                )
    prompts: dict[str, Prompt | None] = {}
    for number, row in enumerate(rows[:limit]):
        prompt_id = str(row[data.id_column]) if data.id_column else str(number)
        if prompt_id in prompts:
            raise DataError(f"{source}: the id {prompt_id!r} is there twice (data.id_column)")
        try:
            messages = _messages(row[data.prompt_column], data.template)
        except (KeyError, TypeError):
            raise DataError(
                f"{source}: row {number}: expected chat messages with a role and a content in {data.prompt_column!r}"
            ) from None
        ids = np.asarray(tokenize(messages), dtype=np.int32)
        fits = len(ids) <= data.max_prompt_tokens
        prompts[prompt_id] = Prompt(prompt_id, ids, str(row[data.answer_column])) if fits else None
    fitting = [prompt for prompt in prompts.values() if prompt]
    if not fitting:
        raise DataError(f"{source}: all {len(prompts)} prompts are longer than {data.max_prompt_tokens} tokens")
    if len(fitting) < len(prompts):
        log.warning(
            "%s: %d of %d prompts are left out, longer than data.max_prompt_tokens (%d)",
            source,
            len(prompts) - len(fitting),
            len(prompts),
            data.max_prompt_tokens,
        )
    return fitting


def _messages(prompt: Any, template: str) -> list[dict[str, str]]:
    if isinstance(prompt, list):
        return [{"role": str(message["role"]), "content": str(message["content"])} for message in prompt]
    return [{"role": "user", "content": template.replace("{prompt}", str(prompt))}]


class Prompts:
    """An endless sequence of (epoch, prompt), the same for the same seed, from any position."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool) -> None:
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, Sequence[int]] = {}
        """Of two epochs at most."""

    def __len__(self) -> int:
        return len(self._prompts)

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of the whole sequence: every id, token and answer, in order, the seed and whether it shuffles."""
        digest = xxhash.xxh3_128(f"{self._seed} {self._shuffle} {len(self._prompts)}".encode())
        for prompt in self._prompts:
            for part in (prompt.prompt_id.encode(), prompt.prompt_ids.tobytes(), prompt.answer.encode()):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.hexdigest()

    def after(self, position: int) -> Iterator[tuple[int, Prompt]]:
        """From the `position`-th prompt of the run on."""
        epoch, start = divmod(position, len(self._prompts))
        while True:
            for index in self._order(epoch)[start:]:
                yield epoch, self._prompts[index]
            epoch, start = epoch + 1, 0

    def at(self, position: int) -> tuple[int, Prompt]:
        """The `position`-th prompt of the run, with its epoch."""
        epoch, place = divmod(position, len(self._prompts))
        return epoch, self._prompts[self._order(epoch)[place]]

    def _order(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(len(self._prompts))
        if epoch not in self._orders:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts)).tolist()
            newest = dict.fromkeys(sorted(self._orders)[-1:])  # those that a resume looks up are of one epoch or two
            self._orders = {kept: self._orders[kept] for kept in newest} | {epoch: order}
        return self._orders[epoch]
