"""Random numbers that are the same for ever: on every rank, machine and version of numpy and torch.

BLAKE2b and the raw output of PCG64 are both fixed for good; what numpy's `Generator` or torch's make of such output
may change between versions (NEP 19), so neither is used.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def draws(key: str, count: int) -> NDArray[np.uint64]:
    """`count` independent, uniform 64-bit numbers that depend on `key` alone; two keys give unrelated numbers."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.asarray(np.random.PCG64(int.from_bytes(digest, "little")).random_raw(count), dtype=np.uint64)
