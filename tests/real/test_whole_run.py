"""The whole system with every real part: SGLang, DeepSpeed in three processes, ZeroMQ, math-verify; on a CPU."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from asyncppo import keys, ports, samples
from asyncppo.transport.zmq import read_key_file
from tests.real.run_tools import Programs

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def complete(
    quick_base: Path, rollout_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Programs, int, int]]:
    """A run to its end with a warm start of the critics, the rollout server started first; with both exit codes."""
    settings = {"run.steps": 6, "critic.warmup_batches": 2, "run.inspect_every": 3}
    programs = Programs(quick_base, tmp_path_factory.mktemp("run"), ports.free_port(), rollout_python, **settings)
    try:
        server = programs.rollout("r0")
        trainer = programs.trainer()
        yield programs, programs.ended(trainer, 200), programs.ended(server)
    finally:
        programs.end()


def test_trainer_and_rollout_server_end_with_0(complete: tuple[Programs, int, int]) -> None:
    programs, trainer, server = complete
    assert (trainer, server) == (0, 0), programs.log("trainer") + programs.log("rollout-r0")


def test_every_step_is_in_the_metrics_within_the_staleness_bound(complete: tuple[Programs, int, int]) -> None:
    rows = complete[0].steps()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= row["staleness/min"] <= row["staleness/max"] <= 4 for row in rows)
    assert rows[-1]["stream/consumed"] == 24 + 8  # those of the warm start too
    assert rows[-1]["stream/dropped"] == 0


def test_every_version_is_hot_swapped_in_order(complete: tuple[Programs, int, int]) -> None:
    versions = [event["policy_version"] for event in complete[0].events("swap")]
    assert versions == sorted(versions)
    assert versions[0] == 0
    assert versions[-1] == 6


def test_engine_and_trainer_agree_on_log_probs_of_the_same_version(complete: tuple[Programs, int, int]) -> None:
    rows = [row for row in complete[0].steps() if row["logprob_gap/tokens"]]
    assert rows, "no batch held a token of the version that it trained"
    assert max(row["logprob_gap/max"] for row in rows) < 1e-4


def test_two_critics_give_a_std_and_both_masks_take_a_fifth(complete: tuple[Programs, int, int]) -> None:
    for row in complete[0].steps():
        assert row["value/std_mean"] > 0
        tokens = row["response/tokens"]
        assert row["mask/policy"] == pytest.approx(int(0.2 * tokens) / tokens, abs=1e-6)
        assert row["mask/entropy"] == pytest.approx(int(0.2 * tokens) / tokens, abs=1e-6)


def test_held_out_problems_are_evaluated_before_and_after(complete: tuple[Programs, int, int]) -> None:
    events = complete[0].events("eval")
    assert [(event["policy_version"], event["problems"], event["samples"]) for event in events] == [
        (0, 8, 2),
        (6, 8, 2),
    ]


def test_exported_actor_loads_as_an_ordinary_hugging_face_directory(complete: tuple[Programs, int, int]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = complete[0].run / "actor"
    assert AutoModelForCausalLM.from_pretrained(directory).num_parameters() == 98_752
    assert AutoTokenizer.from_pretrained(directory).chat_template


def test_the_critics_were_warm_started_by_two_batches_and_kept(complete: tuple[Programs, int, int]) -> None:
    from transformers import AutoModelForTokenClassification

    run = complete[0].run
    assert [event["batch"] for event in complete[0].events("warm_start")] == [1, 2]
    (directory,) = (run / "warm_start").iterdir()
    heads = [AutoModelForTokenClassification.from_pretrained(directory / f"critic_{m}").score.weight for m in (0, 1)]
    assert not heads[0].equal(heads[1])


def test_a_sample_says_of_each_token_what_it_was_trained_on(complete: tuple[Programs, int, int]) -> None:
    kept = [samples.read(path) for path in samples.files_in(complete[0].run)]
    assert sorted(sample.step for sample in kept) == [3, 6]
    tokens = [token for one in kept for r in one.responses for token in samples.tokens_of(r, one.settings)]
    verdicts = {line for token in tokens for line in samples.verdict(token, kept[0].settings)}
    assert any("std among the lowest 20 %" in line for line in verdicts), verdicts


def test_nothing_is_left_behind(complete: tuple[Programs, int, int]) -> None:
    programs = complete[0]
    assert programs.left_behind() == []
    assert not list(programs.directory.glob("asyncppo-*")), "published weights were not removed"


def test_replay_keys_and_every_other_switch_at_once_and_no_secret_is_in_what_the_run_wrote(
    quick_base: Path, rollout_python: str, tmp_path: Path, free_port: int
) -> None:
    directory = tmp_path / "keys"
    secrets = [read_key_file(path)[1] for path in keys.make(directory) if path.suffix == ".key_secret"]
    settings = {
        "run.steps": 6,
        "stream.keys": directory,
        "eval.at_start": False,
        "eval.at_end": False,
        "reward.functions": "{math_verify: 1.0, 'tests.real.rewards:lines': 0.5}",
        "reward.overlong_buffer": 4,
        "algorithm.reuse": "replay",
        "algorithm.utd": 2,
        "algorithm.aggregation": "confidence",
        "algorithm.mask_signal": "entropy",
        "algorithm.mask_fraction": "[[0, 0.0], [4, 0.4]]",
        "algorithm.ratio": "sequence",
        "algorithm.behaviour_level": "sequence",
        "algorithm.kl_coef": 0.01,
        "algorithm.loss_aggregation": "constant",
        "critic.each": "[{}, {learning_rate: 1.0e-4, minibatches: 2}]",
        "critic.lam": 0.9,
        "critic.value_clip": 0.5,
    }
    programs = Programs(quick_base, tmp_path, free_port, rollout_python, **settings)
    try:
        trainer, server = programs.trainer(), programs.rollout("r0")
        assert programs.ended(trainer, 200) == 0, programs.log("trainer")
        assert programs.ended(server) == 0, programs.log("rollout-r0")
    finally:
        programs.end()
    rows = programs.steps()
    assert rows[-1]["stream/used"] == 6 * 4
    assert rows[-1]["stream/consumed"] < 6 * 4, "no group was used twice"
    assert max(row["uses/mean"] for row in rows) > 1
    assert max(row["staleness/max"] for row in rows) <= 4
    assert rows[2]["mask/policy"] == pytest.approx(0.2, abs=0.02)
    assert rows[0]["policy/kl_reference"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["policy/kl_reference"] > 0
    assert sum(row["reward/errors"] for row in rows) == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file() and directory not in path.parents]
    assert {"trainer.log", "rollout-r0.log", "config.yaml", "events.jsonl"} <= {path.name for path in written}
    assert len(secrets) == 3
    assert not [path for path in written for secret in secrets if secret and secret in path.read_bytes()]


def test_servers_come_and_go_engines_die_and_the_trainer_comes_back(
    quick_base: Path, rollout_python: str, tmp_path: Path, free_port: int
) -> None:
    programs = Programs(quick_base, tmp_path, free_port, rollout_python, **{"run.steps": 100_000})

    def steps_after(count: int) -> int:
        return len(programs.steps()) + count

    try:
        trainer = programs.trainer()
        first = programs.rollout("first")
        programs.until("three steps with one server", lambda: len(programs.steps()) >= 3)

        second = programs.rollout("second")
        programs.until(
            "the late joiner to serve the current weights",
            lambda: any(event["server"] == "second" for event in programs.events("swap")),
        )
        late = next(event for event in programs.events("swap") if event["server"] == "second")
        assert late["policy_version"] > 0, "a late joiner gets the current version first"
        first.send_signal(signal.SIGTERM)
        assert programs.ended(first) == 0, programs.log("rollout-first")
        goal = steps_after(3)
        programs.until("three steps with the second server alone", lambda: len(programs.steps()) >= goal)

        engine = [p for p in psutil.Process(second.pid).children() if "sglang_process" in " ".join(p.cmdline())]
        assert len(engine) == 1
        engine[0].kill()
        goal = steps_after(8)  # more than what was buffered when the engine died
        programs.until("steps after the engine was killed", lambda: len(programs.steps()) >= goal)

        trainer.send_signal(signal.SIGTERM)
        assert programs.ended(trainer) == 0, programs.log("trainer")
        reached = len(programs.steps())
        assert second.poll() is None, "a rollout server waits for a trainer that was stopped"

        trainer = programs.trainer()
        programs.until("steps of the resumed trainer", lambda: len(programs.steps()) >= reached + 3)
        assert [row["step"] for row in programs.steps()][: reached + 3] == list(range(1, reached + 4))
        trainer.send_signal(signal.SIGINT)
        second.send_signal(signal.SIGINT)
        assert programs.ended(trainer) == 0, programs.log("trainer")
        assert programs.ended(second) == 0, programs.log("rollout-second")
        assert max(row["staleness/max"] for row in programs.steps()) <= 4
        assert programs.left_behind() == []
    finally:
        programs.end()
