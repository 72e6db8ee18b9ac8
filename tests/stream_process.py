"""A trainer's stream, or a rollout server with a scripted engine, as a process of its own, for tests that stop them.

python tests/stream_process.py trainer|NAME tcp://127.0.0.1:PORT DIRECTORY
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from asyncppo import fingerprints
from asyncppo.config import Config, from_tree
from asyncppo.messages import WeightsReady
from asyncppo.metrics import Journal
from asyncppo.rewards import Grade
from asyncppo.transport.zmq import ZmqHub, ZmqLink
from asyncppo.weights import write_manifest
from rollout_server.engine import ScriptedEngine
from rollout_server.loop import RolloutServer
from rollout_server.reward import Grader
from trainer.stream.intake import Identity, Intake
from trainer.stream.prompts import Prompt, Prompts

HEARTBEAT_S = 0.1
"""So that a silence of a second is a death."""


class RightAway(Grader):
    """Everything is right, without processes."""

    def __init__(self) -> None:
        pass

    async def grade(self, texts: Sequence[str], answer: str) -> list[Grade]:
        return [Grade(1.0, error=False) for _ in texts]

    def close(self) -> None:
        pass


def a_config(directory: Path) -> Config:
    """Small batches for as long as the test lasts."""
    return from_tree(
        {
            "run": {"name": "run", "directory": str(directory), "steps": 100_000},
            "data": {"train": "x"},
            "actor": {"path": str(directory)},
            "sampling": {"group_size": 2, "max_response_tokens": 8},
            "stream": {"prompts_per_batch": 2, "max_staleness": 2, "heartbeat_s": HEARTBEAT_S},
            "rollout": {"max_groups": 2},
        }
    )


def trainer(address: str, directory: Path) -> None:
    """Takes batch after batch; each is an event."""
    config = a_config(directory)
    journal = Journal(config.run_directory)
    prompts = Prompts([Prompt(f"p{n}", np.array([n], np.int32), str(n)) for n in range(50)], 0, True)
    tokenizer = fingerprints.tokenizer_fingerprint(str(directory))
    identity = Identity(config.agreement_hash(), fingerprints.model_fingerprint(str(directory)), tokenizer)
    intake = Intake(config, ZmqHub(address), prompts, identity, journal)
    intake.start()
    for version in range(config.run.steps):
        published = directory / f"v{version}"
        published.mkdir()
        (published / "model.safetensors").write_text(str(version))
        manifest = write_manifest(published, version)
        intake.announce(WeightsReady(policy_version=version, directory=str(published), manifest=manifest))
        assert intake.take(version, lambda: False) is not None
        journal.event("batch", version=version)
        time.sleep(0.05)


async def server(name: str, address: str, directory: Path) -> None:
    """Answers in a few hundredths of a second."""
    engine = ScriptedEngine(lambda prompt, index, version: [(1, -0.5)] * 4, lambda ids: "x", 0.01)
    link = ZmqLink(address, f"{name}/1".encode())
    await RolloutServer(a_config(directory), link, engine, RightAway(), name, str(directory), "1").run()


if __name__ == "__main__":
    role, where, place = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format=f"{role}: %(message)s")
    if role == "trainer":
        trainer(where, Path(place))
    else:
        asyncio.run(server(role, where, Path(place)))
