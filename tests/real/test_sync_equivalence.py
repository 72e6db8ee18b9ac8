"""A whole run at staleness 0 (processes, ZeroMQ, DeepSpeed, a rollout loop) against a loop that shares no code."""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from asyncppo import ports, samples
from asyncppo.transport.zmq import ZmqLink
from tests.critic_maker import make_critic
from tests.model_maker import largest_difference, make_model, weights_of
from tests.real import reference_loop
from tests.real.reference_loop import Numbers, train
from tests.real.run_tools import Programs
from tests.real.test_plain_twin import configure, plain_module
from trainer.model.states import SavedState

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

ONE_PASS = Numbers(
    seed=13,
    steps=5,
    prompts_per_batch=4,
    group_size=4,
    max_response_tokens=12,
    utd=1,
    lam=1.0,
    mask_fraction=0.2,
    entropy_filter=0.2,
    entropy_coef=0.01,
    token_mean=False,
    minibatches=(1, 1),
    rates=(1e-4, 3e-4),
    weight_decay=0.1,
    max_grad_norm=0.5,
)
"""The paper's algorithm as it is, in small."""

TWO_PASSES = replace(
    ONE_PASS,
    seed=18,
    utd=2,
    lam=0.9,
    token_mean=True,
    minibatches=(2, 3),
    group_size=5,  # shards of unequal size
    rates=(3e-4, 3e-4),
    clip=0.05,
    max_grad_norm=0.2,
)
"""More of it: ratios leave the clip (a fifth to a half of the tokens), minibatches, another aggregation."""

CASES = {"UTD 1": ONE_PASS, "UTD 2": TWO_PASSES}

LIMIT = 1e-5
"""Largest difference of any weight after 5 steps: rounding, as Adam enlarges it where a gradient is almost 0.
Which of two tokens of one std a mask takes is up to rounding, too (the first tokens of a group's responses have the
same state before them): so the seeds above are such that no mask ends in a tie."""


def settings(n: Numbers) -> dict[str, Any]:
    """The same numbers as overrides of the run's config."""
    return {
        "run.seed": n.seed,
        "run.steps": n.steps,
        "run.inspect_every": 1,
        "stream.max_staleness": 0,
        "stream.prompts_per_batch": n.prompts_per_batch,
        "sampling.group_size": n.group_size,
        "sampling.max_response_tokens": n.max_response_tokens,
        "algorithm.utd": n.utd,
        "algorithm.lam": n.lam,
        "algorithm.mask_fraction": n.mask_fraction,
        "algorithm.entropy_filter": n.entropy_filter,
        "algorithm.entropy_coef": n.entropy_coef,
        "algorithm.whiten_advantages": "false",
        "algorithm.loss_aggregation": "token-mean" if n.token_mean else "seq-mean-token-mean",
        "algorithm.behaviour_cap": n.cap,
        "algorithm.clip_low": n.clip,
        "algorithm.clip_high": n.clip,
        "actor.minibatches": n.minibatches[0],
        "critic.minibatches": n.minibatches[1],
        "actor.learning_rate": n.rates[0],
        "critic.learning_rate": n.rates[1],
        "actor.weight_decay": n.weight_decay,
        "actor.max_grad_norm": n.max_grad_norm,
        "critic.max_grad_norm": n.max_grad_norm,
        "guard.min_ess": 0,
        "eval.sets": "{}",
        "reward.function": "tests.real.letter_share:share",
    }


def grade(text: str) -> float:
    """As `letter_share` says, in other words."""
    return len(re.findall("[a-z]", text)) / (len(text) or 1)


@dataclass(frozen=True)
class Outcome:
    """What a real run left behind, and what the reference made of the same numbers."""

    real: Programs
    ours: list[dict[str, torch.Tensor]]
    """Weights of the actor and both critics after the real run."""
    theirs: list[dict[str, torch.Tensor]]
    """After the reference's."""
    starts: list[dict[str, torch.Tensor]]
    """Before."""
    seen: list[dict[str, Any]]
    """By the reference, at each step."""


