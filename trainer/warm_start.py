"""The critics' warm start: before the actor's first step they learn from the first policy's own responses.

A critic that knows nothing makes advantages that are the group's luck, or worse. So `critic.warmup_batches` batches of
version 0 train the critics alone (value pretraining: VC-PPO, arXiv 2503.01491), while data keep flowing. Then they
begin the run with another optimiser and the schedule from its start. What comes out is written to
`Config.warmup_directory`, whose name is a hash of all that decides it: a later run of the same settings, or this one
after a restart, takes it from there. `critic.path` says what the warm start begins with.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from pathlib import Path

from asyncppo import algorithm
from asyncppo.config import Config
from asyncppo.metrics import Journal
from trainer.feed import Feed
from trainer.model.critic import warm_started
from trainer.model.critics import Critics
from trainer.model.world import World
from trainer.targets import returns, rewards

log = logging.getLogger("asyncppo.warm_start")


def run(config: Config, world: World, feed: Feed, critics: Critics | None, journal: Journal | None) -> bool:
    """Train the critics alone, if the config wants it and it has not been done; False when the run is to stop.

    All ranks of the learner call it; `critics` and `journal` are None above rank 0.
    """
    batches = config.critic.warmup_batches if config.algorithm.critics else 0
    if batches == 0:
        return True
    started = warm_started(config, world)
    if started is not None:
        log.info("the critics were warm-started by an earlier run: %s", started)
        if critics is not None:
            critics.start(started)  # they were built before that run had ended, perhaps
        return True
    log.info("warm start: %d batches train the critics alone", batches)
    for number in range(batches):
        began = time.monotonic()
        batch = feed.take(0, warm_start=True)
        if batch is None:
            return False
        if critics is None:
            continue
        critics.learn(batch, rewards(batch), step=number - batches)
        answer = critics.values()
        explained = math.nan
        if len(answer.fresh):
            explained = algorithm.explained_variance(answer.fresh.mean(dim=0), returns(batch, config.algorithm))
        if journal:
            journal.event(
                "warm_start",
                batch=number + 1,
                batches=batches,
                reward=float(batch.rewards.mean()),
                explained_variance_fresh=explained,
                seconds=time.monotonic() - began,
                **answer.metrics,
            )
        if (number + 1) % max(1, batches // 10) == 0:
            own = answer.metrics.get("critic/0/explained_variance", math.nan)
            log.info("warm start %d/%d: critic 0 explains %.2f of its shard's variance", number + 1, batches, own)
    if critics is not None:
        _keep(config.warmup_directory, critics)
        critics.start(config.warmup_directory)
    return True


def _keep(directory: Path, critics: Critics) -> None:
    partial = directory.with_name(f".{directory.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    critics.export(partial)
    try:
        os.replace(partial, directory)
    except OSError:
        if not directory.is_dir():
            raise
        shutil.rmtree(partial)  # another run of the same settings was quicker
