"""Everything that can go wrong between a new version and the engines, one fault after the other, on both transports.

Of every fault two things are claimed: the trainer goes on (a publish returns at once, servers that are well swap within
the deadline), and no token bears the version of weights that did not make it: every log-prob that came is compared with
a Hugging Face forward of the version that its span names.

The trainer's stream and publisher are in this process; servers are processes of their own (`tiny_engine`).
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import trainer.publish.broadcast
import trainer.publish.publisher
from asyncppo.config import Config, dump, from_tree
from asyncppo.messages import Bucket, WeightsReady
from asyncppo.metrics import EVENTS_FILE, read
from asyncppo.ports import free_port
from asyncppo.transport.zmq import ZmqHub
from asyncppo.weights import MANIFEST, checksum
from tests.real import tiny_engine
from trainer.bench.check import Checker, samples_of
from trainer.bench.models import Versions, make_model
from trainer.bench.session import Session
from trainer.model.policy import Policy
from trainer.model.world import World
from trainer.publish.broadcast import BroadcastTransport, plan
from trainer.publish.publisher import Weights
from trainer.stream.prompts import Prompt

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

LIMIT_S = 2.0
"""`rollout.swap_timeout_s`"""
PATIENCE_S = 20.0
"""A few times what the slowest remedy takes: a round that fails at its limit, a server that is dead, a second round."""
AT_ONCE_S = 1.0
"""A learner never waits longer for a publish of these small weights."""

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "tests.real.tiny_engine"])  # what a server has to import


class Cluster:
    """A trainer that learns nothing, and servers that fail as they are told."""

    def __init__(self, model: Path, directory: Path, transport: str) -> None:
        self.directory = directory
        self.config = a_config(model, directory, transport)
        (directory / "config.yaml").write_bytes(dump(self.config))
        self.session: Session
        self._hub: ZmqHub
        self._servers: dict[str, BaseProcess] = {}
        self._version = 0

    def open(self, config: Config | None = None) -> Self:
        """The trainer; of a config that somebody else has made, or of this cluster's own."""
        self.config = config or self.config
        self._hub = ZmqHub(self.config.stream.address)
        world = World()
        policy = Policy(self.config, world)
        versions = Versions(dict(policy.network.hf.named_parameters()))
        prompts = [Prompt(f"p{n}", np.arange(10, 18, dtype=np.int32) + n, "0") for n in range(50)]
        self.session = Session(self.config, world, policy, versions, prompts, self._hub, requests=2)
        return self

    def start(self, *names: str, fault: str = "") -> None:
        """Servers; all of them get the fault."""
        for name in names:
            arguments = (self.directory / "config.yaml", name, fault, self.directory / f"{name}.log")
            process = processes.Process(target=tiny_engine.run, args=arguments, daemon=True)
            process.start()
            self._servers[name] = process

    def publish(self, version: int) -> None:
        """A version; the learner does not wait for it."""
        self._version = version
        self._take_all()
        assert self.session.publish(version) < AT_ONCE_S

    def serves(self, version: int, *names: str) -> None:
        """Wait until servers have said that they serve a version."""
        swapped = self.session.heard.swapped
        self.until(
            f"{names} to serve version {version}",
            lambda: set(names) <= {identity.decode().split("/")[0] for identity in swapped[version]},
        )

    def until(self, what: str, condition: Callable[[], object], limit_s: float = PATIENCE_S) -> None:
        """Wait, with the logs in the failure."""
        deadline = time.monotonic() + limit_s
        while not condition():
            self.session.intake.counts()  # raises what failed in its thread
            if time.monotonic() > deadline:
                logs = "\n".join(f"== {path.name}\n{path.read_text()[-2500:]}" for path in self.directory.glob("*.log"))
                raise AssertionError(f"waited {limit_s:g} s for {what}\n{self.events()}\n{logs}")
            time.sleep(0.02)

    def ended(self, name: str, code: int) -> None:
        """Wait until a server's process has ended like this."""
        self.until(f"{name} to end", lambda: self._servers[name].exitcode is not None)
        assert self._servers[name].exitcode == code

    def send(self, name: str, number: signal.Signals) -> None:
        pid = self._servers[name].pid
        assert pid
        os.kill(pid, number)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        events = read(self.config.run_directory / EVENTS_FILE)
        return [event for event in events if not kinds or event["event"] in kinds]

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def generates_more(self, groups: int = 4) -> None:
        """The servers answer, and what they answer can be trained on."""
        self._take_all()
        self.until(f"{groups} more groups", lambda: self.session.intake.counts().buffered >= groups)

    def _take_all(self) -> None:
        """So that there is room for more; as in a warm start, batches are no steps."""
        while self.session.intake.counts().buffered:
            batch = self.session.intake.take(self._version, lambda: False, warm_start=True)
            assert batch
            self.session.groups += batch

    def check(self, model: Path) -> None:
        """Every token that was ever taken is of the weights that its span names."""
        self._take_all()
        samples = list(samples_of(self.session.groups))
        for sample in samples:
            sample.check()
        gaps = Checker(model, "float32").gaps(samples, 1.0)
        assert gaps.tokens
        assert gaps.largest < 1e-4, gaps
        assert gaps.wrong > 0.01, "the versions do not differ: nothing was proved"

    def close(self) -> None:
        for process in self._servers.values():
            process.kill()
            process.join()
        self.session.close("the test is over")
        self._hub.close()


