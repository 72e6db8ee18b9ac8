"""Published weights: a whole directory passes, and every corruption is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from asyncppo.errors import WeightsError
from asyncppo.weights import MANIFEST, Manifest, Tensor, checksum, checksum_of, verify, write_manifest

pytestmark = pytest.mark.unit


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, str]:
    """Version 3 and its manifest's checksum."""
    directory = tmp_path / "3"
    directory.mkdir()
    (directory / "model-1.safetensors").write_bytes(bytes(range(256)) * 100)
    (directory / "model-2.safetensors").write_bytes(b"")
    (directory / "config.json").write_text("{}")
    return directory, write_manifest(directory, 3)


def test_a_whole_directory_passes(published: tuple[Path, str]) -> None:
    directory, announced = published
    verify(directory, 3, announced)


def test_the_manifest_names_the_version_and_every_file(published: tuple[Path, str]) -> None:
    directory, announced = published
    manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    assert manifest.policy_version == 3
    assert list(manifest.files) == ["config.json", "model-1.safetensors", "model-2.safetensors"]
    assert announced == checksum(directory / MANIFEST)
    assert write_manifest(directory, 3) == announced  # the manifest does not name itself
    assert write_manifest(directory, 4) != announced


def test_a_checksum_is_that_of_all_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"0123456789" * 50)
    whole = checksum(file)
    monkeypatch.setattr("asyncppo.weights._CHUNK", 7)
    assert checksum(file) == whole
    file.write_bytes(b"0123456789" * 50 + b"!")
    assert checksum(file) != whole
    assert len(whole) == 32


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_version(directory: Path) -> None:
    write_manifest(directory, 2)


CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda d: (d / MANIFEST).unlink(), r"expected version 3, found no manifest\.json"),
    "a changed manifest": (
        lambda d: flip(d / MANIFEST),
        r"manifest\.json: differs from the manifest that was announced",
    ),
    "the manifest of another version": (other_version, r"manifest\.json: differs from .* announced for version 3"),
    "a missing file": (
        lambda d: (d / "model-1.safetensors").unlink(),
        r"model-1\.safetensors: is missing from version 3",
    ),
    "a directory in place of a file": (
        lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()),
        r"config\.json: is missing",
    ),
    "a flipped bit": (lambda d: flip(d / "model-1.safetensors"), r"model-1\.safetensors: differs from its checksum"),
    "a file cut off": (
        lambda d: (d / "model-1.safetensors").write_bytes(bytes(range(256)) * 99),
        r"model-1\.safetensors: differs",
    ),
    "a file that has grown": (
        lambda d: (d / "model-2.safetensors").write_bytes(b"\0"),
        r"model-2\.safetensors: differs",
    ),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_a_corruption_is_named(published: tuple[Path, str], what: str) -> None:
    directory, announced = published
    corrupt, match = CORRUPTIONS[what]
    corrupt(directory)
    with pytest.raises(WeightsError, match=match) as caught:
        verify(directory, 3, announced)
    assert str(directory) in str(caught.value)


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere: expected version 3, found no manifest\.json"):
        verify(tmp_path / "nowhere", 3, "")


def test_the_right_files_under_the_wrong_version_are_refused(published: tuple[Path, str]) -> None:
    directory, announced = published
    with pytest.raises(WeightsError, match="holds version 3, expected 4"):
        verify(directory, 4, announced)


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"policy_version": 3, "files": {}, "signature": 1}', b"\xff"])
def test_a_manifest_that_another_program_wrote_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(WeightsError, match=r"manifest\.json: is no manifest"):
        verify(tmp_path, 3, checksum(tmp_path / MANIFEST))


def test_a_stray_shard_is_refused(published: tuple[Path, str]) -> None:
    directory, manifest = published
    (directory / "model-00009.safetensors").write_bytes(b"left by somebody")
    with pytest.raises(WeightsError, match=r"model-00009\.safetensors: is not in the manifest"):
        verify(directory, 3, manifest)


# --- tensors ---------------------------------------------------------------------------------------------------------

SHARDS = {
    "model-1.safetensors": {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)},
    "model-2.safetensors": {"c": np.arange(5000, dtype=np.int64)},
}


def with_tensors(directory: Path, **changed: Tensor) -> str:
    """A directory of two shards; its manifest says what they hold, but for what is `changed`."""
    directory.mkdir()
    tensors = {}
    for name, shard in SHARDS.items():
        save_file(shard, directory / name)
        for key, array in shard.items():
            data = checksum_of(array.tobytes())
            tensors[key] = Tensor(dtype=str(array.dtype), shape=list(array.shape), xxh3=data)
    return write_manifest(directory, 3, tensors | changed)


def test_the_manifest_says_what_each_tensor_is_and_they_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = with_tensors(tmp_path / "3")
    manifest = verify(tmp_path / "3", 3, announced)
    assert (manifest.tensors["a.weight"].dtype, manifest.tensors["a.weight"].shape) == ("float32", [2, 3])
    monkeypatch.setattr("asyncppo.weights._CHUNK", 7)
    assert verify(tmp_path / "3", 3, announced) == manifest


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    announced = with_tensors(tmp_path / "3")
    file = tmp_path / "3" / "model-1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=r"model-1\.safetensors: differs from its checksum .* in tensor "):
        verify(tmp_path / "3", 3, announced)


@pytest.mark.parametrize(
    ("name", "wrong", "match"),
    [
        ("b", {"dtype": "bfloat16"}, r"tensor b of version 3 is float16 \[4\], .* has bfloat16 \[4\]"),
        ("b", {"shape": [2, 2]}, r"tensor b of version 3 is float16 \[4\], .* has float16 \[2, 2\]"),
        ("b", {"xxh3": "0" * 32}, r"tensor b of version 3 .* 00000000…"),
        ("z", {}, r"tensor z of version 3 is not there"),
    ],
)
def test_a_file_that_is_not_what_was_meant_is_refused(
    tmp_path: Path, name: str, wrong: dict[str, object], match: str
) -> None:
    right = Tensor(dtype="float16", shape=[4], xxh3=checksum_of(np.ones(4, np.float16).tobytes()))
    announced = with_tensors(tmp_path / "3", **{name: msgspec.structs.replace(right, **wrong)})
    with pytest.raises(WeightsError, match=match):
        verify(tmp_path / "3", 3, announced)


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}", b"\x03\0\0\0\0\0\0\0[1]"])
def test_a_file_without_the_tensors_that_were_meant_is_refused(tmp_path: Path, header: bytes) -> None:
    directory = tmp_path / "3"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(header)
    announced = write_manifest(directory, 3, {"a": Tensor(dtype="float32", shape=[1], xxh3="")})
    with pytest.raises(WeightsError, match="tensor a of version 3 is not there"):
        verify(directory, 3, announced)
