"""Claims about one whole step (critics, values, targets, actor): the same parameters however the batch is ordered, cut
into micro-batches or attended to, and masks of exactly ⌊kN⌋ and ⌊hN⌋ tokens of it. Plain engine, float32.

tests/unit/trainer/test_policy.py and test_critic.py say the same of each part, with targets that are given.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import shutil
import tempfile
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from asyncppo.messages import Learned, Message
from asyncppo.transport.base import Channel
from tests.critic_maker import make_critic
from tests.model_maker import a_batch, a_config, a_world, largest_difference, reorder, weights_of
from tests.stream_maker import a_config as a_stream_config
from tests.stream_maker import a_group, a_prompt
from trainer.feed import Feed
from trainer.model import networks
from trainer.model.critic import Critic
from trainer.model.critics import Critics
from trainer.model.policy import Policy
from trainer.model.world import World
from trainer.stream.batch import Batch
from trainer.stream.buffer import Buffer, BufferedGroup
from trainer.stream.intake import Intake
from trainer.stream.ledger import Ledger
from trainer.stream.prompts import Prompts
from trainer.targets import TargetBuilder, Targets, rewards

pytestmark = pytest.mark.unit

K, H = 0.29, 0.13
"""0.29 · 100 is 28.999999999999996 in float arithmetic: the counts are of the decimal product."""

STEP = (
    "actor.learning_rate=1e-5",  # Adam's first steps are about ± this: a wrong gradient shows, rounding hardly
    "critic.learning_rate=1e-5",
    f"algorithm.mask_fraction={K}",
    f"algorithm.entropy_filter={H}",
    "algorithm.entropy_coef=0.1",
    "algorithm.lam=0.9",
    "algorithm.utd=2",
    "algorithm.behaviour_cap=1000",
)

BATCHES: dict[str, dict[str, Any]] = {
    "two a group": {},
    "four a group, ragged": {
        "prompts": (2, 19, 7),
        "responses": (8, 3, 11, 5, 2, 9, 4, 7, 1, 6, 13, 31),
        "rewards": (1, 0, 0, 1, 0.5, 0, 1, 0, 0, 1, 1, 0),
        "truncated": (0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0),
        "shard": (0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0),
    },
}  # the second has 100 response tokens


class Here:
    """A channel to a critic in this very thread, which answers at once."""

    def __init__(self, critic: Critic) -> None:
        self._critic = critic

    def send(self, message: Message) -> bool:
        self._answer: Learned = self._critic.learn(cast("Any", message))
        return True

    def receive(self, timeout_s: float) -> Learned:
        return self._answer


@dataclass(frozen=True)
class Step:
    """What one step did."""

    weights: list[dict[str, torch.Tensor]]
    """Of the actor and both critics."""
    values: torch.Tensor  # [M, T]
    targets: Targets


@functools.cache
def critic_settings() -> str:
    """Two critics with heads whose stds do not tie where a mask ends: see `border`."""
    root = Path(tempfile.mkdtemp(prefix="asyncppo-test-critics-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    paths = [make_critic(root / str(seed), seed=seed) for seed in (2, 3)]
    return "critic.each=" + json.dumps([{"path": str(path)} for path in paths])


def whole_step(directory: Path, batch: Batch, *overrides: str) -> Step:
    """The learner's `_step`, without the stream."""
    config = a_config(directory, *STEP, critic_settings(), *overrides)
    policy = Policy(config, a_world())
    members = [Critic(config, index, a_world()) for index in range(2)]
    critics = Critics(config, [cast("Channel", Here(critic)) for critic in members])
    critics.learn(batch, rewards(batch), step=batch.version)
    scores = policy.score(batch)
    values = critics.values().values
    targets = TargetBuilder(config).build(batch, values, scores.entropy)
    for use in range(config.algorithm.utd):
        policy.update(batch, scores, targets, use)
    return Step([weights_of(policy.network), *(weights_of(critic.network) for critic in members)], values, targets)


