"""The transport over ZeroMQ sockets; the only file that imports zmq.

ROUTER and DEALER between trainer and rollout servers, DEALER and DEALER between learner and critic. The queues cannot
overflow: the trainer never has more leases out than admission allows, and a server never holds more than its capacity.
"""

from __future__ import annotations

import ipaddress
import threading
from typing import Any
from urllib.parse import urlsplit

import zmq
import zmq.asyncio

from asyncppo.errors import AddressError
from asyncppo.messages import Codec, Message, ToRollout, ToTrainer

_LINGER_MS = 1000


def check_address(address: str, insecure: bool) -> None:
    """Refuse an address that other hosts can reach, unless that was asked for.

    Raises:
        AddressError: the address is not loopback and `insecure` is not set.
    """
    host = ""
    try:
        host = urlsplit(address).hostname or ""
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not insecure:
        raise AddressError(
            f"{address} is not loopback, and nothing on it is encrypted or authenticated: keep to 127.0.0.1 (or a "
            "tunnel), or say stream.insecure=true on a network that you trust"
        )


def _bind(socket: zmq.Socket[bytes], address: str) -> str:
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close(0)
        raise AddressError(
            f"cannot listen on {address}: {zmq.strerror(error.errno or 0).lower()}; stop what holds it or choose "
            "another port (stream.address)"
        ) from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


class ZmqHub:
    """`Hub` on a ROUTER socket.

    Args:
        address: `tcp://host:port`; port 0 or * takes a free one.
        max_bytes: larger messages are refused.

    Raises:
        AddressError: the address cannot be bound.
    """

    def __init__(self, address: str, max_bytes: int = 512 << 20) -> None:
        self._codec = Codec(ToTrainer, max_bytes)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._address = _bind(self._socket, address.replace(":0", ":*") if address.endswith(":0") else address)
        self._bell = context.socket(zmq.PULL)
        self._bell.bind(f"inproc://wake-{id(self)}")
        self._ringer = context.socket(zmq.PUSH)
        self._ringer.setsockopt(zmq.SNDHWM, 1)
        self._ringer.setsockopt(zmq.LINGER, 0)
        self._ringer.connect(f"inproc://wake-{id(self)}")
        self._ringer_lock = threading.Lock()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)

    @property
    def address(self) -> str:
        return self._address

    def receive(self, timeout_s: float) -> tuple[bytes, Any] | None:
        ready = dict(self._poller.poll(max(0, int(timeout_s * 1000))))
        if self._bell in ready:
            self._bell.recv(zmq.NOBLOCK)
        if self._socket not in ready:
            return None
        peer, *frames = self._socket.recv_multipart(copy=False)
        return peer.bytes, self._codec.decode([frame.buffer for frame in frames])

    def send(self, peer: bytes, message: Message) -> bool:
        try:
            self._socket.send_multipart([peer, *self._codec.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def wake(self) -> None:
        with self._ringer_lock:
            try:
                self._ringer.send(b"", zmq.NOBLOCK)
            except zmq.Again:
                return  # a wake is on its way already

    def close(self) -> None:
        for socket in (self._ringer, self._bell, self._socket):
            socket.close()


class ZmqLink:
    """`Link` on a DEALER socket in the running event loop."""

    def __init__(self, address: str, identity: bytes, max_bytes: int = 512 << 20) -> None:
        self._codec = Codec(ToRollout, max_bytes)
        context: zmq.asyncio.Context = zmq.asyncio.Context.instance()
        self._socket: zmq.asyncio.Socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, identity)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        self._socket.connect(address)

    async def receive(self) -> Any:
        return self._codec.decode(await self._socket.recv_multipart())

    async def send(self, message: Message) -> None:
        await self._socket.send_multipart(self._codec.encode(message))

    def close(self) -> None:
        self._socket.close()


class ZmqChannel:
    """`Channel` on a DEALER socket; the critic binds, the learner connects."""

    def __init__(self, address: str, receives: Any, *, bind: bool, max_bytes: int = 2 << 30) -> None:
        self._codec = Codec(receives, max_bytes)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.SNDTIMEO, 1000)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        if bind:
            _bind(self._socket, address)
        else:
            self._socket.connect(address)

    def send(self, message: Message) -> bool:
        try:
            self._socket.send_multipart(self._codec.encode(message))
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float) -> Any | None:
        if not self._socket.poll(max(0, int(timeout_s * 1000))):
            return None
        return self._codec.decode(self._socket.recv_multipart())

    def close(self) -> None:
        self._socket.close()
