"""What one rank of tests/real/test_two_ranks.py does: `python tests/ranks.py DIRECTORY`, with RANK and WORLD_SIZE set.

DIRECTORY has config.yaml. Rank 0 writes `results-SIZE.pt`: for each case the weights and metrics of one update of the
actor and one lesson of a critic, under DeepSpeed.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asyncppo.config import load
from tests.model_maker import a_batch, a_lesson
from trainer.model import deepspeed_engine, networks
from trainer.model.critic import Critic
from trainer.model.policy import Policy, Scores
from trainer.model.world import World
from trainer.publish.disk import Disk
from trainer.stream.batch import Batch
from trainer.targets import TargetBuilder, Targets

STAGES = ("1", "2", "3", "3 as for a large model")
SWITCHES = {
    "sequence ratio": (
        "algorithm.ratio=sequence",
        "algorithm.clip_low=0.01",
        "algorithm.clip_high=0.01",
        "algorithm.behaviour_level=sequence",
        "algorithm.behaviour_mode=clamp",
        "algorithm.behaviour_cap=1.05",
        "algorithm.loss_aggregation=constant",
        "algorithm.kl_coef=0.5",
        "algorithm.mask_scope=sequence",
    ),
    "prefix ratio": (
        "algorithm.ratio=prefix-min",
        "algorithm.proximal=interpolate",
        "algorithm.dual_clip=1.5",
        "algorithm.mask_signal=random",
        "critic.lam=0.5",
        "critic.value_clip=0.1",
    ),
    "divergence": (
        "algorithm.trust=divergence",
        "algorithm.divergence_limit=0.001",
        "algorithm.loss_aggregation=token-mean",
        "algorithm.mask_signal=entropy",
    ),
}
"""Settings under which the update looks at whole responses, or at what only some ranks hold; trained under ZeRO 2."""
BATCHES = ("even", "ragged", "one response")
CASES = [(stage, batch) for stage in STAGES for batch in BATCHES]
CASES += [(switch, batch) for switch in SWITCHES for batch in BATCHES[1:]]


def batches() -> Iterator[tuple[str, Batch]]:
    """`even` fits; `ragged` gives ranks different numbers of response tokens; `one response` leaves a rank empty."""
    yield "even", a_batch()
    yield (
        "ragged",
        a_batch(prompts=(2, 30), responses=(14, 9, 1, 2), rewards=(1, 0, 1, 0), truncated=(0,) * 4, shard=(0, 0, 1, 1)),
    )
    yield "one response", a_batch(prompts=(3,), responses=(7,), rewards=(1,), truncated=(0,), shard=(0,))


def be_large(config: dict[str, Any]) -> dict[str, Any]:
    """Let ZeRO-3 part with every parameter as soon as it can, as it does when they do not fit."""
    names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    config["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
    return config


def own_responses(batch: Batch) -> list[int]:
    return [1] * len(batch.rewards) if len(batch.rewards) == 1 else [1, 0] * (len(batch.rewards) // 2)


def train(directory: Path, stage: str, batch: Batch, world: World, *overrides: str) -> dict[str, Any]:
    settings = [
        f"{role}.{key}" for role in ("actor", "critic") for key in (f"zero_stage={stage[0]}", "engine=deepspeed")
    ]
    config = load(directory / "config.yaml", [*settings, *overrides])
    policy, critic = Policy(config, world), Critic(config, 0, world)
    tokens = len(batch.response_ids)
    values = torch.stack((torch.linspace(-0.5, 0.5, tokens), torch.linspace(0.4, -0.1, tokens).square()))
    scores = policy.score(batch)
    result: dict[str, Any] = {
        name: getattr(scores, name) for name in Scores.__slots__ if getattr(scores, name) is not None
    }
    targets = TargetBuilder(config).build(batch, values, scores.entropy)
    result["policy metrics"] = [policy.update(batch, scores, targets, use) for use in range(2)]
    result["policy"] = policy.weights()
    returns = np.linspace(-1, 1, tokens)
    learned = critic.learn(a_lesson(batch, returns, own_responses(batch)))
    result["values"], result["critic metrics"] = torch.from_numpy(np.array(learned.values)), learned.metrics
    result["critic"] = {name: weights.clone() for name, weights in critic._engine.parameters_in_full()}
    state = directory / f"state-{world.size}" / f"{stage}-{len(batch.rewards)}-{len(overrides)}"
    policy.save(state)
    policy.update(batch, scores, targets, 2)
    expected = policy.weights()
    policy.load(state)
    result["poisoned"] = poisoned(policy, batch, scores, targets)
    policy.update(batch, scores, targets, 2)
    result["resumed"] = {name: bool(torch.equal(weights, expected[name])) for name, weights in policy.weights().items()}
    return result


def poisoned(policy: Policy, batch: Batch, scores: Scores, targets: Targets) -> float:
    """Steps skipped in a pass in which one token of one rank has an advantage that is not a number."""
    advantages = targets.advantages.clone()
    advantages[int(targets.keep_policy.nonzero()[0])] = torch.nan
    return policy.update(batch, scores, replace(targets, advantages=advantages), 2)["skipped"]


def moved(directory: Path, stage: str, world: World) -> dict[str, torch.Tensor]:
    """What one rank has saved, loaded by these ranks: its weights; and it is saved again, to `moved/STAGE`."""
    dtype = "bfloat16" if stage == "2" else "float32"
    overrides = [f"actor.zero_stage={stage[0]}", "actor.engine=deepspeed", f"actor.dtype={dtype}"]
    policy = Policy(load(directory / "config.yaml", overrides), world)
    policy.load(directory / "state-1" / f"{stage}-6-0")
    policy.save(directory / "moved" / stage)
    world.barrier()
    return policy.weights()


def published(directory: Path, stage: str, world: World) -> None:
    """The state that one rank has saved under ZeRO 1, published by these ranks under any stage to
    `published-SIZE-STAGE`, and the probe that each rank has."""
    overrides = [f"actor.zero_stage={stage[0]}", "actor.engine=deepspeed"]
    config = load(directory / "config.yaml", [*overrides, f"publish.directory={directory}/published/{world.size}"])
    policy = Policy(config, world)
    policy.load(directory / "state-1" / "1-6-0")
    weights = policy.weights(torch.bfloat16)
    probe = policy.probe(np.arange(10, 40, dtype=np.int32))
    if world.rank == 0:
        ready = Disk(config, Path(config.actor.path)).put(7, weights, policy.network.hf)
        Path(ready.directory).rename(directory / f"published-{world.size}-{stage}")
    torch.save(probe, directory / f"probe-{world.size}-{stage}-{world.rank}.pt")
    world.barrier()


def shared(world: World) -> dict[str, Any]:
    """What this rank has after `share`; only rank 0 gave something."""
    given = {"ids": np.array(["p1", "prompt ü"]), "numbers": np.arange(5, dtype=np.int32), "none": np.zeros((0, 3))}
    received = world.share(given if world.rank == 0 else None)
    nothing = world.share({} if world.rank == 0 else None)
    return {
        "received": {name: (str(array.dtype), array.tolist()) for name, array in received.items()},
        "nothing": nothing,
    }


def main(directory: Path) -> None:
    networks._HEAD_CHUNK = 3  # so that ranks with more response tokens have more chunks
    world = World()
    torch.save(shared(world), directory / f"shared-{world.size}-{world.rank}.pt")
    results = {}
    derive = deepspeed_engine.deepspeed_config
    for stage in STAGES:
        if "large" in stage:
            deepspeed_engine.deepspeed_config = lambda *args, **kwargs: be_large(derive(*args, **kwargs))
        for name, batch in batches():
            print(f"rank {world.rank} of {world.size}: ZeRO {stage}, {name}", flush=True)
            results[stage, name] = train(directory, stage, batch, world)
    deepspeed_engine.deepspeed_config = derive
    for switch, overrides in SWITCHES.items():
        for name, batch in list(batches())[1:]:
            print(f"rank {world.rank} of {world.size}: {switch}, {name}", flush=True)
            results[switch, name] = train(directory, "2", batch, world, *overrides)
    for stage in STAGES:
        deepspeed_engine.deepspeed_config = lambda *args, stage=stage, **kwargs: (
            be_large(derive(*args, **kwargs)) if "large" in stage else derive(*args, **kwargs)
        )
        published(directory, stage, world)
    if world.size == 2:
        for stage in STAGES:
            deepspeed_engine.deepspeed_config = lambda *args, stage=stage, **kwargs: (
                be_large(derive(*args, **kwargs)) if "large" in stage else derive(*args, **kwargs)
            )
            results["moved", stage] = moved(directory, stage, world)
    if world.rank == 0:
        torch.save(results, directory / f"results-{world.size}.pt")
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
