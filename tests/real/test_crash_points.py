"""Kill -9 of the trainer at every named point of a step: after the resume no prompt is lost, none is trained on twice,
and at staleness 0 everything is, bit for bit, what it is without any kill.

Real processes: supervisor, learner and two critics under DeepSpeed, ZeroMQ, a rollout server with a scripted engine
that lives on while trainers die. The trainers are forked from a process that has imported PyTorch (tests/zygote.py).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncppo import ports
from asyncppo.checkpoints import read_manifest
from asyncppo.metrics import LEDGER_FILE, read
from asyncppo.weights import checksum
from tests.model_maker import a_model
from tests.real.crash_points import POINTS
from tests.real.run_tools import Programs
from tests.zygote import Zygote
from trainer.checkpoint import TrainerState

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

STEPS = 10
BATCH = 3
PROMPTS = 7

NOT_OF_THE_RUN = ("time", "wall_s", "time/", "rollout/", "swap/", "stream/", "critic/0/seconds", "critic/1/seconds")
"""Metrics that say how a run went and not what it did: times, and what was on its way at a moment."""

KILLS = [
    "before the ack:2:all",
    "after the ack:2",
    "in the ledger's line:2:all",
    "after the ledger's line:1",
    "values there:1:all",
    "before the update:2",
    "after the update:1:all",
    "version handed over:2:all",
    "before the version's rename:2",
    "after the version's rename:2:all",
    "before the announcement:2",
    "after the announcement:2:all",
    "before the metrics' line:2",
    "in the metrics' line:1:all",
    "after the metrics' line:1:all",
    "checkpoint's parts written:1:all",
    "before the checkpoint's rename:1",
    "after the checkpoint's rename:1:all",
]
"""Of the learner alone, or of all the trainer's processes. 2 is the second time in that process: it has got a version
further, or at least published the restored one."""
KILLS_OFF_POLICY = [
    "group received:3:all",
    "group held:4:all",
    "before the ledger's line:3",
    "batch taken:3:all",
    "critics asked:2:all",
    "checkpoint begun:2:all",
    "before retention:1",
    "in retention:1:all",
]


class Trainer(Programs):
    """`python -m trainer` in forks, and one scripted rollout server."""

    def __init__(self, zygote: Zygote, directory: Path, port: int, **overrides: Any) -> None:
        base = directory / "base"
        (base / "data").mkdir(parents=True)
        rows = "".join(f'{{"id": "q{n}", "prompt": "Compute {n}+1.", "answer": "{n + 1}"}}\n' for n in range(PROMPTS))
        (base / "data/train.jsonl").write_text(rows)
        settings = {
            "run.steps": STEPS,
            "run.save_every": 1,
            "run.keep_checkpoints": 2,
            "run.inspect_every": 0,
            "eval.sets": "{}",
            "actor.path": a_model(),
            "critic.path": a_model(),
            "actor.learning_rate": 1e-3,
            "stream.prompts_per_batch": BATCH,
            "stream.heartbeat_s": 0.1,
            "stream.batch_timeout_s": 60,
            "sampling.max_response_tokens": 6,
            "data.max_prompt_tokens": 64,
            "reward.function": "tests.real.letter_share:share",
            "guard.min_ess": 0,
        }
        super().__init__(base, directory, port, **(settings | overrides))
        self._zygote = zygote
        self._sockets = tempfile.mkdtemp(prefix="crash-")  # a killed supervisor leaves its critics' sockets

    def server(self) -> None:
        """Start the rollout server."""
        self._start("rollout", [sys.executable, "-m", "tests.real.scripted_server", "scripted", *self.arguments])

    def run_until(self, crash: str | None, limit_s: float = 60.0) -> int:
        """One life of the trainer, to its end or to a crash; returns the supervisor's exit code."""
        environment = {"ASYNCPPO_CRASH": crash or "", "TMPDIR": self._sockets}
        pid = self._zygote.start(self.arguments, environment, self.directory / "trainer.log")
        found: list[int] = []
        self.until(f"the trainer to end ({crash})", lambda: self._poll(pid, found), limit_s)
        self.until(f"all its processes to end ({crash})", lambda: not self._zygote.alive(), limit_s)
        return found[0]

    def _poll(self, pid: int, found: list[int]) -> bool:
        code = self._zygote.poll(pid)
        found += [] if code is None else [code]
        return code is not None

    def end(self) -> None:
        self._zygote.kill()
        super().end()
        shutil.rmtree(self._sockets)

    def batches(self) -> list[dict[str, Any]]:
        """The batches in ledger.jsonl: those of trained versions, in their order."""
        return [line for line in read(self.run / LEDGER_FILE) if "groups" in line]

    def state(self) -> TrainerState:
        """Of the newest checkpoint."""
        newest = max((self.run / "checkpoints").glob("step_*"))
        return msgspec.json.decode((newest / "trainer.json").read_bytes(), type=TrainerState)

    def files(self) -> dict[str, str]:
        """Checksums of the last version's weights, of actor and critics, optimisers and random states included."""
        (newest,) = (self.run / "checkpoints").glob(f"step_*{STEPS}")
        return {name: entry.xxh3 for name, entry in read_manifest(newest).files.items() if "/" in name} | {
            "actor": checksum(self.run / "actor/model.safetensors")
        }

    def check_between_lives(self) -> None:
        """What is on record is one history, up to the moment of the kill."""
        assert [line["version"] for line in self.batches()] == list(range(len(self.batches())))
        assert [row["step"] for row in self.steps()] == list(range(1, len(self.steps()) + 1))
        assert len(self.steps()) in (len(self.batches()), len(self.batches()) - 1)

    def check_the_end(self) -> None:
        """Every prompt that was begun is consumed once or accounted for, in every step's counts and at the end."""
        self.check_between_lives()
        assert [line["version"] for line in self.batches()] == list(range(STEPS))
        uses = Counter((epoch, prompt_id, use) for line in self.batches() for epoch, prompt_id, use in line["groups"])
        assert set(uses.values()) == {1}
        ledger = self.state().ledger
        assert ledger.consumed == len(uses) == STEPS * BATCH
        begun = Counter(position // PROMPTS for position in range(ledger.next_position))
        gone_unused = Counter(position // PROMPTS for position in ledger.unconsumed)
        gone_unused.update(held.epoch for held in ledger.buffered)
        assert Counter(epoch for epoch, _, _ in uses) + gone_unused == begun
        for row in self.steps():
            accounted = (row[f"stream/{what}"] for what in ("in_flight", "buffered", "consumed", "dropped"))
            assert row["stream/admitted"] == sum(accounted)
            assert row["stream/consumed"] == BATCH * row["step"]


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    one = Zygote()
    yield one
    one.close()


def what_was_done(row: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics, without those of its speed."""
    return {
        name: value
        for name, value in row.items()
        if not any(name == other or (other.endswith("/") and name.startswith(other)) for other in NOT_OF_THE_RUN)
    }


def killed_at_every_point(trainer: Trainer, kills: list[str]) -> None:
    """One run in many lives, each ended by a kill; the last one ends by itself."""
    trainer.server()
    try:
        for kill in kills:
            assert trainer.run_until(kill) != 0, f"{kill} was never reached"
            trainer.check_between_lives()
        assert trainer.run_until(None) == 0, trainer.log("trainer")[-3000:]
    finally:
        trainer.end()
    trainer.check_the_end()
    rolled_back = trainer.events("rolled_back")
    assert rolled_back, "no step was ever done again: the kills were all at harmless moments"
    assert all(event["steps"] in (1, 2) for event in rolled_back)


def test_a_run_killed_at_every_point_of_a_step_is_bit_for_bit_the_run_that_was_not(
    zygote: Zygote, tmp_path: Path, free_port: int
) -> None:
    assert {point.split(":")[0] for point in KILLS + KILLS_OFF_POLICY} == set(POINTS)
    settings = {"stream.max_staleness": 0, "algorithm.utd": 2, "actor.minibatches": 2, "critic.minibatches": 2}
    killed = Trainer(zygote, tmp_path / "killed", free_port, **settings)
    killed_at_every_point(killed, KILLS)

    whole = Trainer(zygote, tmp_path / "whole", ports.free_port(), **settings)
    whole.server()
    try:
        assert whole.run_until(None) == 0, whole.log("trainer")[-3000:]
    finally:
        whole.end()
    whole.check_the_end()

    assert killed.batches() == whole.batches()
    assert killed.files() == whole.files()
    assert len(whole.files()) > 6
    for ours, theirs in zip(killed.steps(), whole.steps(), strict=True):
        assert what_was_done(ours) == what_was_done(theirs), ours["step"]
    rewards = [row["reward/std"] for row in whole.steps()]
    assert min(rewards) > 0, "nothing to learn from: equal parameters would say little"


def test_off_policy_a_killed_run_loses_no_prompt_and_trains_on_none_twice(
    zygote: Zygote, tmp_path: Path, free_port: int
) -> None:
    killed = Trainer(zygote, tmp_path, free_port, **{"stream.max_staleness": 2, "run.save_every": 2})
    killed_at_every_point(killed, KILLS_OFF_POLICY)
    assert max(row["staleness/max"] for row in killed.steps()) in (1, 2)
