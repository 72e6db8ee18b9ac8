"""One critic: learns from its shard, then values all responses (AsyPPO, Algorithm 1). Runs in a world of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asyncppo import algorithm
from asyncppo.config import Config
from asyncppo.errors import MessageError
from asyncppo.messages import CriticFailed, CriticReady, Done, Learn, Learned, LoadCritic, Message, SaveCritic, Stop
from asyncppo.transport.base import Channel
from trainer.model.build import build_engine
from trainer.model.networks import ValueNet
from trainer.model.packing import Indices, gather, minibatches, plan
from trainer.model.world import World

log = logging.getLogger("asyncppo.critic")


class Critic:
    """A value network under its engine. Every rank of the critic has to make the same calls."""

    def __init__(self, config: Config, index: int, world: World) -> None:
        self._config = config
        self._index = index
        self._world = world
        self.network = ValueNet(config.critic_path, config.critic, seed=config.run.seed + 1000 * (index + 1))
        self._engine = build_engine(self.network, config.critic, config.critic_steps, world)

    @property
    def parameters(self) -> int:
        """How many weights the network has."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.network.parameters())

    def learn(self, batch: Learn) -> Learned:
        """`critic_epochs` passes over the shard, minimising (V_m(s_t) − R_t)² / 2, then the values of all responses."""
        started = time.monotonic()
        own = np.flatnonzero(batch.shard)
        metrics: dict[str, float] = {}
        for epoch in range(self._config.critic_epochs):
            rng = np.random.default_rng([self._config.run.seed, self._index, batch.step, epoch])
            for part in minibatches(len(own), self._config.critic.minibatches, rng):
                metrics = self._update(batch, own[part])
        values = self.values(batch)
        lengths = torch.from_numpy(batch.response_lengths.astype(np.int64))
        learned_from = torch.from_numpy(batch.shard.astype(bool)).repeat_interleave(lengths)
        returns = torch.from_numpy(np.array(batch.returns))
        for name, tokens in (("explained_variance", learned_from), ("explained_variance_other", ~learned_from)):
            metrics[name] = (
                algorithm.explained_variance(values[tokens], returns[tokens]) if tokens.any() else float("nan")
            )
        return Learned(
            step=batch.step,
            values=values.numpy(),
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

    def _update(self, batch: Learn, which: Indices) -> dict[str, float]:
        returns = torch.from_numpy(np.array(batch.returns))
        tokens = int(batch.response_lengths[which].sum())
        loss_sum = torch.zeros(())
        for micro in self._plan(batch, which):
            packed = self._gather(batch, micro)
            values = self._engine(packed)
            weights = torch.full_like(values, 1.0 / tokens)  # the mean over the minibatch's tokens, on all ranks
            loss, _ = algorithm.value_loss(values, returns[packed.tokens].to(values.device), weights)
            self._engine.backward(loss * self._world.size)  # the engine averages over ranks; the loss is a sum
            loss_sum += loss.detach().cpu()
        report = self._engine.step()
        loss_sum = self._world.sum(loss_sum.to(self._world.device))
        return {"loss": float(loss_sum), "grad_norm": report.grad_norm}

    def _plan(self, batch: Learn, which: Indices) -> list[list[Indices]]:
        budget = self._config.critic.micro_batch_tokens
        return plan(batch.sequence_lengths, which, budget=budget, ranks=self._world.size)

    def _gather(self, batch: Learn, micro: list[Indices]) -> Any:
        mine = micro[self._world.rank]
        return gather(batch.input_ids, batch.sequence_lengths, batch.response_lengths, mine, self._world.device)

    def save(self, directory: Path) -> None:
        """Write what a resume needs."""
        self._engine.save(directory)

    def load(self, directory: Path) -> None:
        """Go on from `save`."""
        self._engine.load(directory)


def serve(
    critic: Critic, channel: Channel | None, index: int, world: World, should_stop: Callable[[], bool] = lambda: False
) -> None:
    """Answer the learner until it says Stop, or this process is told to.

        consumes      Learn, SaveCritic, LoadCritic
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


_LEARN_ARRAYS = ("input_ids", "sequence_lengths", "response_lengths", "returns", "shard", "group_index")


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
    match str(shared["kind"]):
        case "Learn":
            return Learn(step=int(shared["step"]), **{name: shared[name] for name in _LEARN_ARRAYS})
        case "SaveCritic":
            return SaveCritic(directory=str(shared["text"]))
        case "LoadCritic":
            return LoadCritic(directory=str(shared["text"]))
        case _:
            return Stop(reason="")
