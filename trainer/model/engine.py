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
from trainer.model import states


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
        """Write weights, optimiser, schedule and random state (`trainer/model/states.py`). All ranks have to call it,
        and none waits for another, so that one that fails leaves the others unharmed.

        Raises:
            CheckpointError: this rank could not write.
        """

    def load(self, directory: Path) -> None:
        """Go on from `save`, by any engine on any number of ranks. All ranks have to call it.

        Raises:
            CheckpointError: nothing there, or not of this network.
        """


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
        self._device = device
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
        steps = max((int(state["step"]) for state in self._optimizer.state.values()), default=0)
        progress = states.Progress(steps, self._schedule.last_epoch)
        states.write(directory, self._fragments(steps > 0), self._shapes(), progress, self._device)

    def load(self, directory: Path) -> None:
        saved = states.SavedState(directory, self._shapes())
        for parameter in self._parameters:
            begin_adam(self._optimizer, parameter, saved.progress.optimizer_steps)
        for fragment in self._fragments(moments=True):
            saved.read_into(fragment)
        set_schedule(self._schedule, saved.progress.schedule_steps)
        saved.restore_random_state(self._device, 0, 1)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.network.named_parameters() if p.requires_grad}

    def _fragments(self, moments: bool) -> Iterator[states.Fragment]:
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                yield states.Fragment(states.WEIGHT, name, 0, parameter.detach().view(-1))
                for kind in states.MOMENTS if moments else ():
                    yield states.Fragment(kind, name, 0, self._optimizer.state[parameter][kind].view(-1))


def begin_adam(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, steps: int) -> None:
    """Give AdamW (PyTorch's, or DeepSpeed's on the CPU) its state of a tensor; its moments are to be filled in."""
    state = optimizer.state[tensor]
    for kind in states.MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    state["step"] = torch.tensor(float(steps)) if isinstance(optimizer, torch.optim.AdamW) else steps


def set_schedule(schedule: torch.optim.lr_scheduler.LambdaLR, steps: int) -> None:
    """Put a schedule where it is after so many steps. Its peak and its course are those of the config as it is now."""
    rates = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    place = {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | place)
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
