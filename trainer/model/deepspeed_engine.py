"""Training under DeepSpeed; the only file that imports it. Its config dict is derived from ours."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from asyncppo.config import ModelConfig
from asyncppo.errors import CheckpointError
from trainer.model.engine import StepReport, schedule
from trainer.model.world import World

_TAG = "state"
_BUCKET = 500_000_000
"""Elements of a communication bucket, DeepSpeed's default; a smaller model has smaller ones."""


class DeepSpeedEngine:
    """`TrainableEngine` on ZeRO 1, 2 or 3.

    Args:
        network: on the CPU, in the dtype of `model.dtype`.
        model: the section of the config.
        total_steps: optimiser steps of the whole run, for the schedule.
        world: this role's ranks; its process group exists already.
    """

    def __init__(self, network: nn.Module, model: ModelConfig, total_steps: int, world: World) -> None:
        on_cpu = get_accelerator().device_name() == "cpu"
        if on_cpu:
            # Else every first use compiles a shared-memory all-reduce that training never calls (30 s, needs ninja).
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if model.offload_optimizer:
            _find_ninja()
        deepspeed.init_distributed(dist_backend=None, verbose=False)
        self._zero3 = model.zero_stage == 3
        self._world = world
        self._engine, _, _, self._schedule = deepspeed.initialize(
            model=network,
            model_parameters=[parameter for parameter in network.parameters() if parameter.requires_grad],
            config=deepspeed_config(model, on_cpu=on_cpu, parameters=sum(p.numel() for p in network.parameters())),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(model, total_steps)),
        )
        self._engine.train()

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> StepReport:
        rate = float(self._engine.get_lr()[0])
        self._engine.step()  # a gradient that is not finite is forgotten, in bfloat16 and float32 alike
        skipped = bool(self._engine.optimizer.overflow)
        norm = math.inf if skipped else float(self._engine.get_global_grad_norm() or 0.0)
        return StepReport(norm, rate, skipped)

    def parameters_in_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None, enabled=self._zero3):
                yield name, parameter.detach()

    def save(self, directory: Path) -> None:
        self._engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False)

    def load(self, directory: Path) -> None:
        if not (directory / _TAG).is_dir():
            raise CheckpointError(f"{directory}: expected DeepSpeed's {_TAG}/ in it")
        path, _ = self._engine.load_checkpoint(str(directory), tag=_TAG)
        if path is None:
            raise CheckpointError(f"{directory}: DeepSpeed could not load it")


def _find_ninja() -> None:
    """Put this environment's programs on the PATH: compiling needs ninja, and nobody activates an environment here."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def deepspeed_config(model: ModelConfig, *, on_cpu: bool, parameters: int) -> dict[str, Any]:
    """DeepSpeed's config for a model: one optimiser step a `step()`, accumulation by the caller."""
    adam = {"lr": model.learning_rate, "betas": list(model.betas), "weight_decay": model.weight_decay}
    # PyTorch's AdamW: DeepSpeed's own is compiled at first use (100 s and a compiler on a CPU, the CUDA toolkit on a
    # GPU). Only the offloaded one has no other form; it finds ninja beside the interpreter (`_find_ninja`).
    adam["torch_adam"] = not model.offload_optimizer
    # DeepSpeed allocates its buckets whole, 2 GB of memory each, however small the model.
    bucket = min(_BUCKET, -(-parameters // 1024) * 1024)  # ZeRO wants them even
    zero: dict[str, Any] = {
        "stage": model.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if model.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not on_cpu}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": model.max_grad_norm,
        "optimizer": {"type": "AdamW", "params": adam},
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
    }
