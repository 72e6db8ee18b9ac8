"""The plain run: the sampler draws what the policy says, a lag is honest, and a seed decides everything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncppo.config import Config
from asyncppo.errors import ConfigError, StallError
from asyncppo.metrics import EVENTS_FILE, METRICS_FILE, read
from asyncppo.plain import is_finished, plain_config
from tests.model_maker import a_config, a_world
from trainer import plain, preflight
from trainer.feed import Feed
from trainer.model.policy import Policy
from trainer.plain import MemoryPublisher, SampledIntake, Sampler, draw, plain_run
from trainer.stream.batch import pack
from trainer.stream.buffer import BufferedGroup

pytestmark = pytest.mark.unit

END = 2
"""The end-of-sequence token of the tests' model."""
SETTINGS = (
    "reward.function=operator:lt",
    "algorithm.critics=0",
    "sampling.temperature=0.7",
    "rollout.dtype=float32",
)
"""The reward is whether the text comes before the answer in the alphabet: some do, some do not."""


def an_intake(
    config: Config, versions: Sequence[dict[str, torch.Tensor]], lag: int = 0, end: int = END
) -> SampledIntake:
    """An intake whose publisher has these versions, and whose texts begin with the first token's number."""
    publisher = MemoryPublisher()
    publisher.versions = dict(enumerate(versions))
    prompts = preflight.load_data(config).train
    sampler = Sampler(config, end, torch.device("cpu"))
    return SampledIntake(config, prompts, sampler, publisher, lambda ids: f"{ids[0]} it is", lag)


def a_policy(config: Config, change: float = 0.0) -> Policy:
    """The actor, with this added to all of its weights."""
    policy = Policy(config, a_world())
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter += change * torch.sign(parameter)
    return policy


def taken(intake: SampledIntake, version: int, **how: Any) -> list[BufferedGroup]:
    groups = intake.take(version, lambda: False, **how)
    assert groups is not None
    return groups


def policy_gap(config: Config, policy: Policy, groups: Sequence[BufferedGroup], version: int) -> float:
    """Largest |policy − sampler| log-prob of the groups' tokens."""
    shards = [[-1] * config.sampling.group_size] * len(groups)
    batch = pack(groups, shards, version)
    logprobs = policy.score(batch).logprobs
    assert logprobs is not None
    return float((logprobs - torch.from_numpy(batch.behaviour_logprobs)).abs().max())


def contents(groups: Sequence[BufferedGroup]) -> list[tuple[str, bytes, bytes]]:
    return [(g.prompt.prompt_id, g.group.response_ids.tobytes(), g.group.rewards.tobytes()) for g in groups]


def test_the_samplers_logprobs_are_the_policys_of_the_same_weights(tmp_path: Path) -> None:
    config = a_config(tmp_path, *SETTINGS, "sampling.max_response_tokens=24", "sampling.group_size=8")
    policy = a_policy(config)
    groups = taken(an_intake(config, [policy.weights()]), 0)
    assert len({int(length) for held in groups for length in held.group.lengths}) > 1, "rows have to end apart"
    assert policy_gap(config, policy, groups, 0) <= 1e-4
    assert policy_gap(config, a_policy(config, 0.05), groups, 0) > 1e-2


@pytest.mark.parametrize(("version", "drawn_by"), [(0, 0), (1, 0), (2, 0), (3, 1)])
def test_a_lag_is_honest(tmp_path: Path, version: int, drawn_by: int) -> None:
    config = a_config(tmp_path, *SETTINGS)
    policies = [a_policy(config, 0.05 * number) for number in range(4)]
    groups = taken(an_intake(config, [policy.weights() for policy in policies], lag=2), version)
    shards = [[-1] * config.sampling.group_size] * len(groups)
    batch = pack(groups, shards, version)
    assert set(batch.token_versions.tolist()) == {drawn_by}
    assert set(batch.staleness.tolist()) == {version - drawn_by}
    gaps = [policy_gap(config, policy, groups, version) for policy in policies]
    assert gaps[drawn_by] <= 1e-4
    assert min(gap for number, gap in enumerate(gaps) if number != drawn_by) > 1e-2


def test_the_brake_shortens_a_lag(tmp_path: Path) -> None:
    config = a_config(tmp_path, *SETTINGS)
    intake = an_intake(config, [a_policy(config).weights()] * 3, lag=2)
    intake.limit_staleness(1)
    assert {held.oldest_version for held in taken(intake, 2)} == {1}


def test_versions_that_a_lag_still_needs_are_kept() -> None:
    publisher = MemoryPublisher(lag=1)
    for version in range(5):
        publisher.publish(version, {}, torch.zeros(0))
    assert sorted(publisher.versions) == [3, 4]