def assert_same(step: Step, expected: Step, tokens: Any = slice(None)) -> None:
    """`tokens`: where the step's tokens are among the expected ones."""
    for ours, theirs in zip(step.weights, expected.weights, strict=True):
        assert largest_difference(ours, theirs) < 1e-6
    torch.testing.assert_close(step.values, expected.values[:, tokens], atol=1e-5, rtol=0)
    for name in ("advantages", "value", "value_std"):
        ours, theirs = getattr(step.targets, name), getattr(expected.targets, name)[tokens]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for name in ("keep_policy", "keep_entropy"):
        assert torch.equal(getattr(step.targets, name), getattr(expected.targets, name)[tokens]), name


def assert_exact_masks(step: Step) -> None:
    for keep, fraction in ((step.targets.keep_policy, K), (step.targets.keep_entropy, H)):
        assert int((~keep).sum()) == math.floor(Fraction(str(fraction)) * len(keep))


def border(step: Step) -> float:
    """Least distance in std between a token that a mask takes and one that it leaves; near 0 rounding decides."""
    std, tokens = step.targets.value_std.sort().values, len(step.targets.value_std)
    taken = math.floor(Fraction(str(K)) * tokens), tokens - math.floor(Fraction(str(H)) * tokens)
    return min(float(std[place] - std[place - 1]) for place in taken)


def places(batch: Batch, order: list[int]) -> torch.Tensor:
    """Where the tokens of the reordered batch are in this one."""
    parts = np.split(np.arange(len(batch.response_ids)), np.cumsum(batch.response_lengths)[:-1])
    return torch.from_numpy(np.concatenate([parts[index] for index in order]))


@pytest.fixture(scope="module", params=BATCHES)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Batch, Step, Path]:
    """A batch, its step in one micro-batch with the sequences attended to one by one, and where configs go."""
    batch, directory = a_batch(**BATCHES[request.param]), tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "_PADDING_LIMIT", 0)
        step = whole_step(directory, batch, "actor.micro_batch_tokens=10000", "critic.micro_batch_tokens=10000")
    assert border(step) > 1e-4, "no test of the rest: rounding may decide what the masks take"
    return batch, step, directory


@settings(max_examples=12, deadline=None, phases=[Phase.reuse, Phase.generate])  # to shrink a failure takes minutes
@given(data=st.data(), budgets=st.tuples(st.integers(1, 80), st.integers(1, 80)), limit=st.sampled_from([0, 1.5, 1e9]))
def test_a_step_is_the_same_whatever_the_order_the_micro_batches_and_the_attention(
    plain: tuple[Batch, Step, Path], data: st.DataObject, budgets: tuple[int, int], limit: float
) -> None:
    batch, expected, directory = plain
    order = data.draw(st.permutations(range(len(batch.rewards))))
    cut = (f"actor.micro_batch_tokens={budgets[0]}", f"critic.micro_batch_tokens={budgets[1]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "_PADDING_LIMIT", limit)
        step = whole_step(directory, reorder(batch, order), *cut)
    assert_same(step, expected, places(batch, order))
    assert_exact_masks(step)


@pytest.mark.parametrize("minibatches", [2, 3])
@pytest.mark.parametrize("limit", [0, 1e9])
def test_minibatches_are_the_same_responses_whatever_the_micro_batches_and_the_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minibatches: int, limit: float
) -> None:
    # which responses are in a minibatch goes by their place, so the order is kept here
    batch, divided = a_batch(), [f"{role}.minibatches={minibatches}" for role in ("actor", "critic")]
    expected = whole_step(tmp_path, batch, *divided, "actor.micro_batch_tokens=1000", "critic.micro_batch_tokens=1000")
    monkeypatch.setattr(networks, "_PADDING_LIMIT", limit)
    assert_same(whole_step(tmp_path, batch, *divided), expected)


