"""Which engine trains a network: the one place that looks at `engine` in the config."""

from __future__ import annotations

from torch import nn

from asyncppo.config import ModelConfig
from trainer.model.engine import PlainEngine, TrainableEngine
from trainer.model.world import World


def build_engine(network: nn.Module, model: ModelConfig, total_steps: int, world: World) -> TrainableEngine:
    """The engine that the config names. DeepSpeed is imported only where it is used."""
    if model.engine == "plain":
        return PlainEngine(network, model, total_steps, world.device)
    from trainer.model.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(network, model, total_steps, world)
