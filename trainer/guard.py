"""What watches over the updates: the brake, the skipped step, the alarm of critics that have become one.

None of them changes a number while all is well. What they count is in the checkpoint.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np

from asyncppo.config import Config
from asyncppo.errors import TrainingError
from asyncppo.metrics import Journal
from trainer.checkpoint import GuardState
from trainer.model.policy import Scores
from trainer.stream.batch import Batch
from trainer.targets import Targets

log = logging.getLogger("asyncppo.guard")

FRESH = GuardState()
"""Of a run that begins."""

_ALARM_AFTER = 5
"""Steps in a row; one batch of equal rewards is no collapse."""


class Brake:
    """Lowers UTD, then the staleness bound, while off-policy data hurt; eases when they no longer do.

    A step is bad when the effective sample size of the behaviour weights is below `guard.min_ess`, or trainer and
    engine differ by more than `guard.max_logprob_gap`. Each bad step brakes by one level, each `guard.recover_after`
    good ones in a row ease by one: level 1 takes one pass of UTD, and so on down to one pass; each further level takes
    one version of the bound that prompts are admitted by, down to 0. Every rank sees the same numbers and holds the
    same level.
    """

    def __init__(self, config: Config, journal: Journal | None, before: GuardState = FRESH) -> None:
        self._guard = config.guard
        self._passes = config.passes
        self._bound = config.stream.max_staleness
        self._journal = journal
        self.good_steps = before.good_steps
        self.level = min(before.brake_level, self._passes - 1 + self._bound)

    @property
    def passes(self) -> int:
        """Optimiser passes over a batch, now."""
        return max(1, self._passes - self.level)

    @property
    def max_staleness(self) -> int:
        """The bound for admission, now."""
        return max(0, self._bound - max(0, self.level - (self._passes - 1)))

    def observe(self, version: int, ess: float, gap: float) -> None:
        """After a step: its effective sample size (a fraction) and mean log-prob gap (nats).

        NaN says nothing. A step without an effective sample size (no token carried a weight: all were masked, or beyond
        the cap) is no good one either.
        """
        limit = self._guard.max_logprob_gap
        reason = ""
        if ess < self._guard.min_ess:
            reason = f"effective sample size {ess:.2f}, below guard.min_ess {self._guard.min_ess:g}"
        elif limit is not None and gap > limit:
            reason = f"log-prob gap {gap:.3g}, above guard.max_logprob_gap {limit:g}"
        before = self.level
        self.good_steps = 0 if reason else self.good_steps + (not math.isnan(ess))
        if reason:
            self.level = min(self.level + 1, self._passes - 1 + self._bound)
        elif self.good_steps >= self._guard.recover_after and self.level:
            self.level -= 1
            self.good_steps = 0
            reason = f"{self._guard.recover_after} good steps"
        if self.level == before:
            return
        what = "brake" if self.level > before else "brake eased"
        now = f"{self.passes} passes, staleness up to {self.max_staleness}"
        log.warning("%s at version %d: %s; now %s", what, version, reason, now)
        if self._journal:
            self._journal.event(
                "brake",
                policy_version=version,
                level=self.level,
                passes=self.passes,
                max_staleness=self.max_staleness,
                reason=reason,
            )


class SkippedSteps:
    """Counts updates that were skipped because loss or gradient was not finite, keeps their batches, ends a bad run.

    The weights are as they were before; so is what is published. `RUN/skipped/version_N.npz` has the batch.
    """

    def __init__(self, config: Config, journal: Journal | None, before: GuardState = FRESH) -> None:
        self._limit = config.guard.max_skipped
        self._directory = config.run_directory / "skipped"
        self._journal = journal
        self.in_a_row = before.skipped_in_a_row
        self.count = before.skipped

    def observe(self, skipped: int, batch: Batch, scores: Scores, targets: Targets) -> None:
        """After a step with so many skipped optimiser steps.

        Raises:
            TrainingError: too many steps in a row.
        """
        if not skipped:
            self.in_a_row = 0
            return
        self.count += skipped
        self.in_a_row += 1
        path = self._directory / f"version_{batch.version:08d}.npz"
        if self._journal:
            _dump(path, batch, scores, targets)
            self._journal.event("skipped", policy_version=batch.version, optimizer_steps=skipped, batch=str(path))
        log.warning("version %d: %d steps skipped, their gradient was not finite; see %s", batch.version, skipped, path)
        if self.in_a_row >= self._limit:
            raise TrainingError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite (guard.max_skipped): look "
                f"at {path}, lower actor.learning_rate, or go on from an older checkpoint"
            )


def _dump(path: Path, batch: Batch, scores: Scores, targets: Targets) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in Batch.__dataclass_fields__ if name not in ("version", "prompt_ids", "epochs")]
    arrays = {name: getattr(batch, name) for name in names} | {"prompt_ids": np.array(batch.prompt_ids)}
    for holder in (scores, targets):
        for name in holder.__dataclass_fields__:
            tensor = getattr(holder, name)
            if tensor is not None:
                arrays[name] = tensor.numpy()
    np.savez(path, **arrays)


class Alarm:
    """Says when the critics have collapsed into one, and when they no longer are. Rank 0 only."""

    def __init__(self, config: Config, journal: Journal | None, before: GuardState = FRESH) -> None:
        self._limit = config.guard.min_separation
        self._journal = journal
        self.below = before.collapsed_for

    def observe(self, version: int, separation: float) -> None:
        """After a step, with `algorithm.separation` of its values; NaN (fewer than two critics) says nothing."""
        if math.isnan(separation):
            return
        was = self.below >= _ALARM_AFTER
        self.below = self.below + 1 if separation < self._limit else 0
        now = self.below >= _ALARM_AFTER
        if now == was:
            return
        if self._journal:
            self._journal.event("critics_collapsed" if now else "critics_apart", policy_version=version, by=separation)
        if now:
            log.warning(
                "the critics have become one: their std is %.2g of their value's spread over tokens (guard."
                "min_separation %g), so the masks choose at random; use disjoint shards, or different critics",
                separation,
                self._limit,
            )
