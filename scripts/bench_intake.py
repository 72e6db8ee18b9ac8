"""A thousand simulated rollout servers against one real intake: sockets, joins, groups, leaves; nothing is generated.

    .venvs/trainer/bin/python scripts/bench_intake.py --servers 1000 --groups 40000

The servers live in a process of their own: one ZeroMQ DEALER each, which joins, swaps in two phases to each version
that is announced, and answers every lease at once. Half-way a tenth of them vanish and as many others join; in the end
all say Goodbye. Every group carries its lease's prompt, and each prompt has to be consumed once. `cpu_ms_per_group` is
the CPU time of the intake's own thread. The last line is JSON; the exit code is 0 only if nothing was lost and memory
stayed flat.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
import zmq

from asyncppo.config import Config, from_tree
from asyncppo.errors import StallError
from asyncppo.messages import (
    PROTOCOL,
    Ack,
    Codec,
    Goodbye,
    Group,
    Hello,
    Lease,
    Prepared,
    Status,
    Swap,
    Swapped,
    ToRollout,
    Unknown,
    WeightsReady,
    Welcome,
)
from asyncppo.metrics import Journal
from asyncppo.transport.zmq import ZmqHub
from trainer.stream.intake import Identity, Intake
from trainer.stream.prompts import Prompt, Prompts

GROUP_SIZE, TOKENS = 8, 64
HEARTBEAT_S = 2.0
FLAT_MB = 4
"""Growth of the intake's process over the last quarter that still counts as flat."""


