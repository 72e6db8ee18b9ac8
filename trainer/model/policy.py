"""The actor: log-probs of a batch, and its update; the same numbers on any number of ranks and micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from asyncppo import algorithm
from asyncppo.config import Config
from trainer.model.build import build_engine
from trainer.model.engine import StepReport
from trainer.model.networks import PolicyNet
from trainer.model.packing import Indices, Packed, gather, minibatches, plan
from trainer.model.world import World
from trainer.stream.batch import Batch
from trainer.targets import Targets


class Policy:
    """The actor under its engine. Every rank of the learner has to make the same calls."""

    def __init__(self, config: Config, world: World) -> None:
        self._config = config
        self._world = world
        self.network = PolicyNet(config.actor.path, config.actor)
        self._engine = build_engine(self.network, config.actor, config.actor_steps, world)

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probs of the batch's response tokens under the current weights: [T] float32 on the CPU, on every rank."""
        result = torch.zeros(len(batch.response_ids))
        for packed in self._passes(batch, np.arange(len(batch.sequence_lengths))):
            logprobs, _ = self._engine(packed, self._config.sampling.temperature)
            result[packed.tokens] = logprobs.cpu()
        return self._world.sum(result.to(self._world.device)).cpu()

    def update(self, batch: Batch, proximal: torch.Tensor, targets: Targets, use: int) -> dict[str, float]:
        """One optimiser pass over the batch: `actor.minibatches` steps.

        Args:
            batch: N responses with T tokens.
            proximal: [T] log-probs when this batch's update began.
            targets: advantages and masks.
            use: which pass this is, from 0; with the seed and the version it orders the minibatches.

        Returns:
            Sums over all tokens, as `algorithm.policy_loss` names them; of its two losses, which are means already, the
            mean over the minibatches; with `grad_norm` and `learning_rate` of the last step.
        """
        rng = np.random.default_rng([self._config.run.seed, batch.version, use])
        parts = minibatches(len(batch.sequence_lengths), self._config.actor.minibatches, rng)
        sums: Counter[str] = Counter()
        report = StepReport(0.0, 0.0)
        for which in parts:
            sums.update(self._accumulate(batch, which, proximal, targets))
            report = self._engine.step()
        losses = {name: sums[name] / len(parts) for name in ("policy_loss", "entropy_bonus")}
        return {**sums, **losses, "grad_norm": report.grad_norm, "learning_rate": report.learning_rate}

    def _accumulate(self, batch: Batch, which: Indices, proximal: torch.Tensor, targets: Targets) -> dict[str, float]:
        """Add the gradient of one minibatch; its loss has the denominators of the whole minibatch on all ranks."""
        settings = self._config.algorithm
        device = self._world.device
        lengths = torch.from_numpy(batch.response_lengths).long()
        weights = torch.zeros(len(lengths)).repeat_interleave(lengths)
        inside = torch.zeros(len(lengths), dtype=torch.bool)
        inside[torch.from_numpy(which)] = True
        weights[inside.repeat_interleave(lengths)] = algorithm.token_weights(lengths[inside], settings.loss_aggregation)
        behaviour = torch.from_numpy(batch.behaviour_logprobs)
        sums: dict[str, torch.Tensor] = {}
        for packed in self._passes(batch, which):
            logprobs, entropy = self._engine(packed, self._config.sampling.temperature)
            loss, metrics = algorithm.policy_loss(
                logprobs,
                proximal[packed.tokens].to(device),
                behaviour[packed.tokens].to(device),
                targets.advantages[packed.tokens].to(device),
                entropy,
                targets.keep_policy[packed.tokens].to(device),
                targets.keep_entropy[packed.tokens].to(device),
                weights[packed.tokens].to(device),
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                behaviour_cap=settings.behaviour_cap,
                behaviour_mode=settings.behaviour_mode,
                entropy_coef=settings.entropy_coef,
            )
            self._engine.backward(loss * self._world.size)  # the engine averages over ranks; the loss is a sum
            sums = {name: sums.get(name, 0) + value for name, value in metrics.items()}
        names = sorted(sums)
        total = self._world.sum(torch.stack([sums[name].cpu() for name in names]).to(device))
        return dict(zip(names, total.tolist(), strict=True))

    def _passes(self, batch: Batch, which: Indices) -> Iterator[Packed]:
        rounds = plan(
            batch.sequence_lengths, which, budget=self._config.actor.micro_batch_tokens, ranks=self._world.size
        )
        for micro in rounds:
            mine = micro[self._world.rank]
            yield gather(batch.input_ids, batch.sequence_lengths, batch.response_lengths, mine, self._world.device)

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights by their Hugging Face names, on the CPU; rank 0 gets them, the others an empty dict."""
        whole = {}
        for name, parameter in self._engine.parameters_in_full():
            if self._world.rank == 0:
                whole[name.removeprefix("hf.")] = parameter.to("cpu", copy=True)
        return whole

    def save(self, directory: Path) -> None:
        """Write what a resume needs."""
        self._engine.save(directory)

    def load(self, directory: Path) -> None:
        """Go on from `save`."""
        self._engine.load(directory)
