"""One trainer without training: the real stream and publisher, versions one after the other, and what they took.

consumes      groups of the rollout servers (`Intake.take`), what they say of their swaps
produces      a version for each batch
waits for     servers, batches, swaps: each with the limit of the config
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from asyncppo.config import Config
from asyncppo.errors import StallError
from asyncppo.messages import Failed, Hello, Message, Prepared, Status, SwapFailed, Swapped, WeightsReady
from asyncppo.metrics import Journal
from asyncppo.transport.base import Hub
from asyncppo.waits import waiting
from trainer import preflight
from trainer.bench.models import Versions
from trainer.model.networks import files_of
from trainer.model.policy import Policy
from trainer.model.world import World
from trainer.publish.broadcast import BroadcastTransport
from trainer.publish.disk import Disk
from trainer.publish.publisher import Publisher
from trainer.stream.buffer import BufferedGroup
from trainer.stream.intake import Intake
from trainer.stream.prompts import Prompt, Prompts

log = logging.getLogger("asyncppo.bench")

_LOAD_S = 30.0
"""The servers are as busy as they may be within this time of a swap."""


@dataclass
class Heard:
    """What servers have said, with the time at which it came."""

    swapped: dict[int, dict[bytes, tuple[float, Swapped]]] = field(default_factory=lambda: defaultdict(dict))
    """By version and server."""
    prepared: int = 0
    failed_swaps: list[str] = field(default_factory=list)
    failed_leases: list[str] = field(default_factory=list)
    engine_restarts: int = 0


class WatchedHub:
    """A `Hub` that keeps what is said of swaps, and limits how many requests a server has in flight.

    `close` leaves the hub as it is: the next session's servers are those of this one.
    """

    def __init__(self, hub: Hub, requests: int) -> None:
        self._hub = hub
        self._requests = requests
        self.heard = Heard()
        self.changed = threading.Condition()

    @property
    def address(self) -> str:
        return self._hub.address

    def receive(self, timeout_s: float) -> tuple[bytes, Any] | None:
        item = self._hub.receive(timeout_s)
        if item is None:
            return None
        identity, message = item
        if isinstance(message, Hello):
            return identity, msgspec.structs.replace(message, capacity=self._requests)
        with self.changed:
            match message:
                case Swapped():
                    self.heard.swapped[message.policy_version].setdefault(identity, (time.monotonic(), message))
                case Prepared():
                    self.heard.prepared += 1
                case SwapFailed():
                    self.heard.failed_swaps.append(message.reason)
                case Failed():
                    self.heard.failed_leases.append(message.reason)
                case Status():
                    self.heard.engine_restarts = max(self.heard.engine_restarts, message.engine_restarts)
                case _:
                    return item
            self.changed.notify_all()
        return item

    def send(self, peer: bytes, message: Message) -> bool:
        return self._hub.send(peer, message)

    def wake(self) -> None:
        self._hub.wake()

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Timed:
    """One version on its way, seconds."""

    publish_s: float
    """What the learner waits for."""
    served_s: float
    """From publishing until every server has said that it serves it."""
    swaps: list[Swapped]
    """One of each server."""


class Session:
    """A trainer that learns nothing: it takes batches and publishes versions, as the learner does.

    Args:
        config: the run's; `run.directory` gets its journal.
        world: of one rank.
        policy: what is published.
        versions: changes it.
        prompts: what the servers answer.
        hub: where servers say Hello; it stays open.
        requests: in flight at each server.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        policy: Policy,
        versions: Versions,
        prompts: list[Prompt],
        hub: Hub,
        requests: int,
    ) -> None:
        self._config = config
        self._policy = policy
        self._versions = versions
        self._hub = WatchedHub(hub, requests)
        self._journal = Journal(config.run_directory)
        self._transport: Disk | BroadcastTransport
        broadcaster = None
        if config.publish_transport[0] == "broadcast":
            self._transport = broadcaster = BroadcastTransport(config, world.device)
        else:
            self._transport = Disk(config, files_of(config.actor.path))
        stream = Prompts(prompts, config.run.seed, config.data.shuffle)
        identity = preflight.identity(config)
        self.intake = Intake(config, self._hub, stream, identity, self._journal, broadcaster)
        self._probe_ids = preflight.probe_ids(config, prompts)
        self._publisher = Publisher(
            config,
            self._transport,
            policy.network.hf,
            self._announce,
            self._oldest_wanted,
            self._probe_ids,
            self._journal,
        )
        self._busy = requests
        self.groups: list[BufferedGroup] = []
        """All that have been taken."""
        self.intake.start()

    @property
    def heard(self) -> Heard:
        """What servers have said so far."""
        return self._hub.heard

    def publish(self, version: int) -> float:
        """Publish a version, made by `Versions`; the seconds that a learner would wait for it."""
        self._versions.take(version)
        started = time.monotonic()
        weights = self._policy.weights(getattr(torch, self._config.rollout.dtype))
        self._publisher.publish(version, weights, self._policy.probe(self._probe_ids))
        return time.monotonic() - started

    def publish_and_wait(self, version: int, servers: int, alive: Callable[[], None]) -> Timed:
        """Publish a version, and wait until so many servers serve it.

        Args:
            version: see `publish`.
            servers: how many there are.
            alive: raises if a server has ended.

        Raises:
            StallError: not within `rollout.start_timeout_s` for version 0, `rollout.swap_timeout_s` for others.
        """
        started = time.monotonic()
        publish_s = self.publish(version)
        rollout = self._config.rollout
        limit = rollout.swap_timeout_s + (rollout.start_timeout_s if version == 0 else 0.0)
        what = f"{servers} servers to serve version {version}"
        self._wait(what, limit, alive, lambda: len(self.heard.swapped[version]) >= servers)
        with self._hub.changed:
            heard = list(self.heard.swapped[version].values())
        return Timed(
            publish_s=publish_s,
            served_s=max(when for when, _ in heard) - started,
            swaps=[swapped for _, swapped in heard],
        )

    def take(self, version: int, servers: int, alive: Callable[[], None]) -> None:
        """All batches that are there; then wait until the servers are as busy as they may be.

        As in a warm start, batches are no steps: as many may be taken at one version as there are.
        """
        while True:
            self.groups += self.intake.take(version, lambda: False, warm_start=True) or []
            if self.intake.counts().buffered < self._config.stream.prompts_per_batch:
                break
        wanted = servers * self._busy
        self._wait(f"{wanted} requests in flight", _LOAD_S, alive, lambda: self.intake.counts().in_flight >= wanted)

    def close(self, stop_servers: str | None) -> None:
        """End it; servers look for the next one, or end too."""
        self._publisher.close()
        self.intake.close(stop_servers)
        self._transport.close()
        self._journal.close()

    def _announce(self, weights: WeightsReady) -> None:
        self.intake.announce(weights)

    def _oldest_wanted(self, version: int) -> int:
        served = self.intake.oldest_served_version()
        return version if served is None else min(version, served)

    def _wait(self, what: str, limit_s: float, alive: Callable[[], None], condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + limit_s
        with waiting(what, limit_s):
            while not condition():
                alive()
                self.intake.counts()  # raises what failed in its thread
                if time.monotonic() > deadline:
                    raise StallError(f"waited {limit_s:.0f} s for {what}; failed swaps: {self.heard.failed_swaps[-3:]}")
                with self._hub.changed:
                    self._hub.changed.wait(0.05)
