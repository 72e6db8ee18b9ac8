"""An evaluation: held-out prompts on their way. They enter neither ledger nor buffer."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from asyncppo.messages import Group
from trainer.stream.prompts import Prompt


@dataclass(frozen=True, slots=True)
class EvaluationLease:
    """A held-out prompt, leased."""

    peer: bytes
    leased_at: float
    index: int
    prompt: Prompt


@dataclass
class Evaluation:
    """Held-out prompts for servers of one version. Not thread-safe: the intake guards it."""

    version: int
    waiting: deque[tuple[int, Prompt]]
    leased: dict[int, EvaluationLease] = field(default_factory=dict)
    groups: dict[int, Group] = field(default_factory=dict)

    def end(self, lease: int, peer: bytes) -> EvaluationLease | None:
        """Take out a lease of this server, answered or not; None if it has no such lease."""
        leased = self.leased.get(lease)
        return self.leased.pop(lease) if leased is not None and leased.peer == peer else None

    def again(self, leased: EvaluationLease) -> None:
        """Put a prompt that was leased in vain at the end of the queue."""
        self.waiting.append((leased.index, leased.prompt))
