"""The real trainer (DeepSpeed, processes, ZeroMQ) against the plain twin (plain PyTorch, threads, memory)."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from asyncppo.config import Config, load
from asyncppo.transport.zmq import ZmqLink
from tests.real.run_tools import ROOT, Programs
from trainer.tiny_base.base import make_base

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

STEPS = 4


def plain_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_run", ROOT / "scripts/plain_run.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configure(programs: Programs, *more: str) -> Config:
    overrides = [
        value for flag, value in zip(programs.arguments, programs.arguments[1:], strict=False) if flag == "--set"
    ]
    return load(programs.arguments[1], [*overrides, *more])


def test_real_trainer_at_staleness_0_makes_the_plain_twins_parameters(tmp_path: Path, free_port: int) -> None:
    base = tmp_path / "base"
    make_base(base, quick=True)
    settings = {
        "run.steps": STEPS,
        "stream.max_staleness": 0,
        "sampling.max_response_tokens": 12,
        "actor.learning_rate": 1e-3,
    }
    settings |= {"algorithm.utd": 2, "critic.minibatches": 2, "actor.minibatches": 2, "eval.sets": "{}"}
    settings |= {"reward.function": "tests.real.rewards:digits"}  # a quick base never boxes an answer
    plain = plain_module()

    twin = Programs(base, tmp_path / "plain", 1, **settings)
    assert plain.plain_run(configure(twin, *plain.TWINS)) == STEPS

    real = Programs(base, tmp_path / "real", free_port, **settings)
    address = f"tcp://127.0.0.1:{free_port}"
    server: threading.Thread | None = None
    try:
        trainer = real.trainer()
        server = plain.rollout(configure(real), lambda: ZmqLink(address, b"scripted"))
        assert real.ended(trainer, 120) == 0, real.log("trainer")
        server.join(timeout=30)
        assert not server.is_alive()
    finally:
        real.end()

    ours, theirs = (load_file(run / "actor/model.safetensors") for run in (real.run, twin.run))
    start = load_file(base / "actor/model.safetensors")
    assert ours.keys() == theirs.keys() == start.keys()
    moved = max(float((ours[name] - start[name]).abs().max()) for name in ours)
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert moved > 5e-3, "nothing was learned"
    assert apart < 1e-4, "beyond what Adam makes of rounding (4e-6 was seen)"
    for left, right in zip(real.steps(), twin.steps(), strict=True):
        assert left["staleness/max"] == right["staleness/max"] == 0
        for name in (
            "reward/mean",
            "response/tokens",
            "mask/policy",
            "value/std_mean",
            "policy/loss",
            "policy/grad_norm",
        ):
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), (left["step"], name)
