"""Published weights: a directory that Hugging Face and SGLang load, and a manifest with checksums of all that it holds.

The trainer writes versions (`trainer/publish`), the rollout server verifies them before it loads them. The manifest
names files and tensors; its own checksum travels in WeightsReady, so that a directory cannot be mistaken for another
version. Of a version that is broadcast there are no files: the checksum of its manifest is its name all the same.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import xxhash

from asyncppo.errors import WeightsError

MANIFEST = "manifest.json"
_CHUNK = 16 << 20
_MOST_HEADER = 100_000_000
"""Bytes of a safetensors header, as its format has it."""


class Tensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor of a version."""

    dtype: str
    """Such as `bfloat16`."""
    shape: list[int]
    xxh3: str
    """Checksum of its bytes, row by row (xxh3, 128 bits)."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a published version is."""

    policy_version: int
    files: dict[str, str]
    """File name to checksum (xxh3, 128 bits)."""
    tensors: dict[str, Tensor] = {}
    """All tensors of its safetensors files together, by their names there; checksums of what the trainer meant to
    write. Empty: not known."""

    def encode(self) -> bytes:
        """As it is written, and as its checksum is of."""
        return msgspec.json.format(msgspec.json.encode(self))


def checksum(path: Path) -> str:
    """xxh3-128 of a file, read in chunks."""
    digest = xxhash.xxh3_128()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def checksum_of(data: bytes | memoryview) -> str:
    """xxh3-128 of bytes in memory, in chunks: other threads run between them."""
    digest = xxhash.xxh3_128()
    view = memoryview(data)
    for start in range(0, len(view), _CHUNK):
        digest.update(view[start : start + _CHUNK])
    return digest.hexdigest()


def write_manifest(directory: Path, policy_version: int, tensors: Mapping[str, Tensor] | None = None) -> str:
    """Write the manifest of all files in `directory`, and flush all of them to the disk; returns its checksum.

    Args:
        directory: holds the version's files.
        policy_version: its number.
        tensors: what the safetensors files hold, all of them together.

    Raises:
        OSError: it cannot be written.
    """
    files = {path.name: checksum(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST}
    manifest = Manifest(policy_version=policy_version, files=files, tensors=dict(tensors or {}))
    (directory / MANIFEST).write_bytes(manifest.encode())
    for path in [*directory.iterdir(), directory]:
        _flush(path)
    return checksum(directory / MANIFEST)


def verify(directory: Path, policy_version: int, manifest_checksum: str) -> Manifest:
    """Check that a published directory is whole and is the version that was announced; returns its manifest.

    Every file is read once, to its end, so that it is in the page cache.

    Raises:
        WeightsError: which file or tensor is missing or differs.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise WeightsError(f"{directory}: expected version {policy_version}, found no {MANIFEST}")
    data = path.read_bytes()
    if checksum_of(data) != manifest_checksum:
        raise WeightsError(f"{path}: differs from the manifest that was announced for version {policy_version}")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: is no manifest as this version of asyncppo writes it: {error}") from None
    if manifest.policy_version != policy_version:
        raise WeightsError(f"{path}: holds version {manifest.policy_version}, expected {policy_version}")
    strays = {path.name for path in directory.iterdir()} - {MANIFEST, *manifest.files}
    if strays:  # an engine loads every shard that it finds
        raise WeightsError(f"{directory / min(strays)}: is not in the manifest of version {policy_version}")
    found: dict[str, Tensor] = {}
    for name, expected in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise WeightsError(f"{file}: is missing from version {policy_version}")
        if manifest.tensors and file.suffix == ".safetensors":
            whole, tensors = _read_safetensors(file)
            found |= tensors
        else:
            whole, tensors = checksum(file), {}
        if whole != expected:
            wrong = next((t for t in tensors if tensors[t] != manifest.tensors.get(t)), None)
            where = f", at the latest in tensor {wrong}" if wrong else ""
            raise WeightsError(f"{file}: differs from its checksum in version {policy_version}{where}")
    for name in sorted({*manifest.tensors, *found}):  # the file is as it was written: was the right thing written?
        if found.get(name) != manifest.tensors.get(name):
            raise WeightsError(
                f"{directory}: tensor {name} of version {policy_version} is {_brief(found.get(name))}, and its "
                f"manifest has {_brief(manifest.tensors.get(name))}"
            )
    return manifest


def _flush(path: Path) -> None:
    """fsync: nothing where the file system is memory. What was written stays in the page cache for its readers."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _brief(tensor: Tensor | None) -> str:
    return f"{tensor.dtype} {tensor.shape}, {tensor.xxh3[:8]}…" if tensor else "not there"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


class _Place(msgspec.Struct, frozen=True):
    """An entry of a safetensors header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
"""Names of dtypes, safetensors' and torch's; any other keeps its own."""


def _read_safetensors(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The checksum of a file, and what its tensors are, from one pass over it."""
    whole = xxhash.xxh3_128()
    tensors: dict[str, Tensor] = {}
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        header = file.read(min(length, _MOST_HEADER))
        whole.update(head + header)
        end = 0
        for name, place in _places(header):
            start, stop = place.data_offsets
            if start != end:  # by the format there are neither gaps nor overlaps; the rest is still read
                break
            digest = xxhash.xxh3_128()
            while end < stop and (chunk := file.read(min(_CHUNK, stop - end))):
                whole.update(chunk)
                digest.update(chunk)
                end += len(chunk)
            if end < stop:
                break
            dtype = _DTYPES.get(place.dtype, place.dtype)
            tensors[name] = Tensor(dtype=dtype, shape=place.shape, xxh3=digest.hexdigest())
        while chunk := file.read(_CHUNK):
            whole.update(chunk)
    return whole.hexdigest(), tensors


def _places(header: bytes) -> list[tuple[str, _Place]]:
    """The entries of a header in the order of their bytes; none of one that is none."""
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        places = [(n, msgspec.json.decode(raw, type=_Place)) for n, raw in entries.items() if n != "__metadata__"]
    except (msgspec.DecodeError, UnicodeDecodeError):  # the caller finds that the file differs
        return []
    return sorted(places, key=lambda place: place[1].data_offsets)
