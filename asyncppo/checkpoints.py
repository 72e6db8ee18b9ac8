"""Checkpoints on disk, as every program sees them: a directory, and a manifest with a checksum of every file. No torch.

    RUN/checkpoints/step_00000040/
        manifest.json                what belongs to it; a directory without one is no checkpoint
        trainer.json, config.yaml    policy_version, counts, guard; the config that made it
        actor/ critic_0/ critic_1/   weights, optimiser, schedule, random state (`trainer/model/states.py`)
        stream/                      buffered groups

    RUN/checkpoints/.partial-…       a save in progress, or what a killed one left
    RUN/checkpoints/damaged-step_…   what a resume found not to be whole, put aside

`trainer/checkpoint.py` writes them and chooses one to go on from.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from asyncppo.errors import CheckpointError
from asyncppo.weights import checksum

MANIFEST = "manifest.json"
STATE = "trainer.json"
CONFIG = "config.yaml"
FORMAT = 2
"""Of checkpoints as they are written here. Format 1 had no manifest."""
STEP, DAMAGED, PARTIAL = "step_", "damaged-", ".partial-"


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a checkpoint."""

    bytes: int
    xxh3: str
    """xxh3, 128 bits."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint holds."""

    format: int
    policy_version: int
    run: str
    """Name of the run that wrote it."""
    time: float
    """Unix time."""
    actor_path: str
    critic_paths: list[str]
    """One for each critic."""
    parts: list[str]
    """The directories that belong together: `actor`, `critic_m`, `stream`."""
    files: dict[str, FileEntry]
    """By path in the checkpoint; all but the manifest."""
    checksum: str = ""
    """Of the manifest itself, with this field empty."""

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(entry.bytes for entry in self.files.values())


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Fill in all files of `directory` and write the manifest; returns it."""
    files = {
        str(path.relative_to(directory)): FileEntry(bytes=path.stat().st_size, xxh3=checksum(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }
    whole = msgspec.structs.replace(manifest, files=files)
    whole = msgspec.structs.replace(whole, checksum=_own_checksum(whole))
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(whole)))
    return whole


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is torn, altered, or of another format.
    """
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{MANIFEST} is missing") from None
    try:
        form = msgspec.json.decode(data, type=dict).get("format")
        if form != FORMAT:
            raise CheckpointError(f"{MANIFEST} says format {form}, this version of asyncppo reads {FORMAT}")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{MANIFEST} is torn or altered: {error}") from None
    if manifest.checksum != _own_checksum(manifest):
        raise CheckpointError(f"{MANIFEST} differs from its own checksum")
    return manifest


def problems(
    directory: Path,
    *,
    checksums: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """What is wrong with a checkpoint, in words; nothing if it is whole.

    Args:
        directory: the checkpoint.
        checksums: read every file; otherwise only names and sizes are compared.
        progress: gets the bytes of each file that was looked at.

    Raises:
        OSError: something is there and cannot be read.
    """
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    found = [
        f"the part {part} is missing"
        for part in manifest.parts
        if not any(name.startswith(f"{part}/") for name in manifest.files)
    ]
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != entry.bytes:
            found.append(f"{name} has {size} bytes instead of {entry.bytes}")
        elif checksums and checksum(path) != entry.xxh3:
            found.append(f"{name} differs from its checksum")
        progress(entry.bytes)
    return found


def in_run(run_directory: Path) -> list[Path]:
    """The checkpoints of a run, damaged ones too, oldest first."""
    root = run_directory / "checkpoints"
    found = [*root.glob(f"{STEP}*"), *root.glob(f"{DAMAGED}*")]
    return sorted(found, key=lambda path: (path.name.removeprefix(DAMAGED), path.name))


def is_old(directory: Path) -> bool:
    """Whether a version of asyncppo wrote it that knew no manifest."""
    if (directory / MANIFEST).exists() or not (directory / STATE).is_file():
        return False
    try:
        state = msgspec.json.decode((directory / STATE).read_bytes())
    except msgspec.DecodeError:
        return False
    return isinstance(state, dict) and "policy_version" in state and "format" not in state


def kept(versions: Iterable[int], keep_newest: int, keep_every: int) -> dict[int, str]:
    """Which of these versions retention keeps, and why."""
    ordered = sorted(versions)
    newest = ordered[-keep_newest:]
    why = {version: f"newest {keep_newest}" for version in newest}
    for version in ordered:
        if keep_every and version and version % keep_every == 0:
            why[version] = f"multiple of {keep_every}"
    return why


@dataclass(frozen=True)
class Listed:
    """One line of `asyncppo checkpoint ls`."""

    path: Path
    manifest: Manifest | None
    problems: list[str]


def listing(run_directory: Path) -> list[Listed]:
    """All checkpoints of a run, oldest first; names and sizes are compared, not checksums.

    Raises:
        CheckpointError: there is no such run.
    """
    if not run_directory.is_dir():
        raise CheckpointError(f"{run_directory}: there is no such run directory")
    lines = []
    for path in in_run(run_directory):
        try:
            manifest: Manifest | None = read_manifest(path)
        except CheckpointError:
            manifest = None
        wrong = ["of an earlier version of asyncppo"] if is_old(path) else problems(path, checksums=False)
        lines.append(Listed(path, manifest, wrong))
    return lines


def flush_to_disk(directory: Path) -> None:
    """fsync of every file and directory below, and of `directory`; what is read next comes from the disk."""
    for path in [*directory.rglob("*"), directory]:
        with _flushed(path) as descriptor:
            if path.is_file():
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def flush_names(directory: Path) -> None:
    """fsync of one directory: its entries, after a rename."""
    with _flushed(directory):
        pass


@contextlib.contextmanager
def _flushed(path: Path) -> Iterator[int]:
    """The descriptor of a file or directory that is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _own_checksum(manifest: Manifest) -> str:
    return xxhash.xxh3_128(msgspec.json.encode(msgspec.structs.replace(manifest, checksum=""))).hexdigest()
