"""The transport over ZeroMQ sockets; the only file that imports zmq.

ROUTER and DEALER between trainer and rollout servers, DEALER and DEALER between learner and critic. The queues cannot
overflow: the trainer never has more leases out than admission allows, and a server never holds more than its capacity.

With keys (asyncppo/keys.py) a TCP socket speaks CURVE: encrypted, and authenticated both ways. The end that binds asks
pyzmq's authenticator about every key that knocks; the end that connects watches its handshakes, because one that is
turned away would otherwise hear nothing.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from asyncppo.errors import AddressError
from asyncppo.messages import Codec, Message, ToRollout, ToTrainer
from asyncppo.ports import is_loopback

log = logging.getLogger("asyncppo.transport")

_LINGER_MS = 1000
_HANDSHAKES = 4
"""Handshakes in a row that fail without a reason before people are told what the reason may be."""
_DOMAIN = "asyncppo"
"""By which the authenticator knows our sockets."""
_LOGGED = 20
"""Refused keys that are logged one by one."""


@dataclass(frozen=True, slots=True, repr=False)
class KeyPair:
    """A CURVE key pair, Z85; the secret one is in no log, as this has no repr of it."""

    public: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """Keys of an end that binds."""

    own: KeyPair
    allowed: Callable[[bytes], bool]
    """Whether the holder of this public key (Z85) is let in; called in another thread."""


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """Keys of an end that connects."""

    own: KeyPair
    server: bytes
    """Public key of the end that binds (Z85)."""


def make_key_files(directory: Path, name: str) -> None:
    """Write `name`.key and `name`.key_secret, in pyzmq's format."""
    zmq.auth.create_certificates(directory, name)


def read_key_file(path: Path) -> tuple[bytes, bytes | None]:
    """The public and, from a `.key_secret` file, the secret key (Z85).

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no key.
    """
    return zmq.auth.load_certificate(path)


class _Doorkeeper:
    """Asks `allowed` for every key that knocks, and logs those that are turned away."""

    def __init__(self, keys: ServerKeys, address: str) -> None:
        self._keys = keys
        self._address = address
        self._refused: set[bytes] = set()

    def callback(self, domain: str, key: bytes) -> bool:  # pyzmq's name
        if self._keys.allowed(key):
            return True
        if key not in self._refused and len(self._refused) < _LOGGED:
            self._refused.add(key)
            log.warning("%s: the holder of the unknown public key %s was turned away", self._address, key.decode())
        return False


