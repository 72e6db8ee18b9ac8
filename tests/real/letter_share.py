"""A reward function by import path that a model of random weights gets many different rewards from."""

from __future__ import annotations


def share(text: str, answer: str) -> float:
    """How many of a response's characters are small letters, as a fraction."""
    return sum("a" <= character <= "z" for character in text) / max(1, len(text))
