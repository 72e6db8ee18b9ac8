"""The actor: log-probs of a batch, and its update; the same numbers on any number of ranks and micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asyncppo import algorithm
from asyncppo.config import AlgorithmConfig, Config
from asyncppo.messages import Int32
from trainer.model.build import build_engine
from trainer.model.engine import StepReport
from trainer.model.export import whole_weights
from trainer.model.networks import PolicyNet
from trainer.model.packing import Indices, Packed, gather, minibatches, plan
from trainer.model.world import World
from trainer.stream.batch import Batch
from trainer.targets import Targets


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probs and entropies of a batch's T response tokens, from before its update; None where nobody wants them."""

    logprobs: torch.Tensor | None  # [T] float32: proximal, the anchor of the decoupled ratio
    entropy: torch.Tensor | None  # [T] float32, nats
    reference: torch.Tensor | None  # [T] float32: log-probs under the reference policy (`algorithm.kl_coef`)


def objective(settings: AlgorithmConfig) -> algorithm.Objective:
    """The policy loss that the section `algorithm` asks for. Where the proximal is the behaviour policy w is 1."""
    return algorithm.Objective(**{field.name: getattr(settings, field.name) for field in fields(algorithm.Objective)})


class Policy:
    """The actor under its engine. Every rank of the learner has to make the same calls."""

    def __init__(self, config: Config, world: World) -> None:
        self._config = config
        self._world = world
        self.network = PolicyNet(config.actor.path, config.actor)
        self._engine = build_engine(self.network, config.actor, config.actor_steps, world)
        self._objective = objective(config.algorithm)
        self._reference = (
            self._frozen(config.algorithm.reference or config.actor.path) if config.algorithm.kl_coef else None
        )

    def _frozen(self, path: str) -> PolicyNet:
        """The reference policy: whole on every rank, and never trained."""
        return PolicyNet(path, self._config.actor).to(self._world.device).requires_grad_(False)

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """What the batch's response tokens are under the weights as they are now, before its update; on every rank."""
        settings = self._config.algorithm
        logprobs = entropy = reference = None
        if settings.proximal == "recompute":
            logprobs, entropy = self._forward(self._engine, batch)
        if self._reference is not None:
            reference, _ = self._forward(self._reference, batch)
        return Scores(logprobs, entropy, reference)

    def _forward(self, network: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        result = torch.zeros(2, len(batch.response_ids))
        for packed in self._passes(batch, np.arange(len(batch.sequence_lengths))):
            logprobs, entropy = network(packed, self._config.sampling.temperature)
            result[:, packed.tokens] = torch.stack((logprobs, entropy)).cpu()
        logprobs, entropy = self._world.sum(result.to(self._world.device)).cpu()
        return logprobs, entropy

    def update(self, batch: Batch, scores: Scores, targets: Targets, use: int) -> dict[str, float]:
        """One optimiser pass over the batch: `actor.minibatches` steps.

        Args:
            batch: N responses with T tokens.
            scores: of this batch, from before its first pass.
            targets: advantages and masks.
            use: which pass this is, from 0; with the seed and the version it orders the minibatches.

        Returns:
            Sums over all tokens, as `algorithm.policy_loss` names them; of its two losses, which are means already, the
            mean over the minibatches; with `grad_norm` and `learning_rate` of the last step, and how many steps were
            `skipped` because their gradient was not finite.
        """
        rng = np.random.default_rng([self._config.run.seed, batch.version, use])
        parts = minibatches(len(batch.sequence_lengths), self._config.actor.minibatches, rng)
        sums: Counter[str] = Counter()
        report = StepReport(0.0, 0.0)
        for which in parts:
            sums.update(self._accumulate(batch, which, scores, targets))
            report = self._engine.step()
            sums["skipped"] += report.skipped
        losses = {name: sums[name] / len(parts) for name in ("policy_loss", "entropy_bonus")}
        return {**sums, **losses, "grad_norm": report.grad_norm, "learning_rate": report.learning_rate}

    def _accumulate(self, batch: Batch, which: Indices, scores: Scores, targets: Targets) -> dict[str, float]:
        """Add the gradient of one minibatch; its loss has the denominators of the whole minibatch on all ranks."""
        device = self._world.device
        lengths = torch.from_numpy(batch.response_lengths).long()
        weights = self._token_weights(lengths, which)
        behaviour = torch.from_numpy(batch.behaviour_logprobs)
        age = torch.from_numpy(batch.version - batch.token_versions).long()
        sums: dict[str, torch.Tensor] = {}
        for packed, mine in self._micro_batches(batch, which):
            here = packed.tokens
            logprobs, entropy = self._engine(packed, self._config.sampling.temperature)
            drawn = behaviour[here].to(device)
            if scores.logprobs is not None:
                proximal = scores.logprobs[here].to(device)
            elif self._config.algorithm.proximal == "interpolate":
                proximal = algorithm.interpolated_proximal(drawn, logprobs, age[here].to(device))
            else:
                proximal = drawn
            loss, metrics = algorithm.policy_loss(
                logprobs,
                proximal,
                drawn,
                targets.advantages[here].to(device),
                entropy,
                targets.keep_policy[here].to(device),
                targets.keep_entropy[here].to(device),
                weights[here].to(device),
                lengths=lengths[torch.from_numpy(mine)].to(device),
                objective=self._objective,
                reference_logprobs=None if scores.reference is None else scores.reference[here].to(device),
            )
            self._engine.backward(loss * self._world.size)  # the engine averages over ranks; the loss is a sum
            sums = {name: sums.get(name, 0) + value for name, value in metrics.items()}
        names = sorted(sums)
        total = self._world.sum(torch.stack([sums[name].cpu() for name in names]).to(device))
        return dict(zip(names, total.tolist(), strict=True))

    def _token_weights(self, lengths: torch.Tensor, which: Indices) -> torch.Tensor:
        """[T]: what each token counts for in the loss of a minibatch; 0 for those of other minibatches."""
        inside = torch.zeros(len(lengths), dtype=torch.bool)
        inside[torch.from_numpy(which)] = True
        constant = float(len(which) * self._config.sampling.max_response_tokens)
        weights = torch.zeros(int(lengths.sum()))
        weights[inside.repeat_interleave(lengths)] = algorithm.token_weights(
            lengths[inside], self._config.algorithm.loss_aggregation, constant=constant
        )
        return weights

    def _passes(self, batch: Batch, which: Indices) -> Iterator[Packed]:
        return (packed for packed, _ in self._micro_batches(batch, which))

    def _micro_batches(self, batch: Batch, which: Indices) -> Iterator[tuple[Packed, Indices]]:
        """This rank's forward passes, each with the responses it holds."""
        rounds = plan(
            batch.sequence_lengths, which, budget=self._config.actor.micro_batch_tokens, ranks=self._world.size
        )
        for micro in rounds:
            mine = micro[self._world.rank]
            packed = gather(batch.input_ids, batch.sequence_lengths, batch.response_lengths, mine, self._world.device)
            yield packed, mine

    @torch.no_grad()
    def probe(self, ids: Int32) -> torch.Tensor:
        """Log-probs of ids[1:], each under all before it, by the weights as they are and at temperature 1.

        Args:
            ids: [P] tokens of the model's vocabulary.

        Returns:
            [max(0, P - 1)] float32 on the CPU, on every rank.
        """
        if len(ids) < 2:
            return torch.zeros(0)
        lengths = np.array([len(ids)], dtype=np.int32)
        packed = gather(ids, lengths, lengths - 1, [0], self._world.device)
        logprobs: torch.Tensor = self._engine(packed, 1.0)[0]
        return logprobs.float().cpu()

    def weights(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """All weights by their Hugging Face names, on the CPU; rank 0 gets them, the others an empty dict.

        Args:
            dtype: rounded to it; without it they are as they are trained.
        """
        return whole_weights(self._engine, self._world, dtype)

    def save(self, directory: Path) -> None:
        """Write what a resume needs."""
        self._engine.save(directory)

    def load(self, directory: Path) -> None:
        """Go on from `save`."""
        self._engine.load(directory)