def real_run(
    n: Numbers, base: Path, directory: Path, meanwhile: Callable[[Programs, int], None] | None = None, **more: Any
) -> Programs:
    port = ports.free_port()
    each = json.dumps([{"path": str(path)} for path in critics_of(base)])
    overrides = settings(n) | {"critic.each": each, "critic.path": base / "actor"} | more
    real = Programs(base, directory, port, **overrides)
    try:
        trainer = real.trainer()
        server = plain_module().rollout(configure(real), lambda: ZmqLink(f"tcp://127.0.0.1:{port}", b"scripted"))
        if meanwhile:
            meanwhile(real, trainer.pid)
        assert real.ended(trainer, 150) == 0, real.log("trainer")
        server.join(timeout=30)
        assert not server.is_alive()
    finally:
        real.end()
    return real


def weights_of_run(real: Programs) -> list[dict[str, torch.Tensor]]:
    """Of the actor as it is exported, and of the critics as they are in the checkpoint."""
    (saved,) = (real.run / "checkpoints").glob("step_*")
    weights = [load_file(real.run / "actor/model.safetensors")]
    for critic in range(2):
        state = SavedState(saved / f"critic_{critic}")
        weights.append({name.removeprefix("hf."): tensor for name, tensor in state.weights()})
    return weights


def reference(n: Numbers, base: Path) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, Any]]]:
    networks, seen = train(base / "actor", critics_of(base), base / "data/train.jsonl", n, grade)
    return [weights_of(network) for network in networks], seen


def critics_of(base: Path) -> list[Path]:
    return [base / "critic_0", base / "critic_1"]


