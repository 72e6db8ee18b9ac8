"""A reward function by import path, for tests whose model cannot do arithmetic."""

from __future__ import annotations

from asyncppo.rewards import Reward, line_rewards


def digits(text: str, answer: str) -> float:
    """1 where a digit is among the first three characters of a response."""
    return float(any(character.isdigit() for character in text[:3]))


def lines(text: str, answer: str) -> Reward:
    """A process reward of 0.1 for every line with an equals sign, and nothing for the whole."""
    return Reward(0.0, line_rewards(text, lambda _, line: 0.1 * ("=" in line)))
