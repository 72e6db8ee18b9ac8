"""A critic that has lost its supervisor waits for a learner that still has a step to finish and to save."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import trainer.__main__ as program
import trainer.roles as roles
from asyncppo.config import load

pytestmark = pytest.mark.unit

CONFIG = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("stall_s", [1800.0, 5.0])
def test_a_critic_leaves_no_sooner_than_a_step_may_take(monkeypatch: pytest.MonkeyPatch, stall_s: float) -> None:
    limits: list[float] = []

    def orphaned(_: int, for_s: float) -> Callable[[], bool]:
        limits.append(for_s)
        return lambda: False

    monkeypatch.setattr(program, "orphaned", orphaned)
    monkeypatch.setattr(program, "stop_flag", lambda: lambda: False)
    monkeypatch.setattr(program, "set_up_logging", lambda _: None)
    monkeypatch.setattr(roles, "critic", lambda *_: True)
    monkeypatch.setenv("ASYNCPPO_SUPERVISED", str(os.getppid()))
    config = load(CONFIG / "demo.yaml", [f"guard.stall_s={stall_s}"])
    assert program._run(config, Path("c.yaml"), [], "auto", "critic", 0, ["ipc:///none"]) == 0
    assert limits == [stall_s]
