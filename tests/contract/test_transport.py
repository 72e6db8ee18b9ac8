"""The transport's contract, held by ZeroMQ and its in-process twin: order, both ways, several peers, and failures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import pytest
import zmq

from asyncppo import ports
from asyncppo.errors import AddressError, MessageError
from asyncppo.messages import Ack, Codec, CriticReady, Done, Failed, Learned, Message, Pulse, Stop, ToCritic, ToLearner
from asyncppo.transport.base import Channel, Hub, Link
from asyncppo.transport.memory import MemoryChannel, MemoryHub
from asyncppo.transport.zmq import ZmqChannel, ZmqHub, ZmqLink, check_address
from tests.stream_maker import a_group

pytestmark = pytest.mark.unit

LONG = 5.0
"""A wait that ends long before, unless something is broken."""
SHORT = 0.1
"""A wait for something that must not come."""


class Kind(Protocol):
    """One implementation."""

    def hub(self) -> Hub: ...

    def link(self, hub: Hub, identity: bytes) -> Link: ...

    def garbage_to_hub(self, hub: Hub) -> None:
        """A peer that speaks nonsense."""

    async def garbage_to_link(self, hub: Hub, identity: bytes) -> None:
        """The hub's end sends nonsense to a peer that has spoken."""


class Zmq:
    def hub(self) -> Hub:
        return ZmqHub("tcp://127.0.0.1:0")

    def link(self, hub: Hub, identity: bytes) -> Link:
        return ZmqLink(hub.address, identity)

    def garbage_to_hub(self, hub: Hub) -> None:
        with zmq.Context.instance().socket(zmq.DEALER) as stranger:
            stranger.connect(hub.address)
            stranger.send_multipart([b"\xc1nonsense", b"", b"more"])

    async def garbage_to_link(self, hub: Hub, identity: bytes) -> None:
        assert isinstance(hub, ZmqHub)
        hub._socket.send_multipart([identity, b"\xc1nonsense"])


class Memory:
    def hub(self) -> Hub:
        return MemoryHub()

    def link(self, hub: Hub, identity: bytes) -> Link:
        assert isinstance(hub, MemoryHub)
        return hub.link(identity)

    def garbage_to_hub(self, hub: Hub) -> None:
        assert isinstance(hub, MemoryHub)
        hub._inbox.put((b"stranger", [b"\xc1nonsense", b"", b"more"]))

    async def garbage_to_link(self, hub: Hub, identity: bytes) -> None:
        assert isinstance(hub, MemoryHub)
        hub._peers[identity]([b"\xc1nonsense"])


