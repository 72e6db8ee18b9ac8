"""Makes what flows through the stream: configs, prompts, groups and messages with small, readable numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from asyncppo.config import Config, from_tree
from asyncppo.messages import PROTOCOL, Group, Hello, Prepared, Status, Swapped, WeightsReady
from trainer.stream.buffer import BufferedGroup
from trainer.stream.prompts import Prompt, Prompts

Spans = Sequence[tuple[int, int]]
"""(version, tokens) of each span of one response."""


def a_config(
    *, steps: int = 4, batch: int = 2, max_staleness: int = 1, group_size: int = 2, **changes: dict[str, Any]
) -> Config:
    """A config with a small stream; `changes` are further sections: `stream={"heartbeat_s": 0.1}`."""
    tree: dict[str, Any] = {
        "run": {"steps": steps},
        "data": {"train": "train.jsonl"},
        "actor": {"path": "actor"},
        "sampling": {"group_size": group_size},
        "stream": {"prompts_per_batch": batch, "max_staleness": max_staleness},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    return from_tree(tree)


def a_prompt(number: int = 0, tokens: int = 3) -> Prompt:
    """Prompt `p5` has the tokens 50, 51, 52 and the answer 5."""
    return Prompt(f"p{number}", np.arange(10 * number, 10 * number + tokens, dtype=np.int32), str(number))


def some_prompts(count: int, *, seed: int = 0, shuffle: bool = False) -> Prompts:
    """p0, p1, … over and over."""
    return Prompts([a_prompt(number) for number in range(count)], seed, shuffle)


def a_group(
    lease: int = 1,
    spans: Sequence[Spans] = ([(0, 3)], [(0, 1), (1, 2)]),
    rewards: Sequence[float] | None = None,
    **changes: Any,
) -> Group:
    """A group of a response for each entry of `spans`; response n has the tokens 100·n, 100·n + 1, …

    By default two responses of three tokens each, of which the second met a swap after its first token.
    """
    lengths = [sum(tokens for _, tokens in response) for response in spans]
    flat = [span for response in spans for span in response]
    fields: dict[str, Any] = {
        "lease": lease,
        "response_ids": np.concatenate([100 * n + np.arange(length) for n, length in enumerate(lengths)]),
        "lengths": np.array(lengths),
        "behaviour_logprobs": -0.25 * np.arange(sum(lengths)),
        "span_versions": np.array([version for version, _ in flat]),
        "span_lengths": np.array([tokens for _, tokens in flat]),
        "span_counts": np.array([len(response) for response in spans]),
        "rewards": np.array(rewards if rewards is not None else [n % 2 for n in range(len(lengths))]),
        "truncated": np.zeros(len(lengths)),
        "reward_errors": np.zeros(len(lengths)),
        "generate_s": 1.5,
        "grade_s": 0.25,
    }
    dtypes = {"behaviour_logprobs": np.float32, "rewards": np.float32, "truncated": np.uint8, "reward_errors": np.uint8}
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            fields[name] = value.astype(dtypes.get(name, np.int32))
    return Group(**(fields | changes))


def a_group_of_version(version: int, lease: int = 1, responses: int = 2) -> Group:
    """All tokens drawn by one version."""
    return a_group(lease, [[(version, 2)]] * responses)


def a_buffered(
    version: int, lease: int, prompt: Prompt | None = None, group: Group | None = None, uses: int = 0
) -> BufferedGroup:
    """A group that has arrived, of this oldest version."""
    return BufferedGroup(lease, lease, 0, prompt or a_prompt(lease), group or a_group_of_version(version, lease), uses)


def a_hello(server: str = "alice", incarnation: str = "1", capacity: int = 4, **changes: Any) -> Hello:
    """The Hello of a server that fits `Identity("agreement", "model", "tokenizer")`."""
    fields: dict[str, Any] = {"protocol": PROTOCOL, "started": float(incarnation) if incarnation.isdecimal() else 0.0}
    fields |= {"agreement": "agreement", "model": "model", "tokenizer": "tokenizer"}
    return Hello(server=server, incarnation=incarnation, capacity=capacity, engine="scripted", **(fields | changes))


def a_status(policy_version: int = 0, **changes: Any) -> Status:
    """A heartbeat of a server that has done nothing yet."""
    zeros = dict.fromkeys(
        ("groups_in_flight", "unacknowledged", "responses", "tokens", "idle_s", "reward_errors", "engine_restarts"), 0
    )
    return Status(**({"policy_version": policy_version, "state": "waiting for leases"} | zeros | changes))


def weights_of(version: int) -> WeightsReady:
    """The announcement of a version."""
    return WeightsReady(policy_version=version, directory=f"/weights/{version}", manifest=f"checksum-{version}")


def a_prepared(version: int, manifest: str | None = None) -> Prepared:
    """For what `weights_of` announces, unless another manifest is said."""
    manifest = weights_of(version).manifest if manifest is None else manifest
    return Prepared(policy_version=version, manifest=manifest, prepare_s=0.5)


def a_swapped(version: int, manifest: str | None = None, **changes: Any) -> Swapped:
    """To what `weights_of` announces, unless another manifest is said; generation stood still for 0.4375 s."""
    fields: dict[str, Any] = {"prepare_s": 0.5, "wait_s": 1.0, "pause_s": 0.25, "load_s": 0.125, "resume_s": 0.0625}
    fields |= {"manifest": weights_of(version).manifest if manifest is None else manifest, "probe_s": 0.03125}
    return Swapped(policy_version=version, **(fields | changes))
