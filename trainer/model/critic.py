"""One critic: learns from its shard, then values all responses (AsyPPO, Algorithm 1). Runs in a world of its own."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from asyncppo import algorithm
from asyncppo.config import Config, CriticConfig
from asyncppo.errors import CheckpointError, MessageError
from asyncppo.messages import (
    CriticFailed,
    CriticReady,
    Done,
    ExportCritic,
    ForCritic,
    Learn,
    Learned,
    LoadCritic,
    Message,
    SaveCritic,
    StartCritic,
    Stop,
)
from asyncppo.transport.base import Channel
from asyncppo.waits import phase, waiting
from trainer.model.build import build_engine
from trainer.model.export import export, whole_weights
from trainer.model.networks import ValueNet, files_of
from trainer.model.packing import Indices, gather, minibatches, plan
from trainer.model.world import World

log = logging.getLogger("asyncppo.critic")

NOTHING = object()
"""No message has come yet."""
_NOTHING = "nothing"
_READY_S = 5.0
"""CriticReady is sent this often while the learner says nothing: it may be another process that has never heard it."""
_SHARE_S = 30.0
"""Rank 0 of a critic tells the others this often that nothing has come."""


def warm_started(config: Config, world: World) -> Path | None:
    """Where critics that were warm-started by these settings are; None without a warm start, or before it.

    All ranks have to call it: it is there if all of them see it.
    """
    there = config.warmup_groups > 0 and world.agree(config.warmup_directory.is_dir())
    return config.warmup_directory if there else None


def _warm(settings: CriticConfig) -> CriticConfig:
    """The settings of the warm start's own optimiser."""
    if settings.warmup_learning_rate is None:
        return msgspec.structs.replace(settings, warmup_steps=0, schedule="constant")
    return msgspec.structs.replace(
        settings, warmup_steps=0, schedule="linear", learning_rate=settings.warmup_learning_rate
    )