def test_groups_make_sense_and_say_where_they_were_cut(tmp_path: Path) -> None:
    config = a_config(tmp_path, *SETTINGS, "sampling.max_response_tokens=24", "sampling.group_size=8")
    flags = []
    for held in taken(an_intake(config, [a_policy(config).weights()]), 0):
        held.group.check(8)
        ends = np.cumsum(held.group.lengths)
        last = held.group.response_ids[ends - 1]
        assert (held.group.truncated == (last != END)).all()
        assert (held.group.lengths[held.group.truncated == 1] == 24).all()
        assert np.count_nonzero(held.group.response_ids == END) == np.count_nonzero(last == END)
        flags += held.group.truncated.tolist()
    assert {0, 1} == set(flags)


def test_training_pays_for_overlong_responses_and_evaluation_does_not(tmp_path: Path) -> None:
    overlong = ("reward.overlong_buffer=4", "reward.overlong_penalty=0.5", "reward.function=operator:ne")
    config = a_config(tmp_path, *SETTINGS, *overlong)
    intake = an_intake(config, [a_policy(config).weights()], end=-1)  # nothing ever ends
    assert {float(reward) for held in taken(intake, 0) for reward in held.group.rewards} == {0.5}
    answers = intake.evaluate([held.prompt for held in taken(intake, 0)], 0, lambda: False)
    assert answers is not None
    assert {float(reward) for group in answers for reward in group.rewards} == {1.0}


def test_every_step_has_its_prompts_whatever_the_warm_start_took(tmp_path: Path) -> None:
    config = a_config(tmp_path, *SETTINGS)
    weights = [a_policy(config).weights()] * 2
    plainly, warmed = an_intake(config, weights), an_intake(config, weights)
    warm = [contents(taken(warmed, 0, warm_start=True)) for _ in range(3)]
    assert len({str(batch) for batch in warm}) == 3, "batches of a warm start differ"
    for version in (0, 1):
        assert contents(taken(plainly, version)) == contents(taken(warmed, version))
    assert warmed.tokens[plain._STEP] == plainly.tokens[plain._STEP]


def test_an_epoch_has_every_prompt_once(tmp_path: Path) -> None:
    config = a_config(tmp_path, *SETTINGS, "stream.prompts_per_batch=2")
    intake = an_intake(config, [a_policy(config).weights()] * 2)
    assert sorted(held.prompt.prompt_id for version in (0, 1) for held in taken(intake, version)) == list("0123")


def test_groups_without_a_signal_are_drawn_again_and_counted(tmp_path: Path) -> None:
    config = a_config(tmp_path, *SETTINGS, "stream.drop_equal_rewards=true")
    intake = an_intake(config, [a_policy(config).weights()])
    groups = [held for _ in range(4) for held in taken(intake, 0)]
    assert all(len(set(held.group.rewards.tolist())) == 2 for held in groups)
    counts = intake.counts()
    assert counts.consumed == 12
    assert counts.admitted - counts.consumed == counts.dropped["no signal"] > 0
    assert intake.tokens[plain._REPLACEMENT] > 0


def test_a_task_without_any_signal_ends_the_run(tmp_path: Path) -> None:
    config = a_config(tmp_path, *SETTINGS, "stream.drop_equal_rewards=true", "reward.function=operator:ne")
    with pytest.raises(StallError, match="drop_equal_rewards"):
        taken(an_intake(config, [a_policy(config).weights()]), 0)


def test_draws_follow_the_probabilities_and_never_take_an_impossible_token() -> None:
    rows = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).repeat(40_000, 1)
    drawn = torch.bincount(draw(rows, torch.Generator().manual_seed(0))[:, 0], minlength=5) / len(rows)
    assert drawn[[0, 2, 4]].tolist() == [0, 0, 0]
    assert abs(float(drawn[1]) - 0.25) < 4 * (0.25 * 0.75 / len(rows)) ** 0.5


@pytest.mark.parametrize("uniform", [0.0, 1.0])
def test_the_ends_of_the_uniform_number_lead_to_possible_tokens(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, uniform))
    drawn = int(draw(torch.tensor([[0.0, 0.3, 0.7, 0.0]]), torch.Generator()))
    assert drawn == (1 if uniform == 0 else 2)


