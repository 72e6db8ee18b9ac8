"""Published weights: a directory that Hugging Face and SGLang load, and a manifest with a checksum of every file.

The trainer writes versions (`trainer/publish.py`), the rollout server verifies them before it loads them. The manifest
names the files; its own checksum travels in WeightsReady, so a directory cannot be mistaken for another version.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import xxhash

from asyncppo.errors import WeightsError

MANIFEST = "manifest.json"
_CHUNK = 16 << 20


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a published directory holds."""

    policy_version: int
    files: dict[str, str]
    """File name to checksum (xxh3, 128 bits)."""


def checksum(path: Path) -> str:
    """xxh3-128 of a file, read in chunks."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(directory: Path, policy_version: int) -> str:
    """Write the manifest of all files in `directory`; returns the manifest's own checksum."""
    files = {path.name: checksum(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST}
    manifest = Manifest(policy_version=policy_version, files=files)
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return checksum(directory / MANIFEST)


def verify(directory: Path, policy_version: int, manifest_checksum: str) -> None:
    """Check that a published directory is whole and is the version that was announced.

    Raises:
        WeightsError: which file is missing or differs.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise WeightsError(f"{directory}: expected version {policy_version}, found no {MANIFEST}")
    if checksum(path) != manifest_checksum:
        raise WeightsError(f"{path}: differs from the manifest that was announced for version {policy_version}")
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: is no manifest as this version of asyncppo writes it: {error}") from None
    if manifest.policy_version != policy_version:
        raise WeightsError(f"{path}: holds version {manifest.policy_version}, expected {policy_version}")
    strays = {path.name for path in directory.iterdir()} - {MANIFEST, *manifest.files}
    if strays:  # an engine loads every shard that it finds
        raise WeightsError(f"{directory / min(strays)}: is not in the manifest of version {policy_version}")
    for name, expected in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise WeightsError(f"{file}: is missing from version {policy_version}")
        if checksum(file) != expected:
            raise WeightsError(f"{file}: differs from its checksum in version {policy_version}")
