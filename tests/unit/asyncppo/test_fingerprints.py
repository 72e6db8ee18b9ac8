"""Fingerprints: the same for the same model wherever it lies, another for another, and an error for none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncppo.errors import ModelError
from asyncppo.fingerprints import model_fingerprint, tokenizer_fingerprint

pytestmark = pytest.mark.unit

CONFIG = {"model_type": "qwen3", "hidden_size": 64, "rope": {"theta": 1e6, "scaling": None}, "dtype": "float32"}


def a_model(directory: Path, config: dict[str, Any] | None = None, tokenizer: str = '{"model": {}}') -> str:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config or CONFIG))
    (directory / "tokenizer.json").write_text(tokenizer)
    return str(directory)


def test_copies_have_one_fingerprint_in_whatever_order_and_dtype_they_were_saved(tmp_path: Path) -> None:
    model = a_model(tmp_path / "a")
    shuffled = dict(reversed(CONFIG.items())) | {"dtype": "bfloat16", "transformers_version": "5.0", "use_cache": False}
    copy = a_model(tmp_path / "b", shuffled)
    assert model_fingerprint(model) == model_fingerprint(copy)
    assert tokenizer_fingerprint(model) == tokenizer_fingerprint(copy)
    assert len(model_fingerprint(model)) == 16


@pytest.mark.parametrize("changes", [{"hidden_size": 128}, {"rope": {"theta": 1e4, "scaling": None}}, {"new": 1}])
def test_another_architecture_has_another_fingerprint(tmp_path: Path, changes: dict[str, Any]) -> None:
    one, other = a_model(tmp_path / "a"), a_model(tmp_path / "b", CONFIG | changes)
    assert model_fingerprint(one) != model_fingerprint(other)
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)


def test_another_tokenizer_has_another_fingerprint(tmp_path: Path) -> None:
    one, other = a_model(tmp_path / "a"), a_model(tmp_path / "b", tokenizer='{"model": {"vocab": {}}}')
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)
    assert model_fingerprint(one) == model_fingerprint(other)


def test_a_hub_name_stands_for_itself() -> None:
    assert model_fingerprint("Qwen/Qwen3-0.6B") == model_fingerprint("Qwen/Qwen3-0.6B")
    assert model_fingerprint("Qwen/Qwen3-0.6B") != model_fingerprint("Qwen/Qwen3-1.7B")
    assert tokenizer_fingerprint("Qwen/Qwen3-0.6B") != tokenizer_fingerprint("Qwen/Qwen3-1.7B")


@pytest.mark.parametrize("config", [None, b"{", b"\xff\xfe", b"[]", b"7"])
def test_a_directory_without_a_readable_config_is_a_model_error(tmp_path: Path, config: bytes | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ModelError, match=r"expected a Hugging Face model directory with a config\.json") as caught:
        model_fingerprint(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_directory_without_a_fast_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a tokenizer\.json \(a fast tokenizer\)"):
        tokenizer_fingerprint(str(tmp_path))
