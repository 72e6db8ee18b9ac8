"""Short hashes by which two processes tell that they mean the same model, tokenizer or bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from asyncppo.errors import ModelError

_VOLATILE = {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "use_cache",
    "_attn_implementation_autoset",
}


def model_fingerprint(model: str) -> str:
    """Hash of a model's architecture: its config.json without what changes from save to save.

    A hub name that is no directory here stands for itself.

    Raises:
        ModelError: a directory without a readable config.json.
    """
    if not Path(model).is_dir():
        return _short(model.encode())
    try:
        config = json.loads((Path(model) / "config.json").read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{model}: expected a Hugging Face model directory with a config.json: {error}") from None
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    return _short(json.dumps(kept, sort_keys=True).encode())


def tokenizer_fingerprint(model: str) -> str:
    """Hash of a model directory's tokenizer.json. A hub name that is no directory here stands for itself.

    Raises:
        ModelError: a directory without a tokenizer.json.
    """
    if not Path(model).is_dir():
        return _short(model.encode())
    try:
        return _short((Path(model) / "tokenizer.json").read_bytes())
    except OSError as error:
        raise ModelError(f"{model}: expected a tokenizer.json (a fast tokenizer): {error}") from None


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
