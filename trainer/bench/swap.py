"""What a hot swap costs: real rollout servers generate while version after version is published to them.

For each model size some rollout servers are started once. For each transport and each load a trainer without training
(`session`) publishes version after version, each as soon as the servers are busy again after the last one. A swap
stops generation for pause + load + resume; it is held to the bound of a copy: 2 × bytes / bandwidth + 50 ms, where the
bandwidth is that of reading the published files from the page cache, or of the loopback. Afterwards every token's
log-prob is compared with a Hugging Face forward of the version that its span names.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from asyncppo.config import Config, dump, from_tree
from asyncppo.errors import EngineError
from asyncppo.lifetime import end
from asyncppo.ports import free_port
from asyncppo.transport.zmq import ZmqHub
from trainer.bench.bandwidth import copy_bandwidth, loopback_bandwidth
from trainer.bench.check import Checker, Gaps, Sample, samples_of
from trainer.bench.models import Versions, make_model
from trainer.bench.session import Session, Timed
from trainer.model.policy import Policy
from trainer.model.world import World
from trainer.stream.prompts import Prompt

log = logging.getLogger("asyncppo.bench")

Transport = Literal["disk", "broadcast"]

REACH_FACTOR, REACH_S = 2.0, 0.05
"""A swap's pause should be at most the one times the bound plus the other."""
_PROMPT = 16
"""Tokens of a prompt."""
_PROMPTS = 1000
_PER_BATCH = 16
"""Requests in flight for each group of a batch."""
_SETTLE_S = 0.2
"""Between two swaps, at least: requests have begun by then."""
_END_S = 10.0
_TAIL = 2000


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    rollout_python: str
    """The interpreter of the rollout environment."""
    directory: Path
    """For models, configs, logs."""
    sizes: Sequence[str] = ("0.1M", "10M", "100M")
    """Keys of `models.SHAPES`, or Hugging Face directories."""
    transports: Sequence[Transport] = ("disk", "broadcast")
    requests: Sequence[int] = (1, 16, 64)
    """In flight at each server."""
    swaps: int = 10
    servers: int = 1
    tokens: int = 256
    """Of a response at most."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the engine's weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    publish_directory: str = "/dev/shm"
    check: int = 64
    """Responses of each row whose log-probs are compared; 0 compares none."""


@dataclass(frozen=True)
class Spread:
    """Of one time over all swaps and servers, seconds."""

    median: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), max(values))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    size: str
    parameters: int
    bytes: int
    transport: Transport
    servers: int
    requests: int
    swaps: int
    publish_s: Spread
    """What the learner waits for."""
    prepare_s: Spread
    wait_s: Spread
    pause_s: Spread
    load_s: Spread
    resume_s: Spread
    still_s: Spread
    """Pause, load and resume together: nothing is generated."""
    probe_s: Spread
    served_s: Spread
    """From publishing until every server serves the version."""
    bandwidth: float
    """Bytes a second: of reading the published files (disk), of the loopback (broadcast)."""
    bound_s: float
    """The version's bytes over that."""
    limit_s: float
    """2 × bound + 50 ms."""
    in_reach: bool
    """Whether the median of `still_s` is within it."""
    probe_gap: float
    """Largest of all swaps, nats."""
    attempts: int
    """The most that a swap took."""
    failed_swaps: int
    responses: int
    tokens: int
    met_a_swap: int
    """Responses with tokens of several versions: they were in flight during a swap, and lost nothing."""
    most_versions: int
    """Of one response."""
    lost_groups: int
    """Leased and dropped or given back: 0 unless something failed. Tokens are lost with them, and only so."""
    engine_restarts: int
    gaps: Gaps
    memory_mb: tuple[float, float]
    """Of all servers with their engines, after the first third of the swaps and at the end (unique set size)."""


