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
from trainer.model import states
from trainer.model.engine import StepReport, begin_adam, schedule, set_schedule
from trainer.model.world import World

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
        steps = max((int(state["step"]) for state in self._adam.state.values() if state), default=0)
        progress = states.Progress(steps, self._schedule.last_epoch)
        fragments = self._fragments(steps > 0)
        states.write(
            directory,
            fragments,
            self._shapes(),
            progress,
            self._world.device,
            rank=self._world.rank,
            ranks=self._world.size,
        )

    def load(self, directory: Path) -> None:
        saved = states.SavedState(directory, self._shapes())
        for masters in self._masters():
            begin_adam(self._adam, masters, saved.progress.optimizer_steps)
        if self._zero3:
            self._zero.checkpoint_event_prologue()  # lets go of the whole weights that it holds
        for fragment in self._fragments(moments=True):
            saved.read_into(fragment)
        if self._zero3:  # from the masters to the weights that are trained with
            for group in range(len(self._masters())):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            self._zero.checkpoint_event_epilogue()
        else:
            self._zero.update_lp_params()
        set_schedule(self._schedule, saved.progress.schedule_steps)
        saved.restore_random_state(self._world.device, self._world.rank, self._world.size)

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    @property
    def _adam(self) -> torch.optim.Optimizer:
        adam: torch.optim.Optimizer = self._zero.optimizer
        return adam

    def _masters(self) -> list[torch.Tensor]:
        """This rank's float32 weights, flat: one tensor for each group."""
        name = "fp32_partitioned_groups_flat" if self._zero3 else "single_partition_of_fp32_groups"
        masters: list[torch.Tensor] = getattr(self._zero, name)
        return masters

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self._engine.module.named_parameters()
            if parameter.requires_grad
        }

    def _fragments(self, moments: bool) -> Iterator[states.Fragment]:
        """What this rank owns of every parameter: views of its masters and, if they are there, moments."""
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            group, offset, start, count = self._owned(parameter)
            if count:
                masters = self._masters()[group]
                yield states.Fragment(states.WEIGHT, name, start, masters.detach().narrow(0, offset, count))
                for kind in states.MOMENTS if moments else ():
                    yield states.Fragment(kind, name, start, self._adam.state[masters][kind].narrow(0, offset, count))

    def _owned(self, parameter: Any) -> tuple[int, int, int, int]:
        """Group of masters, first element in it, first element of the flattened parameter, and how many."""
        if self._zero3:  # equal parts, the last padded
            group, offset, count = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = count * self._world.rank
            return group, offset, start, max(0, min(count, parameter.ds_numel - start))
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, 0, 0, 0
        there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
        return mapping.param_group_index, there.start, here.start, there.numel


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
