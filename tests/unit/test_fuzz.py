"""The short version of scripts/fuzz.py; the long one is a command (docs/measurements.md)."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.unit

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    logging.disable(logging.CRITICAL)  # a line for every damaged message
    yield module
    logging.disable(logging.NOTSET)
    del sys.modules["fuzz"]


def test_nothing_that_comes_ends_the_intake_or_enters_the_buffer_unsound(fuzz: ModuleType) -> None:
    intake = fuzz.fuzz_intake(seed=1, messages=4000)
    assert intake.found == []
    assert intake.counts["consumed"] > 100  # sound groups came through all the while
    assert intake.counts["decode"] > 500  # not everything was refused as bytes


def test_nothing_that_comes_over_sockets_keeps_a_proper_server_out(fuzz: ModuleType) -> None:
    found, counts = fuzz.fuzz_sockets(seed=1, messages=500)
    assert found == []
    assert counts["malformed"] > 100


def test_nothing_that_comes_ends_a_rollout_server_but_a_stop_or_a_refusal(fuzz: ModuleType) -> None:
    rollout = fuzz.fuzz_rollout(seed=1, messages=4000)
    assert rollout.found == []
    assert rollout.counts["groups"] > 20
