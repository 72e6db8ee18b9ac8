"""The in-process twin of the ZeroMQ transport, for tests and the plain run: same codec, same bytes, no sockets."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from typing import Any

from asyncppo.messages import Codec, Frames, Message, ToLearner, ToRollout, ToTrainer


class MemoryHub:
    """`Hub` whose peers are the links made by `link`."""

    def __init__(self) -> None:
        self._codec = Codec(ToTrainer)
        self._inbox: queue.SimpleQueue[tuple[bytes, Frames] | None] = queue.SimpleQueue()
        self._peers: dict[bytes, Callable[[Frames], None]] = {}

    @property
    def address(self) -> str:
        return "memory"

    def link(self, identity: bytes) -> MemoryLink:
        """A new peer's end; call it in the peer's event loop."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Frames] = asyncio.Queue()

        def deliver(frames: Frames) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, frames)

        self._peers[identity] = deliver

        def hang_up() -> None:
            if self._peers.get(identity) is deliver:  # else a newer link has the name
                del self._peers[identity]

        return MemoryLink(inbox, lambda frames: self._inbox.put((identity, frames)), hang_up)

    def receive(self, timeout_s: float) -> tuple[bytes, Any] | None:
        try:
            item = self._inbox.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        return item and (item[0], self._codec.decode(item[1]))

    def send(self, peer: bytes, message: Message) -> bool:
        deliver = self._peers.get(peer)
        if deliver is None:
            return False
        try:
            deliver([bytes(frame) for frame in self._codec.encode(message)])
        except RuntimeError:  # the peer's event loop has ended
            return False
        return True

    def wake(self) -> None:
        self._inbox.put(None)

    def close(self) -> None:
        self._peers.clear()


class MemoryLink:
    """`Link` made by `MemoryHub.link`."""

    def __init__(
        self, inbox: asyncio.Queue[Frames], deliver: Callable[[Frames], None], hang_up: Callable[[], None]
    ) -> None:
        self._codec = Codec(ToRollout)
        self._inbox = inbox
        self._deliver = deliver
        self._hang_up = hang_up

    @property
    def hint(self) -> str:
        return ""

    async def receive(self) -> Any:
        return self._codec.decode(await self._inbox.get())

    async def send(self, message: Message) -> None:
        self._deliver([bytes(frame) for frame in self._codec.encode(message)])

    def close(self) -> None:
        self._hang_up()


class MemoryChannel:
    """`Channel`; `pair` makes both ends."""

    def __init__(self, inbox: queue.SimpleQueue[Frames], outbox: queue.SimpleQueue[Frames], receives: Any) -> None:
        self._codec = Codec(receives)
        self._inbox, self._outbox = inbox, outbox

    @classmethod
    def pair(cls, to_critic: Any) -> tuple[MemoryChannel, MemoryChannel]:
        """The learner's end and the critic's end; `to_critic` is the union that the critic receives."""
        down: queue.SimpleQueue[Frames] = queue.SimpleQueue()
        up: queue.SimpleQueue[Frames] = queue.SimpleQueue()
        return cls(up, down, ToLearner), cls(down, up, to_critic)

    @property
    def hint(self) -> str:
        return ""

    def send(self, message: Message) -> bool:
        self._outbox.put([bytes(frame) for frame in self._codec.encode(message)])
        return True

    def receive(self, timeout_s: float) -> Any | None:
        try:
            return self._codec.decode(self._inbox.get(timeout=max(0.0, timeout_s)))
        except queue.Empty:
            return None

    def close(self) -> None:
        """Nothing to let go of."""