@pytest.fixture(params=[Zmq(), Memory()], ids=["zmq", "memory"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def hub(kind: Kind) -> Iterator[Hub]:
    hub = kind.hub()
    yield hub
    hub.close()


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario in an event loop of its own, with a limit."""

    async def limited() -> None:
        async with asyncio.timeout(2 * LONG):
            await scenario()

    asyncio.run(limited())


async def heard(hub: Hub, timeout_s: float = LONG) -> Any:
    """What the hub receives, while the loop goes on."""
    return await asyncio.to_thread(hub.receive, timeout_s)


async def said(link: Link) -> Any:
    async with asyncio.timeout(LONG):
        return await link.receive()


# --- hub and link ----------------------------------------------------------------------------------------------------


def test_messages_keep_their_order_both_ways(kind: Kind, hub: Hub) -> None:
    async def scenario() -> None:
        link = kind.link(hub, b"alice")
        for lease in range(50):
            await link.send(Failed(lease=lease, reason=""))
        got = [await heard(hub) for _ in range(50)]
        assert [(peer, message.lease) for peer, message in got] == [(b"alice", lease) for lease in range(50)]
        assert all([hub.send(b"alice", Ack(lease=lease)) for lease in range(50)])
        assert [(await said(link)).lease for _ in range(50)] == list(range(50))
        link.close()

    play(scenario)


def test_arrays_arrive_whole_and_read_only(kind: Kind, hub: Hub) -> None:
    group = a_group(9, [[(0, 40_000)]] * 2)

    async def scenario() -> None:
        link = kind.link(hub, b"alice")
        await link.send(group)
        _, got = await heard(hub)
        got.check(group_size=2)
        assert np.array_equal(got.response_ids, group.response_ids)
        assert not got.response_ids.flags.writeable
        link.close()

    play(scenario)


def test_several_peers_are_told_apart(kind: Kind, hub: Hub) -> None:
    async def scenario() -> None:
        links = {name: kind.link(hub, name) for name in (b"alice", b"bob", b"carol")}
        for number, link in enumerate(links.values()):
            await link.send(Failed(lease=number, reason=""))
        got = dict([await heard(hub) for _ in links])
        assert {peer: message.lease for peer, message in got.items()} == {b"alice": 0, b"bob": 1, b"carol": 2}
        for number, name in enumerate(links):
            assert hub.send(name, Pulse(policy_version=number))
        assert [(await said(link)).policy_version for link in links.values()] == [0, 1, 2]
        for link in links.values():
            link.close()

    play(scenario)


def test_receive_gives_up_after_its_timeout(hub: Hub) -> None:
    started = time.monotonic()
    assert hub.receive(SHORT) is None
    assert SHORT * 0.9 <= time.monotonic() - started < LONG
    assert hub.receive(0) is None
    assert hub.receive(-1.0) is None


def test_wake_ends_a_waiting_receive_and_is_no_message(hub: Hub) -> None:
    waker = threading.Timer(SHORT, hub.wake)
    waker.start()
    started = time.monotonic()
    assert hub.receive(LONG) is None
    assert time.monotonic() - started < LONG / 2
    waker.join()
    started = time.monotonic()
    assert hub.receive(SHORT) is None
    assert time.monotonic() - started >= SHORT * 0.9  # one wake ends one wait


def test_wakes_from_many_threads_lose_no_message(kind: Kind, hub: Hub) -> None:
    async def scenario() -> None:
        link = kind.link(hub, b"alice")
        threads = [threading.Thread(target=lambda: [hub.wake() for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for lease in range(10):
            await link.send(Failed(lease=lease, reason=""))
        got = []
        while len(got) < 10:
            item = await heard(hub)
            got += [item[1].lease] if item else []
        assert got == list(range(10))
        for thread in threads:
            thread.join()
        link.close()

    play(scenario)


def test_nonsense_is_one_message_error_and_the_next_message_arrives(kind: Kind, hub: Hub) -> None:
    async def scenario() -> None:
        kind.garbage_to_hub(hub)
        with pytest.raises(MessageError):
            await heard(hub)
        link = kind.link(hub, b"alice")
        await link.send(Failed(lease=1, reason=""))
        assert (await heard(hub))[1].lease == 1

        await kind.garbage_to_link(hub, b"alice")
        assert hub.send(b"alice", Ack(lease=2))
        with pytest.raises(MessageError):
            await said(link)
        assert (await said(link)).lease == 2
        link.close()

    play(scenario)


def test_a_peer_that_was_never_there_cannot_be_sent_to(hub: Hub) -> None:
    assert hub.send(b"nobody", Pulse(policy_version=0)) is False


def test_a_peer_that_is_gone_cannot_be_sent_to(kind: Kind, hub: Hub) -> None:
    async def scenario() -> None:
        link = kind.link(hub, b"alice")
        await link.send(Failed(lease=1, reason=""))
        await heard(hub)
        link.close()
        async with asyncio.timeout(LONG):
            while hub.send(b"alice", Pulse(policy_version=0)):  # until the socket has noticed
                await asyncio.sleep(0.01)

    play(scenario)


def test_what_was_sent_before_close_still_arrives(kind: Kind, hub: Hub) -> None:
    async def scenario() -> None:
        link = kind.link(hub, b"alice")
        await link.send(Failed(lease=1, reason="last words"))
        link.close()
        assert (await heard(hub))[1].reason == "last words"

    play(scenario)


def test_what_the_hub_sent_before_close_still_arrives(kind: Kind) -> None:
    async def scenario() -> None:
        hub = kind.hub()
        link = kind.link(hub, b"alice")
        await link.send(Failed(lease=1, reason=""))
        await heard(hub)
        assert hub.send(b"alice", Stop(reason="the run is complete"))
        hub.close()
        assert (await said(link)).reason == "the run is complete"
        link.close()

    play(scenario)


def test_a_link_that_comes_back_under_its_name_is_reached_and_the_old_one_no_longer(kind: Kind, hub: Hub) -> None:
    async def scenario() -> None:
        old = kind.link(hub, b"alice")
        await old.send(Failed(lease=1, reason=""))
        await heard(hub)
        new = kind.link(hub, b"alice")
        await new.send(Failed(lease=2, reason=""))
        assert (await heard(hub))[1].lease == 2
        old.close()
        await asyncio.sleep(SHORT)
        assert hub.send(b"alice", Ack(lease=2))
        assert (await said(new)).lease == 2
        new.close()

    play(scenario)


# --- ZeroMQ alone: addresses, time, size -----------------------------------------------------------------------------


def free_address() -> str:
    return f"tcp://127.0.0.1:{ports.free_port()}"


def bound(address: str) -> ZmqHub:
    """A hub on an address that was let go of a moment ago."""
    deadline = time.monotonic() + LONG
    while True:
        try:
            return ZmqHub(address)
        except AddressError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def test_a_hub_that_comes_late_gets_what_was_sent_before() -> None:
    async def scenario() -> None:
        address = free_address()
        link = ZmqLink(address, b"alice")
        await link.send(Failed(lease=1, reason="early"))
        await asyncio.sleep(SHORT)
        hub = bound(address)
        assert (await heard(hub))[1].reason == "early"
        assert hub.send(b"alice", Ack(lease=1))
        assert (await said(link)).lease == 1
        link.close()
        hub.close()

    play(scenario)


def test_a_link_finds_a_new_hub_on_the_old_port() -> None:
    async def scenario() -> None:
        first = ZmqHub("tcp://127.0.0.1:0")
        link = ZmqLink(first.address, b"alice")
        await link.send(Failed(lease=1, reason=""))
        await heard(first)
        first.close()
        second = await asyncio.to_thread(bound, first.address)
        await link.send(Failed(lease=2, reason=""))
        peer, message = await heard(second)
        assert (peer, message.lease) == (b"alice", 2)
        assert second.send(b"alice", Ack(lease=2))
        assert (await said(link)).lease == 2
        link.close()
        second.close()

    play(scenario)


def test_a_free_port_is_taken_for_port_0_and_named() -> None:
    hubs = [ZmqHub(address) for address in ("tcp://127.0.0.1:0", "tcp://127.0.0.1:*")]
    ports = {int(hub.address.rpartition(":")[2]) for hub in hubs}
    assert len(ports) == 2
    assert min(ports) > 0
    for hub in hubs:
        hub.close()


def test_a_port_that_is_taken_is_an_address_error_with_advice() -> None:
    hub = ZmqHub("tcp://127.0.0.1:0")
    with pytest.raises(AddressError, match=r"address (already )?in use; .*another port \(stream.address\)") as caught:
        ZmqHub(hub.address)
    assert hub.address in str(caught.value)
    hub.close()


@pytest.mark.parametrize("address", ["tcp://203.0.113.1:5757", "tcp://no.such.host.invalid:5757", "carrier-pigeon://1"])
def test_an_address_that_is_not_this_hosts_is_an_address_error(address: str) -> None:
    with pytest.raises(AddressError, match="cannot listen on"):
        ZmqHub(address)
    with pytest.raises(AddressError, match="cannot listen on"):
        ZmqChannel(address, ToCritic, bind=True)


def test_a_message_above_the_limit_is_refused_and_a_small_one_passes() -> None:
    async def scenario() -> None:
        hub = ZmqHub("tcp://127.0.0.1:0", max_bytes=2000)
        link = ZmqLink(hub.address, b"alice")
        await link.send(a_group(1, [[(0, 200)]] * 2))  # 2 frames of 1600 bytes: each passes, together they do not
        with pytest.raises(MessageError, match="at most"):
            await heard(hub)
        await link.send(a_group(2))
        assert (await heard(hub))[1].lease == 2
        link.close()
        hub.close()

    play(scenario)


def test_a_frame_above_the_limit_does_not_reach_the_hub_and_the_others_go_on() -> None:
    async def scenario() -> None:
        hub = ZmqHub("tcp://127.0.0.1:0", max_bytes=2000)
        other, link = ZmqLink(hub.address, b"bob"), ZmqLink(hub.address, b"alice")
        await link.send(a_group(1, [[(0, 1000)]] * 2))
        assert await heard(hub, SHORT) is None
        await other.send(a_group(2))
        assert (await heard(hub))[1].lease == 2
        other.close()
        link.close()
        hub.close()

    play(scenario)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("tcp://127.0.0.1:5757", True),
        ("tcp://127.8.9.10:5757", True),
        ("tcp://localhost:5757", True),
        ("tcp://[::1]:5757", True),
        ("tcp://0.0.0.0:5757", False),
        ("tcp://*:5757", False),
        ("tcp://10.1.2.3:5757", False),
        ("tcp://[::]:5757", False),
        ("tcp://trainer.example.com:5757", False),
        ("tcp://localhost.example.com:5757", False),
        ("tcp://127.0.0.1.example.com:5757", False),
        ("tcp://eth0:5757", False),
        ("tcp://[::1:5757", False),
        ("tcp://:5757", False),
        ("5757", False),
    ],
)
def test_only_loopback_addresses_go_without_being_asked_for(address: str, loopback: bool) -> None:
    check_address(address, insecure=True)
    if loopback:
        check_address(address, insecure=False)
    else:
        with pytest.raises(AddressError, match=r"not loopback.*stream\.insecure=true") as caught:
            check_address(address, insecure=False)
        assert address in str(caught.value)


# --- channel ---------------------------------------------------------------------------------------------------------


@contextmanager
def zmq_pair() -> Iterator[tuple[Channel, Channel]]:
    address = free_address()
    learner = ZmqChannel(address, ToLearner, bind=False)  # the learner may come first
    critic = ZmqChannel(address, ToCritic, bind=True)
    yield learner, critic
    learner.close()
    critic.close()


@contextmanager
def memory_pair() -> Iterator[tuple[Channel, Channel]]:
    learner, critic = MemoryChannel.pair(ToCritic)
    yield learner, critic
    learner.close()
    critic.close()


@pytest.fixture(params=[zmq_pair, memory_pair], ids=["zmq", "memory"])
def channels(request: pytest.FixtureRequest) -> Iterator[tuple[Channel, Channel]]:
    with request.param() as pair:
        yield pair


def send_nonsense(channel: Channel) -> None:
    if isinstance(channel, ZmqChannel):
        channel._socket.send_multipart([b"\xc1nonsense"])
    else:
        assert isinstance(channel, MemoryChannel)
        channel._outbox.put([b"\xc1nonsense"])


def test_a_channel_carries_both_ways_in_order(channels: tuple[Channel, Channel]) -> None:
    learner, critic = channels
    values = np.arange(3, dtype=np.float32)
    learner.send(Stop(reason="first"))
    assert critic.receive(LONG) is not None
    assert critic.send(CriticReady(index=1, parameters=2)) is True
    for step in range(20):
        critic.send(Learned(step=step, values=values, fresh_values=values, metrics={"loss": 0.5}, seconds=0.0))
        learner.send(Stop(reason=str(step)))
    assert learner.receive(LONG) is not None
    learned = [learner.receive(LONG) for _ in range(20)]
    assert [message.step for message in learned if message] == list(range(20))
    assert all(np.array_equal(message.values, values) for message in learned if message)
    stops = [critic.receive(LONG) for _ in range(20)]
    assert [message.reason for message in stops if message] == [str(step) for step in range(20)]


def test_a_channel_gives_up_after_its_timeout(channels: tuple[Channel, Channel]) -> None:
    learner, _ = channels
    started = time.monotonic()
    assert learner.receive(SHORT) is None
    assert SHORT * 0.9 <= time.monotonic() - started < LONG
    assert learner.receive(0.0) is None
    assert learner.receive(-1.0) is None


def test_a_channel_that_nobody_has_come_to_takes_nothing_and_does_not_wait_for_ever() -> None:
    critic = ZmqChannel(free_address(), ToCritic, bind=True)
    assert critic.send(Done()) is False
    critic.close()


def test_nonsense_on_a_channel_is_one_message_error(channels: tuple[Channel, Channel]) -> None:
    learner, critic = channels
    send_nonsense(critic)
    critic.send(Done())
    with pytest.raises(MessageError):
        learner.receive(LONG)
    assert isinstance(learner.receive(LONG), Done)


def test_a_message_for_the_other_end_is_a_message_error(channels: tuple[Channel, Channel]) -> None:
    learner, critic = channels
    critic.send(Stop(reason=""))  # only a learner says that
    with pytest.raises(MessageError):
        learner.receive(LONG)


def test_both_transports_put_the_same_bytes_on_the_wire() -> None:
    message: Message = a_group(3)
    expected = [bytes(frame) for frame in Codec(ToLearner).encode(message)]
    learner, critic = MemoryChannel.pair(ToCritic)
    critic.send(message)
    assert learner._inbox.get() == expected
    with zmq_pair() as (zmq_learner, zmq_critic):
        zmq_critic.send(message)
        assert isinstance(zmq_learner, ZmqChannel)
        assert zmq_learner._socket.poll(int(LONG * 1000))
        assert zmq_learner._socket.recv_multipart() == expected