def a_config(model: Path, directory: Path, transport: str) -> Config:
    return from_tree(
        {
            "run": {"name": "run", "directory": str(directory), "steps": 100_000, "save_every": 0},
            "data": {"train": "-", "max_prompt_tokens": 32},
            "actor": {"path": str(model), "engine": "plain", "dtype": "float32"},
            "algorithm": {"critics": 1},
            "sampling": {"group_size": 1, "max_response_tokens": tiny_engine.TOKENS},
            "stream": {
                "address": f"tcp://127.0.0.1:{free_port()}",
                "prompts_per_batch": 1,
                "max_staleness": 64,
                "ready_batches": 100_000,
                "heartbeat_s": 0.1,
                "batch_timeout_s": PATIENCE_S,
            },
            "rollout": {"max_groups": 2, "dtype": "float32", "swap_timeout_s": LIMIT_S, "start_timeout_s": 30},
            "publish": {"directory": str(directory), "transport": transport, "ready_timeout_s": 0.5},
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "actor"
    make_model(directory, "0.1M", "float32")
    return directory


@contextmanager
def checked(model: Path, directory: Path, transport: str) -> Iterator[Cluster]:
    """What it has generated is checked at the end."""
    opened = Cluster(model, directory, transport).open()
    try:
        yield opened
        opened.check(model)
    finally:
        opened.close()


@pytest.fixture(params=["disk", "broadcast"])
def cluster(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[Cluster]:
    """On either transport."""
    with checked(model, tmp_path, request.param) as opened:
        yield opened


@pytest.fixture
def broadcast(model: Path, tmp_path: Path) -> Iterator[Cluster]:
    with checked(model, tmp_path, "broadcast") as opened:
        yield opened


@pytest.fixture
def disk(model: Path, tmp_path: Path) -> Iterator[Cluster]:
    with checked(model, tmp_path, "disk") as opened:
        yield opened


PHASES = {
    "disk": ("prepare", "pause", "loaded", "score"),
    "broadcast": ("prepared", "bucket", "resume", "swapped"),
}
"""Where servers are killed: each phase on one of the transports, as most are the same on both."""


def test_a_server_that_is_killed_in_any_phase_costs_the_others_nothing_but_time(cluster: Cluster) -> None:
    phases = PHASES[cluster.config.publish.transport]
    victims = [f"at-{phase}" for phase in phases]
    for version, (phase, victim) in enumerate(zip(phases, victims, strict=True), 1):
        cluster.start(victim, fault=f"kill:{phase}:v{version}")
    cluster.start("bob")
    cluster.publish(0)
    cluster.serves(0, "bob", *victims)
    for version, victim in enumerate(victims, 1):
        cluster.publish(version)
        cluster.ended(victim, -signal.SIGKILL)
        cluster.serves(version, "bob", *victims[version:])
    cluster.generates_more()


def test_a_server_that_hangs_is_late_alone_and_catches_up(cluster: Cluster) -> None:
    phases = ("pause", "load", "resume", "score") if cluster.config.publish.transport == "disk" else ("load",)
    cluster.start("bob")
    cluster.start("alice", fault=",".join(f"hang:{phase}:{number}" for number, phase in enumerate(phases, 2)))
    cluster.publish(0)
    cluster.serves(0, "alice", "bob")
    for version in range(1, 4):
        cluster.publish(version)
        cluster.serves(version, "bob")
    cluster.serves(3, "alice")
    assert "rollout.swap_timeout_s" in cluster.log("alice")
    cluster.generates_more()


def test_a_server_that_is_stopped_in_a_broadcast_holds_nobody_up_and_swaps_when_it_is_back(broadcast: Cluster) -> None:
    broadcast.start("bob")
    broadcast.start("alice", fault="stop:bucket:2")
    broadcast.publish(0)
    broadcast.serves(0, "alice", "bob")
    broadcast.publish(1)
    broadcast.serves(1, "bob")
    broadcast.publish(2)
    broadcast.serves(2, "bob")
    broadcast.send("alice", signal.SIGCONT)
    broadcast.serves(2, "alice")


def test_a_server_that_refuses_a_version_keeps_the_old_one_and_tries_again(disk: Cluster) -> None:
    disk.start("bob")
    disk.start("alice", fault="fail:pause:2")
    disk.publish(0)
    disk.serves(0, "alice", "bob")
    disk.publish(1)
    disk.serves(1, "bob")
    disk.until("a failed swap", lambda: disk.events("swap_failed"))
    assert "as told, it fails at pause" in str(disk.events("swap_failed"))
    disk.generates_more()
    disk.serves(1, "alice")


def small_buckets(weights: Weights, _: int) -> list[Bucket]:
    """So many that there is a middle."""
    return plan(weights, 20_000)


def killed_in_a_broadcast(directory: Path, config: Config, model: Path) -> None:
    """A trainer that is killed when the second bucket of version 1 is on its way."""
    trainer.publish.broadcast.plan = small_buckets
    cluster = Cluster(model, directory, "broadcast").open(config)
    cluster.publish(0)
    cluster.serves(0, "alice", "bob")
    arrive = BroadcastTransport._arrive

    def arrive_or_die(self: BroadcastTransport, work: object, deadline: float, number: int) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        arrive(self, work, deadline, number)

    BroadcastTransport._arrive = arrive_or_die  # type: ignore[method-assign]
    cluster.publish(1)
    time.sleep(PATIENCE_S)


def test_a_trainer_that_is_killed_in_a_broadcast_leaves_servers_that_the_next_one_finds(
    model: Path, tmp_path: Path
) -> None:  # which cuts the same version into other buckets
    cluster = Cluster(model, tmp_path, "broadcast")
    cluster.start("alice", "bob")
    other = tmp_path / "other"
    other.mkdir()
    first = processes.Process(target=killed_in_a_broadcast, args=(other, cluster.config, model), daemon=True)
    first.start()
    first.join(2 * PATIENCE_S)
    assert first.exitcode == -signal.SIGKILL
    try:
        cluster.open().publish(1)
        cluster.serves(1, "alice", "bob")
        cluster.generates_more()
        cluster.check(model)
    finally:
        cluster.close()


def test_an_engine_that_says_it_has_loaded_and_has_not_is_seen_by_the_probe(cluster: Cluster) -> None:
    """And nothing that it made in the meantime leaves it."""
    cluster.start("bob")
    cluster.start("alice", fault="lie:load:2")
    cluster.publish(0)
    cluster.serves(0, "alice", "bob")
    cluster.publish(1)
    cluster.serves(1, "alice", "bob")  # loaded once more
    (heard,) = (
        swapped for identity, (_, swapped) in cluster.session.heard.swapped[1].items() if identity.startswith(b"alice")
    )
    assert heard.attempts == 2
    cluster.generates_more()


def test_an_engine_that_lies_again_and_again_is_quarantined_until_a_version_is_right(cluster: Cluster) -> None:
    cluster.start("bob")
    cluster.start("alice", fault=",".join(f"lie:load:{number}" for number in (2, 3, 4, 5)))
    cluster.publish(0)
    cluster.serves(0, "alice", "bob")
    cluster.publish(1)
    cluster.serves(1, "bob")
    cluster.until("quarantine", lambda: "quarantined" in str(cluster.events("swap_failed")))
    cluster.generates_more()  # bob's
    version = 2
    while not any(identity.startswith(b"alice") for identity in cluster.session.heard.swapped[version]):
        version += 1
        cluster.publish(version)
        cluster.serves(version, "bob")
        time.sleep(0.5)
        assert version < 20, "it never came back"
    cluster.generates_more()


def test_two_versions_at_once_end_at_the_newer_one(cluster: Cluster) -> None:
    cluster.start("alice", "bob")
    cluster.publish(0)
    cluster.serves(0, "alice", "bob")
    for version in range(1, 16, 3):
        for newer in range(3):
            cluster.publish(version + newer)
        cluster.serves(version + 2, "alice", "bob")
    cluster.generates_more()


def before_the_announcement(cluster: Cluster, version: int, change: Callable[[WeightsReady], WeightsReady]) -> None:
    """Have something happen to a version between its writing and its announcement."""
    announce = cluster.session.intake.announce

    def spoilt(weights: WeightsReady) -> None:
        announce(change(weights) if weights.policy_version == version else weights)

    cluster.session.intake.announce = spoilt  # type: ignore[method-assign]


def test_a_corrupted_shard_is_never_loaded(disk: Cluster) -> None:
    def corrupt(weights: WeightsReady) -> WeightsReady:
        shard = Path(weights.directory) / "model.safetensors"
        content = bytearray(shard.read_bytes())
        content[-100] ^= 1
        shard.write_bytes(content)
        return weights

    before_the_announcement(disk, 1, corrupt)
    disk.start("alice", "bob")
    disk.publish(0)
    disk.serves(0, "alice", "bob")
    disk.publish(1)
    disk.until("both to refuse it", lambda: {e["server"] for e in disk.events("swap_failed")} == {"alice", "bob"})
    assert "checksum" in str(disk.events("swap_failed"))
    disk.generates_more()  # by version 0
    disk.publish(2)
    disk.serves(2, "alice", "bob")
    assert not disk.session.heard.swapped[1]


def test_files_of_another_dtype_than_the_manifest_says_are_never_loaded(disk: Cluster) -> None:
    def retype(weights: WeightsReady) -> WeightsReady:
        directory = Path(weights.directory)
        shard, manifest = directory / "model.safetensors", directory / MANIFEST
        before = checksum(shard)
        save_file({name: tensor.to(torch.float16) for name, tensor in load_file(shard).items()}, shard)
        # somebody who repairs the checksums of the files has still not made them what was trained
        manifest.write_text(manifest.read_text().replace(before, checksum(shard)))
        return msgspec.structs.replace(weights, manifest=checksum(manifest))

    before_the_announcement(disk, 1, retype)
    disk.start("alice")
    disk.publish(0)
    disk.serves(0, "alice")
    disk.publish(1)
    disk.until("it to be refused", lambda: disk.events("swap_failed"))
    assert "float16" in str(disk.events("swap_failed")).lower().replace("f16", "float16")
    disk.generates_more()
    disk.publish(2)
    disk.serves(2, "alice")
    assert not disk.session.heard.swapped[1]


def test_a_full_disk_delays_a_version_and_stops_nobody(disk: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.publish.publisher, "PAUSE_S", 0.2)
    disk.start("alice")
    disk.publish(0)
    disk.serves(0, "alice")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # every file of this process
        disk.publish(1)
        disk.generates_more()
        time.sleep(0.5)
        assert not disk.session.heard.swapped[1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    disk.serves(1, "alice")
