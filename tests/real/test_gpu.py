"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model_maker import a_batch, a_config
from trainer.model.deepspeed_engine import DeepSpeedEngine
from trainer.model.networks import PolicyNet
from trainer.model.packing import gather
from trainer.model.world import World

pytestmark = [pytest.mark.real, pytest.mark.gpu]


def test_log_probs_on_a_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    config, batch = a_config(tmp_path), a_batch()
    network = PolicyNet(config.actor.path, config.actor)
    which = range(len(batch.sequence_lengths))
    results = []
    for device in ("cpu", "cuda"):
        packed = gather(
            batch.input_ids, batch.sequence_lengths, batch.response_lengths, list(which), torch.device(device)
        )
        with torch.no_grad():
            results.append(network.to(device)(packed, 1.0)[0].cpu())
    assert torch.allclose(*results, atol=1e-4)


def test_deepspeed_takes_bfloat16_steps_on_a_gpu(tmp_path: Path) -> None:
    config, batch = a_config(tmp_path, "actor.engine=deepspeed", "actor.dtype=bfloat16"), a_batch()
    world = World()
    assert world.device.type == "cuda"
    engine = DeepSpeedEngine(PolicyNet(config.actor.path, config.actor), config.actor, 4, world)
    packed = gather(
        batch.input_ids,
        batch.sequence_lengths,
        batch.response_lengths,
        list(range(len(batch.sequence_lengths))),
        world.device,
    )
    before = float(engine(packed, 1.0)[0].sum())
    for _ in range(3):
        engine.backward(-engine(packed, 1.0)[0].mean())
        assert engine.step().grad_norm > 0
    assert float(engine(packed, 1.0)[0].sum()) > before