def test_a_step_is_of_this_very_batch(plain: tuple[Batch, Step, Path]) -> None:
    # what the claims above would miss if the tolerance were too wide, or the parts not connected
    batch, expected, directory = plain
    for other, learned_otherwise in (
        (whole_step(directory, replace(batch, shard=1 - batch.shard)), True),
        (whole_step(directory, replace(batch, rewards=1 - batch.rewards)), True),
        (whole_step(directory, batch, "algorithm.mask_fraction=0"), False),
    ):
        actor, *critics = map(largest_difference, other.weights, expected.weights)
        assert actor > 5e-6
        assert all(difference > 5e-6 for difference in critics) if learned_otherwise else max(critics) < 1e-6


# --- shards: reuse, resume, ranks ------------------------------------------------------------------------------------

PROMPTS = [a_prompt(number) for number in range(5)]
"""Five prompts: the sixth group of a run is of the second epoch."""
SIZE = 6


def feed_of(taken: list[BufferedGroup] | None, shared: dict[str, Any]) -> Feed:
    """Of rank 0 with these groups, or of another rank, which has what rank 0 shared."""

    def share(arrays: dict[str, Any] | None) -> dict[str, Any]:
        shared.update(arrays or {})
        return dict(shared)

    intake = None if taken is None else SimpleNamespace(take=lambda *_, **__: taken)
    world = SimpleNamespace(rank=int(taken is None), share=share)
    config = a_stream_config(group_size=SIZE)
    return Feed(config, cast("World", world), cast("Intake | None", intake), None, {}, Path(), lambda: False)


def shards_of(groups: list[BufferedGroup]) -> dict[tuple[int, str], list[int]]:
    """(epoch, prompt) to the critic of each response, the same on two ranks."""
    wire: dict[str, Any] = {}
    first, second = feed_of(groups, wire).take(3), feed_of(None, wire).take(3)
    assert first is not None
    assert second is not None
    assert first.shard.tolist() == second.shard.tolist()
    keys = zip(first.epochs, first.prompt_ids, strict=True)
    return dict(zip(keys, first.shard.reshape(-1, SIZE).tolist(), strict=True))


def arrived(ledger: Ledger, count: int) -> list[BufferedGroup]:
    """The next prompts of the ledger, leased and answered."""
    groups = []
    for _ in range(count):
        record = ledger.lease(b"alice", oldest_version=2, now=0.0)
        group = a_group(record.lease, [[(2, 2)]] * SIZE)
        groups.append(BufferedGroup(record.lease, record.position, record.epoch, record.prompt, group))
    return groups


@settings(max_examples=30, deadline=None)
@given(done=st.integers(0, 8), order=st.permutations(range(8)))
def test_shards_are_the_same_on_every_use_after_a_resume_and_on_every_rank(done: int, order: list[int]) -> None:
    ledger = Ledger(Prompts(PROMPTS, seed=3, shuffle=True), max_staleness=1)
    groups = arrived(ledger, 8)
    expected = shards_of(groups)
    assert len(expected) == 8
    assert len({tuple(shard) for shard in expected.values()}) > 1

    buffer = Buffer(max_staleness=1, batch=8)  # reuse: they come back from the buffer, in whatever order
    for index in order:
        buffer.return_used(groups[index], version=2)
    again = buffer.take(3, due={})
    assert again is not None
    assert {group.uses for group in again} == {1}
    assert shards_of([again[index] for index in order]) == expected

    for group in groups[:done]:  # a resume: what was not used is leased again, first, under other leases
        ledger.receive(group.lease, 2)
        ledger.use(group.lease)
    resumed = Ledger(Prompts(PROMPTS, seed=3, shuffle=True), max_staleness=1)
    resumed.restore(ledger.state())
    left = arrived(resumed, 8 - done)
    if left:
        assert shards_of(left) == {key: expected[key] for key in list(expected)[done:]}