class Critic:
    """A value network under its engine. Every rank of the critic has to make the same calls."""

    def __init__(self, config: Config, index: int, world: World) -> None:
        self._config = config
        self._settings = config.critic_of(index)
        self._index = index
        self._world = world
        self._warming = False
        begun = warm_started(config, world)
        if begun is not None:
            self.start(begun / f"critic_{index}")
        else:
            self.begin()

    def begin(self) -> None:
        """Begin as a run does that finds nothing of an earlier one: with the warm start, if the config has one."""
        if self._config.warmup_groups > 0:
            self.warm_up()
        else:
            self.start(str(self._settings.path))

    def warm_up(self) -> None:
        """Begin as the warm start does, with its own optimiser."""
        steps = self._settings.warmup_batches * self._settings.minibatches
        self._build(str(self._settings.path), _warm(self._settings), steps)
        self._warming = True

    def start(self, path: Path | str) -> None:
        """Begin anew, as a run does, from a checkpoint: another optimiser, and the schedule from its start."""
        self._build(str(path), self._settings, self._config.critic_steps(self._index))
        self._warming = False

    def _build(self, path: str, settings: CriticConfig, steps: int) -> None:
        self.network = ValueNet(path, settings, seed=self._config.run.seed + 1000 * (self._index + 1))
        self._engine = build_engine(self.network, settings, steps, self._world)

    @property
    def parameters(self) -> int:
        """How many weights the network has."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.network.parameters())

    def learn(self, batch: Learn) -> Learned:
        """Its epochs over the shard, minimising (V_m(s_t) − R_t)² / 2, then the values of all responses.

        R_t is the Monte-Carlo return, or with `critic.lam` below 1 the TD(λ) target on the critic's own values before
        it learns. The warm start (`batch.step` below 0) makes one epoch, whatever `critic.epochs` says.
        """
        started = time.monotonic()
        settings, gamma = self._settings, self._config.algorithm.gamma
        lengths = torch.from_numpy(batch.response_lengths.astype(np.int64))
        rewards = torch.from_numpy(np.array(batch.rewards))
        returns = algorithm.returns(rewards, lengths, gamma=gamma)
        fresh = None
        if settings.fresh_values or settings.value_clip is not None or settings.lam < 1:
            fresh = self.values(batch)
        targets = returns
        if fresh is not None and settings.lam < 1:
            targets = algorithm.lambda_returns(rewards, fresh, lengths, gamma=gamma, lam=settings.lam)
        own = np.flatnonzero(batch.shard)
        sums = {"loss": 0.0, "skipped": 0.0, "grad_norm": 0.0}
        for epoch in range(1 if batch.step < 0 else settings.epochs or 1):
            rng = np.random.default_rng([self._config.run.seed, self._index, batch.step % (1 << 32), epoch])
            for part in minibatches(len(own), settings.minibatches, rng):
                skipped = sums["skipped"]
                sums = self._update(batch, own[part], targets, fresh)
                sums["skipped"] += skipped
        values = self.values(batch)
        learned_from = torch.from_numpy(batch.shard.astype(bool)).repeat_interleave(lengths)
        metrics = sums | {
            "explained_variance": _explained(values, returns, learned_from),
            "explained_variance_other": _explained(values, returns, ~learned_from),
        }
        if fresh is not None:
            metrics["explained_variance_fresh"] = algorithm.explained_variance(fresh, returns)
        return Learned(
            step=batch.step,
            values=values.numpy(),
            fresh_values=np.zeros(0, dtype=np.float32) if fresh is None else fresh.numpy(),
            metrics={name: value for name, value in metrics.items() if np.isfinite(value)},
            seconds=time.monotonic() - started,
        )

    @torch.no_grad()
    def values(self, batch: Learn) -> torch.Tensor:
        """V_m of the state before each response token: [T] float32 on the CPU, on every rank."""
        result = torch.zeros(int(batch.response_lengths.sum()))
        for micro in self._plan(batch, np.arange(len(batch.sequence_lengths))):
            packed = self._gather(batch, micro)
            result[packed.tokens] = self._engine(packed).cpu()
        return self._world.sum(result.to(self._world.device)).cpu()

    def _update(
        self, batch: Learn, which: Indices, targets: torch.Tensor, fresh: torch.Tensor | None
    ) -> dict[str, float]:
        tokens = int(batch.response_lengths[which].sum())
        clip = self._settings.value_clip
        loss_sum = torch.zeros(())
        for micro in self._plan(batch, which):
            packed = self._gather(batch, micro)
            values = self._engine(packed)
            weights = torch.full_like(values, 1.0 / tokens)  # the mean over the minibatch's tokens, on all ranks
            old = None if clip is None or fresh is None else fresh[packed.tokens].to(values.device)
            loss, _ = algorithm.value_loss(
                values, targets[packed.tokens].to(values.device), weights, old_values=old, clip=clip
            )
            self._engine.backward(loss * self._world.size)  # the engine averages over ranks; the loss is a sum
            loss_sum += loss.detach().cpu()
        report = self._engine.step()
        loss_sum = self._world.sum(loss_sum.to(self._world.device))
        return {"loss": float(loss_sum), "grad_norm": report.grad_norm, "skipped": float(report.skipped)}

    def _plan(self, batch: Learn, which: Indices) -> list[list[Indices]]:
        budget = self._settings.micro_batch_tokens
        return plan(batch.sequence_lengths, which, budget=budget, ranks=self._world.size)

    def _gather(self, batch: Learn, micro: list[Indices]) -> Any:
        mine = micro[self._world.rank]
        return gather(batch.input_ids, batch.sequence_lengths, batch.response_lengths, mine, self._world.device)

    def save(self, directory: Path) -> None:
        """Write what a resume needs."""
        self._engine.save(directory)

    def load(self, directory: Path) -> None:
        """Go on from `save`."""
        if self._warming:  # a checkpoint comes after the warm start, and has the run's optimiser and schedule
            self.start(str(self._settings.path))
        self._engine.load(directory)

    def export(self, directory: Path) -> None:
        """Write the weights as a Hugging Face model with a scalar head, which `critic.path` may name."""
        weights = whole_weights(self._engine, self._world)
        if self._world.rank == 0:
            export(self.network.hf, weights, directory, files_of(str(self._settings.path)))


def _explained(values: torch.Tensor, returns: torch.Tensor, tokens: torch.Tensor) -> float:
    return algorithm.explained_variance(values[tokens], returns[tokens]) if tokens.any() else float("nan")


def serve(
    critic: Critic, channel: Channel | None, index: int, world: World, should_stop: Callable[[], bool] = lambda: False
) -> bool:
    """Answer the learner until it says Stop, or this process is told to; returns whether it was the learner.

        consumes      Learn, SaveCritic, LoadCritic, ExportCritic, StartCritic, of its own session only
        produces      CriticReady while nothing comes; Learned or Done for each; CriticFailed before an error
        waits for     the learner, without a limit of its own: the supervisor ends this process when the learner ends
        unblocked by  the channel, `should_stop`

    Rank 0 has the channel and shares what comes with the other ranks.
    """
    line = _Line(channel, should_stop, CriticReady(index=index, parameters=critic.parameters, session=uuid.uuid4().hex))
    while True:
        with waiting("the learner", math.inf) as wait:
            message = NOTHING
            while (
                message is NOTHING
            ):  # shared again and again: the other ranks' wait has a limit, the learner's has not
                message = _shared(line.next(_SHARE_S if world.size > 1 else math.inf), world)
                wait.renew()
        try:
            with phase(type(message).__name__):
                answer = _answer(critic, message, world)
        except Exception as error:
            line.send(CriticFailed(reason=f"{type(error).__name__}: {error}", session=line.session))
            raise
        if answer is None:
            return line.told_by_learner
        line.send(msgspec.structs.replace(answer, session=line.session))


def _answer(critic: Critic, message: Any, world: World) -> Learned | Done | None:
    match message:
        case Learn():
            return critic.learn(message)
        case SaveCritic():
            return _written(lambda: critic.save(Path(message.directory)), world)
        case ExportCritic():
            return _written(lambda: critic.export(Path(message.directory)), world)
        case LoadCritic():
            critic.load(Path(message.directory))
        case StartCritic() if message.directory:
            critic.start(message.directory)
        case StartCritic():
            critic.begin()
        case _:
            return None
    return Done()


def _written(write: Callable[[], None], world: World) -> Done:
    """A disk that is full is no reason to lose what the critic has learned: the learner hears of it."""
    failure = ""
    try:
        write()
    except (OSError, CheckpointError) as error:
        failure = f"{type(error).__name__}: {error}"
        log.error("not written: %s", failure)
    everywhere = world.agree(not failure)
    return Done(failure=failure or ("" if everywhere else "another rank could not write its part; its log says why"))


class _Line:
    """Rank 0's line to the learner; other ranks have none."""

    def __init__(self, channel: Channel | None, should_stop: Callable[[], bool], ready: CriticReady) -> None:
        self.told_by_learner = True
        self._channel = channel
        self._should_stop = should_stop
        self._ready = ready
        self._quiet_since = -math.inf

    @property
    def session(self) -> str:
        """Of this process."""
        return self._ready.session

    def send(self, message: Message) -> None:
        """Send, however long the learner is away; not when this process is told to end."""
        while self._channel is not None and not self._channel.send(message) and not self._should_stop():
            log.debug("the learner has not come yet, or is gone")
        self._quiet_since = time.monotonic()

    def next(self, limit_s: float) -> Any:
        """The learner's next message to this very process; `NOTHING` after the limit."""
        if self._channel is None:
            return NOTHING
        deadline = time.monotonic() + limit_s
        while not self._should_stop():
            if time.monotonic() - self._quiet_since >= _READY_S and self._channel.send(self._ready):
                self._quiet_since = time.monotonic()
            try:
                message = self._channel.receive(0.5)
            except MessageError as error:
                log.warning("dropped: a message %s", error)
                continue
            if isinstance(message, ForCritic) and message.session != self.session:
                log.info("dropped: %s for a process before this one", type(message).__name__)
            elif message is not None:
                self._quiet_since = time.monotonic()
                if isinstance(message, (Learn, LoadCritic, StartCritic)):
                    self._ready = msgspec.structs.replace(self._ready, used=True)
                return message
            if time.monotonic() >= deadline:
                return NOTHING
        self._channel.send(CriticFailed(reason="it was told to end, and not by the learner", session=self.session))
        self.told_by_learner = False
        return Stop(reason="")


_LEARN_ARRAYS = ("input_ids", "sequence_lengths", "response_lengths", "rewards", "shard", "group_index")
_WITH_DIRECTORY = {kind.__name__: kind for kind in (SaveCritic, LoadCritic, ExportCritic, StartCritic)}


def _shared(message: Any, world: World) -> Any:
    """Rank 0's message on every rank."""
    if world.size == 1:
        return message
    arrays: dict[str, Any] | None = None
    if world.rank == 0:
        kind = _NOTHING if message is NOTHING else type(message).__name__
        text = getattr(message, "directory", "")
        arrays = {"kind": np.array(kind), "text": np.array(text)}
        if isinstance(message, Learn):
            arrays |= {"step": np.array(message.step)} | {name: getattr(message, name) for name in _LEARN_ARRAYS}
    shared = world.share(arrays)
    kind = str(shared["kind"])
    if kind == _NOTHING:
        return NOTHING
    if kind == "Learn":
        given: dict[str, Any] = {name: shared[name] for name in _LEARN_ARRAYS}
        return Learn(step=int(shared["step"]), **given)
    if kind in _WITH_DIRECTORY:
        return _WITH_DIRECTORY[kind](directory=str(shared["text"]))
    return Stop(reason="")
