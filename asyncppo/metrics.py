"""Metrics and events as JSON lines in the run directory: one line a step, one line an event; for people and programs.

`metrics.jsonl` has one flat object per trainer step (names and meanings: `STEP_METRICS`), `events.jsonl` one object per
thing that happened, `ledger.jsonl` what became of each prompt (trainer/stream/ledger.py). All are appended and flushed
line by line, so a reader may follow them while the run goes on. A trainer that goes on from a checkpoint cuts metrics
and ledger where the checkpoint was made, so no step is there twice; events are a history, and stay.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec

from asyncppo.errors import JournalError

log = logging.getLogger("asyncppo.metrics")

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
LEDGER_FILE = "ledger.jsonl"
_BLOCK = 1 << 16
_PATIENCE_S = 5.0
"""A line of metrics or of the ledger that cannot be written is tried again for so long."""

STEP_METRICS: dict[str, str] = {
    "step": "trainer steps done",
    "policy_version": "version that was trained (the step publishes the next one)",
    "time": "Unix time at the end of the step",
    "wall_s": "seconds since the first step began, of this process",
    "reward/mean": "mean reward of the batch's responses, without those that `reward.on_error` masks",
    "reward/std": "standard deviation of the same",
    "reward/errors": "responses of the batch's groups whose grading failed, masked ones too",
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
    "time/publish_s": "gathering the new version's weights and its probe; it is written and announced beside training",
    "time/checkpoint_s": "saving the checkpoint of the version about to be trained, where one was due",
    "stream/servers": "rollout servers in the pool",
    "stream/in_flight": "groups leased and not yet received",
    "stream/buffered": "groups received and not yet consumed",
    "stream/admitted": "groups leased so far",
    "stream/consumed": "groups consumed so far",
    "stream/used": "uses of groups so far: above consumed with reuse by replay",
    "stream/lapsed": "further uses that were not made because the group had grown too old (reuse by replay)",
    "stream/dropped": "groups dropped so far: too stale, lost with their server, or without signal; events say which",
    "stream/dropped_length": "tokens of a response, mean over the dropped groups that had come, of this process",
    "stream/dropped_reward": "reward, mean over the same",
    "stream/consumed_length": "tokens of a response, mean over the consumed groups, of this process",
    "stream/consumed_reward": "reward, mean over the consumed groups",
    "stream/adopted": "groups of leases from before that this process took in the place of a new lease",
    "stream/ignored": "groups that came to this process and nobody waited for: duplicates, or rolled back by a resume",
    "stream/malformed": "messages dropped so far because they do not decode or make no sense",
    "rollout/idle": "fraction of the servers' time since the last step without anything to generate",
    "rollout/tokens_per_s": "response tokens generated per second since the last step, all servers",
    "swap/count": "swaps reported so far",
    "swap/pause_s": "seconds that generation stood still in the newest swap: pause, load, resume",
}
"""Every metric of a step. `M` stands for a critic's index."""


class Journal:
    """Appends to a run's `metrics.jsonl`, `events.jsonl` and `ledger.jsonl`; the last is made by its first line."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._torn: set[str] = set()
        """Files whose last line was written in part."""
        self.lost_events = 0
        self._files = {name: _open(directory / name) for name in (METRICS_FILE, EVENTS_FILE)}
        if (directory / LEDGER_FILE).exists():
            self._files[LEDGER_FILE] = _open(directory / LEDGER_FILE)

    def step(self, values: Mapping[str, Any]) -> None:
        """Append one step. Numbers that are not finite become null."""
        self._append(METRICS_FILE, {key: _plain(value) for key, value in values.items()})

    def event(self, event: str, **details: Any) -> None:
        """Append one event with the time. One that cannot be written is counted and said, and nothing else."""
        plain = {key: _plain(value) for key, value in details.items()}
        try:
            self._append(EVENTS_FILE, {"event": event, "time": time.time(), **plain}, patience_s=0.0)
        except JournalError as error:
            self.lost_events += 1
            if self.lost_events == 1:
                log.warning("the event %s is lost, and this is said once: %s", event, error)

    def ledger(self, **line: Any) -> None:
        """Append one line of the ledger; one thread at a time."""
        if LEDGER_FILE not in self._files:
            self._files[LEDGER_FILE] = _open(self._directory / LEDGER_FILE)
        self._append(LEDGER_FILE, line)

    def sizes(self) -> tuple[int, int]:
        """Bytes of metrics and ledger, for `roll_back`."""
        return self._size(METRICS_FILE), self._size(LEDGER_FILE)

    def sync(self) -> None:
        """Return when everything that was written is on the disk."""
        for file in list(self._files.values()):
            os.fsync(file.fileno())

    def roll_back(self, metrics_bytes: int, ledger_bytes: int) -> int:
        """Cut metrics and ledger to what they were (`sizes`) when a checkpoint was made.

        Returns:
            How many steps were cut off.
        """
        steps = 0
        for name, size in ((METRICS_FILE, metrics_bytes), (LEDGER_FILE, ledger_bytes)):
            there = self._size(name)
            if there < size:
                log.warning(
                    "%s has %d bytes, and had %d when the checkpoint was made: lines are missing",
                    self._directory / name,
                    there,
                    size,
                )
            elif there > size:
                if name == METRICS_FILE:
                    with (self._directory / name).open("rb") as file:
                        file.seek(size)
                        steps = sum(1 for _ in file)
                os.ftruncate(self._files[name].fileno(), size)
        return steps

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _size(self, name: str) -> int:
        return os.fstat(self._files[name].fileno()).st_size if name in self._files else 0

    def _append(self, name: str, line: Mapping[str, Any], patience_s: float | None = None) -> None:
        """A full disk is given some seconds: a checkpoint that did not fit is just being removed, perhaps."""
        rest = memoryview((b"\n" if name in self._torn else b"") + msgspec.json.encode(line) + b"\n")
        whole = len(rest)
        deadline = time.monotonic() + (_PATIENCE_S if patience_s is None else patience_s)
        while True:
            try:
                rest, why = rest[self._files[name].write(rest) :], "is the disk full?"
            except OSError as error:
                why = str(error)
            if not rest:
                self._torn.discard(name)
                return
            if time.monotonic() >= deadline:
                if len(rest) < whole:
                    self._torn.add(name)
                raise JournalError(
                    f"{self._directory / name}: a line cannot be written: {why}; make room and start the same command "
                    "again: it goes on from the last checkpoint"
                )
            time.sleep(0.1)


def _open(path: Path) -> FileIO:
    """For appending whole lines: a last line that was torn by a kill or a full disk is cut off first."""
    file = path.open("ab", buffering=0)
    size = whole = os.fstat(file.fileno()).st_size
    with path.open("rb") as reader:
        newline = -1
        while whole and newline < 0:
            start = max(0, whole - _BLOCK)
            reader.seek(start)
            newline = reader.read(whole - start).rfind(b"\n")
            whole = start + newline + 1
    if whole < size:
        log.warning("%s: its last line was torn, and %d bytes are cut off", path, size - whole)
        os.ftruncate(file.fileno(), whole)
    return file


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
