"""Writes a synthetic run directory for the tests of the tools that read one: small round numbers, known by heart.

A run of `steps` steps of 2 s each, 8 groups a step, staleness bound 4, two critics:

    launched at START, trainer ready after 8 s, server joined after 20 s, version 0 served after 21 s,
    held-out problems answered after 26 s, then the steps, the held-out problems again (5 s), the end (1 s later).

The reward rises from 0.2 by 0.01 a step; of each step 0.7 s is waiting for groups, 0.1 s for critics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

START = 1_700_000_000.0
STEP_S = 2.0
FIRST_STEP = START + 26.0

CONFIG = """\
run: {{name: {name}, directory: {directory}, steps: {steps}}}
data: {{train: train.jsonl}}
eval: {{sets: {{6-op: eval_6.jsonl, 8-op: eval_8.jsonl}}}}
stream: {{prompts_per_batch: 8, max_staleness: 4}}
sampling: {{group_size: 16}}
actor: {{path: artifacts/tiny/actor}}
"""


def row(step: int, **changes: Any) -> dict[str, Any]:
    """The metrics of one step, counted from 1."""
    return {
        "step": step,
        "policy_version": step - 1,
        "time": FIRST_STEP + STEP_S * step,
        "wall_s": STEP_S * step,
        "reward/mean": 0.2 + 0.01 * (step - 1),
        "reward/std": 0.4,
        "reward/errors": 0,
        "response/length_mean": 20.0,
        "response/length_max": 60,
        "response/truncated": 0.01,
        "response/tokens": 2560,
        "staleness/min": 0,
        "staleness/mean": 1.25,
        "staleness/max": 3,
        "staleness/histogram": [2, 3, 2, 1, 0],
        "uses": 1,
        "uses/mean": 1.0,
        "passes": 1,
        "value/mean": 0.3,
        "value/explained_variance": 0.1 + 0.005 * step,
        "value/explained_variance_fresh": 0.1 + 0.005 * step,
        "value/separation": 0.4,
        "value/std_mean": 0.04,
        "value/std_p10": 0.01,
        "value/std_p50": 0.03,
        "value/std_p90": 0.08,
        "value/correlation": 0.8,
        "mask/policy": 0.2,
        "mask/entropy": 0.2,
        "advantage/mean": 0.0,
        "advantage/std": 0.4,
        "policy/loss": -0.01,
        "policy/clip_fraction": 0.03,
        "policy/capped_fraction": 0.001,
        "policy/entropy": 0.9 - 0.005 * step,
        "policy/kl_behaviour": 0.002,
        "policy/kl_proximal": 0.001,
        "policy/constrained_fraction": 0.0,
        "policy/kl_reference": 0.0,
        "policy/chi2": 0.03,
        "policy/skipped": 0,
        "policy/ess": 0.97,
        "policy/grad_norm": 0.8,
        "policy/learning_rate": 3e-4,
        "logprob_gap/mean": 2e-6,
        "logprob_gap/max": 5e-5,
        "logprob_gap/tokens": 640,
        "time/step_s": STEP_S,
        "time/wait_for_batch_s": 0.7,
        "time/proximal_s": 0.2,
        "time/wait_for_critics_s": 0.1,
        "time/targets_s": 0.05,
        "time/update_s": 0.75,
        "time/publish_s": 0.1,
        "stream/servers": 1,
        "stream/in_flight": 16,
        "stream/buffered": 4,
        "stream/admitted": 8 * step + 20,
        "stream/consumed": 8 * step,
        "stream/used": 8 * step,
        "stream/lapsed": 0,
        "stream/dropped": 0,
        "stream/dropped_length": None,
        "stream/dropped_reward": None,
        "stream/consumed_length": 40.0,
        "stream/consumed_reward": 0.5,
        "stream/adopted": 0,
        "stream/ignored": 0,
        "stream/malformed": 0,
        "swap/count": step,
        "swap/pause_s": 0.2,
        "rollout/idle": None if step == 1 else 0.05,
        "rollout/tokens_per_s": None if step == 1 else 1280.0,
        **{
            f"critic/{index}/{name}": number
            for index in (0, 1)
            for name, number in {
                "loss": 0.1,
                "grad_norm": 1.0,
                "explained_variance": 0.12 + 0.005 * step,
                "explained_variance_other": 0.08 + 0.005 * step,
                "explained_variance_fresh": 0.05 + 0.005 * step,
                "skipped": 0,
                "seconds": 0.3,
            }.items()
        },
        **changes,
    }


def evaluation(set_name: str, version: int, pass_at_1: float, at: float) -> dict[str, Any]:
    """An `eval` event of 128 problems with 4 samples each."""
    return {
        "event": "eval",
        "time": at,
        "set": set_name,
        "policy_version": version,
        "problems": 128,
        "samples": 4,
        "pass_at_1": pass_at_1,
        "pass_at_k": min(1.0, pass_at_1 + 0.2),
        "length_mean": 20.0,
        "reward_errors": 0,
    }


def swap(version: int, at: float) -> dict[str, Any]:
    """A `swap` event that paused generation for 0.2 s."""
    return {
        "event": "swap",
        "time": at,
        "server": "demo-1",
        "policy_version": version,
        "prepare_s": 0.01,
        "wait_s": 0.0,
        "pause_s": 0.05,
        "load_s": 0.1,
        "resume_s": 0.05,
        "probe_s": 0.01,
        "probe_gap": 1e-6,
        "attempts": 1,
    }


def events(steps: int, before: float = 0.25, after: float = 0.75) -> list[dict[str, Any]]:
    """The events of a whole run."""
    end = FIRST_STEP + STEP_S * steps
    return [
        {"event": "launched", "time": START},
        {"event": "start", "time": START + 8, "version": 0, "resumed": False},
        {"event": "server_joined", "time": START + 20, "server": "demo-1", "engine": "sglang", "capacity": 16},
        swap(0, START + 21),
        evaluation("6-op", 0, before, START + 24),
        evaluation("8-op", 0, before - 0.1, FIRST_STEP),
        *(swap(step, FIRST_STEP + STEP_S * step) for step in range(1, steps + 1)),
        evaluation("6-op", steps, after, end + 3),
        evaluation("8-op", steps, after - 0.1, end + 5),
        {"event": "end", "time": end + 6, "version": steps, "reason": "the run is complete"},
    ]


def append(path: Path, objects: list[dict[str, Any]]) -> None:
    """Add lines to a JSON-lines file."""
    with path.open("ab") as file:
        for item in objects:
            file.write(msgspec.json.encode(item) + b"\n")


def write_config(directory: Path, steps: int) -> None:
    """The config that the trainer leaves in a run directory."""
    directory.mkdir(parents=True, exist_ok=True)
    text = CONFIG.format(name=directory.name, directory=directory.parent, steps=steps)
    (directory / "config.yaml").write_text(text)


def write_run(directory: Path, steps: int = 40, before: float = 0.25, after: float = 0.75, **changes: Any) -> Path:
    """A finished run; `changes` are put into every row. Returns the directory."""
    write_config(directory, steps)
    append(directory / "events.jsonl", events(steps, before, after))
    append(directory / "metrics.jsonl", [row(step, **changes) for step in range(1, steps + 1)])
    (directory / "logs").mkdir(exist_ok=True)
    return directory
