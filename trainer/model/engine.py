"""The seam of training: what an engine does with a network, and the plain PyTorch twin that DeepSpeed is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from asyncppo.config import ModelConfig
from asyncppo.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimiser step did."""

    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    skipped: bool = False
    """The gradient was not finite: it is forgotten, and neither weights, optimiser nor schedule have moved."""


class TrainableEngine(Protocol):
    """A network under an optimiser. The caller owns accumulation: any number of `backward`, then one `step`."""

    def __call__(self, *args: Any) -> Any:
        """The network's forward pass."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradient. Gradients are averaged over ranks at the step."""

    def step(self) -> StepReport:
        """Clip, step, forget the gradients, move the schedule; all or, if it is not finite, nothing."""

    def parameters_in_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter whole, by its name in the network. All ranks have to iterate to the end."""

    def save(self, directory: Path) -> None:
        """Write weights, optimiser and schedule. All ranks have to call it."""

    def load(self, directory: Path) -> None:
        """Go on from `save`. All ranks have to call it."""


def schedule(model: ModelConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate's factor after n optimiser steps: linear warm-up, then constant, linear or cosine to 0."""

    def factor(done: int) -> float:
        if done < model.warmup_steps:
            return (done + 1) / model.warmup_steps
        progress = (done - model.warmup_steps) / max(1, total_steps - model.warmup_steps)
        progress = min(1.0, max(0.0, progress))
        match model.schedule:
            case "linear":
                return 1.0 - progress
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * progress))
            case _:
                return 1.0

    return factor


class PlainEngine:
    """The plain twin: one process, PyTorch's AdamW, float32 or bfloat16 as the network is."""

    def __init__(self, network: nn.Module, model: ModelConfig, total_steps: int, device: torch.device) -> None:
        self.network = network.to(device).train()
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._max_norm = model.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=model.learning_rate, betas=model.betas, weight_decay=model.weight_decay
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, schedule(model, total_steps))

    def __call__(self, *args: Any) -> Any:
        return self.network(*args)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> StepReport:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        rate = float(self._optimizer.param_groups[0]["lr"])
        if not torch.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            return StepReport(float(norm), rate, skipped=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        return StepReport(float(norm), rate)

    def parameters_in_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.network.named_parameters():
            yield name, parameter.detach()

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        state = {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }
        torch.save(state, directory / "plain.pt")

    def load(self, directory: Path) -> None:
        path = directory / "plain.pt"
        if not path.is_file():
            raise CheckpointError(f"{directory}: expected plain.pt in it")
        state = torch.load(path, weights_only=True)
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
