"""The intake, with scripted rollout servers on the in-process transport: who is let in, who gets what, what is lost."""

from __future__ import annotations

import asyncio
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest

from asyncppo.config import Config
from asyncppo.errors import ConservationError, StallError
from asyncppo.messages import (
    PROTOCOL,
    Ack,
    Cancel,
    Failed,
    Goodbye,
    Group,
    GroupMember,
    Lease,
    Message,
    Pulse,
    Refused,
    Stop,
    Swap,
    SwapFailed,
    Unknown,
    WeightsReady,
    Welcome,
)
from asyncppo.metrics import EVENTS_FILE, Journal, read
from asyncppo.transport.memory import MemoryHub
from tests.stream_maker import (
    a_config,
    a_group,
    a_group_of_version,
    a_hello,
    a_prepared,
    a_prompt,
    a_status,
    a_swapped,
    some_prompts,
    weights_of,
)
from trainer.publish.swaps import Broadcaster
from trainer.stream import dynamic_sampling, pool
from trainer.stream import intake as intake_module
from trainer.stream.buffer import BufferedGroup
from trainer.stream.intake import Counts, Identity, Intake
from trainer.stream.ledger import LedgerState
from trainer.stream.state import StreamState

pytestmark = pytest.mark.unit

LONG = 10.0
"""A wait that ends long before, unless something is broken."""
QUIET = 0.15
"""Three ticks of the intake: what does not come within them does not come."""

T = TypeVar("T", bound=Message)


class Server:
    """A rollout server that does what the test says."""

    def __init__(self, house: House, name: str, incarnation: str = "1", capacity: int = 4) -> None:
        self._loop = house.loop
        self.hello = a_hello(name, incarnation, capacity)
        self.version = 0
        self.answers_everything = False
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._unheard: list[Any] = []
        self._link = self._in_loop(self._connect(house.hub, f"{name}/{incarnation}".encode()))

    async def _connect(self, hub: MemoryHub, identity: bytes) -> Any:
        link = hub.link(identity)
        self._pump = asyncio.create_task(self._receive(link))
        return link

    async def _receive(self, link: Any) -> None:
        while True:
            message = await link.receive()
            self._inbox.put(message)
            if self.answers_everything and isinstance(message, WeightsReady):
                self.version = message.policy_version
                await link.send(a_swapped(self.version))
            if self.answers_everything and isinstance(message, Lease):
                await link.send(a_group_of_version(self.version, message.lease, message.group_size))

    def _in_loop(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(LONG)

    def say(self, *messages: Message) -> None:
        for message in messages:
            self._in_loop(self._link.send(message))

    def hear(self, kind: type[T]) -> T:
        """The next message of this kind; others are kept for later."""
        deadline = time.monotonic() + LONG
        while True:
            for message in self._unheard:
                if isinstance(message, kind):
                    self._unheard.remove(message)
                    return message
            try:
                self._unheard.append(self._inbox.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"no {kind.__name__} came, but {self._unheard}") from None

    def hear_all(self, quiet_s: float = QUIET) -> list[Any]:
        """Everything that comes until nothing does for a while; pulses are left out."""
        time.sleep(quiet_s)
        while not self._inbox.empty():
            self._unheard.append(self._inbox.get())
        heard, self._unheard = self._unheard, []
        return [message for message in heard if not isinstance(message, Pulse)]

    def join(self, version: int = 0) -> Server:
        """Hello, and after the Welcome a swap to this version."""
        self.say(self.hello)
        self.hear(Welcome)
        self.version = version
        self.say(a_swapped(version))
        return self

    def leases(self, count: int) -> list[Lease]:
        return [self.hear(Lease) for _ in range(count)]

    def answer(self, *leases: Lease, version: int | None = None) -> None:
        for lease in leases:
            served = self.version if version is None else version
            self.say(a_group_of_version(served, lease.lease, lease.group_size))
            assert self.hear(Ack).lease == lease.lease

    def vanish(self) -> None:
        """Without a Goodbye."""
        self._link.close()


class House:
    """An intake on a MemoryHub, and an event loop for its servers."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        state: StreamState | None,
        prompts: int,
        broadcaster: Broadcaster | None,
    ) -> None:
        self.directory = directory
        self.hub = MemoryHub()
        self.journal = Journal(directory)
        identity = Identity("agreement", "model", "tokenizer")
        self.intake = Intake(config, self.hub, some_prompts(prompts), identity, self.journal, broadcaster)
        self.loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._loop_thread.start()
        self.learner = ThreadPoolExecutor(1)
        self.ending = threading.Event()
        self.intake.start(state)

    def server(self, name: str = "alice", incarnation: str = "1", capacity: int = 4) -> Server:
        return Server(self, name, incarnation, capacity)

    def announce(self, version: int) -> None:
        self.intake.announce(weights_of(version))

    def take(self, version: int) -> list[BufferedGroup]:
        groups = self.intake.take(version, self.ending.is_set)
        assert groups is not None
        return groups

    def taking(self, version: int) -> Future[list[BufferedGroup]]:
        """`take` in a thread of its own."""
        return self.learner.submit(self.take, version)

    def evaluating(self, count: int, version: int) -> Future[Any]:
        """`evaluate` in a thread of its own, for problems p100, p101, …"""
        prompts = [a_prompt(100 + number) for number in range(count)]
        return self.learner.submit(self.intake.evaluate, prompts, version, self.ending.is_set)

    def counts(self) -> Counts:
        return self.intake.counts()

    def waits_for(self, condition: Callable[[Counts], bool]) -> Counts:
        """The counts, once they are so."""
        deadline = time.monotonic() + LONG
        while not condition(counts := self.counts()):
            assert time.monotonic() < deadline, counts
            time.sleep(0.005)
        return counts

    def events(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in read(self.directory / EVENTS_FILE) if entry["event"] == event]

    def close(self) -> None:
        if self.loop.is_closed():
            return
        self.ending.set()
        self.intake.close("the test is over")
        self.journal.close()
        self.learner.shutdown()

        async def end_all() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end_all(), self.loop).result(LONG)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._loop_thread.join(LONG)
        self.loop.close()


Build = Callable[..., House]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Makes houses: `build(batch=2, stream={...})`; by default B = 2, η = 1, 4 steps."""
    houses: list[House] = []

    def make(
        state: StreamState | None = None, prompts: int = 5, broadcaster: Broadcaster | None = None, **config: Any
    ) -> House:
        houses.append(House(tmp_path / str(len(houses)), a_config(**config), state, prompts, broadcaster))
        return houses[-1]

    yield make
    for house in houses:
        house.close()


def names(leases: list[Lease]) -> list[str]:
    return [lease.prompt_id for lease in leases]


# --- who is let in ---------------------------------------------------------------------------------------------------


def test_a_server_that_fits_is_welcome_and_is_told_the_newest_weights(build: Build) -> None:
    house = build(run={"name": "demo"}, stream={"heartbeat_s": 1.5})
    house.announce(0)
    house.announce(1)
    alice = house.server()
    alice.say(alice.hello)
    welcome, weights = alice.hear_all()
    assert (welcome.run, welcome.heartbeat_s) == ("demo", 1.5)
    assert welcome.trainer
    assert (weights.policy_version, weights.directory, weights.manifest) == (1, "/weights/1", "checksum-1")
    assert house.counts().servers == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": PROTOCOL + 1}, r"protocol: the trainer has \d+, the rollout server \d+; install one version"),
        ({"model": "other"}, r"model: the trainer has model, the rollout server other; its config\.json differs"),
        ({"tokenizer": "other"}, r"tokenizer: .*its tokenizer\.json differs"),
        ({"agreement": "other"}, r"sampling and reward settings: .*one config file"),
    ],
)
def test_a_server_that_does_not_fit_is_turned_away_with_the_reason(
    build: Build, changes: dict[str, Any], reason: str
) -> None:
    house = build()
    house.announce(0)
    alice = house.server()
    alice.say(msgspec.structs.replace(alice.hello, **changes), a_swapped(0))
    refused, unknown = alice.hear_all()
    assert isinstance(refused, Refused)
    assert isinstance(unknown, Unknown)
    assert re.search(reason, refused.reason)
    assert house.counts().servers == 0
    assert house.counts().admitted == 0


def test_a_server_whose_engine_is_swapped_in_another_way_now_says_so_once(build: Build) -> None:
    house = build()
    alice = house.server()
    fallen_back = msgspec.structs.replace(alice.hello, engine="sglang, swapped by resubmitting")
    alice.say(alice.hello, fallen_back, fallen_back)
    assert [type(message) for message in alice.hear_all()] == [Welcome] * 3
    assert [event["engine"] for event in house.events("server_engine")] == ["sglang, swapped by resubmitting"]
    assert len(house.events("server_joined")) == 1


