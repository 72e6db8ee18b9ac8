"""A network's training state on disk, the same whatever engine, number of ranks and ZeRO stage wrote it. No pickle.

    engine.json                      shapes of all parameters, optimiser steps, how many ranks wrote
    state-0-of-2-000.safetensors     fragments of rank 0; the next file when one is full
    random-0-of-2.safetensors        torch's random state of rank 0

A fragment is a run of elements of one flattened parameter, or of one of its two moments. Its key says which:
`exp_avg 4096 hf.lm_head.weight`, with the number of its first element. Every rank writes the fragments that it owns,
and reads those that it needs, so nothing is gathered and nobody waits for another rank.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from asyncppo.errors import CheckpointError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by PyTorch's names."""

_HEAD = "engine.json"
_FORMAT = 1
_FILE_BYTES = 1 << 30


class _Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int
    ranks: int
    optimizer_steps: int
    schedule_steps: int
    shapes: dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements `start`, `start` + 1, … of a flattened parameter or moment, as a view that can be read and written."""

    kind: str
    name: str
    start: int
    values: torch.Tensor  # [n]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training has come."""

    optimizer_steps: int
    """AdamW's own count, of its bias correction."""
    schedule_steps: int


def write(
    directory: Path,
    fragments: Iterable[Fragment],
    shapes: Mapping[str, tuple[int, ...]],
    progress: Progress,
    device: torch.device,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Write this rank's part; a GB of it is held in memory at a time.

    Raises:
        CheckpointError: it cannot be written.
    """
    pending: dict[str, torch.Tensor] = {}
    size = number = 0

    def flush() -> None:
        nonlocal pending, size, number
        save_file(pending, directory / f"state-{rank}-of-{ranks}-{number:03d}.safetensors")
        pending, size, number = {}, 0, number + 1

    try:
        directory.mkdir(parents=True, exist_ok=True)
        for fragment in fragments:
            key = f"{fragment.kind} {fragment.start} {fragment.name}"
            pending[key] = fragment.values.detach().to("cpu", copy=True)
            size += pending[key].nbytes
            if size >= _FILE_BYTES:
                flush()
        if pending:
            flush()
        save_file(_random_state(device), directory / f"random-{rank}-of-{ranks}.safetensors")
        if rank == 0:
            head = _Head(
                format=_FORMAT,
                ranks=ranks,
                optimizer_steps=progress.optimizer_steps,
                schedule_steps=progress.schedule_steps,
                shapes={name: list(shape) for name, shape in shapes.items()},
            )
            (directory / _HEAD).write_bytes(msgspec.json.format(msgspec.json.encode(head)))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: cannot be written: {error}") from error


class SavedState:
    """What `write` wrote, by all ranks together. Only what is asked for is read.

    Raises:
        CheckpointError: nothing there, of other parameters than `shapes`, or not every element of each.
    """

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self._directory = directory
        try:
            self._head = msgspec.json.decode((directory / _HEAD).read_bytes(), type=_Head)
        except FileNotFoundError:
            old = any(directory.glob("*.pt")) or (directory / "state").is_dir()
            why = "it is of an earlier version of asyncppo, in another format" if old else "nothing was saved here"
            raise CheckpointError(f"{directory}: expected {_HEAD} in it; {why}") from None
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{directory / _HEAD}: cannot be read: {error}") from None
        self._index: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        self.shapes = {name: tuple(shape) for name, shape in self._head.shapes.items()}
        self._open()
        if shapes is not None:
            self._compare(shapes)
        self._check_whole()

    @property
    def progress(self) -> Progress:
        """How far training had come."""
        return Progress(self._head.optimizer_steps, self._head.schedule_steps)

    def read_into(self, fragment: Fragment) -> None:
        """Fill a fragment of any place and length; a moment that was not saved, before the first step, with 0."""
        target = fragment.values.detach()
        if fragment.kind != WEIGHT and not self._head.optimizer_steps:
            target.zero_()
            return
        first, last = fragment.start, fragment.start + target.numel()
        for start, end, file, key in self._index[fragment.kind, fragment.name]:
            low, high = max(start, first), min(end, last)
            if low < high:
                values = file.get_slice(key)[low - start : high - start]
                if not torch.promote_types(values.dtype, target.dtype) == target.dtype:
                    raise CheckpointError(
                        f"{self._directory}: was saved in {values.dtype}, which {target.dtype} would round: go on with "
                        "the dtype and engine of the run that saved it"
                    )
                target[low - first : high - first].copy_(values)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter whole, on the CPU."""
        for name, shape in self.shapes.items():
            dtype = self._index[WEIGHT, name][0][2].get_slice(self._index[WEIGHT, name][0][3])[:0].dtype
            whole = torch.empty(shape, dtype=dtype)
            self.read_into(Fragment(WEIGHT, name, 0, whole.view(-1)))
            yield name, whole

    def restore_random_state(self, device: torch.device, rank: int, ranks: int) -> None:
        """Torch's random state of this rank; another number of ranks has none to go on from, and keeps its own."""
        if ranks != self._head.ranks:
            return
        path = self._directory / f"random-{rank}-of-{ranks}.safetensors"
        try:
            states = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        torch.set_rng_state(states["cpu"])
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)

    def _open(self) -> None:
        for path in sorted(self._directory.glob(f"state-*-of-{self._head.ranks}-*.safetensors")):
            try:
                file: Any = safe_open(os.fspath(path), "pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from None
            for key in file.keys():  # noqa: SIM118  # not a dict, not even iterable
                kind, start, name = key.split(" ", 2)
                count = file.get_slice(key).get_shape()[0]
                self._index[kind, name].append((int(start), int(start) + count, file, key))
        for places in self._index.values():
            places.sort(key=lambda place: place[:2])

    def _compare(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name in [*shapes, *self.shapes]:
            ours, theirs = shapes.get(name), self.shapes.get(name)
            if ours != theirs:
                raise CheckpointError(f"{self._directory}: has {name} of shape {theirs}, and the network has {ours}")

    def _check_whole(self) -> None:
        kinds = (WEIGHT, *MOMENTS) if self._head.optimizer_steps else (WEIGHT,)
        for name, shape in self.shapes.items():
            for kind in kinds:
                end = 0
                for start, stop, _, _ in self._index[kind, name]:
                    if start > end:
                        break
                    end = max(end, stop)
                count = torch.Size(shape).numel()
                if end < count:
                    raise CheckpointError(
                        f"{self._directory}: {kind} of {name} ends at element {end} of {count}: a file is missing"
                    )


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
