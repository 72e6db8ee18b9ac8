"""Fixtures that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asyncppo import ports

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped, with the reason, where there is no GPU."""
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if "gpu" in item.keywords:
                    item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def rollout_python() -> str:
    """The interpreter of the rollout environment, where SGLang is."""
    found = os.environ.get("ASYNCPPO_ROLLOUT_PYTHON", str(ROOT / ".venvs/rollout/bin/python"))
    if not Path(found).exists():
        pytest.skip(f"no rollout environment at {found}: run scripts/setup.sh, or set ASYNCPPO_ROLLOUT_PYTHON")
    return found


@pytest.fixture(scope="session")
def quick_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base models after a few dozen steps: the files are real, the models know nothing."""
    from trainer.tiny_base.base import make_base

    directory = tmp_path_factory.mktemp("base") / "tiny"
    make_base(directory, quick=True)
    return directory


@pytest.fixture
def free_port() -> int:
    """A loopback port that nobody listens on."""
    return ports.free_port()
