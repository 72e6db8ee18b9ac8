"""`python -m tests.chaos.server`: `python -m rollout_server` with a scripted engine in SGLang's place, else the same.

What it says depends on prompt, response and policy version alone. It has no weights that a probe could be right under:
`publish.probe` has to be off. `CHAOS_TOKEN_S` is the time that a token takes.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import rollout_server.__main__ as program
import rollout_server.sglang_engine as real
from asyncppo.config import Config
from rollout_server.engine import ScriptedEngine

LONGEST = 8
"""Tokens of a response at most."""
_END = 2


def script(prompt_ids: tuple[int, ...], index: int, version: int) -> list[tuple[int, float]]:
    """Two to eight tokens of the tiny models' vocabulary."""

    def draw(place: int) -> int:
        return zlib.crc32(repr((prompt_ids, index, version, place)).encode())

    length = 2 + draw(-1) % (LONGEST - 1)
    return [(20 + draw(place) % 300, -5.5 - (draw(place) >> 16 & 7) / 8) for place in range(length - 1)] + [
        (_END, -5.5)
    ]


def decode(ids: Sequence[int]) -> str:
    """Numbers: nobody reads them."""
    return " ".join(map(str, ids))


def scripted(config: Config, model: str, log: Path, url: str | None) -> ScriptedEngine:
    """In the place of `SGLangEngine`, with its arguments."""
    return ScriptedEngine(script, decode, token_s=float(os.environ.get("CHAOS_TOKEN_S", "0.005")))


if __name__ == "__main__":
    real.SGLangEngine = scripted  # type: ignore[misc, assignment]
    sys.argv[0] = "rollout_server"
    program.app()
