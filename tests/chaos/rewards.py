"""What chaos grades by: a reward drawn from the text, which now and then fails, or hangs until its worker is killed."""

from __future__ import annotations

import time
import zlib

FAILS, HANGS = 61, 1999
"""One text in so many."""


def by_chance(text: str, answer: str) -> float:
    """0 or 1, the same for the same text."""
    number = zlib.crc32(f"{text}/{answer}".encode())
    if number % HANGS == 0:
        time.sleep(600)
    if number % FAILS == 0:
        raise ValueError("this text is one that cannot be graded")
    return float(number & 1)