def make_small_base(directory: Path) -> Path:
    """An actor, two critics of other sizes, and twelve prompts: with four a step the fourth step is of a new epoch."""
    make_model(directory / "actor", seed=0)
    for index, path in enumerate(critics_of(directory)):
        make_critic(path, seed=1 + index, hidden=(48, 40)[index])
    rows = [{"id": f"p{i}", "prompt": f"Compute {i}+{3 * i}.", "answer": str(4 * i)} for i in range(12)]
    (directory / "data").mkdir()
    (directory / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def outcome_of(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """The outcome of a case, made once."""

    @functools.cache
    def outcome(case: str) -> Outcome:
        real = real_run(CASES[case], base, tmp_path_factory.mktemp("real"))
        theirs, seen = reference(CASES[case], base)
        starts = [load_file(path / "model.safetensors") for path in (base / "actor", *critics_of(base))]
        return Outcome(real, weights_of_run(real), theirs, starts, seen)

    return outcome


@pytest.mark.parametrize("case", CASES)
def test_a_run_at_staleness_0_makes_the_parameters_of_the_reference_loop(
    outcome_of: Callable[[str], Outcome], case: str
) -> None:
    outcome, n = outcome_of(case), CASES[case]
    roles = zip(("actor", "critic 0", "critic 1"), outcome.ours, outcome.theirs, outcome.starts, strict=True)
    for role, ours, theirs, start in roles:
        assert largest_difference(ours, theirs) < LIMIT, role
        assert largest_difference(ours, start) > 3 * min(n.rates), f"the {role} was hardly trained"
    for seen in outcome.seen:
        assert np.ptp(seen["rewards"]) > 0.3, "rewards without signal prove nothing"
        std, tokens = np.sort(seen["std"]), len(seen["std"])
        for place in (int(n.mask_fraction * tokens), tokens - int(n.entropy_filter * tokens)):
            assert std[place] - std[place - 1] > 1e-5, "rounding decides what a mask takes: choose another seed"


@pytest.mark.parametrize("case", CASES)
def test_the_run_saw_the_prompts_responses_advantages_and_masks_of_the_reference_loop(
    outcome_of: Callable[[str], Outcome], case: str
) -> None:
    outcome, n = outcome_of(case), CASES[case]
    rows, files = outcome.real.steps(), samples.files_in(outcome.real.run)
    for row, file, seen in zip(rows, files, outcome.seen, strict=True):
        assert row["staleness/max"] == 0
        assert row["passes"] == n.utd
        assert row["reward/mean"] == pytest.approx(np.mean(seen["rewards"]), rel=1e-6)
        assert row["response/tokens"] == sum(map(len, seen["responses"]))
        assert row["mask/policy"] == pytest.approx(1 - float(seen["keep_policy"].sum()) / row["response/tokens"])
        sample = samples.read(file)  # one group of the batch, token by token
        first = seen["prompts"].index(sample.prompt_id) * n.group_size
        for place, response in enumerate(sample.responses, start=first):
            ids = seen["responses"][place]
            assert response.token_ids.tolist() == ids
            assert response.reward == pytest.approx(seen["rewards"][place], rel=1e-6)
            assert response.keep_policy.tolist() == seen["keep_policy"][place, : len(ids)].tolist()
            assert response.keep_entropy.tolist() == seen["keep_entropy"][place, : len(ids)].tolist()
            np.testing.assert_allclose(response.advantages, seen["advantages"][place, : len(ids)], atol=1e-4)
    if n.utd > 1:
        assert min(row["policy/clip_fraction"] for row in rows) > 0.01, "no ratio has left the clip"


def kill_critics(real: Programs, trainer: int) -> None:
    """kill -9 of critic 0 after the first step, and of critic 1 after the third, which a checkpoint came before."""
    for index, steps in (("0", 1), ("1", 3)):
        real.until(f"step {steps}", lambda steps=steps: len(real.steps()) >= steps)
        children = psutil.Process(trainer).children()
        (critic,) = [child for child in children if f"--role critic --index {index}" in " ".join(child.cmdline())]
        critic.kill()


def test_critics_that_are_killed_in_mid_run_change_no_bit_of_any_parameter(
    outcome_of: Callable[[str], Outcome], base: Path, tmp_path: Path
) -> None:
    checkpoints = {"run.save_every": 2, "run.keep_checkpoints": 1}
    real = real_run(ONE_PASS, base, tmp_path, kill_critics, **checkpoints)
    assert [event["critic"] for event in real.events("critic_restarted")] == [0, 1], real.log("trainer")
    assert [row["step"] for row in real.steps()] == list(range(1, ONE_PASS.steps + 1))
    for ours, theirs in zip(weights_of_run(real), outcome_of("UTD 1").ours, strict=True):
        assert largest_difference(ours, theirs) == 0


WRONG: dict[str, dict[str, Any]] = {
    "lambda": {"lam": 1.0},
    "no policy mask": {"mask_fraction": 0.0},
    "no entropy filter": {"entropy_filter": 0.0},
    "no entropy bonus": {"entropy_coef": 0.0},
    "the other aggregation": {"token_mean": False},
    "no clip of the ratio": {"clip": 1e9},
    "no clip of the gradient": {"max_grad_norm": 1e9},
    "no weight decay": {"weight_decay": 0.0},
    "one minibatch of the actor": {"minibatches": (1, 3)},
    "two minibatches of the critics": {"minibatches": (2, 2)},
    "the other shard": {},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_reference_that_is_wrong_in_one_thing_makes_other_parameters(
    outcome_of: Callable[[str], Outcome], base: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    # so the comparison above is of all of these
    if wrong == "the other shard":
        shards = reference_loop.shards
        monkeypatch.setattr(reference_loop, "shards", lambda *key: [1 - critic for critic in shards(*key)])
    weights, _ = reference(replace(TWO_PASSES, **WRONG[wrong]), base)
    assert largest_difference(weights[0], outcome_of("UTD 2").ours[0]) > 10 * LIMIT


def test_the_reference_loop_shares_no_code_with_the_project() -> None:
    tree = ast.parse(Path(reference_loop.__file__).read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.partition(".")[0] for name in found} - sys.stdlib_module_names
    assert outside == {"numpy", "torch", "transformers"}
