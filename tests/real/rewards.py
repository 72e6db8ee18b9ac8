"""A reward function by import path, for tests whose model cannot do arithmetic."""

from __future__ import annotations


def digits(text: str, answer: str) -> float:
    """1 where a digit is among the first three characters of a response."""
    return float(any(character.isdigit() for character in text[:3]))