def test_a_server_gets_leases_only_after_its_swap(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server()
    alice.say(alice.hello, a_status(-1), SwapFailed(policy_version=0, reason="no such directory"))
    assert [type(message) for message in alice.hear_all()] == [Welcome, WeightsReady]
    alice.say(a_swapped(0))
    first = alice.hear(Lease)
    assert (first.epoch, first.prompt_id, first.answer, first.group_size, first.purpose) == (0, "p0", "0", 2, "train")
    assert first.prompt_ids.tolist() == [0, 1, 2]
    assert [event["reason"] for event in house.events("swap_failed")] == ["no such directory"]
    assert house.counts().swap_pause_s == 0.25 + 0.125 + 0.0625


def test_a_second_hello_of_the_same_process_changes_nothing(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server().join()
    leases = alice.leases(4)
    alice.say(alice.hello)
    assert [type(message) for message in alice.hear_all()] == [WeightsReady, Welcome, WeightsReady]
    alice.answer(*leases)
    assert house.counts().dropped == {}
    assert house.counts().servers == 1


def test_strangers_are_told_that_they_are_unknown(build: Build) -> None:
    house = build()
    alice = house.server()
    alice.say(a_status(), a_group_of_version(0, lease=1), Goodbye(reason=""))
    assert [type(message) for message in alice.hear_all()] == [Unknown, Unknown, Unknown]
    assert house.counts().servers == 0


def test_every_server_is_told_of_new_weights_and_of_the_trainers_pulse(build: Build) -> None:
    house = build(stream={"heartbeat_s": 0.1})
    house.announce(0)
    servers = [house.server(name).join() for name in ("alice", "bob")]
    house.announce(1)
    for server in servers:
        assert [server.hear(WeightsReady).policy_version for _ in range(2)] == [0, 1]
        while server.hear(Pulse).policy_version != 1:
            pass


# --- who gets what ---------------------------------------------------------------------------------------------------


def test_admission_ends_at_bound_plus_one_batches_and_goes_on_with_the_next_version(build: Build) -> None:
    house = build(batch=2, max_staleness=1)
    house.announce(0)
    alice = house.server(capacity=100).join()
    leases = alice.leases(4)
    assert alice.hear_all() != []
    alice.answer(*leases[:2])
    house.take(0)
    assert alice.hear_all() == []  # still served by version 0: they would be due at 1, as the two in flight
    house.announce(1)
    alice.say(a_swapped(1))
    assert names(alice.leases(2)) == ["p4", "p0"]
    assert [type(message) for message in alice.hear_all()] == [WeightsReady]


def test_a_servers_capacity_is_never_exceeded(build: Build) -> None:
    house = build(batch=8, max_staleness=1)
    house.announce(0)
    alice, bob = house.server("alice", capacity=3).join(), house.server("bob", capacity=1).join()
    leases = alice.leases(3)
    bob.leases(1)
    assert not [m for m in alice.hear_all() + bob.hear_all() if isinstance(m, Lease)]
    alice.answer(leases[0])
    alice.leases(1)
    assert alice.hear_all() == []
    assert house.counts().in_flight == 4


def test_the_least_busy_server_is_served_first(build: Build) -> None:
    house = build(batch=2, max_staleness=3)
    house.announce(0)
    alice = house.server("alice", capacity=4).join()
    leases = alice.leases(4)
    alice.answer(*leases[:2])  # a whole batch is ready: nothing is leased, alice keeps 2 of 4
    bob = house.server("bob", capacity=4).join()
    assert [type(message) for message in bob.hear_all()] == [WeightsReady]
    house.take(0)  # now 4 more may be: to bob until he has 2 of 4 too, then to each in turn
    assert len(bob.leases(3)) == 3
    assert len(alice.leases(1)) == 1
    assert not [m for m in alice.hear_all() + bob.hear_all() if isinstance(m, Lease)]


def test_a_server_that_lags_too_far_behind_gets_nothing_until_it_swaps(build: Build) -> None:
    house = build(max_staleness=1)
    for version in range(3):
        house.announce(version)
    alice = house.server().join(version=0)
    assert [type(message) for message in alice.hear_all()] == [WeightsReady]
    alice.say(a_swapped(1))
    alice.leases(2)  # due at 2, which is about to be trained: one batch, not two
    assert alice.hear_all() == []


def test_no_prompt_is_leased_while_enough_batches_wait(build: Build) -> None:
    house = build(batch=2, max_staleness=4, stream={"ready_batches": 2})
    house.announce(0)
    alice = house.server(capacity=4).join()
    alice.answer(*alice.leases(3))
    alice.answer(alice.leases(1)[0])  # two batches are ready
    house.waits_for(lambda counts: counts.buffered == 4)
    held = len([message for message in alice.hear_all() if isinstance(message, Lease)])
    assert house.counts().admitted == 4 + held
    assert alice.hear_all() == []


def test_the_end_of_the_run_admits_exactly_what_it_needs(build: Build) -> None:
    house = build(steps=3, batch=2, max_staleness=4)
    alice = house.server(capacity=50)
    alice.answers_everything = True
    alice.say(alice.hello)
    for version in range(3):
        house.announce(version)
        assert len(house.take(version)) == 2
    counts = house.waits_for(lambda counts: counts.in_flight == 0)
    time.sleep(QUIET)
    assert (counts.admitted, counts.consumed, counts.dropped) == (6, 6, {})
    assert house.counts().admitted == 6


def test_a_batch_has_its_groups_prompts_and_epochs(build: Build) -> None:
    house = build(prompts=3)
    house.announce(0)
    alice = house.server().join()
    leases = alice.leases(4)
    assert [(lease.epoch, lease.prompt_id) for lease in leases] == [(0, "p0"), (0, "p1"), (0, "p2"), (1, "p0")]
    alice.answer(leases[3], leases[1])
    taken = house.take(0)
    assert [(held.lease, held.epoch, held.prompt.prompt_id) for held in taken] == [
        (leases[1].lease, 0, "p1"),
        (leases[3].lease, 1, "p0"),
    ]
    assert taken[0].group.response_ids.tolist() == [0, 1, 100, 101]
    counts = house.counts()
    assert (counts.consumed, counts.in_flight, counts.buffered) == (2, 2, 0)


def test_take_waits_for_a_slow_group_that_is_due(build: Build) -> None:
    house = build(batch=2, max_staleness=1)
    house.announce(0)
    alice = house.server(capacity=6).join()
    leases = alice.leases(4)
    alice.answer(*leases[:3])
    house.take(0)
    house.announce(1)
    alice.join(version=1)
    alice.answer(*alice.leases(2))  # both overtake the slow one
    taking = house.taking(1)
    time.sleep(QUIET)
    assert not taking.done()
    alice.answer(leases[3], version=0)
    assert sorted(held.lease for held in taking.result(LONG)) == sorted([leases[2].lease, leases[3].lease])


# --- what is lost ----------------------------------------------------------------------------------------------------


def test_a_servers_goodbye_gives_its_prompts_to_another(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server("alice").join()
    lost = alice.leases(4)
    alice.answer(lost[0])  # has arrived: it is not lost with its server
    alice.say(Goodbye(reason="SIGTERM"))
    bob = house.server("bob").join()
    assert names(bob.leases(3)) == names(lost[1:])
    counts = house.counts()
    assert (counts.servers, counts.buffered, counts.in_flight, counts.dropped) == (1, 1, 3, {"server left": 3})
    assert house.events("server_left")[0]["leased_again"] == 3


def test_a_dead_servers_prompts_are_leased_again(build: Build) -> None:
    house = build(stream={"heartbeat_s": 0.05})
    house.announce(0)
    alice = house.server("alice").join()
    lost = alice.leases(4)
    for _ in range(15):  # as long as it speaks, it lives
        time.sleep(0.05)
        alice.say(a_status())
    assert house.counts().servers == 1
    house.waits_for(lambda counts: counts.servers == 0)
    bob = house.server("bob").join()
    assert names(bob.leases(4)) == names(lost)
    assert "nothing heard" in house.events("server_left")[0]["reason"]
    alice.say(a_group_of_version(0, lost[0].lease))
    assert isinstance(alice.hear(Unknown), Unknown)


def test_a_new_process_of_the_same_name_takes_the_place_of_the_old_one(build: Build) -> None:
    house = build()
    house.announce(0)
    lost = house.server("alice", incarnation="1").join().leases(4)
    new = house.server("alice", incarnation="2").join()
    assert names(new.leases(4)) == names(lost)
    assert house.counts().servers == 1
    assert house.counts().dropped == {"server left": 4}


def test_a_new_process_under_the_same_identity_takes_the_place_of_the_old_one(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server("alice").join()
    lost = alice.leases(4)
    alice.hello = msgspec.structs.replace(alice.hello, incarnation="2")
    alice.hear(WeightsReady)
    alice.say(alice.hello)
    assert [type(message) for message in alice.hear_all()] == [Welcome, WeightsReady]  # no lease before its swap
    alice.say(a_swapped(0))
    assert names(alice.leases(4)) == names(lost)
    assert house.counts().servers == 1


def test_a_failed_lease_is_given_out_again(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server().join()
    leases = alice.leases(4)
    alice.say(Failed(lease=leases[1].lease, reason="the engine is down"))
    (again,) = alice.leases(1)
    assert again.prompt_id == "p1"
    assert again.lease != leases[1].lease
    alice.say(Failed(lease=leases[1].lease, reason="again"), Failed(lease=999, reason="never leased"))
    alice.answer(again)
    assert house.counts().dropped == {"not completed": 1}
    assert "the engine is down" in house.events("lease_returned")[0]["reason"]


def test_an_expired_lease_is_cancelled_and_given_out_again(build: Build) -> None:
    house = build(steps=1, batch=1, max_staleness=0, stream={"lease_timeout_s": 0.3})
    house.announce(0)
    alice = house.server("alice", capacity=1).join()
    (slow,) = alice.leases(1)
    assert alice.hear(Cancel).leases == [slow.lease]
    (again,) = alice.leases(1)
    assert again.prompt_id == slow.prompt_id
    alice.answer(slow)  # too late: acknowledged, so that it is forgotten, and ignored
    assert house.counts().buffered == 0
    alice.answer(again)
    assert [held.lease for held in house.take(0)] == [again.lease]
    assert house.counts().dropped == {"not completed": 1}


def test_a_server_that_a_lease_cannot_be_sent_to_leaves_the_pool(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server("alice", capacity=1).join()
    (lease,) = alice.leases(1)
    alice.vanish()
    alice.say(Failed(lease=lease.lease, reason="lost"))  # so it has room for a lease again
    house.waits_for(lambda counts: counts.servers == 0)
    assert "cannot be reached" in house.events("server_left")[0]["reason"]
    assert names(house.server("bob").join().leases(2)) == ["p0", "p1"]


def test_a_duplicate_group_is_acknowledged_and_ignored(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server().join()
    leases = alice.leases(4)
    alice.answer(leases[0])
    alice.answer(leases[0])
    assert house.counts().buffered == 1
    alice.answer(leases[1])
    house.take(0)
    alice.answer(leases[0])
    counts = house.counts()
    assert (counts.consumed, counts.buffered, counts.in_flight, counts.malformed) == (2, 0, 2, 0)


def test_a_group_for_another_servers_lease_is_acknowledged_and_ignored(build: Build) -> None:
    house = build(batch=1, max_staleness=0)
    house.announce(0)
    alice, bob = house.server("alice").join(), house.server("bob")
    (lease,) = alice.leases(1)
    bob.join()
    bob.answer(lease)
    bob.say(Failed(lease=lease.lease, reason="not mine"))
    assert house.counts().in_flight == 1
    alice.answer(lease)
    assert house.counts().dropped == {}


@pytest.mark.parametrize(
    "group",
    [
        a_group_of_version(0, responses=3),  # another group size
        a_group_of_version(1),  # a version that was not published
        msgspec.structs.replace(a_group_of_version(0), rewards=np.full(2, np.nan, np.float32)),
    ],
    ids=["size", "version", "rewards"],
)
def test_a_malformed_group_is_counted_and_its_prompt_leased_again(build: Build, group: Group) -> None:
    house = build()
    house.announce(0)
    alice = house.server().join()
    leases = alice.leases(4)
    alice.say(msgspec.structs.replace(group, lease=leases[2].lease))
    assert alice.hear(Ack).lease == leases[2].lease
    (again,) = alice.leases(1)
    assert again.prompt_id == "p2"
    counts = house.counts()
    assert (counts.malformed, counts.dropped, counts.buffered, counts.in_flight) == (1, {"malformed": 1}, 0, 4)


def test_a_message_that_does_not_decode_is_counted_and_the_next_one_is_heard(build: Build) -> None:
    house = build()
    house.announce(0)
    for _ in range(30):
        house.hub._inbox.put((b"stranger", [b"\xc1nonsense"]))
    house.server().join().leases(4)
    assert house.counts().malformed == 30


def test_a_group_that_became_too_stale_is_dropped_and_its_prompt_leased_again(build: Build) -> None:
    house = build(steps=2, batch=1, max_staleness=0)
    house.announce(0)
    alice = house.server().join()
    (first,) = alice.leases(1)
    alice.answer(first)
    house.announce(1)  # version 0 was never trained, as after a resume from elsewhere
    alice.say(a_swapped(1))
    taking = house.taking(1)
    (again,) = alice.leases(1)
    assert again.prompt_id == first.prompt_id
    alice.answer(again, version=1)
    (held,) = taking.result(LONG)
    assert (held.lease, held.oldest_version) == (again.lease, 1)
    assert house.counts().dropped == {"too stale": 1}
    (event,) = house.events("dropped")
    assert (event["reason"], event["length_mean"], event["reward_mean"]) == ("too stale", 2.0, 0.5)


def test_what_was_dropped_without_a_group_has_no_length(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server().join()
    alice.say(Failed(lease=alice.leases(1)[0].lease, reason="no"))
    house.waits_for(lambda counts: counts.dropped == {"not completed": 1})
    assert "length_mean" not in house.events("dropped")[0]


# --- names -----------------------------------------------------------------------------------------------------------


def test_an_older_process_that_still_lives_is_told_to_end_and_cannot_push_the_new_one_out(build: Build) -> None:
    house = build()
    house.announce(0)
    old = house.server("alice", incarnation="1").join()
    old.leases(4)
    new = house.server("alice", incarnation="2").join()
    leases = new.leases(4)
    assert "a newer process has its name" in old.hear(Refused).reason
    old.say(a_status())
    old.hear(Unknown)
    old.say(old.hello)  # as if it had not heard
    assert "a newer process has its name" in old.hear(Refused).reason
    new.answer(*leases)
    assert (house.counts().servers, house.counts().buffered) == (1, 4)


def test_a_hello_of_a_dead_process_that_comes_late_does_not_take_the_name_of_a_live_one(build: Build) -> None:
    house = build()
    house.announce(0)
    dead = house.server("alice", incarnation="1")
    live = house.server("alice", incarnation="2").join()
    leases = live.leases(4)
    dead.say(dead.hello)  # it was on its way when that process was killed
    assert "a newer process has its name" in dead.hear(Refused).reason
    live.answer(*leases)
    assert (house.counts().servers, house.counts().buffered) == (1, 4)


def test_an_older_process_that_was_lost_and_comes_back_finds_its_name_taken(build: Build) -> None:
    house = build(stream={"heartbeat_s": 0.05})
    house.announce(0)
    old = house.server("alice", incarnation="1").join()
    house.waits_for(lambda counts: counts.servers == 0)
    new = house.server("alice", incarnation="2").join()
    new.leases(4)
    old.say(old.hello)
    old.hear(Refused)
    assert house.counts().servers == 1


# --- servers that fail -----------------------------------------------------------------------------------------------


def failed(lease: Lease) -> Failed:
    return Failed(lease=lease.lease, reason="no")


def test_a_server_that_fails_again_and_again_is_set_aside_then_tried_with_one_lease_and_welcomed_back(
    build: Build,
) -> None:
    house = build(batch=8, stream={"failures_in_a_row": 2, "set_aside_s": 0.4})
    house.announce(0)
    alice = house.server("alice", capacity=4).join()
    first = alice.leases(4)
    alice.say(failed(first[0]), failed(first[1]))
    alice.leases(1)  # for the first failure; the second sets it aside
    started = time.monotonic()
    (probe,) = alice.leases(1)
    assert time.monotonic() - started > 0.25
    # What it still held was taken away when it got its chance, so that the one lease is all that it has:
    assert len([m for m in alice.hear_all() if isinstance(m, Cancel)]) == 3
    assert house.counts().dropped == {"not completed": 2, "server set aside": 3}
    alice.say(failed(probe))  # aside again, for twice as long
    started = time.monotonic()
    (probe,) = alice.leases(1)
    assert time.monotonic() - started > 0.6
    alice.answer(probe)
    alice.leases(4)
    assert len(house.events("server_set_aside")) == 2
    assert len(house.events("server_back")) == 1


def test_a_completed_group_starts_the_count_of_failures_again(build: Build) -> None:
    house = build(batch=8, stream={"failures_in_a_row": 2, "set_aside_s": 60})
    house.announce(0)
    alice = house.server("alice", capacity=1).join()
    for _ in range(3):
        alice.say(failed(alice.leases(1)[0]))
        alice.answer(alice.leases(1)[0])
    alice.leases(1)
    assert house.events("server_set_aside") == []


def test_malformed_groups_and_expired_leases_are_failures_too(build: Build) -> None:
    house = build(batch=8, stream={"failures_in_a_row": 2, "set_aside_s": 60, "lease_timeout_s": 0.3})
    house.announce(0)
    alice = house.server("alice", capacity=1).join()
    alice.say(a_group_of_version(0, alice.leases(1)[0].lease, responses=5))
    alice.hear(Ack)
    alice.leases(1)  # never answered
    alice.hear(Cancel)
    assert not [message for message in alice.hear_all() if isinstance(message, Lease)]
    assert "2 leases in a row" in house.events("server_set_aside")[0]["reason"]


def test_a_server_that_is_set_aside_does_not_hold_up_the_others(build: Build) -> None:
    house = build(batch=2, max_staleness=1, stream={"failures_in_a_row": 1, "set_aside_s": 60})
    house.announce(0)
    bad, good = house.server("bad").join(), house.server("good")
    bad.say(*map(failed, bad.leases(4)))
    house.waits_for(lambda counts: counts.in_flight == 0)
    good.answers_everything = True
    good.say(good.hello)
    assert len(house.take(0)) == 2


def test_a_prompt_that_failed_at_one_server_goes_to_another_where_there_is_one(build: Build) -> None:
    house = build(batch=1, max_staleness=0)
    house.announce(0)
    alice = house.server("alice").join()
    (lease,) = alice.leases(1)
    bob = house.server("bob").join()
    house.waits_for(lambda counts: counts.swaps == 2)
    alice.say(failed(lease))  # she is the less busy one by her place
    (again,) = bob.leases(1)
    bob.say(failed(again))
    alice.leases(1)
    alice.say(Goodbye(reason=""))
    bob.leases(1)  # the only one


# --- swaps in two phases ---------------------------------------------------------------------------------------------


def test_a_prepared_server_is_told_to_swap_and_every_phase_is_on_record(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server()
    alice.say(alice.hello)
    assert [type(message) for message in alice.hear_all()] == [Welcome, WeightsReady]
    alice.say(a_prepared(0, "another trainer's"))
    assert alice.hear_all() == []
    alice.say(a_prepared(0))
    swap = alice.hear(Swap)
    assert (swap.policy_version, swap.manifest, swap.member) == (0, "checksum-0", None)
    alice.say(a_swapped(0, probe_gap=1e-6, attempts=2))
    alice.leases(4)
    [event] = house.events("swap")
    del event["time"]
    assert event == {
        "event": "swap",
        "server": "alice",
        "policy_version": 0,
        "prepare_s": 0.5,
        "wait_s": 1.0,
        "pause_s": 0.25,
        "load_s": 0.125,
        "resume_s": 0.0625,
        "probe_s": 0.03125,
        "probe_gap": 1e-6,
        "attempts": 2,
    }


def test_a_server_that_says_once_more_that_it_swapped_counts_once(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server().join()
    alice.leases(4)
    alice.say(a_swapped(0, pause_s=0.0, load_s=0.0, resume_s=0.0), a_status(0))
    alice.hear_all()
    assert house.counts().swaps == 1
    assert house.counts().swap_pause_s == 0.25 + 0.125 + 0.0625
    alice.say(a_swapped(0))  # its engine was restarted, and has loaded it again
    house.waits_for(lambda counts: counts.swaps == 2)


def test_rolling_the_next_server_swaps_when_one_has_swapped_failed_left_or_not_answered_in_time(build: Build) -> None:
    house = build(publish={"swap": "rolling"}, rollout={"swap_timeout_s": 0.4})
    servers = [house.server(name).join() for name in "abcde"]
    house.announce(0)
    for server in servers:
        server.hear(WeightsReady)
        server.say(a_prepared(0))
        time.sleep(0.02)  # in this order
    a, b, c, d, e = servers
    a.hear(Swap)
    assert not any(isinstance(message, Swap) for message in b.hear_all())
    a.say(a_swapped(0))
    b.hear(Swap)
    b.say(SwapFailed(policy_version=0, reason="no"))
    c.hear(Swap)
    c.say(Goodbye(reason=""))
    d.hear(Swap)
    began = time.monotonic()
    e.hear(Swap)
    assert 0.3 < time.monotonic() - began < LONG / 2


def test_a_server_that_waits_for_its_turn_does_not_grow_late(build: Build) -> None:
    house = build(publish={"swap": "rolling"}, rollout={"swap_timeout_s": 0.3})
    house.announce(0)
    servers = [house.server(name).join() for name in "abcd"]
    house.announce(1)
    house.waits_for(lambda counts: counts.swaps == 4)
    for server in servers:
        server.say(a_prepared(1))
    told: list[Server] = []
    while len(told) < 4:  # none of them does it: the last one is told after three turns, and twice a turn is late
        heard = [server for server in servers if any(isinstance(m, Swap) for m in server.hear_all(0.05))]
        told += heard
        late = {event["server"] for event in house.events("server_set_aside")}
        assert late <= {server.hello.server for server in told}
    house.waits_for(lambda counts: len(house.events("server_set_aside")) == 4)


class Rounds:
    """A broadcaster that is never busy."""

    busy = False

    def __init__(self) -> None:
        self.begun: list[tuple[int, str, list[tuple[bytes, int]]]] = []

    def give_up(self, member: bytes) -> None:
        """Its rounds end by themselves."""

    def begin(
        self, version: int, manifest: str, members: Sequence[tuple[bytes, int]], group: str
    ) -> dict[bytes, GroupMember]:
        self.begun.append((version, manifest, list(members)))
        return {
            identity: GroupMember(name="g", address="a", port=1, rank=rank, world_size=9, backend="gloo")
            for rank, (identity, _) in enumerate(members, start=1)
        }


def test_a_broadcast_begins_when_all_are_prepared_and_each_is_told_its_place(build: Build) -> None:
    rounds = Rounds()
    house = build(broadcaster=rounds)
    house.announce(0)
    alice, bob = house.server("alice"), house.server("bob")
    bob.say(msgspec.structs.replace(bob.hello, ranks=2))
    alice.say(alice.hello)
    for server in (alice, bob):
        server.hear(WeightsReady)
        assert not any(isinstance(message, Swap) for message in server.hear_all())
        server.say(a_prepared(0))
    places = [server.hear(Swap).member for server in (alice, bob)]
    assert [place and place.rank for place in places] == [1, 2]
    assert rounds.begun == [(0, "checksum-0", [(b"alice/1", 1), (b"bob/1", 2)])]


@pytest.mark.parametrize("says", ["SwapFailed", "Status"])
def test_a_quarantined_server_loses_what_it_has_and_gets_nothing_until_it_has_swapped(build: Build, says: str) -> None:
    house = build(max_staleness=3)
    house.announce(0)
    alice = house.server("alice").join()
    bob = house.server("bob", capacity=9)
    leases = alice.leases(4)
    house.announce(1)
    alice.say(
        SwapFailed(policy_version=1, reason="off by 1.5 nats", quarantined=True)
        if says == "SwapFailed"
        else a_status(0, state="quarantined")
    )
    assert sorted(lease for _ in leases for lease in alice.hear(Cancel).leases) == [lease.lease for lease in leases]
    bob.join(version=1)
    assert names(bob.leases(4)) == names(leases)
    assert house.counts().dropped == {"server quarantined": 4}
    assert house.intake.oldest_served_version() == 0  # it may fall back
    assert "probe" in house.events("server_set_aside")[0]["reason"]
    assert [event["quarantined"] for event in house.events("swap_failed")] == [True] * (says == "SwapFailed")
    alice.say(a_status(0, state="quarantined"), a_group_of_version(0, leases[0].lease))  # it was on its way
    assert not any(isinstance(message, Lease) for message in alice.hear_all())
    assert sum(house.counts().ignored.values()) == 1
    assert len(house.events("server_set_aside")) == 1
    bob.say(Goodbye(reason=""))
    alice.say(a_swapped(1))
    assert names(alice.leases(4)) == names(leases)
    assert len(house.events("server_back")) == 1
    assert house.intake.oldest_served_version() == 1


def test_held_out_problems_of_a_quarantined_server_go_to_another(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server("alice", capacity=5).join()
    alice.leases(4)
    scores = house.evaluating(1, version=0)
    [held_out] = [lease for lease in alice.leases(1) if lease.purpose == "eval"]
    alice.say(SwapFailed(policy_version=0, reason="", quarantined=True))
    bob = house.server("bob", capacity=9).join()
    again = next(lease for lease in bob.leases(5) if lease.purpose == "eval")
    assert again.prompt_id == held_out.prompt_id
    bob.say(a_group_of_version(0, again.lease, again.group_size))
    assert len(scores.result(LONG)) == 1


def test_a_server_whose_engine_was_restarted_swaps_again_and_is_told_again_when_that_fails(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_RETRY_S", 0.1)
    house = build(stream={"heartbeat_s": 0.2})
    house.announce(0)
    alice = house.server().join()
    alice.hear(WeightsReady)
    alice.leases(4)
    for _ in range(2):
        alice.say(a_prepared(0))
        assert alice.hear(Swap).policy_version == 0
        alice.say(SwapFailed(policy_version=0, reason="no"))
        assert alice.hear(WeightsReady).policy_version == 0
    alice.say(SwapFailed(policy_version=0, reason="it could not even prepare"))
    assert alice.hear(WeightsReady).policy_version == 0


def test_a_server_that_is_behind_and_says_nothing_is_told_again(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_LONGEST_RETRY_S", 0.3)
    house = build(stream={"heartbeat_s": 0.2})
    house.announce(0)
    alice = house.server()
    alice.say(alice.hello)
    for _ in range(3):  # its Prepared, or what it failed at, was lost
        assert alice.hear(WeightsReady).policy_version == 0
    alice.say(a_prepared(0))
    alice.hear(Swap)
    assert alice.hear(WeightsReady).policy_version == 0  # or its Swap was
    alice.say(a_swapped(0))
    alice.leases(4)
    alice.hear_all(0.0)
    assert not any(isinstance(message, WeightsReady) for message in alice.hear_all(0.7))
    house.announce(1)
    alice.say(a_swapped(0))
    for _ in range(2):
        assert alice.hear(WeightsReady).policy_version == 1


def test_a_version_that_is_published_while_training_goes_on_does_not_set_the_stream_back(build: Build) -> None:
    house = build(max_staleness=1)
    house.announce(0)
    alice = house.server(capacity=9).join()
    alice.answer(*alice.leases(4))
    house.take(0)
    house.take(1)  # version 2 is about to be trained
    alice.hear_all()
    house.announce(1)  # only now
    alice.say(a_swapped(1))
    assert len(alice.leases(2)) == 2  # for version 2; what version 1 draws is too old for the batch after that
    assert not any(isinstance(message, Lease) for message in alice.hear_all())
    assert house.intake.state().ledger.version == 2


def test_what_the_version_of_a_checkpoint_draws_counts_even_if_it_is_published_only_later(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server().join()
    welcomes = house.intake.state().ledger.history
    alice.answer(*alice.leases(4))
    house.take(0)
    [(trainer, before)] = welcomes.items()
    assert before == 0
    assert house.intake.state().ledger.history == {trainer: 1}


# --- late swaps ------------------------------------------------------------------------------------------------------


def test_a_server_that_does_not_swap_is_set_aside_and_no_version_is_kept_for_it(build: Build) -> None:
    house = build(batch=4, max_staleness=3, rollout={"swap_timeout_s": 0.2})
    house.announce(0)
    hung, good = house.server("hung").join(), house.server("good").join()
    leases = hung.leases(4)
    good.leases(4)
    house.waits_for(lambda counts: counts.swaps == 2)
    house.announce(1)
    good.say(a_swapped(1))
    house.waits_for(lambda counts: counts.swaps == 3)
    assert house.intake.oldest_served_version() == 0  # it may yet swap, or fall back
    deadline = time.monotonic() + LONG
    while house.intake.oldest_served_version() != 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "does not swap to version 1" in house.events("server_set_aside")[0]["reason"]
    hung.say(failed(leases[0]))
    assert not [message for message in hung.hear_all() if isinstance(message, Lease)]
    hung.say(a_swapped(1))
    hung.leases(1)
    assert house.intake.oldest_served_version() == 1
    assert len(house.events("server_back")) == 1


def test_a_server_that_claims_a_version_that_was_not_published_is_not_believed(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server()
    alice.say(alice.hello, a_swapped(7))
    house.waits_for(lambda counts: counts.malformed == 1)
    assert not [message for message in alice.hear_all() if isinstance(message, Lease)]


# --- what is too slow ------------------------------------------------------------------------------------------------


def test_what_can_be_in_no_batch_any_more_is_cancelled_before_the_swap_and_leased_again(build: Build) -> None:
    house = build(batch=2, max_staleness=0)
    house.announce(0)
    alice = house.server().join()
    slow = alice.leases(2)
    house.announce(1)  # version 0 is not trained any more, as with a run that goes on from elsewhere
    heard = alice.hear_all()
    kinds = [type(message) for message in heard]
    assert kinds.index(Cancel) < len(kinds) - 1 - kinds[::-1].index(WeightsReady)
    assert [m.leases[0] for m in heard if isinstance(m, Cancel)] == [lease.lease for lease in slow]
    alice.say(a_swapped(1))
    assert sorted(names(alice.leases(2))) == names(slow)
    assert house.counts().dropped == {"too stale": 2}


def test_where_slow_prompts_are_dropped_nothing_waits_for_them_and_they_are_cancelled_when_overdue(
    build: Build,
) -> None:
    house = build(batch=2, max_staleness=1, stream={"slow": "drop"})
    house.announce(0)
    alice = house.server(capacity=6).join()
    leases = alice.leases(4)
    alice.answer(*leases[:3])
    house.take(0)
    house.announce(1)
    alice.join(version=1)
    alice.answer(*alice.leases(2))  # both overtake the slow one
    assert leases[2].lease in [held.lease for held in house.take(1)]
    assert alice.hear(Cancel).leases == [leases[3].lease]
    counts = house.counts()
    assert counts.dropped == {"too stale": 1}
    assert (counts.consumed_length, counts.consumed_reward) == (2.0, 0.5)


def test_lengths_and_rewards_of_what_is_dropped_are_counted_and_a_bias_is_said(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    house = build(steps=99, batch=1, max_staleness=0, prompts=200)
    alice = house.server(capacity=1)
    alice.say(alice.hello)
    for version in range(40):
        house.announce(version)
        alice.say(a_swapped(version))
        (lease,) = alice.leases(1)
        if version < 20:
            alice.answer(lease, version=version)
            house.take(version)
        else:  # never taken: the next version makes it too old
            group = a_group(lease.lease, [[(version, 9)], [(version, 11)]], rewards=[1, 1])
            alice.say(group)
            house.waits_for(lambda counts: counts.buffered == 1)
            house.intake._remove_stale(version + 1)
    counts = house.counts()
    assert (counts.consumed_length, counts.dropped_length, counts.dropped_reward) == (2.0, 10.0, 1.0)
    assert "drops are biased: the 20 dropped groups have 10 tokens" in caplog.text


# --- acknowledgement -------------------------------------------------------------------------------------------------


def test_a_group_is_acknowledged_only_when_the_ledger_holds_it(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    house = build()
    house.announce(0)
    alice = house.server().join()
    (lease, *_) = alice.leases(4)

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(house.intake._ledger, "receive", fail)
    alice.say(a_group_of_version(0, lease.lease))
    assert not [message for message in alice.hear_all(0.5) if isinstance(message, Ack)]
    with pytest.raises(OSError, match="no space"):
        house.counts()


@pytest.mark.parametrize(
    "changes",
    [
        {"response_ids": np.array([0, 1, 100, 64], np.int32)},
        {"lengths": np.array([3, 1], np.int32), "span_lengths": np.array([3, 1], np.int32)},
        {"epoch": 7, "prompt_id": "p0"},
        {"prompt_id": "another"},
    ],
    ids=["vocabulary", "too long", "epoch", "prompt"],
)
def test_a_group_that_would_break_training_or_answers_another_prompt_is_malformed(
    build: Build, changes: dict[str, Any]
) -> None:
    house = build(sampling={"max_response_tokens": 2})
    house.intake._identity = Identity("agreement", "model", "tokenizer", vocabulary=100)
    house.announce(0)
    alice = house.server().join()
    (lease, *_) = alice.leases(4)
    group = msgspec.structs.replace(
        a_group_of_version(0, lease.lease), response_ids=np.array([0, 1, 99, 64], np.int32), prompt_id=lease.prompt_id
    )
    alice.say(msgspec.structs.replace(group, **changes))
    alice.hear(Ack)
    assert house.counts().dropped == {"malformed": 1}
    (_, again, *_) = [lease, *alice.leases(1)]
    good = msgspec.structs.replace(group, lease=again.lease, prompt_id=again.prompt_id)
    alice.say(good)
    house.waits_for(lambda counts: counts.buffered == 1)


# --- replay ----------------------------------------------------------------------------------------------------------


def test_with_replay_a_batch_is_drawn_again_at_the_next_version_and_prompts_are_leased_as_groups_leave(
    build: Build,
) -> None:
    house = build(batch=2, max_staleness=1, algorithm={"utd": 2, "reuse": "replay"})
    house.announce(0)
    alice = house.server(capacity=9).join()
    leases = alice.leases(2)  # two uses each: 4 uses are 2 batches
    alice.answer(*leases)
    first = house.take(0)
    house.announce(1)
    alice.say(a_swapped(1))
    assert not [message for message in alice.hear_all() if isinstance(message, Lease)]
    again = house.take(1)
    assert [(held.lease, held.uses) for held in first] == [(lease.lease, 0) for lease in leases]
    assert [(held.lease, held.uses) for held in again] == [(lease.lease, 1) for lease in leases]
    assert len(alice.leases(2)) == 2
    counts = house.counts()
    assert (counts.admitted, counts.in_flight, counts.buffered, counts.consumed) == (4, 2, 0, 2)
    assert (counts.used, counts.lapsed, counts.dropped) == (4, 0, {})


def test_uses_that_the_bound_forbids_lapse_with_the_batch_and_a_new_prompt_is_leased(build: Build) -> None:
    house = build(batch=1, max_staleness=0, algorithm={"utd": 3, "reuse": "replay"})
    house.announce(0)
    alice = house.server().join()
    alice.answer(*alice.leases(1))
    house.take(0)
    counts = house.counts()
    assert (counts.consumed, counts.buffered, counts.used, counts.lapsed) == (1, 0, 1, 2)
    house.announce(1)
    alice.say(a_swapped(1))
    alice.leases(1)


def test_with_epochs_a_group_leaves_the_stream_with_its_batch(build: Build) -> None:
    house = build(batch=1, max_staleness=4, algorithm={"utd": 4, "reuse": "epochs"})
    house.announce(0)
    alice = house.server().join()
    alice.answer(*alice.leases(1))
    house.take(0)
    counts = house.counts()
    assert (counts.consumed, counts.buffered, counts.used, counts.lapsed) == (1, 0, 1, 0)


def test_a_replaying_run_admits_what_it_needs_and_a_resume_leases_nothing_again_that_was_used(build: Build) -> None:
    settings: dict[str, Any] = {"steps": 6, "batch": 2, "max_staleness": 3, "algorithm": {"utd": 2, "reuse": "replay"}}
    used: list[tuple[int, str]] = []
    state: StreamState | None = None
    for first, last in ((0, 3), (3, 6)):
        house = build(state, prompts=50, **settings)
        house.announce(first)
        alice = house.server("alice", capacity=3)
        alice.answers_everything = True
        alice.say(alice.hello)
        for version in range(first, last):
            taken = house.take(version)
            assert [held.uses for held in taken] == [used.count((held.epoch, held.prompt.prompt_id)) for held in taken]
            used += [(held.epoch, held.prompt.prompt_id) for held in taken]
            house.announce(version + 1)
        state = house.intake.state()
        house.close()
    assert state is not None
    assert all(used.count(group) <= 2 for group in used)
    assert (state.ledger.used, state.ledger.consumed + len(state.held)) == (12, len(set(used)))
    assert state.ledger.unconsumed == []


def test_buffered_groups_of_other_sampling_settings_are_made_anew_at_a_resume(build: Build) -> None:
    house = build(batch=2, max_staleness=1, prompts=50)
    house.announce(0)
    alice = house.server().join()
    alice.answer(*alice.leases(1))
    house.waits_for(lambda counts: counts.buffered == 1)
    state = house.intake.state()
    house.close()
    assert len(state.held) == 1
    other = StreamState(msgspec.structs.replace(state.ledger, agreement="other"), state.held)
    for kept, buffered in ((state, 1), (other, 0)):
        house = build(kept, batch=2, max_staleness=1, prompts=50)
        assert house.counts().buffered == buffered
        house.close()


# --- the warm start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [{}, {"utd": 2, "reuse": "replay"}], ids=["epochs", "replay"])
def test_the_warm_start_takes_as_many_batches_of_new_groups_at_version_0_as_it_likes(
    build: Build, algorithm: dict[str, Any]
) -> None:
    house = build(steps=1, batch=2, max_staleness=1, prompts=50, algorithm=algorithm)
    house.announce(0)
    alice = house.server(capacity=9)
    alice.answers_everything = True
    alice.say(alice.hello)
    taken: list[BufferedGroup] = []
    for _ in range(5):
        taken += house.intake.take(0, house.ending.is_set, warm_start=True) or []
    taken += house.take(0)
    assert len({held.lease for held in taken}) == 12
    time.sleep(QUIET)
    counts = house.counts()
    assert (counts.admitted, counts.consumed + counts.buffered, counts.used) == (12, 12, 12)
    assert (counts.in_flight, counts.dropped, counts.lapsed) == (0, {}, 0)


# --- the brake -------------------------------------------------------------------------------------------------------


def test_the_brake_lowers_and_restores_the_bound_of_admission(build: Build) -> None:
    house = build(batch=2, max_staleness=1)
    house.intake.limit_staleness(0)
    house.announce(0)
    alice = house.server(capacity=9).join()
    alice.leases(2)
    assert not [message for message in alice.hear_all() if isinstance(message, Lease)]
    house.intake.limit_staleness(1)
    alice.leases(2)
    assert alice.hear_all() == []
    with pytest.raises(ValueError, match="from 0 to stream"):
        house.intake.limit_staleness(2)


def test_the_brake_drops_nothing_that_was_leased_before(build: Build) -> None:
    house = build(batch=2, max_staleness=1)
    house.announce(0)
    alice = house.server(capacity=9).join()
    leases = alice.leases(4)
    house.intake.limit_staleness(0)
    alice.answer(*leases)
    house.take(0)
    house.announce(1)
    assert [held.oldest_version for held in house.take(1)] == [0, 0]
    assert house.counts().dropped == {}


# --- dynamic sampling ------------------------------------------------------------------------------------------------


def without_signal(lease: Lease, **changes: Any) -> Group:
    group = a_group_of_version(0, lease.lease)
    return msgspec.structs.replace(group, rewards=np.full(2, 0.25, np.float32), **changes)


def test_a_group_without_signal_is_dropped_and_another_prompt_takes_its_place(build: Build) -> None:
    house = build(steps=1, batch=2, max_staleness=0, stream={"drop_equal_rewards": True})
    house.announce(0)
    alice = house.server().join()
    first, second = alice.leases(2)
    alice.say(without_signal(first))
    assert alice.hear(Ack).lease == first.lease
    (third,) = alice.leases(1)
    assert names([first, second, third]) == ["p0", "p1", "p2"]
    alice.answer(second, third)
    assert [held.lease for held in house.take(0)] == [second.lease, third.lease]
    counts = house.counts()
    assert (counts.admitted, counts.consumed, counts.dropped) == (3, 2, {"no signal": 1})
    (event,) = house.events("dropped")
    assert (event["reason"], event["length_mean"], event["reward_mean"]) == ("no signal", 2.0, 0.25)
    assert house.intake.state().ledger.unconsumed == []


@pytest.mark.parametrize("keeps", ["not asked for", "process rewards"])
def test_a_group_of_equal_rewards_is_kept_where_that_is(build: Build, keeps: str) -> None:
    house = build(batch=1, max_staleness=0, stream={"drop_equal_rewards": keeps != "not asked for"})
    house.announce(0)
    alice = house.server().join()
    (lease,) = alice.leases(1)
    dense = {"step_rewards": np.array([0, 1, 0, 0], np.float32)} if keeps == "process rewards" else {}
    alice.say(without_signal(lease, **dense))
    assert [held.lease for held in house.take(0)] == [lease.lease]


def test_a_run_without_any_signal_ends_and_says_so(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_sampling, "_BATCHES_WITHOUT_SIGNAL", 2)
    house = build(batch=2, max_staleness=1, stream={"drop_equal_rewards": True})
    house.announce(0)
    alice = house.server(capacity=1).join()
    for _ in range(3):
        alice.say(without_signal(alice.leases(1)[0]))
    alice.say(a_group_of_version(0, alice.leases(1)[0].lease))  # has signal: it starts again
    for _ in range(3):
        alice.say(without_signal(alice.leases(1)[0]))
    assert house.waits_for(lambda counts: counts.dropped == {"no signal": 6})
    taking = house.taking(0)
    alice.say(without_signal(alice.leases(1)[0]))
    with pytest.raises(StallError, match=r"the last 4 groups had one reward each, 0\.25 .*drop_equal_rewards"):
        taking.result(LONG)


def test_a_group_without_any_graded_response_is_leased_again_and_after_five_times_its_prompt_is_given_up(
    build: Build,
) -> None:
    house = build(batch=1, max_staleness=0)
    house.announce(0)
    alice = house.server(capacity=1).join()
    failed = {"rewards": np.zeros(2, np.float32), "reward_errors": np.ones(2, np.uint8)}
    for _ in range(5):
        (lease,) = alice.leases(1)
        assert lease.prompt_id == "p0"
        alice.say(msgspec.structs.replace(a_group_of_version(0, lease.lease), **failed))
    (other,) = alice.leases(1)
    assert other.prompt_id == "p1"
    partly = {"rewards": np.array([1, 0], np.float32), "reward_errors": np.array([0, 1], np.uint8)}
    alice.say(msgspec.structs.replace(a_group_of_version(0, other.lease), **partly))
    assert [held.lease for held in house.take(0)] == [other.lease]
    assert house.counts().dropped == {"reward errors": 5}


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_held_out_problems_go_to_servers_of_that_version_and_never_enter_the_counts(build: Build) -> None:
    house = build(batch=1, max_staleness=1, eval={"samples": 3})
    house.announce(0)
    house.announce(1)
    old, new = house.server("old", capacity=2).join(version=0), house.server("new", capacity=2).join(version=1)
    (trained,) = old.leases(1)
    (also,) = new.leases(1)
    before = house.counts()
    evaluating = house.evaluating(3, version=1)
    (first,) = new.leases(1)
    assert (first.purpose, first.group_size, first.prompt_id, first.answer) == ("eval", 3, "p100", "100")
    new.answer(first)
    (second,) = new.leases(1)
    new.say(Failed(lease=second.lease, reason="no"))  # goes back to the end
    (third,) = new.leases(1)
    assert third.prompt_id == "p102"
    new.answer(msgspec.structs.replace(third, group_size=2))  # one response too few
    again = []
    for _ in range(2):
        again += new.leases(1)
        new.answer(again[-1])
    groups = evaluating.result(LONG)
    assert sorted(names(again)) == ["p101", "p102"]
    by_prompt = {lease.prompt_id: lease.lease for lease in [first, *again]}
    assert [group.lease for group in groups] == [by_prompt[f"p{n}"] for n in (100, 101, 102)]
    assert not [message for message in old.hear_all() if isinstance(message, Lease)]
    after = house.counts()
    assert after.malformed == 1
    assert (after.admitted, after.in_flight, after.dropped) == (before.admitted, before.in_flight, {})
    old.answer(trained)
    new.answer(also)


def test_held_out_problems_of_a_server_that_leaves_go_to_another(build: Build) -> None:
    house = build(steps=1, batch=1, max_staleness=0, eval={"samples": 1})
    house.announce(0)
    alice = house.server("alice", capacity=3).join()
    alice.leases(1)
    evaluating = house.evaluating(2, version=0)
    assert names(alice.leases(2)) == ["p100", "p101"]
    alice.say(Goodbye(reason=""))
    bob = house.server("bob").join()
    bob.answer(*[lease for lease in bob.leases(3) if lease.purpose == "eval"])
    assert len(evaluating.result(LONG)) == 2


def test_a_held_out_problem_that_is_not_answered_in_time_is_cancelled_and_given_out_again(build: Build) -> None:
    house = build(steps=1, batch=1, max_staleness=0, eval={"samples": 1}, stream={"lease_timeout_s": 0.3})
    house.announce(0)
    alice = house.server("alice").join()
    alice.answer(alice.leases(1)[0])
    evaluating = house.evaluating(1, version=0)
    (slow,) = alice.leases(1)
    assert alice.hear(Cancel).leases == [slow.lease]
    (again,) = alice.leases(1)
    assert again.prompt_id == slow.prompt_id
    alice.answer(again)
    assert len(evaluating.result(LONG)) == 1


def test_a_server_cannot_answer_or_fail_anothers_held_out_problem(build: Build) -> None:
    house = build(steps=1, batch=1, max_staleness=0, eval={"samples": 1})
    house.announce(0)
    alice = house.server("alice", capacity=2).join()
    alice.leases(1)
    evaluating = house.evaluating(1, version=0)
    (lease,) = alice.leases(1)
    bob = house.server("bob", capacity=1).join()
    bob.answer(lease)
    bob.say(Failed(lease=lease.lease, reason="not mine"))
    assert not [message for message in bob.hear_all() if isinstance(message, Lease)]
    assert not evaluating.done()
    alice.answer(lease)
    assert [group.lease for group in evaluating.result(LONG)] == [lease.lease]


def test_an_evaluation_waits_for_a_server_of_its_version_and_says_so_when_none_comes(build: Build) -> None:
    house = build(stream={"batch_timeout_s": 0.3})
    house.announce(0)
    house.announce(1)
    house.server().join(version=0)
    with pytest.raises(StallError, match=r"answers to 2 held-out problems, 0 came; .*versions \[0\], wanted 1"):
        house.evaluating(2, version=1).result(LONG)


def test_an_evaluation_ends_on_a_stop(build: Build) -> None:
    house = build()
    evaluating = house.evaluating(2, version=0)
    time.sleep(0.05)
    house.ending.set()
    assert evaluating.result(LONG) is None


# --- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["the run is complete", None])
def test_close_tells_every_server_to_stop_or_lets_them_live(build: Build, reason: str | None) -> None:
    house = build()
    house.announce(0)
    servers = [house.server(name).join() for name in ("alice", "bob")]
    house.waits_for(lambda counts: counts.swaps == 2)
    house.intake.close(reason)
    stops = [[message.reason for message in s.hear_all() if isinstance(message, Stop)] for s in servers]
    assert stops == ([[reason]] * 2 if reason else [[], []])


def test_a_take_without_groups_ends_on_a_stop(build: Build) -> None:
    house = build()
    assert house.intake.take(0, should_stop=lambda: True) is None


def test_a_stall_says_what_there_was(build: Build) -> None:
    house = build(stream={"batch_timeout_s": 0.3})
    house.announce(0)
    alice = house.server(capacity=3).join()
    alice.answer(alice.leases(3)[0])
    message = (
        r"waited 0(\.3)? s for a batch of 2 groups for version 0: 1 rollout servers, 3 groups in flight, 1 buffered; "
        r"is a rollout server running.*stream\.batch_timeout_s"
    )
    alice.leases(1)
    with pytest.raises(StallError, match=message):
        house.take(0)


def test_a_failure_in_the_thread_is_raised_by_every_method_of_the_learner(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build()
    taking = house.taking(0)

    def fail(timeout_s: float) -> None:
        raise RuntimeError("the socket is gone")

    monkeypatch.setattr(house.hub, "receive", fail)
    house.hub.wake()
    with pytest.raises(RuntimeError, match="the socket is gone"):
        taking.result(LONG)
    for call in (
        lambda: house.take(0),
        lambda: house.announce(1),
        lambda: house.intake.evaluate([], 0, lambda: False),
        house.counts,
        house.intake.state,
        house.intake.oldest_served_version,
        lambda: house.intake.limit_staleness(0),
    ):
        with pytest.raises(RuntimeError, match="the socket is gone"):
            call()


def test_counts_that_do_not_add_up_end_the_run(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server().join()
    alice.answer(*alice.leases(4)[:2])
    house.intake._ledger.admitted += 1
    with pytest.raises(ConservationError):
        house.take(0)


def test_a_server_whose_swap_failed_is_told_of_the_weights_again_until_it_serves_them(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_RETRY_S", 0.1)
    monkeypatch.setattr(pool, "_LONGEST_RETRY_S", 0.2)
    house = build(stream={"heartbeat_s": 0.3})
    house.announce(0)
    alice = house.server()
    alice.say(alice.hello)
    alice.hear(WeightsReady)
    for _ in range(2):  # the second one even if what the server says to the first is lost
        alice.say(SwapFailed(policy_version=0, reason="a file is missing from version 0"))
        assert alice.hear(WeightsReady).policy_version == 0
    alice.hear(WeightsReady)
    alice.say(a_swapped(0))
    alice.leases(4)
    alice.hear_all(0.0)
    assert [message for message in alice.hear_all(0.5) if isinstance(message, WeightsReady)] == []


def test_another_trainers_version_of_the_same_number_is_not_taken_for_this_ones(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server()
    alice.say(alice.hello)
    alice.hear(WeightsReady)
    alice.say(a_swapped(0, manifest="that of a version 0 that was rolled back"))
    assert alice.hear(WeightsReady).manifest == "checksum-0"
    assert not any(isinstance(message, Lease) for message in alice.hear_all())
    assert house.counts().swaps == 0
    alice.say(a_swapped(0))
    alice.leases(4)


class Clock:
    """The intake's clock, which can be moved on as it is while a process is stopped."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.mark.parametrize("first", ["the thread", "the learner"])
def test_a_stop_of_this_process_ends_no_wait_and_no_lease(
    build: Build, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    clock = Clock()
    monkeypatch.setattr(intake_module, "time", clock)
    house = build(stream={"batch_timeout_s": 60.0, "lease_timeout_s": 60.0, "set_aside_s": 60.0})
    house.announce(0)
    alice = house.server().join()
    leases = alice.leases(4)
    batch = house.taking(0)
    breaker = house.intake._pool.get(b"alice/1").breaker  # type: ignore[union-attr]
    breaker.until = until = clock.monotonic() + 60.0
    time.sleep(QUIET)
    if first == "the learner":
        receive = house.hub.receive
        monkeypatch.setattr(house.hub, "receive", lambda wait_s: (time.sleep(0.8), receive(wait_s))[1])
        time.sleep(QUIET)  # the thread sleeps now, longer than the learner waits
    clock.ahead_s = 1000.0
    time.sleep(1.8 if first == "the learner" else 0.8)
    assert not batch.done()
    assert breaker.until == pytest.approx(until + 1000.0, abs=5)
    assert not any(isinstance(message, Cancel) for message in alice.hear_all())
    alice.answer(*leases[:2])
    assert [held.prompt.prompt_id for held in batch.result(LONG)] == ["p0", "p1"]
    assert house.counts().dropped == {}


def test_held_out_problems_outlive_a_stop_of_this_process(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(intake_module, "time", clock)
    house = build(steps=1, stream={"batch_timeout_s": 60.0, "lease_timeout_s": 60.0})
    house.announce(0)
    answers = house.evaluating(1, 0)
    alice = house.server(capacity=1).join()
    (lease,) = alice.leases(1)
    assert lease.purpose == "eval"
    clock.ahead_s = 1000.0
    time.sleep(0.8)
    assert not answers.done()
    assert not any(isinstance(message, Cancel) for message in alice.hear_all())
    alice.answer(lease)
    assert len(answers.result(LONG)) == 1


# --- what is reported ------------------------------------------------------------------------------------------------


def test_the_oldest_served_version_is_that_of_the_slowest_server(build: Build) -> None:
    house = build()
    assert house.intake.oldest_served_version() is None
    house.announce(2)
    house.announce(3)
    house.server("alice").join(version=3)
    house.server("bob").join(version=2)
    house.waits_for(lambda counts: counts.swaps == 2)
    assert house.intake.oldest_served_version() == 2
    carol = house.server("carol")
    carol.say(carol.hello)
    house.waits_for(lambda counts: counts.servers == 3)
    assert house.intake.oldest_served_version() == 2  # it loads version 3 or a later one


def test_a_server_that_never_swaps_keeps_only_what_was_announced_since_its_hello(build: Build) -> None:
    house = build()
    for version in range(6):
        house.announce(version)
    carol = house.server("carol")
    carol.say(carol.hello)
    house.waits_for(lambda counts: counts.servers == 1)
    house.announce(6)
    assert house.intake.oldest_served_version() == 5


def test_tokens_and_idle_time_are_those_of_all_servers_that_ever_were_each_once(build: Build) -> None:
    house = build()
    alice, bob = house.server("alice").join(), house.server("bob").join()
    alice.say(a_status(tokens=100, idle_s=1.0))
    alice.say(a_status(tokens=150, idle_s=2.0))
    bob.say(a_status(tokens=7, idle_s=0.5))
    house.waits_for(lambda counts: counts.tokens == 157 and counts.idle_s == 2.5)
    alice.say(Goodbye(reason=""))
    house.waits_for(lambda counts: counts.servers == 1)
    assert house.counts().tokens == 157
    alice.say(alice.hello, a_status(tokens=160, idle_s=2.0))  # it was only out of reach
    counts = house.waits_for(lambda counts: counts.servers == 2 and counts.tokens != 157)
    assert (counts.tokens, counts.idle_s) == (167, 2.5)


# --- resume ----------------------------------------------------------------------------------------------------------


def test_after_a_resume_every_prompt_is_consumed_exactly_once(build: Build) -> None:
    steps, batch = 6, 2
    consumed: list[tuple[int, str]] = []
    state: StreamState | None = None
    for first, last in ((0, 2), (2, 3), (3, 6)):  # the trainer ends twice, and returns from its checkpoint
        house = build(state, prompts=5, steps=steps, batch=batch, max_staleness=2, stream={"ready_batches": 3})
        house.announce(first)
        if last < steps:
            house.server("bob", capacity=2).join(first).leases(2)  # never answered: in flight when the trainer ends
        alice = house.server("alice", capacity=3)
        alice.answers_everything = True
        alice.say(alice.hello)
        for version in range(first, last):
            consumed += [(held.epoch, held.prompt.prompt_id) for held in house.take(version)]
            house.announce(version + 1)
        state = house.intake.state()
        house.close()
        assert state.ledger.consumed == last * batch
        assert len(state.ledger.unconsumed) >= (2 if last < steps else 0)
    assert len(consumed) == len(set(consumed)) == steps * batch
    sequence = some_prompts(5).after(0)
    leased = [next(sequence) for _ in range(state.ledger.next_position)]
    left = [leased[position] for position in [*state.ledger.unconsumed, *(held.position for held in state.held)]]
    assert sorted(consumed + [(epoch, prompt.prompt_id) for epoch, prompt in left]) == sorted(
        (epoch, prompt.prompt_id) for epoch, prompt in leased
    )


# --- groups of leases from before ------------------------------------------------------------------------------------


def kept(lease: Lease, trainer: str, version: int = 0, **changes: Any) -> Group:
    """The finished group of a lease, as a server keeps it."""
    group = a_group_of_version(version, lease.lease, lease.group_size)
    return msgspec.structs.replace(
        group, **({"trainer": trainer, "epoch": lease.epoch, "prompt_id": lease.prompt_id} | changes)
    )


def a_second_life(build: Build, **config: Any) -> tuple[House, Server, list[Lease], str]:
    """A trainer that came back from a checkpoint of version 1; the leases that were in flight when it was made."""
    first = build(batch=2, max_staleness=1, steps=4, **config)
    first.announce(0)
    alice = first.server(capacity=9)
    alice.say(alice.hello)
    trainer = alice.hear(Welcome).trainer
    alice.say(a_swapped(0))
    leases = alice.leases(4)
    alice.answer(*leases[:2])
    first.take(0)
    first.announce(1)
    state = first.intake.state()
    first.announce(2)  # and more, that no checkpoint has
    first.close()
    second = build(state, batch=2, max_staleness=1, steps=4, **config)
    server = second.server(capacity=9)
    server.say(server.hello)
    server.hear(Welcome)
    return second, server, leases[2:], trainer


def test_a_resumed_trainer_adopts_what_a_server_kept_even_before_it_has_published(build: Build) -> None:
    house, alice, (third, fourth), trainer = a_second_life(build)
    alice.say(kept(third, trainer), kept(third, trainer))
    assert [alice.hear(Ack).lease for _ in range(2)] == [third.lease] * 2
    counts = house.waits_for(lambda counts: counts.ignored != {})
    assert (counts.adopted, counts.buffered, counts.in_flight, counts.ignored) == (1, 1, 0, {"not wanted": 1})
    house.announce(1)
    alice.say(a_swapped(1))
    assert names(alice.leases(1)) == [fourth.prompt_id]  # first; of the other it has the group
    house.intake._ledger.check()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "rolled back"),  # published, and in no checkpoint
        ({"trainer": "somebody"}, "another run's"),
        ({"epoch": -1}, "not wanted"),  # a held-out prompt of the same id
        ({"prompt_id": "p0"}, "not wanted"),  # consumed
    ],
)
def test_what_does_not_count_any_more_is_acknowledged_and_ignored(
    build: Build, changes: dict[str, Any], reason: str
) -> None:
    house, alice, (third, _), trainer = a_second_life(build)
    alice.say(kept(third, **({"trainer": trainer} | changes)))
    assert alice.hear(Ack).lease == third.lease
    counts = house.counts()
    assert (counts.adopted, counts.buffered, counts.ignored, counts.malformed) == (0, 0, {reason: 1}, 0)


def test_a_kept_group_that_is_too_old_for_the_restored_version_is_ignored(build: Build) -> None:
    house, alice, (third, _), trainer = a_second_life(build)
    house.intake._admission.version = 2  # as if the checkpoint were of version 2
    alice.say(kept(third, trainer))
    alice.hear(Ack)
    assert house.counts().ignored == {"too stale": 1}


def test_a_kept_group_that_makes_no_sense_is_counted_and_its_prompt_leased_again(build: Build) -> None:
    house, alice, (third, _), trainer = a_second_life(build)
    alice.say(kept(third, trainer, rewards=np.zeros(3, np.float32)))
    alice.say(kept(third, trainer, span_versions=np.empty(0, np.int32)))
    for _ in range(2):
        alice.hear(Ack)
    house.announce(1)
    alice.say(a_swapped(1))
    assert third.prompt_id in names(alice.leases(2))
    assert (house.counts().malformed, house.counts().adopted) == (2, 0)


def test_a_restored_trainer_judges_by_its_own_version_from_the_start(build: Build) -> None:
    house, *_ = a_second_life(build)
    assert house.intake._admission.version == 1


def test_a_server_that_was_out_of_reach_keeps_its_answer_and_another_is_not_asked(build: Build) -> None:
    house = build(batch=2, max_staleness=1)
    house.announce(0)
    alice = house.server(capacity=2)
    alice.say(alice.hello)
    trainer = alice.hear(Welcome).trainer
    alice.say(a_swapped(0))
    lease, _ = alice.leases(2)
    alice.say(Goodbye(reason="gone for a moment"))
    house.waits_for(lambda counts: counts.servers == 0)
    alice.say(alice.hello, kept(lease, trainer))
    assert alice.hear(Ack).lease == lease.lease
    counts = house.counts()
    assert (counts.adopted, counts.buffered, counts.admitted, counts.dropped) == (1, 1, 3, {"server left": 2})


def test_an_answer_to_another_prompt_than_the_leases_is_malformed(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server().join()
    first, *_ = alice.leases(4)
    alice.say(kept(first, trainer="", prompt_id="p4"))
    alice.hear(Ack)
    assert house.counts().dropped == {"malformed": 1}


def test_a_server_whose_swapped_was_lost_is_asked_again(build: Build) -> None:
    house = build()
    house.announce(0)
    alice = house.server()
    alice.say(alice.hello)
    alice.hear(WeightsReady)
    alice.say(a_status(0))
    assert alice.hear(WeightsReady).policy_version == 0
    alice.say(a_swapped(0))
    alice.leases(4)


def test_buffered_groups_outlive_a_restart_with_their_uses(build: Build, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch": 2, "max_staleness": 2, "algorithm": {"utd": 2, "reuse": "replay"}}
    house = build(**settings)
    house.announce(0)
    alice = house.server(capacity=9).join()
    leases = alice.leases(3)
    alice.answer(*leases)
    house.take(0)
    house.announce(1)
    state = house.intake.state()
    state.write(tmp_path / "stream")
    house.close()
    ledger = msgspec.json.decode(msgspec.json.encode(state.ledger), type=LedgerState)
    house = build(StreamState.read(ledger, tmp_path / "stream", 1 << 20), **settings)
    counts = house.counts()
    assert (counts.admitted, counts.buffered, counts.in_flight, counts.used) == (3, 3, 0, 2)
    taken = house.take(1)
    assert [(held.prompt.prompt_id, held.uses, held.used_at) for held in taken] == [("p2", 0, -1), ("p0", 1, 0)]
    assert taken[1].group.rewards.tolist() == [0, 1]
    assert taken[1].group.response_ids.tolist() == a_group_of_version(0).response_ids.tolist()