class _Locked:
    """A context of its own for a socket that binds with keys, and the authenticator in it."""

    def __init__(self, keys: ServerKeys, address: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._keys = keys
        self._authenticator = ThreadAuthenticator(self.context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_DOMAIN, credentials_provider=_Doorkeeper(keys, address))

    def lock(self, socket: zmq.Socket[bytes]) -> None:
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self._keys.own.public, self._keys.own.secret
        socket.zap_domain = _DOMAIN.encode()

    def close(self) -> None:
        """After its sockets."""
        self._authenticator.stop()
        self.context.term()


class _Handshakes:
    """What becomes of the handshakes of a socket that connects: a refusal has to be told to people.

    A connection that closes before its handshake is no refusal: a tunnel or proxy accepts for an end that is away, and
    a process that is stopped accepts too. ZeroMQ goes on trying; whoever waits has a limit, and `hint` for its message.
    """

    def __init__(self, address: str, has_keys: bool) -> None:
        self._address = address
        self._has_keys = has_keys
        self._in_a_row = 0

    @property
    def hint(self) -> str:
        """Why nothing may come; empty when there is nothing to say."""
        if self._in_a_row < _HANDSHAKES:
            return ""
        return (
            f"{self._address} accepts connections and ends them before the handshake: the other end is away behind a "
            f"tunnel or proxy, or stopped, or its keys do not fit ({self._ours}; stream.keys)"
        )

    @property
    def _ours(self) -> str:
        return "this end has keys" if self._has_keys else "this end has no keys"

    def observe(self, frames: list[bytes]) -> None:
        """Take one message of the socket's monitor.

        Raises:
            AddressError: the other end does not accept this one's keys, or this one not the other's.
        """
        event = parse_monitor_message(frames)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._in_a_row = 0
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise AddressError(
                f"{self._address} does not let this key in: is its public key in the other end's directory of keys? "
                "(stream.keys; make it there with asyncppo keys)"
            )
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:  # after which ZeroMQ does not try again
            raise AddressError(
                f"{self._address} answers, and no handshake succeeds: {self._ours}, so the other one has none, or "
                "others; give both ends stream.keys with one directory that asyncppo keys made, or neither"
            )
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._in_a_row += 1
            if self._in_a_row == _HANDSHAKES:
                log.warning("%s; trying on", self.hint)


_WATCHED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


def _unlock(socket: zmq.Socket[Any], keys: ClientKeys | None) -> None:
    if keys is not None:
        socket.curve_publickey, socket.curve_secretkey = keys.own.public, keys.own.secret
        socket.curve_serverkey = keys.server


def check_address(address: str, insecure: bool, *, has_keys: bool = False) -> None:
    """Refuse an address that other hosts can reach, unless there are keys, or that was asked for.

    Raises:
        AddressError: the address is not loopback, and there are neither keys nor `insecure`.
    """
    if has_keys:
        return
    if not is_loopback(address) and not insecure:
        raise AddressError(
            f"{address} is not loopback, and without keys nothing on it is encrypted or authenticated: make keys with "
            "asyncppo keys DIR and give both ends stream.keys=DIR, keep to 127.0.0.1 (or a tunnel), or say "
            "stream.insecure=true on a network that you trust"
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
        keys: for CURVE; without them everybody is let in.

    Raises:
        AddressError: the address cannot be bound.
    """

    def __init__(self, address: str, max_bytes: int = 512 << 20, keys: ServerKeys | None = None) -> None:
        self._codec = Codec(ToTrainer, max_bytes)
        self._locked = _Locked(keys, address) if keys else None
        context: zmq.Context[zmq.Socket[bytes]] = self._locked.context if self._locked else zmq.Context.instance()
        self._socket = context.socket(zmq.ROUTER)
        if self._locked:
            self._locked.lock(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        try:
            self._address = _bind(self._socket, address.replace(":0", ":*") if address.endswith(":0") else address)
        except AddressError:
            if self._locked:
                self._locked.close()
            raise
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
        if self._locked:
            self._locked.close()


class ZmqLink:
    """`Link` on a DEALER socket in the running event loop.

    Args:
        address: where the hub listens.
        identity: who this is.
        max_bytes: larger messages are refused.
        keys: for CURVE.
    """

    def __init__(
        self, address: str, identity: bytes, max_bytes: int = 512 << 20, keys: ClientKeys | None = None
    ) -> None:
        self._codec = Codec(ToRollout, max_bytes)
        context: zmq.asyncio.Context = zmq.asyncio.Context.instance()
        self._socket: zmq.asyncio.Socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, identity)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        _unlock(self._socket, keys)
        self._monitor: zmq.asyncio.Socket = self._socket.get_monitor_socket(_WATCHED)
        self._handshakes = _Handshakes(address, keys is not None)
        self._refused: asyncio.Future[None] = asyncio.ensure_future(self._watch())
        self._socket.connect(address)

    @property
    def hint(self) -> str:
        return self._handshakes.hint

    async def receive(self) -> Any:
        message: asyncio.Future[list[bytes]] = asyncio.ensure_future(self._socket.recv_multipart())
        try:
            await asyncio.wait((message, self._refused), return_when=asyncio.FIRST_COMPLETED)
            if message.done():
                return self._codec.decode(message.result())
        finally:
            message.cancel()
        self._refused.result()
        raise AssertionError("the monitor ended without a reason")

    async def send(self, message: Message) -> None:
        await self._socket.send_multipart(self._codec.encode(message))

    def close(self) -> None:
        if not self._refused.cancel() and not self._refused.cancelled():
            self._refused.exception()  # who closes does not ask any more
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()

    async def _watch(self) -> None:
        while True:
            self._handshakes.observe(await self._monitor.recv_multipart())


class ZmqChannel:
    """`Channel` on a DEALER socket; the critic binds, the learner connects.

    Args:
        address: `tcp://host:port`, or `ipc://path`, on which there are no keys.
        receives: the union of messages that may come.
        bind: whether this end listens.
        max_bytes: larger messages are refused.
        keys: for CURVE: `ServerKeys` where it listens, else `ClientKeys`.
    """

    def __init__(
        self,
        address: str,
        receives: Any,
        *,
        bind: bool,
        max_bytes: int = 2 << 30,
        keys: ServerKeys | ClientKeys | None = None,
    ) -> None:
        self._codec = Codec(receives, max_bytes)
        self._locked = _Locked(keys, address) if isinstance(keys, ServerKeys) else None
        context: zmq.Context[zmq.Socket[bytes]] = self._locked.context if self._locked else zmq.Context.instance()
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.SNDTIMEO, 1000)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        # A host that vanished is noticed by the kernel within two minutes; a process that stands still is still there.
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 60)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 15)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
        self._monitor: zmq.Socket[bytes] | None = None
        self._handshakes = _Handshakes(address, keys is not None)
        if bind:
            try:
                if self._locked:
                    self._locked.lock(self._socket)
                _bind(self._socket, address)
            except AddressError:
                if self._locked:
                    self._locked.close()
                raise
        else:
            client = keys if isinstance(keys, ClientKeys) else None
            _unlock(self._socket, client)
            self._monitor = self._socket.get_monitor_socket(_WATCHED)
            self._socket.connect(address)

    @property
    def hint(self) -> str:
        return self._handshakes.hint

    def send(self, message: Message) -> bool:
        try:
            self._socket.send_multipart(self._codec.encode(message))
        except zmq.Again:
            self._look_at_handshakes()
            return False
        return True

    def receive(self, timeout_s: float) -> Any | None:
        self._look_at_handshakes()
        ready = self._socket.poll(max(0, int(timeout_s * 1000)))
        if not ready:
            return None
        return self._codec.decode(self._socket.recv_multipart())

    def close(self) -> None:
        if self._monitor:
            self._socket.disable_monitor()
            self._monitor.close()
        self._socket.close()
        if self._locked:
            self._locked.close()

    def _look_at_handshakes(self) -> None:
        while self._monitor and self._monitor.poll(0):
            self._handshakes.observe(self._monitor.recv_multipart())
