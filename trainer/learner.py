"""The learner: AsyPPO on one screen, in the order of the algorithm. All ranks run it; rank 0 has the stream.

consumes      batches (`Feed.take`), values (`Critics`)
produces      policy versions (`Publisher`, which works beside it), one line of metrics a step
waits for     a batch, the critics
unblocked by  the intake, the critics; a stop request ends it after the step
"""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import numpy as np
import torch

from asyncppo import waits
from asyncppo.config import Config
from asyncppo.messages import Int32
from asyncppo.metrics import Journal
from trainer import warm_start
from trainer.checkpoint import Checkpoints, GuardState, TrainerState
from trainer.feed import Feed
from trainer.guard import FRESH, Alarm, Brake, SkippedSteps
from trainer.model.critics import NO_VALUES, Critics, Values
from trainer.model.export import export
from trainer.model.policy import Policy, Scores
from trainer.model.world import World
from trainer.publish.publisher import Publisher, is_published
from trainer.record import Recorder, StepRecord, effective_sample_size, logprob_gap
from trainer.samples import Samples
from trainer.stream.batch import Batch
from trainer.targets import TargetBuilder, Targets, rewards

log = logging.getLogger("asyncppo.learner")


class Learner:
    """Trains from one policy version to the last. `critics`, `publisher` and `journal` are None on ranks above 0.

    `resumed` is from the checkpoint that the run goes on from. `probe_ids` [P], the same on every rank, are what the
    engines are probed with; without them they are not.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        feed: Feed,
        policy: Policy,
        critics: Critics | None,
        publisher: Publisher | None,
        journal: Journal | None,
        resumed: TrainerState | None = None,
        probe_ids: Int32 | None = None,
    ) -> None:
        self._config = config
        self._world = world
        self._feed = feed
        self._policy = policy
        self._critics = critics
        self._publisher = publisher
        self._journal = journal
        self._checkpoints = Checkpoints(config, journal, world.agree, critics.saved if critics else None)
        self._recorder = Recorder(config)
        self._samples = Samples(config, feed.tokenizer_directory) if journal and config.run.inspect_every else None
        self._targets = TargetBuilder(config, resumed.critic_errors if resumed else ())
        counts = resumed.guard if resumed else FRESH
        self._brake = Brake(config, journal, counts)
        self._skipped = SkippedSteps(config, journal, counts)
        self._alarm = Alarm(config, journal, counts) if journal else None
        self._saved_version = -1
        self._probe_ids = np.zeros(0, np.int32) if probe_ids is None else probe_ids

    def run(self, version: int) -> int:
        """Train from this version to the last, or until a stop is asked for; returns the version reached."""
        self._saved_version = version or -1  # above 0 it comes from its checkpoint
        if self._world.rank == 0:
            self._feed.limit_staleness(self._brake.max_staleness)
        self._publish(version)
        if version == 0 and self._config.eval.at_start:
            self._evaluate(version)
        if version == 0 and not warm_start.run(self._config, self._world, self._feed, self._critics, self._journal):
            return version
        while version < self._config.run.steps and self._step(version):
            version += 1
        with waits.phase(f"save and export of version {version}"):  # before an evaluation that may wait in vain
            self._save(version)
            self._export(version)
        if version == self._config.run.steps:
            self._flush()
        if version == self._config.run.steps and self._config.eval.at_end:
            self._evaluate(version)
        if not self._checkpoints.settled():
            self._saved_version = -1  # it is tried once more
            self._save(version)
        self._checkpoints.wait()
        return version

    def close(self) -> None:
        """Let the save in progress end, whyever the run has ended."""
        self._checkpoints.close()

    def _step(self, version: int) -> bool:
        """One batch: values, targets, `utd` passes, the next version. False when the run is to stop."""
        step = StepRecord(version)
        waits.note(policy_version=version)
        self._checkpoints.report()
        if self._config.run.save_every and version % self._config.run.save_every == 0 and version:
            with step.phase("checkpoint"):  # between two steps: what the last one did is on record
                self._save(version)
        with step.phase("wait_for_batch"):
            batch = self._feed.take(version)  # B groups, none staler than the bound
        if batch is None:
            return False
        with step.phase("proximal"):
            if self._critics:
                self._critics.learn(batch, rewards(batch), step=version)  # each on its shard and device; meanwhile:
            scores = self._policy.score(batch)  # the anchor of the decoupled ratio
        with step.phase("wait_for_critics"):
            values = self._values()  # [M, T]
        with step.phase("targets"):
            targets = self._targets.build(batch, values.values, scores.entropy)  # GAE on V̄, masks from its std
        with step.phase("update"):
            for use in range(self._brake.passes):
                step.add(self._policy.update(batch, scores, targets, use))
        with step.phase("publish"):
            if is_published(self._config, version + 1):
                self._publish(version + 1)
        self._record(step, batch, scores, values, targets)
        return True

    def _values(self) -> Values:
        if self._config.algorithm.critics == 0:
            return NO_VALUES
        answer = self._critics.values() if self._critics else NO_VALUES
        arrays = {"values": answer.values.numpy()} if self._critics else None
        shared = torch.from_numpy(self._world.share(arrays)["values"])
        return Values(shared, answer.fresh, answer.metrics)

    def _record(self, step: StepRecord, batch: Batch, scores: Scores, values: Values, targets: Targets) -> None:
        """What the step did: for people, for the files, and for those who watch over the next one."""
        if self._journal and self._alarm:
            row = self._recorder.row(step, batch, targets, values, scores, self._feed.counts())
            self._journal.step(row)
            log.info(self._recorder.line(row))
            self._alarm.observe(batch.version, row.get("value/separation", math.nan))
        if self._samples and (batch.version + 1) % self._config.run.inspect_every == 0:
            self._samples.keep(batch, targets, values.values, scores.logprobs, scores.entropy)
        self._skipped.observe(int(step.sums["skipped"]), batch, scores, targets)
        self._brake.observe(batch.version, effective_sample_size(step.sums), logprob_gap(batch, scores.logprobs))
        if self._world.rank == 0:
            self._feed.limit_staleness(self._brake.max_staleness)

    def _publish(self, version: int) -> None:
        """Hand the weights over as they are now; they are written and announced beside what comes next."""
        weights = self._policy.weights(getattr(torch, self._config.rollout.dtype))  # all ranks gather, rank 0 has them
        logprobs = self._policy.probe(self._probe_ids)
        if self._publisher:
            self._publisher.publish(version, weights, logprobs)

    def _flush(self) -> None:
        """Wait until the newest version is out."""
        if self._publisher:
            self._publisher.flush()

    def _evaluate(self, version: int) -> None:
        self._flush()
        if self._world.rank == 0 and self._config.eval.sets:
            scores = self._feed.evaluate(version)
            log.info("evaluation of version %d: %s", version, ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        self._world.barrier()

    def _save(self, version: int) -> None:
        if version == self._saved_version:
            return
        stream = self._feed.state()
        state = TrainerState(
            policy_version=version,
            critics=self._config.algorithm.critics,
            actor_path=self._config.actor.path,
            critic_paths=self._config.critic_paths,
            critic_errors=self._targets.errors,
            ledger=stream.ledger,
            guard=self._guard_state(),
        )

        def write_parts(directory: Path) -> None:
            self._policy.save(directory / "actor")
            if self._world.rank == 0:
                stream.write(directory / "stream")
            if self._critics:
                self._critics.save(directory)

        self._checkpoints.begin(state, write_parts, first_rank=self._world.rank == 0)
        self._saved_version = version

    def _guard_state(self) -> GuardState:
        return GuardState(
            brake_level=self._brake.level,
            good_steps=self._brake.good_steps,
            skipped=self._skipped.count,
            skipped_in_a_row=self._skipped.in_a_row,
            collapsed_for=self._alarm.below if self._alarm else 0,
        )

    def _export(self, version: int) -> None:
        weights = self._policy.weights()
        if self._world.rank == 0:
            directory = self._config.run_directory / "actor"
            partial = directory.with_name(".partial-actor")
            shutil.rmtree(partial, ignore_errors=True)
            export(self._policy.network.hf, weights, partial, self._feed.tokenizer_directory)
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)
            log.info("version %d of the actor is in %s, an ordinary Hugging Face directory", version, directory)
