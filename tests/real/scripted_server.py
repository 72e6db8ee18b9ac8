"""A rollout server as a process of its own, with the plain twin's engine: real transport, loop and grading, no SGLang.

python -m tests.real.scripted_server NAME --config … --set …
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
import sys
import uuid

import torch

from asyncppo.config import Config, load
from asyncppo.transport.zmq import ZmqLink
from rollout_server.engine import ScriptedEngine
from rollout_server.loop import RolloutServer
from rollout_server.reward import Grader
from tests.real.run_tools import ROOT


async def serve(config: Config, name: str) -> None:
    """Until the trainer says Stop."""
    spec = importlib.util.spec_from_file_location("plain_run", ROOT / "scripts/plain_run.py")
    assert spec
    assert spec.loader
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    sampler = plain.SeededSampler(config)
    incarnation = uuid.uuid4().hex
    engine = ScriptedEngine(sampler, sampler.decode, on_load=sampler.load, scores=sampler.score)
    link = ZmqLink(config.stream.address, f"{name}/{incarnation}".encode(), config.stream.max_message_mb << 20)
    grader = Grader(config.reward)
    await grader.self_test()
    await RolloutServer(config, link, engine, grader, name, config.actor.path, incarnation).run()


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s")
    _, server, *arguments = sys.argv
    changes = [value for flag, value in itertools.pairwise(arguments) if flag == "--set"]
    asyncio.run(serve(load(arguments[1], changes), server))
