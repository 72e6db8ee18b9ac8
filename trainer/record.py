"""One step's record: phase times while it runs, then the row of metrics (asyncppo/metrics.py) and a line for people."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from asyncppo import algorithm, waits
from asyncppo.config import Config
from trainer.model.critics import Values
from trainer.model.policy import Scores
from trainer.stream.batch import Batch
from trainer.stream.intake import Counts
from trainer.targets import Targets, returns


class Recorder:
    """Makes the rows of a run; remembers only what rates need."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._started: float | None = None
        self._last: tuple[float, Counts] | None = None

    def row(
        self,
        step: StepRecord,
        batch: Batch,
        targets: Targets,
        values: Values,
        scores: Scores,
        counts: Counts,
    ) -> dict[str, Any]:
        """All metrics of a step that has ended."""
        now = time.monotonic()
        if self._started is None:
            self._started = step.started
        row: dict[str, Any] = {
            "step": batch.version + 1,
            "policy_version": batch.version,
            "time": time.time(),
            "wall_s": now - self._started,
            "uses": self._config.algorithm.utd,
            "passes": step.passes,
            **_batch_metrics(batch, self._config.stream.max_staleness),
            **_value_metrics(batch, targets, values, self._config),
            **values.metrics,
            **_policy_metrics(step.sums),
            **_gap(batch, scores.logprobs),
            "time/step_s": now - step.started,
            **{f"time/{name}_s": seconds for name, seconds in step.seconds.items()},
            "stream/servers": counts.servers,
            "stream/in_flight": counts.in_flight,
            "stream/buffered": counts.buffered,
            "stream/admitted": counts.admitted,
            "stream/consumed": counts.consumed,
            "stream/used": counts.used,
            "stream/lapsed": counts.lapsed,
            "stream/dropped": sum(counts.dropped.values()),
            "stream/dropped_length": counts.dropped_length,
            "stream/dropped_reward": counts.dropped_reward,
            "stream/consumed_length": counts.consumed_length,
            "stream/consumed_reward": counts.consumed_reward,
            "stream/adopted": counts.adopted,
            "stream/ignored": sum(counts.ignored.values()),
            "stream/malformed": counts.malformed,
            "swap/count": counts.swaps,
            "swap/pause_s": counts.swap_pause_s,
            **self._rates(now, counts),
        }
        self._last = (now, counts)
        return row

    def _rates(self, now: float, counts: Counts) -> dict[str, float | None]:
        if self._last is None:
            return {"rollout/idle": None, "rollout/tokens_per_s": None}
        then, before = self._last
        span = max(1e-9, now - then)
        idle = (counts.idle_s - before.idle_s) / span / max(1, counts.servers)
        return {
            "rollout/idle": min(1.0, max(0.0, idle)),
            "rollout/tokens_per_s": max(0, counts.tokens - before.tokens) / span,
        }

    def line(self, row: dict[str, Any]) -> str:
        """The step for people."""
        return (
            f"step {row['step']}/{self._config.run.steps}  reward {row['reward/mean']:.3f}  "
            f"length {row['response/length_mean']:.0f}  "
            f"staleness {row['staleness/mean']:.1f} (max {row['staleness/max']})  "
            f"critic std {row['value/std_mean']:.3f}  entropy {row['policy/entropy']:.3f}  "
            f"{row['time/step_s']:.1f} s, {row['time/wait_for_batch_s']:.1f} s of it waiting for groups"
        )


class StepRecord:
    """Collects the step that trains `version`."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.passes = 0
        self.sums: dict[str, float] = {}

    def add(self, sums: dict[str, float]) -> None:
        """One pass of the update; its sums are kept until the next, the skipped steps of all are added up."""
        skipped = self.sums.get("skipped", 0.0)
        self.sums = sums | {"skipped": skipped + sums["skipped"]}
        self.passes += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block, and tells the watchdog of it."""
        started = time.monotonic()
        with waits.phase(f"{name.replace('_', ' ')} of version {self.version}"):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


