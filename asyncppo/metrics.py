"""Metrics and events as JSON lines in the run directory: one line a step, one line an event; for people and programs.

`metrics.jsonl` has one flat object per trainer step (names and meanings: `STEP_METRICS`), `events.jsonl` one object per
thing that happened. Both are appended and flushed line by line, so a reader may follow them while the run goes on.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"

STEP_METRICS: dict[str, str] = {
    "step": "trainer steps done",
    "policy_version": "version that was trained (the step publishes the next one)",
    "time": "Unix time at the end of the step",
    "wall_s": "seconds since the first step began, of this process",
    "reward/mean": "mean reward of the batch's responses",
    "reward/std": "standard deviation of the same",
    "reward/errors": "responses of the batch whose grading failed",
    "response/length_mean": "tokens of a response, mean",
    "response/length_max": "tokens of a response, longest",
    "response/truncated": "fraction of responses cut at max_response_tokens",
    "response/tokens": "response tokens of the batch",
    "staleness/min": "versions, least of the batch's groups",
    "staleness/mean": "versions, mean over the batch's groups",
    "staleness/max": "versions, most of the batch's groups; never above stream.max_staleness",
    "staleness/histogram": "groups of the batch by staleness 0, 1, … max_staleness",
    "uses": "how often a group is trained on at most (utd)",
    "uses/mean": "which use of its group this is, mean over the batch's groups: 1 without replay",
    "passes": "optimiser passes over this batch: utd with reuse by epochs, less what the brake takes",
    "value/mean": "mean of the critics' values",
    "value/explained_variance": "1 − Var(R − V̄)/Var(R) of the aggregated value",
    "value/explained_variance_fresh": "the same of the mean value before the critics learned from the batch",
    "value/separation": "mean std over critics, as a share of the mean value's std over tokens; near 0 they are one",
    "value/std_mean": "standard deviation over critics, mean over tokens",
    "value/std_p10": "the same, 10th percentile",
    "value/std_p50": "the same, median",
    "value/std_p90": "the same, 90th percentile",
    "value/correlation": "correlation of the first two critics' values",
    "critic/M/loss": "critic M: mean squared error on its shard, halved, before the last optimiser step",
    "critic/M/grad_norm": "critic M: gradient norm before clipping",
    "critic/M/explained_variance": "critic M: explained variance on the responses it learned from",
    "critic/M/explained_variance_other": "critic M: explained variance on the responses it did not learn from",
    "critic/M/explained_variance_fresh": "critic M: explained variance of all responses before it learned from any",
    "critic/M/skipped": "critic M: optimiser steps skipped because the gradient was not finite",
    "critic/M/seconds": "critic M: seconds of learning and valuing",
    "mask/policy": "fraction of tokens that left the policy term",
    "mask/entropy": "fraction of tokens that left the entropy bonus",
    "advantage/mean": "mean advantage",
    "advantage/std": "standard deviation of advantages",
    "policy/loss": "policy loss of the last pass",
    "policy/clip_fraction": "fraction of tokens at which PPO's clip binds, last pass",
    "policy/capped_fraction": "fraction of tokens whose behaviour weight passes its cap",
    "policy/constrained_fraction": "fraction of tokens that DPPO's limit takes out",
    "policy/entropy": "mean entropy over response tokens, nats",
    "policy/kl_behaviour": "KL(behaviour‖current), k3 estimate, mean over tokens, nats",
    "policy/kl_proximal": "KL(proximal‖current), k3 estimate, mean over tokens, nats",
    "policy/kl_reference": "KL(current‖reference), k3 estimate, mean over tokens, nats; 0 without a reference",
    "policy/chi2": "χ²(proximal‖behaviour), mean of (w − 1)² over the policy term's tokens, uncapped",
    "policy/skipped": "optimiser steps of this step that were skipped because the gradient was not finite",
    "policy/ess": "effective sample size of the behaviour weights, as a fraction",
    "policy/grad_norm": "gradient norm before clipping, last optimiser step",
    "policy/learning_rate": "learning rate of the last optimiser step",
    "logprob_gap/mean": "|trainer − engine| log-prob of tokens drawn by the version about to be trained; null without",
    "logprob_gap/max": "the same, largest",
    "logprob_gap/tokens": "how many such tokens the batch holds",
    "time/step_s": "seconds of the whole step",
    "time/wait_for_batch_s": "the trainer waits for the rollout servers",
    "time/proximal_s": "proximal log-probs (critics learn meanwhile)",
    "time/wait_for_critics_s": "what the critics took longer than that",
    "time/targets_s": "advantages and masks",
    "time/update_s": "optimiser passes of the actor",
    "time/publish_s": "gathering, writing and announcing the new version",
    "time/checkpoint_s": "saving a checkpoint, where this step did",
    "stream/servers": "rollout servers in the pool",
    "stream/in_flight": "groups leased and not yet received",
    "stream/buffered": "groups received and not yet consumed",
    "stream/admitted": "groups leased so far",
    "stream/consumed": "groups consumed so far",
    "stream/used": "uses of groups so far: above consumed with reuse by replay",
    "stream/lapsed": "further uses that were not made because the group had grown too old (reuse by replay)",
    "stream/dropped": "groups dropped so far: too stale, lost with their server, or without signal; events say which",
    "stream/malformed": "messages dropped so far because they do not decode or make no sense",
    "rollout/idle": "fraction of the servers' time since the last step without anything to generate",
    "rollout/tokens_per_s": "response tokens generated per second since the last step, all servers",
    "swap/count": "swaps reported so far",
    "swap/pause_s": "seconds that generation stood still in the newest swap: pause, load, resume",
}
"""Every metric of a step. `M` stands for a critic's index."""


class Journal:
    """Appends to a run's `metrics.jsonl` and `events.jsonl`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._metrics = (directory / METRICS_FILE).open("ab", buffering=0)
        self._events = (directory / EVENTS_FILE).open("ab", buffering=0)

    def step(self, values: Mapping[str, Any]) -> None:
        """Append one step. Numbers that are not finite become null."""
        self._metrics.write(msgspec.json.encode({key: _plain(value) for key, value in values.items()}) + b"\n")

    def event(self, event: str, **details: Any) -> None:
        """Append one event with the time."""
        plain = {key: _plain(value) for key, value in details.items()}
        self._events.write(msgspec.json.encode({"event": event, "time": time.time(), **plain}) + b"\n")

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._events.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, in order; nothing if there is none. Half-written lines are left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                with contextlib.suppress(msgspec.DecodeError):  # torn by a full disk, or a process that was killed
                    yield msgspec.json.decode(line)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
