"""A network that can be made bad: one ROUTER for each rollout server, one DEALER to the trainer for each of its lives.

    rollout server  DEALER ──▶ ROUTER [ weather ] DEALER ──▶ ROUTER  trainer

Whole ZeroMQ messages pass, under the identities of the servers, so the trainer sees the peers it would see without it.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass

import zmq

_TICK_MS = 20
_LIVES = 3
"""Connections to the trainer kept for each server: those of its latest processes."""


@dataclass(frozen=True, slots=True)
class Weather:
    """What happens to each message of one server, in either direction; probabilities."""

    drop: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    delay_s: float = 0.0
    """Up to so long, drawn for each message: so they overtake each other."""
    cut: bool = False
    """Nothing passes."""


FINE = Weather()


class Proxy:
    """Runs in a thread of its own from `start` to `close`.

    Args:
        ports: server's name to the port that it is told is the trainer's.
        trainer: where the trainer listens.
        seed: of what happens to which message.
    """

    def __init__(self, ports: dict[str, int], trainer: str, seed: int) -> None:
        self._trainer = trainer
        self._rng = random.Random(seed)
        self._ports = ports
        self._context: zmq.Context[zmq.Socket[bytes]]
        self._weather = dict.fromkeys(ports, FINE)
        self._fronts: dict[str, zmq.Socket[bytes]] = {}
        self._backs: dict[tuple[str, bytes], zmq.Socket[bytes]] = {}
        self._later: list[tuple[float, int, zmq.Socket[bytes], list[bytes]]] = []
        self._order = itertools.count()
        self._closing = threading.Event()
        self.counts: Counter[str] = Counter()
        """Of messages: passed, dropped, duplicated, corrupted, delayed."""
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def start(self) -> None:
        """From now on messages pass."""
        self._context = zmq.Context()
        self._fronts = {name: self._front(port) for name, port in self._ports.items()}
        self._thread.start()

    def close(self) -> None:
        """End the thread and all connections, if it was started."""
        if not self._thread.is_alive():
            return
        self._closing.set()
        self._thread.join(timeout=5)
        self._context.destroy(linger=0)

    def set_weather(self, name: str, weather: Weather) -> None:
        """From now on, for this server."""
        self._weather[name] = weather

    def _front(self, port: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.bind(f"tcp://127.0.0.1:{port}")
        return socket

    def _back(self, name: str, identity: bytes) -> zmq.Socket[bytes]:
        found = self._backs.get((name, identity))
        if found is None:
            lives = [key for key in self._backs if key[0] == name]
            for key in lives[: len(lives) - _LIVES + 1]:
                gone = self._backs.pop(key)
                self._later = [entry for entry in self._later if entry[2] is not gone]
                heapq.heapify(self._later)
                gone.close(0)
            found = self._context.socket(zmq.DEALER)
            found.setsockopt(zmq.ROUTING_ID, identity)
            found.setsockopt(zmq.RECONNECT_IVL, 50)
            found.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
            found.connect(self._trainer)
            self._backs[name, identity] = found
        return found

    def _run(self) -> None:
        while not self._closing.is_set():
            poller = zmq.Poller()
            for socket in (*self._fronts.values(), *self._backs.values()):
                poller.register(socket, zmq.POLLIN)
            ready = dict(poller.poll(_TICK_MS))
            for name, front in self._fronts.items():
                for _ in range(100 if front in ready else 0):
                    try:
                        identity, *frames = front.recv_multipart(zmq.NOBLOCK)
                    except zmq.Again:
                        break
                    self._pass(name, self._back(name, identity), [], frames)
            for (name, identity), back in list(self._backs.items()):
                for _ in range(100 if back in ready else 0):
                    try:
                        frames = back.recv_multipart(zmq.NOBLOCK)
                    except zmq.Again:
                        break
                    self._pass(name, self._fronts[name], [identity], frames)
            now = time.monotonic()
            while self._later and self._later[0][0] <= now:
                _, _, socket, frames = heapq.heappop(self._later)
                self._send(socket, frames)

    def _pass(self, name: str, to: zmq.Socket[bytes], head: list[bytes], frames: list[bytes]) -> None:
        weather, chance = self._weather[name], self._rng.random
        if weather.cut or chance() < weather.drop:
            self.counts["dropped"] += 1
            return
        if chance() < weather.corrupt:
            frames = self._corrupted(frames)
            self.counts["corrupted"] += 1
        copies = 1
        if chance() < weather.duplicate:
            copies = 2
            self.counts["duplicated"] += 1
        for _ in range(copies):
            if weather.delay_s:
                self.counts["delayed"] += 1
                due = time.monotonic() + chance() * weather.delay_s
                heapq.heappush(self._later, (due, next(self._order), to, [*head, *frames]))
            else:
                self._send(to, [*head, *frames])

    def _corrupted(self, frames: list[bytes]) -> list[bytes]:
        """A few bytes of one frame are others, or its end is missing."""
        which = self._rng.randrange(len(frames))
        data = bytearray(frames[which])
        if self._rng.random() < 0.3:
            del data[self._rng.randrange(len(data) + 1) :]
        for _ in range(self._rng.randint(1, 4) if data else 0):
            data[self._rng.randrange(len(data))] = self._rng.randrange(256)
        return [*frames[:which], bytes(data), *frames[which + 1 :]]

    def _send(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
            self.counts["passed"] += 1
        except zmq.ZMQError:  # its queue is full, or nobody is there: a network loses it, too
            self.counts["dropped"] += 1
