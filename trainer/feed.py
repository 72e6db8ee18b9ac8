"""The feed: what the learner's ranks see of the stream. Rank 0 has the intake; all get the same batch, or the stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from asyncppo.algorithm import assign_shards
from asyncppo.config import Config
from asyncppo.messages import WeightsReady
from asyncppo.metrics import Journal
from asyncppo.waits import waiting
from trainer.model.world import World
from trainer.stream.batch import Batch, pack
from trainer.stream.buffer import BufferedGroup
from trainer.stream.intake import Counts, Intake
from trainer.stream.ledger import LedgerState
from trainer.stream.prompts import Prompt
from trainer.stream.state import StreamState

_ARRAYS = [field.name for field in fields(Batch) if field.name not in ("version", "prompt_ids", "epochs")]


class Feed:
    """Batches for every rank. `intake` and `journal` are None above rank 0."""

    def __init__(
        self,
        config: Config,
        world: World,
        intake: Intake | None,
        journal: Journal | None,
        eval_sets: dict[str, list[Prompt]],
        tokenizer_directory: Path,
        should_stop: Callable[[], bool],
    ) -> None:
        self._config = config
        self._world = world
        self._intake = intake
        self._journal = journal
        self._eval_sets = eval_sets
        self._should_stop = should_stop
        self.tokenizer_directory = tokenizer_directory

    def take(self, version: int, *, warm_start: bool = False) -> Batch | None:
        """The next batch, packed, the same on every rank; None when the run is to stop.

        Args:
            version: the version about to be trained.
            warm_start: a batch of the critics' warm start: as many as are wanted of one version, each of groups that
                are used this once (`Intake.take`).
        """
        arrays: dict[str, Any] | None = None
        if self._intake is not None:
            with waiting(f"a batch for version {version}", self._config.stream.batch_timeout_s):
                groups = self._intake.take(version, self._should_stop, warm_start=warm_start)
            if groups is None:
                arrays = {}
            else:
                mask_errors = self._config.reward.on_error == "mask"
                batch = pack(groups, self._shards(groups), version, mask_errors=mask_errors)
                names = {"prompt_ids": np.array(batch.prompt_ids), "epochs": np.array(batch.epochs)}
                arrays = names | {name: getattr(batch, name) for name in _ARRAYS}
        shared = self._world.share(arrays)
        if not shared:
            return None
        prompt_ids = tuple(str(prompt_id) for prompt_id in shared.pop("prompt_ids"))
        epochs = tuple(int(epoch) for epoch in shared.pop("epochs"))
        return Batch(version=version, prompt_ids=prompt_ids, epochs=epochs, **shared)

    def announce(self, weights: WeightsReady) -> None:
        """Tell the rollout servers of a new version."""
        self._rank_0.announce(weights)

    def limit_staleness(self, bound: int) -> None:
        """The brake: lease by this bound, at most `stream.max_staleness`, from now on (`Intake.limit_staleness`).

        It is at least `publish.every` - 1: below that nothing could be leased for the last step before a version.
        """
        self._rank_0.limit_staleness(max(bound, self._config.publish.every - 1))

    def oldest_wanted_version(self, newest: int) -> int:
        """Versions below this one are served by nobody and wanted by nobody."""
        served = self._rank_0.oldest_served_version()
        return newest if served is None else min(served, newest)

    def evaluate(self, version: int) -> dict[str, float]:
        """pass@1 of each held-out set, by servers that serve this version; nothing when the run is to stop."""
        scores: dict[str, float] = {}
        for name, prompts in self._eval_sets.items():
            with waiting(f"answers to the held-out problems of {name}", self._config.stream.batch_timeout_s):
                groups = self._rank_0.evaluate(prompts, version, self._should_stop)
            if groups is None:
                return scores
            rewards = np.stack([group.rewards for group in groups])
            lengths = np.concatenate([group.lengths for group in groups])
            of_problems = rewards.mean(axis=1)
            scores[name] = float(rewards.mean())
            if self._journal:
                self._journal.event(
                    "eval",
                    set=name,
                    policy_version=version,
                    problems=len(groups),
                    samples=self._config.eval.samples,
                    pass_at_1=scores[name],
                    standard_error=float(of_problems.std(ddof=1) / len(groups) ** 0.5) if len(groups) > 1 else None,
                    pass_at_k=float(rewards.max(axis=1).mean()),
                    length_mean=float(lengths.mean()),
                    reward_errors=int(sum(group.reward_errors.sum() for group in groups)),
                )
        return scores

    def counts(self) -> Counts:
        """The stream now."""
        return self._rank_0.counts()

    def state(self) -> StreamState:
        """For a checkpoint; above rank 0 nobody looks at it."""
        if self._intake is None:
            return StreamState(LedgerState(next_position=0, unconsumed=[], admitted=0, consumed=0, dropped={}))
        return self._intake.state()

    @property
    def _rank_0(self) -> Intake:
        assert self._intake is not None, "only rank 0 has the intake"
        return self._intake

    def _shards(self, groups: Sequence[BufferedGroup]) -> list[tuple[int, ...]]:
        """Which critic learns from which response: drawn from (seed, prompt, epoch), so the same on every use."""
        config = self._config
        size, critics = config.sampling.group_size, config.algorithm.critics
        return [assign_shards(config.run.seed, g.prompt.prompt_id, g.epoch, size, critics) for g in groups]