@pytest.mark.parametrize(
    ("override", "lag", "message"),
    [
        ("algorithm.reuse=replay", 0, "replay"),
        ("sampling.top_p=0.9", 0, "top_p"),
        ("sampling.top_k=5", 0, "top_k"),
        ("stream.max_staleness=2", 3, "max_staleness"),
        ("publish.every=2", 0, "publish.every"),
    ],
)
def test_what_a_plain_run_cannot_do_is_refused(tmp_path: Path, override: str, lag: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plain.check(a_config(tmp_path, *SETTINGS, override), lag)


def a_run(directory: Path, root: str, seed: int, *overrides: str) -> Config:
    """The config of a run of three steps with two critics."""
    a_config(directory)  # writes config.yaml and the data
    more = ("run.steps=3", "algorithm.critics=2", f"eval.sets={{held: {directory / 'train.jsonl'}}}", *overrides)
    return plain_config(directory / "config.yaml", [*SETTINGS, *more], directory / root, seed)


def numbers(config: Config) -> list[dict[str, Any]]:
    """The run's metrics, without times."""
    timed = ("time", "wall_s", "rollout/tokens_per_s")
    return [
        {key: item for key, item in row.items() if key not in timed and "time/" not in key and "seconds" not in key}
        for row in read(config.run_directory / METRICS_FILE)
    ]


def test_a_seed_decides_the_whole_run(tmp_path: Path) -> None:
    first, second, other = a_run(tmp_path, "a", 1), a_run(tmp_path, "b", 1), a_run(tmp_path, "c", 2)
    for config in (first, second, other):
        assert plain_run(config) == 3
    assert numbers(first) == numbers(second)
    assert numbers(first) != numbers(other)
    assert "critic/1/loss" in numbers(first)[0]
    assert numbers(first)[0]["logprob_gap/max"] <= 1e-4


def test_a_run_leaves_what_every_run_leaves_and_no_checkpoints(tmp_path: Path) -> None:
    config = a_run(tmp_path, "a", 1)
    plain_run(config, lag=1)
    assert sorted(path.name for path in config.run_directory.iterdir()) == ["config.yaml", "events.jsonl", METRICS_FILE]
    events = {event["event"]: event for event in read(config.run_directory / EVENTS_FILE)}
    assert events["start"]["lag"] == 1
    assert events["eval"]["policy_version"] == 3
    assert events["end"]["train_cpu_s"] > 0
    assert events["end"]["tokens"] == sum(row["response/tokens"] for row in numbers(config))
    assert [row["staleness/max"] for row in numbers(config)] == [0, 1, 1]


def test_a_finished_run_is_not_done_again_and_any_other_is(tmp_path: Path) -> None:
    config = a_run(tmp_path, "a", 1)
    assert not is_finished(config, 0)
    plain_run(config)
    assert is_finished(config, 0)
    assert not is_finished(config, 1)
    assert not is_finished(a_run(tmp_path, "a", 1, "actor.learning_rate=1.0e-2"), 0)
    events = config.run_directory / EVENTS_FILE
    events.write_text("".join(line for line in events.read_text().splitlines(keepends=True) if '"end"' not in line))
    assert not is_finished(config, 0)
    assert plain._one_run(config, 0)
    assert len(numbers(config)) == 3, "an unfinished run is done anew, not continued"
    before = events.stat().st_mtime_ns
    assert plain._one_run(config, 0)
    assert events.stat().st_mtime_ns == before


def test_the_newest_version_is_out_before_it_is_evaluated_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    publish = MemoryPublisher.publish

    def published(self: MemoryPublisher, version: int, weights: Any, probe: torch.Tensor) -> None:
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}  # rollout.dtype
        assert probe.numel() == 0  # nobody is probed here
        happened.append(f"publish {version}")
        publish(self, version, weights, probe)

    monkeypatch.setattr(MemoryPublisher, "publish", published)
    monkeypatch.setattr(MemoryPublisher, "flush", lambda _: happened.append("flush"))
    monkeypatch.setattr(Feed, "evaluate", lambda _, version: happened.append(f"evaluate {version}") or {})
    plain_run(a_run(tmp_path, "a", 1, "eval.at_start=true", "eval.at_end=true", "run.steps=2"))
    assert happened[:3] == ["publish 0", "flush", "evaluate 0"]
    assert happened[3:5] == ["publish 1", "publish 2"]
    assert happened[-2:] == ["flush", "evaluate 2"]


def test_a_run_that_is_done_is_saved_and_exported_before_an_evaluation_that_waits_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_run(tmp_path, "a", 1)
    found: list[bool] = []

    def evaluate(self: Feed, version: int) -> dict[str, float]:
        if version == config.run.steps:
            saved = config.run_directory / "checkpoints"
            found.extend((any(saved.iterdir()), (config.run_directory / "actor/config.json").is_file()))
            raise StallError("nobody answers")
        return {}

    monkeypatch.setattr(Feed, "evaluate", evaluate)
    with pytest.raises(StallError):
        plain_run(config)
    assert found == [True, True]
