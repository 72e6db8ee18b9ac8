"""One critic: learns from its shard, then values all responses (AsyPPO, Algorithm 1). Runs in a world of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from asyncppo import algorithm
from asyncppo.config import Config, CriticConfig
from asyncppo.errors import MessageError
from asyncppo.messages import (
    CriticFailed,
    CriticReady,
    Done,
    ExportCritic,
    Learn,
    Learned,
    LoadCritic,
    Message,
    SaveCritic,
    StartCritic,
    Stop,
)
from asyncppo.transport.base import Channel
from trainer.model.build import build_engine
from trainer.model.export import export, whole_weights
from trainer.model.networks import ValueNet, files_of
from trainer.model.packing import Indices, gather, minibatches, plan
from trainer.model.world import World

log = logging.getLogger("asyncppo.critic")


def warm_started(config: Config) -> Path | None:
    """Where critics that were warm-started by these settings are; None without a warm start, or before it."""
    there = config.warmup_groups > 0 and config.warmup_directory.is_dir()
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
        begun = warm_started(config)
        self._warming = config.warmup_groups > 0 and begun is None
        if begun is not None:
            self.start(begun / f"critic_{index}")
        elif self._warming:
            self._build(
                str(self._settings.path),
                _warm(self._settings),
                self._settings.warmup_batches * self._settings.minibatches,
            )
        else:
            self.start(str(self._settings.path))

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
) -> None:
    """Answer the learner until it says Stop, or this process is told to.

        consumes      Learn, SaveCritic, LoadCritic, ExportCritic, StartCritic
        produces      CriticReady first, then Learned or Done for each; CriticFailed before it ends with an error
        waits for     the learner, without a limit of its own: the supervisor ends this process when the learner ends
        unblocked by  the channel, `should_stop`

    Rank 0 has the channel and shares what comes with the other ranks.
    """
    _send(channel, CriticReady(index=index, parameters=critic.parameters), should_stop)
    while True:
        message = _shared(_next(channel, should_stop), world)
        try:
            match message:
                case Learn():
                    answer: Learned | Done = critic.learn(message)
                case SaveCritic():
                    critic.save(Path(message.directory))
                    answer = Done()
                case LoadCritic():
                    critic.load(Path(message.directory))
                    answer = Done()
                case ExportCritic():
                    critic.export(Path(message.directory))
                    answer = Done()
                case StartCritic():
                    critic.start(message.directory)
                    answer = Done()
                case _:
                    return
        except Exception as error:
            _send(channel, CriticFailed(reason=f"{type(error).__name__}: {error}"), should_stop)
            raise
        _send(channel, answer, should_stop)


def _send(channel: Channel | None, message: Message, should_stop: Callable[[], bool]) -> None:
    while channel is not None and not channel.send(message) and not should_stop():
        log.debug("the learner has not come yet, or is gone")


def _next(channel: Channel | None, should_stop: Callable[[], bool]) -> Any:
    while channel is not None and not should_stop():
        try:
            message = channel.receive(0.5)
        except MessageError as error:
            log.warning("dropped: a message %s", error)
            continue
        if message is not None:
            return message
    if channel is not None:
        channel.send(CriticFailed(reason="it was told to end, and not by the learner"))
    return Stop(reason="")


_LEARN_ARRAYS = ("input_ids", "sequence_lengths", "response_lengths", "rewards", "shard", "group_index")
_WITH_DIRECTORY = {kind.__name__: kind for kind in (SaveCritic, LoadCritic, ExportCritic, StartCritic)}


def _shared(message: Any, world: World) -> Any:
    """Rank 0's message on every rank."""
    if world.size == 1:
        return message
    arrays: dict[str, Any] | None = None
    if world.rank == 0:
        kind = type(message).__name__
        text = getattr(message, "directory", "")
        arrays = {"kind": np.array(kind), "text": np.array(text)}
        if isinstance(message, Learn):
            arrays |= {"step": np.array(message.step)} | {name: getattr(message, name) for name in _LEARN_ARRAYS}
    shared = world.share(arrays)
    kind = str(shared["kind"])
    if kind == "Learn":
        given: dict[str, Any] = {name: shared[name] for name in _LEARN_ARRAYS}
        return Learn(step=int(shared["step"]), **given)
    if kind in _WITH_DIRECTORY:
        return _WITH_DIRECTORY[kind](directory=str(shared["text"]))
    return Stop(reason="")