def _batch_metrics(batch: Batch, max_staleness: int) -> dict[str, Any]:
    staleness = batch.staleness
    return {
        "reward/mean": float(batch.rewards.mean()),
        "reward/std": float(batch.rewards.std()),
        "reward/errors": int(batch.reward_errors.sum()),
        "response/length_mean": float(batch.response_lengths.mean()),
        "response/length_max": int(batch.response_lengths.max()),
        "response/truncated": float(batch.truncated.mean()),
        "response/tokens": len(batch.response_ids),
        "staleness/min": int(staleness.min()),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": int(staleness.max()),
        "uses/mean": float(batch.uses.mean()) + 1.0,
        "staleness/histogram": np.bincount(staleness, minlength=max_staleness + 1).tolist(),
    }


def _value_metrics(batch: Batch, targets: Targets, answer: Values, config: Config) -> dict[str, Any]:
    values = answer.values
    metrics = {
        "mask/policy": 1.0 - float(targets.keep_policy.float().mean()),
        "mask/entropy": 1.0 - float(targets.keep_entropy.float().mean()),
        "advantage/mean": float(targets.advantages.mean()),
        "advantage/std": float(targets.advantages.std(correction=0)),
        "value/std_mean": float(targets.value_std.mean()),
    }
    if len(values):
        achieved = returns(batch, config.algorithm)
        explained = algorithm.explained_variance(targets.value, achieved)
        metrics |= {"value/mean": float(targets.value.mean()), "value/explained_variance": explained}
        if len(answer.fresh):
            fresh = algorithm.explained_variance(answer.fresh.mean(dim=0), achieved)
            metrics["value/explained_variance_fresh"] = fresh
    if len(values) >= 2:
        low, middle, high = np.quantile(targets.value_std.numpy(), [0.1, 0.5, 0.9]).tolist()
        metrics |= {"value/std_p10": low, "value/std_p50": middle, "value/std_p90": high}
        metrics["value/separation"] = algorithm.separation(values)
        if float(values[0].std()) > 0 and float(values[1].std()) > 0:
            metrics["value/correlation"] = float(torch.corrcoef(values[:2])[0, 1])
    return metrics


def _policy_metrics(sums: dict[str, float]) -> dict[str, float]:
    tokens, active = max(1.0, sums["tokens"]), max(1.0, sums["active"])
    kept = max(1.0, sums["policy_kept"])
    return {
        "policy/loss": sums["policy_loss"],
        "policy/clip_fraction": sums["clipped"] / active,
        "policy/capped_fraction": sums["capped"] / kept,
        "policy/constrained_fraction": sums["divergence_masked"] / active,
        "policy/entropy": sums["entropy_sum"] / tokens,
        "policy/kl_behaviour": sums["kl_behaviour_sum"] / tokens,
        "policy/kl_proximal": sums["kl_proximal_sum"] / tokens,
        "policy/kl_reference": sums["kl_reference_sum"] / tokens,
        "policy/chi2": sums["chi2_sum"] / kept,
        "policy/ess": effective_sample_size(sums),
        "policy/skipped": sums["skipped"],
        "policy/grad_norm": sums["grad_norm"],
        "policy/learning_rate": sums["learning_rate"],
    }


def effective_sample_size(sums: dict[str, float]) -> float:
    """(Σw)² / Σw² of the behaviour weights as a fraction of the tokens that carry one; NaN where none does."""
    squares, active = sums["weight_sq_sum"], sums["active"]
    return sums["weight_sum"] ** 2 / squares / active if squares else float("nan")


def logprob_gap(batch: Batch, logprobs: torch.Tensor | None) -> float:
    """Mean |trainer − engine| log-prob, as `logprob_gap/mean`; NaN without such tokens."""
    mean = _gap(batch, logprobs)["logprob_gap/mean"]
    return float("nan") if mean is None else float(mean)


def _gap(batch: Batch, logprobs: torch.Tensor | None) -> dict[str, Any]:
    """Trainer against engine: only tokens that the very version drew, whose log-probs should be the same."""
    same = batch.token_versions == batch.version
    if logprobs is None or not same.any():
        return {"logprob_gap/mean": None, "logprob_gap/max": None, "logprob_gap/tokens": 0}
    gap = np.abs(logprobs.numpy()[same] - batch.behaviour_logprobs[same])
    return {
        "logprob_gap/mean": float(gap.mean()),
        "logprob_gap/max": float(gap.max()),
        "logprob_gap/tokens": int(same.sum()),
    }