class Swarm:
    """Many rollout servers in one thread."""

    def __init__(self, address: str, capacity: int) -> None:
        self._address = address
        self._capacity = capacity
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._poller = zmq.Poller()
        self._names: dict[zmq.Socket[bytes], str] = {}
        self._versions: dict[zmq.Socket[bytes], int] = {}
        self._trainers: dict[zmq.Socket[bytes], str] = {}
        self._incoming, self._outgoing = Codec(ToRollout), Codec(ToRollout)
        self._next = 0
        self._last_status = time.monotonic()
        self.groups = self.acks = 0

    def join(self, count: int) -> None:
        """So many new ones."""
        for _ in range(count):
            name = f"server-{self._next}"
            self._next += 1
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.ROUTING_ID, name.encode())
            socket.setsockopt(zmq.LINGER, 1000)
            socket.connect(self._address)
            self._poller.register(socket, zmq.POLLIN)
            self._names[socket], self._versions[socket] = name, -1
            self._say_hello(socket)

    def leave(self, count: int, *, goodbye: bool) -> None:
        """So many go, with or without a word."""
        for socket in list(self._names)[:count]:
            if goodbye:
                self._say(socket, Goodbye(reason="done"))
            self._poller.unregister(socket)
            socket.close(1000 if goodbye else 0)
            del self._names[socket]

    def serve(self, commands: Connection) -> None:
        """Answer until told to end; commands are (what, count)."""
        while True:
            for socket, _ in self._poller.poll(20):
                self._answer(socket)
            if time.monotonic() - self._last_status > HEARTBEAT_S:
                self._last_status = time.monotonic()
                for socket in self._names:
                    self._say(socket, self._status(self._versions[socket]))
            while commands.poll():
                what, count = commands.recv()
                if what == "join":
                    self.join(count)
                elif what == "vanish":
                    self.leave(count, goodbye=False)
                else:
                    self.leave(len(self._names), goodbye=True)
                    commands.send((self.groups, self.acks))
                    return

    def _answer(self, socket: zmq.Socket[bytes]) -> None:
        while True:
            try:
                message = self._incoming.decode(socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            match message:
                case Welcome():
                    self._trainers[socket] = message.trainer
                case WeightsReady():
                    version, manifest = message.policy_version, message.manifest
                    self._say(socket, Prepared(policy_version=version, manifest=manifest, prepare_s=0.0))
                case Swap():
                    self._versions[socket] = message.policy_version
                    self._say(socket, Swapped.at_once(message.policy_version, message.manifest))
                case Lease():
                    self.groups += 1
                    self._say(socket, a_group(message, self._versions[socket], self._trainers[socket]))
                case Ack():
                    self.acks += 1
                case Unknown():
                    self._say_hello(socket)

    def _say_hello(self, socket: zmq.Socket[bytes]) -> None:
        hello = Hello(
            protocol=PROTOCOL,
            server=self._names[socket],
            incarnation="1",
            started=0.0,
            capacity=self._capacity,
            agreement="a",
            model="m",
            tokenizer="t",
            engine="simulated",
        )
        self._say(socket, hello)

    def _say(self, socket: zmq.Socket[bytes], message: Any) -> None:
        socket.send_multipart(self._outgoing.encode(message), copy=True)

    @staticmethod
    def _status(version: int) -> Status:
        return Status(
            policy_version=version,
            groups_in_flight=0,
            unacknowledged=0,
            responses=0,
            tokens=0,
            idle_s=0.0,
            reward_errors=0,
            engine_restarts=0,
            state="generating",
        )


def a_group(lease: Lease, version: int, trainer: str) -> Group:
    """Of GROUP_SIZE responses with TOKENS tokens each."""
    tokens = GROUP_SIZE * TOKENS
    return Group(
        lease=lease.lease,
        trainer=trainer,
        epoch=lease.epoch,
        prompt_id=lease.prompt_id,
        response_ids=np.arange(tokens, dtype=np.int32),
        lengths=np.full(GROUP_SIZE, TOKENS, np.int32),
        behaviour_logprobs=np.full(tokens, -0.5, np.float32),
        span_versions=np.full(GROUP_SIZE, version, np.int32),
        span_lengths=np.full(GROUP_SIZE, TOKENS, np.int32),
        span_counts=np.ones(GROUP_SIZE, np.int32),
        rewards=np.arange(GROUP_SIZE, dtype=np.float32) % 2,
        truncated=np.zeros(GROUP_SIZE, np.uint8),
        reward_errors=np.zeros(GROUP_SIZE, np.uint8),
        generate_s=0.1,
        grade_s=0.1,
    )


def swarm(address: str, capacity: int, commands: Connection) -> None:
    """The process of the servers."""
    Swarm(address, capacity).serve(commands)


def a_config(directory: Path, batch: int, steps: int, swap: str) -> Config:
    """A stream with deadlines that a busy machine keeps."""
    return from_tree(
        {
            "run": {"steps": steps, "directory": str(directory)},
            "data": {"train": "train.jsonl"},
            "actor": {"path": str(directory)},
            "publish": {"swap": swap},
            "sampling": {"group_size": GROUP_SIZE, "max_response_tokens": TOKENS},
            "stream": {
                "prompts_per_batch": batch,
                "max_staleness": 2,
                "ready_batches": 2,
                "heartbeat_s": HEARTBEAT_S,
                "batch_timeout_s": 120,
            },
        }
    )


def main(
    servers: Annotated[int, typer.Option(min=10, help="Simulated rollout servers.")] = 1000,
    groups: Annotated[int, typer.Option(min=100, help="Groups that are consumed.")] = 40_000,
    batch: Annotated[int, typer.Option(min=1, help="Groups of a batch.")] = 500,
    capacity: Annotated[int, typer.Option(min=1, help="Leases that a server takes at once.")] = 2,
    swap: Annotated[str, typer.Option(help="publish.swap: together or rolling.")] = "together",
) -> None:
    """Run it, print what it cost, and fail where something was lost."""
    steps = groups // batch
    with tempfile.TemporaryDirectory(prefix="asyncppo-bench-") as directory:
        config = a_config(Path(directory), batch, steps, swap)
        prompts = [Prompt(f"p{n}", np.arange(32, dtype=np.int32), str(n)) for n in range(steps * batch)]
        hub = ZmqHub("tcp://127.0.0.1:0")
        journal = Journal(Path(directory))
        intake = Intake(config, hub, Prompts(prompts, 0, True), Identity("a", "m", "t"), journal)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=swarm, args=(hub.address, capacity, theirs), daemon=True
        )
        process.start()
        intake.start()
        intake.announce(_weights(0))
        started = time.monotonic()
        ours.send(("join", servers))
        while intake.counts().servers < servers and time.monotonic() - started < 120:
            time.sleep(0.05)
        joined_s = time.monotonic() - started
        cpu_before, began = time.thread_time(), time.monotonic()
        intake_cpu = thread_cpu(intake)
        consumed: Counter[tuple[int, str]] = Counter()
        memory = []
        problems = []
        for version in range(steps):
            if version == steps // 2:
                ours.send(("vanish", servers // 10))
                ours.send(("join", servers // 10))
            try:
                taken = intake.take(version, lambda: False)
            except StallError as error:
                problems.append(str(error))
                break
            assert taken is not None
            consumed.update((held.epoch, held.prompt.prompt_id) for held in taken)
            intake.announce(_weights(version + 1))
            memory.append(psutil.Process().memory_info().rss >> 20)
        seconds = time.monotonic() - began
        cpu = thread_cpu(intake) - intake_cpu
        counts = intake.counts()
        ours.send(("leave", 0))
        sent, acknowledged = ours.recv() if ours.poll(60) else (0, 0)
        ended = time.monotonic()
        while intake.counts().servers and time.monotonic() - ended < 60:
            time.sleep(0.05)
        left = intake.counts().servers
        intake.close(None)
        process.join(30)
        journal.close()
    total = sum(consumed.values())
    settled = memory[3 * len(memory) // 4 :] or [0]  # ZeroMQ's buffers of a connection grow to some 100 kB first
    result = {
        "servers": servers,
        "groups": total,
        "lost": steps * batch - len(consumed),
        "twice": total - len(consumed),
        "dropped": counts.dropped,
        "still_there": left,
        "groups_sent": sent,
        "acks": acknowledged,
        "joined_s": round(joined_s, 2),
        "seconds": round(seconds, 2),
        "groups_per_s": round(total / seconds, 1),
        "intake_cpu_ms_per_group": round(1000 * cpu / max(total, 1), 3),
        "learner_cpu_ms_per_group": round(1000 * (time.thread_time() - cpu_before) / max(total, 1), 3),
        "rss_mb": {"first": memory[0] if memory else 0, "three_quarters": settled[0], "last": settled[-1]},
    }
    for problem in problems:
        print(problem)
    print(json.dumps(result))
    flat = settled[-1] - settled[0] < FLAT_MB
    good = flat and not problems and not result["lost"] and not result["twice"] and not left
    sys.exit(0 if good else 1)


def thread_cpu(intake: Intake) -> float:
    """CPU seconds of the intake's thread so far."""
    return time.clock_gettime(time.pthread_getcpuclockid(intake._thread.ident or 0))


def _weights(version: int) -> WeightsReady:
    return WeightsReady(policy_version=version, directory="/nowhere", manifest="none")


if __name__ == "__main__":
    typer.run(main)
