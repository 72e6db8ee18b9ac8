"""Claims about a step's row of metrics: exactly the declared names, and numbers that can be redone by hand."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncppo.config import Config
from asyncppo.metrics import METRICS_FILE, STEP_METRICS, Journal, read
from tests.model_maker import a_batch, a_config
from trainer import record
from trainer.model.critics import Values
from trainer.model.policy import Scores
from trainer.record import Recorder, StepRecord, effective_sample_size, logprob_gap
from trainer.stream.batch import Batch
from trainer.stream.intake import Counts
from trainer.targets import TargetBuilder

pytestmark = pytest.mark.unit

PHASES = ("wait_for_batch", "proximal", "wait_for_critics", "targets", "update", "publish", "checkpoint")
CRITIC = (
    "loss",
    "grad_norm",
    "skipped",
    "explained_variance",
    "explained_variance_other",
    "explained_variance_fresh",
    "seconds",
)
SUMS = {
    "tokens": 20.0,
    "policy_kept": 16.0,
    "entropy_kept": 15.0,
    "capped": 4.0,
    "active": 12.0,
    "clipped": 3.0,
    "divergence_masked": 6.0,
    "weight_sum": 12.0,
    "weight_sq_sum": 24.0,
    "ratio_sum": 20.0,
    "kl_behaviour_sum": 2.0,
    "kl_proximal_sum": 1.0,
    "kl_reference_sum": 5.0,
    "chi2_sum": 24.0,
    "entropy_sum": 30.0,
    "policy_loss": -0.25,
    "entropy_bonus": 1.5,
    "grad_norm": 0.75,
    "learning_rate": 1e-4,
    "skipped": 1.0,
}


def some_counts(**changes: object) -> Counts:
    fields = {
        "servers": 2,
        "in_flight": 5,
        "buffered": 1,
        "admitted": 20,
        "consumed": 9,
        "dropped": {"too stale": 2, "server left": 3},
        "malformed": 1,
        "swaps": 4,
        "swap_pause_s": 0.5,
        "tokens": 1000,
        "idle_s": 10.0,
    }
    return Counts(**(fields | changes))


def a_step() -> StepRecord:
    step = StepRecord(4)
    for name in PHASES:
        with step.phase(name):
            pass
    step.add(dict(SUMS))
    return step


def a_row(
    config: Config,
    *,
    batch: Batch | None = None,
    recorder: Recorder | None = None,
    counts: Counts | None = None,
    values: torch.Tensor | None = None,
    fresh: torch.Tensor | None = None,
    scores: Scores | None = None,
) -> dict[str, object]:
    batch = batch or a_batch()
    critics, tokens = config.algorithm.critics, len(batch.response_ids)
    if values is None:
        values = torch.stack([torch.linspace(0, 1 + index, tokens) for index in range(critics)] or [torch.zeros(0)])
        values = values if critics else torch.zeros((0, 0))
    targets = TargetBuilder(config).build(batch, values, None)
    metrics = {f"critic/{index}/{name}": 0.5 for index in range(critics) for name in CRITIC}
    answer = Values(values, values if fresh is None else fresh, metrics)
    scores = scores or Scores(torch.from_numpy(batch.behaviour_logprobs) + 0.125, None, None)
    return (recorder or Recorder(config)).row(a_step(), batch, targets, answer, scores, counts or some_counts())


def declared(critics: int) -> set[str]:
    return {
        name.replace("critic/M/", f"critic/{index}/")
        for name in STEP_METRICS
        for index in (range(critics) if "/M/" in name else range(1))
    }


@pytest.mark.parametrize("critics", [2, 3])
def test_a_row_has_exactly_the_declared_metrics(tmp_path: Path, critics: int) -> None:
    config = a_config(tmp_path, f"algorithm.critics={critics}", "sampling.group_size=4")
    assert set(a_row(config)) == declared(critics)


@pytest.mark.parametrize("critics", [0, 1])
def test_with_fewer_critics_only_what_speaks_of_several_is_left_out(tmp_path: Path, critics: int) -> None:
    missing = declared(critics) - set(a_row(a_config(tmp_path, f"algorithm.critics={critics}")))
    disagreement = {"value/std_p10", "value/std_p50", "value/std_p90", "value/correlation", "value/separation"}
    worth = {"value/mean", "value/explained_variance", "value/explained_variance_fresh"}
    assert missing == disagreement | (worth if critics == 0 else set())
    assert set(a_row(a_config(tmp_path, f"algorithm.critics={critics}"))) <= declared(critics)


def test_every_declared_metric_has_a_meaning_and_a_name_of_its_own() -> None:
    assert all(text and re.fullmatch(r"[a-zA-Z0-9_/]+", name) for name, text in STEP_METRICS.items())
    assert len(set(STEP_METRICS.values())) > len(STEP_METRICS) - 6  # "the same, …" repeats


def test_the_batchs_numbers_are_those_of_the_batch(tmp_path: Path) -> None:
    batch = replace(a_batch(), oldest_versions=np.array([4, 2, 3], dtype=np.int32))
    row = a_row(a_config(tmp_path), batch=batch)
    assert (row["step"], row["policy_version"], row["uses"]) == (5, 4, 1)
    assert row["reward/mean"] == pytest.approx(2.5 / 6)
    assert row["reward/errors"] == 1
    assert row["response/length_mean"] == pytest.approx(23 / 6)
    assert (row["response/length_max"], row["response/tokens"]) == (7, 23)
    assert row["response/truncated"] == pytest.approx(1 / 6)
    assert (row["staleness/min"], row["staleness/max"]) == (0, 2)
    assert row["staleness/mean"] == pytest.approx(1.0)
    assert row["staleness/histogram"] == [1, 1, 1]  # max_staleness is 2


def test_the_policys_numbers_are_sums_over_what_they_are_means_of(tmp_path: Path) -> None:
    row = a_row(a_config(tmp_path))
    assert row["policy/loss"] == -0.25
    assert row["policy/clip_fraction"] == pytest.approx(3 / 12)
    assert row["policy/capped_fraction"] == pytest.approx(4 / 16)
    assert row["policy/constrained_fraction"] == pytest.approx(6 / 12)
    assert row["policy/entropy"] == pytest.approx(30 / 20)
    assert row["policy/kl_reference"] == pytest.approx(5 / 20)
    assert row["policy/chi2"] == pytest.approx(24 / 16)
    assert (row["policy/skipped"], row["passes"]) == (1, 1)
    assert row["policy/kl_behaviour"] == pytest.approx(2 / 20)
    assert row["policy/kl_proximal"] == pytest.approx(1 / 20)
    assert row["policy/ess"] == pytest.approx(12**2 / 24 / 12)
    assert (row["policy/grad_norm"], row["policy/learning_rate"]) == (0.75, 1e-4)


def test_the_critics_numbers_are_of_their_mean_and_their_distance(tmp_path: Path) -> None:
    row = a_row(a_config(tmp_path))  # values rise from 0 to 1 and from 0 to 2 over the 23 tokens
    assert row["value/mean"] == pytest.approx(0.75)
    assert row["value/std_mean"] == pytest.approx(0.25)
    assert row["value/std_p50"] == pytest.approx(0.25)
    assert row["value/std_p10"] == pytest.approx(0.05)
    assert row["value/std_p90"] == pytest.approx(0.45)
    assert row["value/correlation"] == pytest.approx(1.0)
    spread = np.linspace(0, 1.5, 23).std()
    assert row["value/separation"] == pytest.approx(0.25 / spread)
    assert row["mask/policy"] == pytest.approx(4 / 23)  # ⌊0.2·23⌋
    assert row["mask/entropy"] == pytest.approx(4 / 23)


def test_the_gap_to_the_engine_is_over_the_tokens_of_the_version_being_trained(tmp_path: Path) -> None:
    batch = a_batch()  # responses of an even number are of the version before
    row = a_row(a_config(tmp_path), batch=batch)
    assert row["logprob_gap/tokens"] == 1 + 3 + 6
    assert row["logprob_gap/mean"] == pytest.approx(0.125)
    assert row["logprob_gap/max"] == pytest.approx(0.125)
    stale = replace(batch, token_versions=batch.token_versions * 0)
    row = a_row(a_config(tmp_path), batch=stale)
    assert (row["logprob_gap/mean"], row["logprob_gap/max"], row["logprob_gap/tokens"]) == (None, None, 0)


def test_the_streams_numbers_are_its_counts_and_rates_are_since_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config(tmp_path)
    recorder, clock = Recorder(config), [100.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: clock[0])
    first = a_row(config, recorder=recorder)
    assert (first["stream/dropped"], first["stream/admitted"], first["stream/malformed"]) == (5, 20, 1)
    assert (first["rollout/idle"], first["rollout/tokens_per_s"], first["wall_s"]) == (None, None, 0.0)
    clock[0] = 110.0
    second = a_row(config, recorder=recorder, counts=some_counts(tokens=1500, idle_s=14.0))
    assert second["rollout/tokens_per_s"] == pytest.approx(500 / 10)
    assert second["rollout/idle"] == pytest.approx(4 / 10 / 2)  # two servers
    assert second["wall_s"] == pytest.approx(10.0)


def test_a_phase_that_comes_twice_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(record.time, "monotonic", lambda: next(clock))
    step = StepRecord(4)
    for _ in range(2):
        with step.phase("update"):
            pass
    assert step.seconds == {"update": 6.0}


@pytest.mark.parametrize("critics", [0, 1, 2])
def test_a_row_is_written_read_again_and_said_in_one_line(tmp_path: Path, critics: int) -> None:
    config = a_config(tmp_path, f"algorithm.critics={critics}")
    recorder = Recorder(config)
    row = a_row(config, recorder=recorder)
    journal = Journal(tmp_path)
    journal.step(row)
    journal.close()
    (found,) = read(tmp_path / METRICS_FILE)
    assert set(found) == set(row)
    assert found["policy/entropy"] == pytest.approx(1.5)
    assert "\n" not in recorder.line(row)
    assert recorder.line(row).startswith("step 5/10  reward 0.417")


def test_a_batch_of_equal_rewards_has_no_explained_variance_and_is_still_a_row(tmp_path: Path) -> None:
    batch = replace(a_batch(), rewards=np.ones(6, dtype=np.float32))
    row = a_row(a_config(tmp_path), batch=batch)
    assert math.isnan(row["value/explained_variance"])


def test_values_from_before_learning_are_reported_where_somebody_asked_for_them(tmp_path: Path) -> None:
    config, batch = a_config(tmp_path), a_batch()
    asked = {"value/explained_variance_fresh"}
    assert asked & set(a_row(config, fresh=torch.zeros((0, 0)))) == set()
    returns = np.repeat(batch.rewards, batch.response_lengths)
    ours = torch.from_numpy(np.stack((returns, 0.5 * returns)))  # their mean is three quarters of the return
    row = a_row(config, fresh=ours)
    assert row["value/explained_variance_fresh"] == pytest.approx(1 - 0.25**2)
    assert row["value/explained_variance"] != pytest.approx(1 - 0.25**2)


def test_critics_that_are_one_have_no_separation(tmp_path: Path) -> None:
    assert a_row(a_config(tmp_path), values=torch.linspace(0, 1, 23).repeat(2, 1))["value/separation"] == 0


def test_without_a_proximal_pass_there_is_no_gap_to_report(tmp_path: Path) -> None:
    row = a_row(a_config(tmp_path), scores=Scores(None, None, None))
    assert (row["logprob_gap/mean"], row["logprob_gap/max"], row["logprob_gap/tokens"]) == (None, None, 0)
    assert math.isnan(logprob_gap(a_batch(), None))


def test_the_gap_that_the_brake_sees_is_the_rows(tmp_path: Path) -> None:
    batch = a_batch()
    logprobs = torch.from_numpy(batch.behaviour_logprobs) + torch.linspace(-1, 1, 23)
    row = a_row(a_config(tmp_path), scores=Scores(logprobs, None, None))
    assert logprob_gap(batch, logprobs) == row["logprob_gap/mean"]
    assert math.isnan(logprob_gap(replace(batch, token_versions=batch.token_versions * 0), logprobs))


def test_the_effective_sample_size_of_equal_weights_is_1_and_of_none_is_not_a_number() -> None:
    def of(weights: list[float]) -> float:
        squares = sum(weight**2 for weight in weights)
        return effective_sample_size({"weight_sum": sum(weights), "weight_sq_sum": squares, "active": len(weights)})

    assert of([0.5] * 8) == pytest.approx(1)
    assert of([4.0, 0.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert math.isnan(of([]))
    assert math.isnan(of([1.0, math.nan]))


def test_passes_are_counted_their_skipped_steps_added_up_and_the_last_ones_sums_kept() -> None:
    step = StepRecord(4)
    for entropy, skipped in ((1.0, 2.0), (3.0, 0.0), (2.0, 1.0)):
        step.add(SUMS | {"entropy_sum": entropy, "skipped": skipped})
    assert step.passes == 3
    assert step.sums["skipped"] == 3
    assert step.sums["entropy_sum"] == 2.0
