"""The learner: AsyPPO on one screen, in the order of the algorithm. All ranks run it; rank 0 has the stream.

consumes      batches (`Feed.take`), values (`Critics`)
produces      policy versions (`Publisher`), one line of metrics a step
waits for     a batch, the critics
unblocked by  the intake, the critics; a stop request ends it after the step
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from asyncppo.config import Config
from asyncppo.metrics import Journal
from trainer.checkpoint import Checkpoints, TrainerState
from trainer.feed import Feed
from trainer.model.critics import Critics
from trainer.model.policy import Policy
from trainer.model.world import World
from trainer.publish import Publisher, export
from trainer.record import Recorder, StepRecord
from trainer.targets import build_targets, returns

log = logging.getLogger("asyncppo.learner")


class Learner:
    """Trains from one policy version to the last. `critics`, `publisher` and `journal` are None on ranks above 0."""

    def __init__(
        self,
        config: Config,
        world: World,
        feed: Feed,
        policy: Policy,
        critics: Critics | None,
        publisher: Publisher | None,
        journal: Journal | None,
    ) -> None:
        self._config = config
        self._world = world
        self._feed = feed
        self._policy = policy
        self._critics = critics
        self._publisher = publisher
        self._journal = journal
        self._checkpoints = Checkpoints(config)
        self._recorder = Recorder(config)
        self._saved_version = -1

    def run(self, version: int) -> int:
        """Train from this version to the last, or until a stop is asked for; returns the version reached."""
        self._saved_version = version or -1  # above 0 it comes from its checkpoint
        self._publish(version)
        if version == 0 and self._config.eval.at_start:
            self._evaluate(version)
        while version < self._config.run.steps and self._step(version):
            version += 1
        if version == self._config.run.steps and self._config.eval.at_end:
            self._evaluate(version)
        self._save(version)
        self._export(version)
        return version

    def _step(self, version: int) -> bool:
        """One batch: values, targets, `utd` passes, the next version. False when the run is to stop."""
        settings = self._config.algorithm
        step = StepRecord()
        with step.phase("wait_for_batch"):
            batch = self._feed.take(version)  # B groups, none staler than the bound
        if batch is None:
            return False
        with step.phase("proximal"):
            if self._critics:
                self._critics.learn(batch, returns(batch, settings))  # each on its shard and device; meanwhile:
            proximal = self._policy.logprobs(batch)  # the anchor of the decoupled ratio
        with step.phase("wait_for_critics"):
            values = self._values(step)  # [M, T]
        with step.phase("targets"):
            targets = build_targets(batch, values, settings)  # GAE on the mean value, masks from its std
        with step.phase("update"):
            for use in range(settings.utd):
                step.sums = self._policy.update(batch, proximal, targets, use)
        with step.phase("publish"):
            self._publish(version + 1)
        if self._config.run.save_every and (version + 1) % self._config.run.save_every == 0:
            with step.phase("checkpoint"):
                self._save(version + 1)
        if self._journal:
            row = self._recorder.row(step, batch, targets, values, proximal, self._feed.counts())
            self._journal.step(row)
            log.info(self._recorder.line(row))
        return True

    def _values(self, step: StepRecord) -> torch.Tensor:
        if self._config.algorithm.critics == 0:
            return torch.zeros((0, 0))
        arrays = None
        if self._critics:
            values, step.critics = self._critics.values()
            arrays = {"values": values.numpy()}
        return torch.from_numpy(self._world.share(arrays)["values"])

    def _publish(self, version: int) -> None:
        weights = self._policy.weights()  # all ranks gather, rank 0 has them
        if self._publisher:
            self._feed.announce(self._publisher.publish(self._policy, weights, version))
            self._publisher.remove_before(self._feed.oldest_wanted_version(version))

    def _evaluate(self, version: int) -> None:
        if self._world.rank == 0 and self._config.eval.sets:
            scores = self._feed.evaluate(version)
            log.info("evaluation of version %d: %s", version, ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        self._world.barrier()

    def _save(self, version: int) -> None:
        if version == self._saved_version:
            return
        state = TrainerState(
            policy_version=version,
            critics=self._config.algorithm.critics,
            actor_path=self._config.actor.path,
            critic_path=self._config.critic_path,
            ledger=self._feed.ledger_state(),
        )

        def write_parts(directory: Path) -> None:
            self._world.barrier()  # rank 0 has made the directory
            self._policy.save(directory / "actor")
            if self._critics:
                self._critics.save(directory)
            self._world.barrier()

        path = self._checkpoints.save(state, write_parts, first_rank=self._world.rank == 0)
        self._saved_version = version
        log.info("saved %s", path)

    def _export(self, version: int) -> None:
        weights = self._policy.weights()
        if self._world.rank == 0:
            directory = self._config.run_directory / "actor"
            shutil.rmtree(directory, ignore_errors=True)
            export(self._policy, weights, directory, self._feed.tokenizer_directory)
            log.info("version %d of the actor is in %s, an ordinary Hugging Face directory", version, directory)