class Servers:
    """Rollout servers of one config, as processes; `end` leaves nothing behind."""

    def __init__(self, plan: Plan, config_file: Path, directory: Path) -> None:
        self._directory = directory
        self._running: list[subprocess.Popen[bytes]] = []
        for number in range(plan.servers):
            name = f"server-{number}"
            command = [plan.rollout_python, "-m", "rollout_server", "--config", str(config_file), "--name", name]
            with (directory / f"{name}.log").open("wb") as output:
                process = subprocess.Popen(
                    [*command, "--log-directory", str(directory)],
                    env={"OMP_NUM_THREADS": "1", **os.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            self._running.append(process)

    def check(self) -> None:
        """Raises EngineError if one has ended."""
        for number, process in enumerate(self._running):
            if process.poll() is not None:
                path = self._directory / f"server-{number}.log"
                said = path.read_text(errors="replace")[-_TAIL:]
                raise EngineError(
                    f"server-{number} ended with exit code {process.returncode}; the end of {path}:\n{said}"
                )

    def memory_mb(self) -> float:
        """Unique set size of the servers and all their descendants."""
        total = 0
        for process in self._running:
            with contextlib.suppress(psutil.NoSuchProcess):
                server = psutil.Process(process.pid)
                for each in (server, *server.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        total += each.memory_full_info().uss
        return total / (1 << 20)

    def end(self) -> None:
        """All of them and their engines."""
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self._running):
            time.sleep(0.05)  # they may have been told to stop
        end(self._running, _END_S)


def bench(plan: Plan) -> list[Row]:
    """Measure everything; each row is logged as soon as it is there.

    Raises:
        AsyncPPOError: what failed; all servers are ended then.
    """
    rows = []
    for number, size in enumerate(plan.sizes):
        directory = plan.directory / str(number)
        directory.mkdir(parents=True, exist_ok=True)
        for row in _rows(plan, size, directory):
            log.info("still for %.0f ms, at most %.0f ms wanted", 1e3 * row.still_s.median, 1e3 * row.limit_s)
            rows.append(row)
    return rows


def _rows(plan: Plan, size: str, directory: Path) -> Iterator[Row]:
    """All rows of one model: its servers are started once and see one trainer after the other."""
    model = Path(size)
    if not model.is_dir():
        model = directory / "model"
        make_model(model, size, "float32" if plan.dtype == "float32" else "bfloat16")
    config = config_of(plan, model, directory, plan.transports[0], max(plan.requests))
    config_file = directory / "config.yaml"
    config_file.write_bytes(dump(config))
    world = World()
    policy = Policy(config, world)
    versions = Versions(dict(policy.network.hf.named_parameters()))
    checker = Checker(model, plan.dtype) if plan.check else None
    hub = ZmqHub(config.stream.address, config.stream.max_message_mb << 20)
    servers = Servers(plan, config_file, directory)
    try:
        loads = [(transport, requests) for transport in plan.transports for requests in plan.requests]
        for number, (transport, requests) in enumerate(loads):
            last = number == len(loads) - 1
            of_row = config_of(plan, model, directory, transport, requests, config.stream.address)
            yield _row(plan, size, of_row, world, policy, versions, checker, hub, servers, requests, last=last)
    finally:
        hub.close()
        servers.end()


def config_of(
    plan: Plan, model: Path, directory: Path, transport: Transport, requests: int, address: str = ""
) -> Config:
    """A run whose servers may always have as much in flight as they take."""
    tree: dict[str, Any] = {
        "run": {"name": "bench", "directory": str(directory), "steps": 1_000_000, "save_every": 0},
        "data": {"train": "-", "max_prompt_tokens": _PROMPT},
        "actor": {"path": str(model), "engine": "plain", "dtype": "float32" if plan.dtype == "float32" else "bfloat16"},
        "algorithm": {"critics": 1},
        "sampling": {"group_size": 1, "max_response_tokens": plan.tokens},
        "stream": {
            "address": address or f"tcp://127.0.0.1:{free_port()}",
            # (max_staleness + 1) batches may be in flight or buffered: several times what the servers take
            "prompts_per_batch": plan.servers * -(-requests // _PER_BATCH),
            "max_staleness": 64,
            "ready_batches": 1_000_000,
            "heartbeat_s": 0.5,
            "batch_timeout_s": 600,
        },
        "rollout": {
            "max_groups": max(plan.requests),
            "device": plan.device,
            "dtype": plan.dtype,
            "connect_timeout_s": 60,
            "swap_timeout_s": 120,
        },
        "publish": {"directory": plan.publish_directory, "transport": transport},
    }
    return from_tree(tree)


def _row(
    plan: Plan,
    size: str,
    config: Config,
    world: World,
    policy: Policy,
    versions: Versions,
    checker: Checker | None,
    hub: ZmqHub,
    servers: Servers,
    requests: int,
    *,
    last: bool,
) -> Row:
    """Publish `plan.swaps` versions after the first, under this load."""
    transport = config.publish_transport[0]
    log.info("%s, %s, %d requests in flight", size, transport, requests)
    vocabulary = policy.network.hf.config.vocab_size
    draw, pause = np.random.default_rng(0), random.Random(0)
    prompts = [
        Prompt(f"p{n}", draw.integers(10, min(vocabulary, 300), _PROMPT, dtype=np.int32), "0") for n in range(_PROMPTS)
    ]
    session = Session(config, world, policy, versions, prompts, hub, requests)
    memory: list[float] = []
    try:
        session.publish_and_wait(0, plan.servers, servers.check)
        timed = []
        for version in range(plan.swaps):
            session.take(version, plan.servers, servers.check)
            time.sleep(_SETTLE_S + pause.random() * _SETTLE_S)
            timed.append(session.publish_and_wait(version + 1, plan.servers, servers.check))
            if version in (plan.swaps // 3, plan.swaps - 1):
                memory.append(servers.memory_mb())
        session.take(plan.swaps, plan.servers, servers.check)
        size_bytes, bandwidth = _bound_of(config, policy, transport)
        return _summary(plan, size, transport, requests, policy, session, timed, checker, size_bytes, bandwidth, memory)
    finally:
        session.close("the bench is over" if last else None)


def _bound_of(config: Config, policy: Policy, transport: Transport) -> tuple[int, float]:
    """Bytes of a version, and the bandwidth that bounds its swap."""
    width = 4 if config.rollout.dtype == "float32" else 2
    size = sum(parameter.numel() for parameter in policy.network.hf.parameters()) * width  # tied ones come once
    if transport == "broadcast":
        return size, loopback_bandwidth()
    newest = max(path for path in config.weights_directory.iterdir() if path.name.startswith("v"))
    return size, copy_bandwidth(newest)


def _summary(
    plan: Plan,
    size: str,
    transport: Transport,
    requests: int,
    policy: Policy,
    session: Session,
    timed: Sequence[Timed],
    checker: Checker | None,
    size_bytes: int,
    bandwidth: float,
    memory: Sequence[float],
) -> Row:
    swaps = [swap for version in timed for swap in version.swaps]
    still = Spread.of([swap.pause_s + swap.load_s + swap.resume_s for swap in swaps])
    samples = list(samples_of(session.groups))
    for sample in samples:
        sample.check()
    counts = session.intake.counts()
    bound_s = size_bytes / bandwidth
    limit_s = REACH_FACTOR * bound_s + REACH_S
    return Row(
        size=size,
        parameters=sum(parameter.numel() for parameter in policy.network.hf.parameters()),
        bytes=size_bytes,
        transport=transport,
        servers=plan.servers,
        requests=requests,
        swaps=len(timed),
        publish_s=Spread.of([version.publish_s for version in timed]),
        prepare_s=Spread.of([swap.prepare_s for swap in swaps]),
        wait_s=Spread.of([swap.wait_s for swap in swaps]),
        pause_s=Spread.of([swap.pause_s for swap in swaps]),
        load_s=Spread.of([swap.load_s for swap in swaps]),
        resume_s=Spread.of([swap.resume_s for swap in swaps]),
        still_s=still,
        probe_s=Spread.of([swap.probe_s for swap in swaps]),
        served_s=Spread.of([version.served_s for version in timed]),
        bandwidth=bandwidth,
        bound_s=bound_s,
        limit_s=limit_s,
        in_reach=still.median <= limit_s,
        probe_gap=max((swap.probe_gap for swap in swaps if swap.probe_gap is not None), default=math.nan),
        attempts=max(swap.attempts for swap in swaps),
        failed_swaps=len(session.heard.failed_swaps),
        responses=len(samples),
        tokens=sum(len(sample.ids) for sample in samples),
        met_a_swap=sum(len(sample.spans) > 1 for sample in samples),
        most_versions=max(len(sample.spans) for sample in samples),
        lost_groups=sum(counts.dropped.values()) + len(session.heard.failed_leases),
        engine_restarts=session.heard.engine_restarts,
        gaps=checker.gaps(_some(samples, plan.check), 1.0) if checker else Gaps(0, 0.0, 0.0, 0.0),
        memory_mb=(memory[0], memory[-1]),
    )


def _some(samples: Sequence[Sample], count: int) -> list[Sample]:
    """So many of them, those of the most versions first: what a swap can spoil."""
    return sorted(samples, key=lambda sample: -len(sample.spans))[:count]
