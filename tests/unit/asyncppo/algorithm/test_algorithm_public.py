"""The package's list of public names, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import asyncppo.algorithm as algorithm

pytestmark = pytest.mark.unit


def test_all_lists_every_public_name_in_order_and_each_has_a_docstring() -> None:
    modules = {"advantages", "annotations", "ensemble", "losses", "masks", "objective", "ratios", "sharding"}
    public = {name for name in vars(algorithm) if not name.startswith("_")} - modules
    assert list(algorithm.__all__) == sorted(public)
    assert all(getattr(algorithm, name).__doc__ for name in public)


def test_importing_asyncppo_does_not_load_torch() -> None:
    code = "import sys, asyncppo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=True)
