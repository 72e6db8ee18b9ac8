"""The pool: the rollout servers that are there, and which of them may have the next lease.

A server comes and goes, and nothing waits for one of them alone. What is asked for every message (who is it, who is
the least busy) costs the same with a thousand servers as with three; only `look_around` sees all, a few times a second.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from asyncppo.config import Config
from asyncppo.messages import Hello, Status

MISSED_HEARTBEATS = 10
"""Missed heartbeats that are a death."""
_LATE_SWAPS = 2.0
"""A server that serves an old version for so many times `rollout.swap_timeout_s` without a swap holds nothing up."""
_RETRY_S, _LONGEST_RETRY_S = 2.0, 30.0
"""After a failed swap a server is told of the weights again: first after the one, then twice as long each time, up to
the other. So long after the last word on weights it is told in any case, as words may be lost."""
_LONGEST = 10.0
"""A server is set aside for so many times `stream.set_aside_s` at most."""
_REMEMBERED = 1000
"""Servers that have left whose particulars are kept."""


@dataclass(slots=True)
class Breaker:
    """Keeps leases from a server that fails one after the other, then tries it with one.

    Closed (`until` is None), open until a time, then on probation with one lease; a completed group closes it again.
    """

    limit: int
    """Failures in a row that open it."""
    pause_s: float
    """How long it stays open the first time; twice as long each further time, up to ten times."""
    in_a_row: int = 0
    times: int = 0
    """How often it was opened since a group was completed."""
    until: float | None = None
    probation: bool = False

    def fail(self, now: float) -> float | None:
        """A lease failed. The seconds that the server is set aside for because of it, or None."""
        self.in_a_row += 1
        if (self.until is not None and not self.probation) or self.in_a_row < self.limit:
            return None
        pause = self.pause_s * min(2.0**self.times, _LONGEST)
        self.times = min(self.times + 1, 16)
        self.until, self.probation = now + pause, False
        return pause

    def succeed(self) -> bool:
        """A lease was completed. Whether the server was set aside until now."""
        was_open = self.until is not None
        self.in_a_row, self.times, self.until, self.probation = 0, 0, None, False
        return was_open

    def room(self, capacity: int) -> int:
        """Leases that the server may hold now."""
        if self.until is None:
            return capacity
        return 1 if self.probation else 0


@dataclass(slots=True, eq=False)
class Peer:
    """One rollout server of the pool."""

    identity: bytes
    name: str
    incarnation: str
    engine: str
    """What generates, for people."""
    started: float
    """When its process was started, by its own clock."""
    capacity: int
    last_seen: float
    breaker: Breaker
    number: int
    """Its place in the order of arrival."""
    policy_version: int = -1
    """What its engine serves; -1 before its first swap, and while it is quarantined."""
    wants_from: int = 0
    """While it serves no version: none older than this one is what it will load."""
    in_flight: int = 0
    status: Status | None = None
    behind_since: float | None = None
    """When the version that it has not swapped to was announced, or its last swap, if that was later."""
    prepared_since: float | None = None
    """It is prepared for the newest version since then, and was not told to swap: that is not its fault."""
    quarantined: bool = False
    """It answered the probe wrongly: its engine serves no version until it has swapped."""
    retry_at: float | None = None
    """When it is told of the weights again: as long as it is behind, and is not prepared."""
    retry_s: float = _RETRY_S
    """How long the next wait for that is."""
    late: bool = False
    """It has been behind for too long: it gets no lease, and no version is kept for it."""
    stamp: int = 0
    """Raised with every change, so that an older place in the queue is known to be void."""

    @property
    def has_room(self) -> bool:
        """Whether it may have one more lease, as far as it is up to itself."""
        return self.policy_version >= 0 and not self.late and self.in_flight < self.breaker.room(self.capacity)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What `Pool.look_around` has found."""

    dead: list[Peer]
    """Nothing was heard of them for too long."""
    late: list[Peer]
    """They have become `late` just now."""
    tell_again: list[Peer]
    """They are to be told of the weights again."""
    on_probation: list[Peer]
    """Their time aside is over: what they still hold is to be taken from them, then they may have one lease."""


_Place = tuple[float, int, int, Peer]
"""(share of its capacity in use, order of arrival, stamp, the server)"""


class Pool:
    """The servers by identity. Not thread-safe: the intake guards it. After every change of a peer: `update`."""

    def __init__(self, config: Config) -> None:
        self._stream = config.stream
        self._late_s = _LATE_SWAPS * config.rollout.swap_timeout_s
        self._peers: dict[bytes, Peer] = {}
        self._by_name: dict[str, Peer] = {}
        self._free: dict[int, list[_Place]] = {}
        """Version served to a heap of places, the least busy server first; void places are left in it for a while."""
        self._places = 0
        self._numbers = itertools.count()
        self._left: OrderedDict[tuple[bytes, str], Peer] = OrderedDict()
        self._tokens_before, self._idle_s_before = 0, 0.0
        self._announced = -1

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def get(self, identity: bytes) -> Peer | None:
        """The server of this identity, if it is in the pool."""
        return self._peers.get(identity)

    def of_name(self, name: str) -> Peer | None:
        """The server that has this name, if there is one."""
        return self._by_name.get(name)

    def is_replaced(self, hello: Hello) -> bool:
        """Whether a younger process has this one's name: Hellos of dead processes may come late, in any order."""
        holder = self._by_name.get(hello.server)
        return holder is not None and holder.incarnation != hello.incarnation and holder.started > hello.started

    def join(self, identity: bytes, hello: Hello, now: float) -> Peer:
        """A server comes, or comes back: what it failed at, and its counts, are then still known."""
        peer = self._left.pop((identity, hello.incarnation), None)
        if peer is None:
            breaker = Breaker(self._stream.failures_in_a_row, self._stream.set_aside_s)
            peer = Peer(
                identity=identity,
                name=hello.server,
                incarnation=hello.incarnation,
                engine=hello.engine,
                started=hello.started,
                capacity=hello.capacity,
                last_seen=now,
                breaker=breaker,
                number=next(self._numbers),
            )
        peer.last_seen, peer.capacity, peer.policy_version, peer.in_flight = now, hello.capacity, -1, 0
        peer.behind_since, peer.late = (now if self._announced >= 0 else None), False
        peer.wants_from = max(self._announced, 0)
        peer.retry_at, peer.retry_s = (now + _LONGEST_RETRY_S if self._announced >= 0 else None), _RETRY_S
        peer.prepared_since, peer.quarantined = None, False
        self._peers[identity] = self._by_name[hello.server] = peer
        return peer

    def leave(self, peer: Peer) -> None:
        """A server goes. It may come back, unless a younger process has its name then."""
        del self._peers[peer.identity]
        if self._by_name.get(peer.name) is peer:
            del self._by_name[peer.name]
        peer.stamp += 1
        self._left[peer.identity, peer.incarnation] = peer
        if len(self._left) > _REMEMBERED:
            _, forgotten = self._left.popitem(last=False)
            if forgotten.status:
                self._tokens_before += forgotten.status.tokens
                self._idle_s_before += forgotten.status.idle_s

    def announced(self, version: int, now: float) -> None:
        """A new version is out: whoever does not serve it is behind."""
        self._announced = version
        for peer in self._peers.values():
            peer.wants_from = min(peer.wants_from, version)
            if peer.behind_since is None:
                peer.behind_since = now
            self.told_to_swap(peer, now)  # what it is prepared for is not the newest any more
            peer.retry_at, peer.retry_s = now + _LONGEST_RETRY_S, _RETRY_S

    def prepared(self, peer: Peer, now: float) -> None:
        """A server is prepared for the newest version: until it is told to swap it does not grow late."""
        if peer.behind_since is None:
            peer.behind_since = now  # it had the version, and its engine was restarted
        if peer.prepared_since is None:
            peer.prepared_since = now
        peer.retry_at = None

    def told_to_swap(self, peer: Peer, now: float) -> None:
        """A server is told to swap, or need not any more: from now on it may grow late."""
        if peer.prepared_since is not None and peer.behind_since is not None:
            peer.behind_since += now - max(peer.prepared_since, peer.behind_since)
        peer.prepared_since = None
        if peer.behind_since is not None:
            peer.retry_at = now + _LONGEST_RETRY_S

    def swapped(self, peer: Peer, version: int, now: float) -> bool:
        """A server serves this version now. Whether it was late or quarantined until now."""
        peer.policy_version = version
        peer.behind_since = now if version < self._announced else None
        peer.retry_at = now + _LONGEST_RETRY_S if version < self._announced else None
        peer.retry_s, peer.prepared_since = _RETRY_S, None
        was_away, peer.late, peer.quarantined = peer.late or peer.quarantined, False, False
        self.update(peer)
        return was_away

    def swap_failed(self, peer: Peer, version: int, now: float) -> None:
        """A server could not swap: it is told of the weights again, as long as it is behind."""
        self.told_to_swap(peer, now)
        if peer.behind_since is None and version == self._announced:
            peer.behind_since = now  # it had the version, and its engine was restarted
        if peer.behind_since is not None:
            peer.retry_at = now + peer.retry_s

    def quarantine(self, peer: Peer, now: float) -> bool:
        """A server serves no version until it has swapped, and is told of the weights again. Whether that is new."""
        if peer.quarantined:
            return False
        if peer.policy_version >= 0:
            peer.wants_from = peer.policy_version
        peer.quarantined, peer.policy_version = True, -1
        self.swap_failed(peer, self._announced, now)
        self.update(peer)
        return True

    def update(self, peer: Peer) -> None:
        """Note the place of a server that has changed."""
        peer.stamp += 1
        if self._places > 8 * len(self._peers) + 64:
            self._free, self._places = {}, 0
            for other in self._peers.values():
                self._place(other)
        else:
            self._place(peer)

    def least_busy(self, may: Callable[[int], bool], avoid: str | None = None) -> Peer | None:
        """The server of the least load that has room, of those that serve a version which `may` have a lease.

        Args:
            may: asked for each version that is served.
            avoid: the name of a server that is taken only where there is no other.
        """
        tops = [
            (load, -version, number, stamp, peer)
            for version in list(self._free)
            if (place := self._top(version)) and may(version)
            for load, number, stamp, peer in [place]
        ]
        if not tops:
            return None
        load, _, number, stamp, peer = min(tops, key=lambda top: top[:4])
        if peer.name != avoid:
            return peer
        heapq.heappop(self._free[peer.policy_version])  # look behind it, then put it back
        self._places -= 1
        other = self.least_busy(may)
        heapq.heappush(self._free.setdefault(peer.policy_version, []), (load, number, stamp, peer))
        self._places += 1
        return other or peer

    def look_around(self, now: float) -> Surroundings:
        """Who is dead, late, or may be tried again."""
        limit = MISSED_HEARTBEATS * self._stream.heartbeat_s
        found = Surroundings([], [], [], [])
        for peer in self._peers.values():
            breaker = peer.breaker
            if now - peer.last_seen > limit:
                found.dead.append(peer)
            elif breaker.until is not None and not breaker.probation and now >= breaker.until:
                breaker.probation = True
                found.on_probation.append(peer)
            elif not peer.late and peer.prepared_since is None and self._is_late(peer, now):
                peer.late = True
                found.late.append(peer)
            if peer.retry_at is not None and now >= peer.retry_at:
                peer.retry_s = min(2 * peer.retry_s, _LONGEST_RETRY_S)
                peer.retry_at = now + peer.retry_s  # whatever becomes of this message
                found.tell_again.append(peer)
        for peer in (*found.late, *found.on_probation):
            self.update(peer)
        return found

    def forgive_silence(self, now: float, gap_s: float) -> None:
        """This process stood still for so many seconds: every server gets a new deadline."""
        for peer in self._peers.values():
            peer.last_seen = now
            if peer.behind_since is not None:
                peer.behind_since = now
            if peer.prepared_since is not None:
                peer.prepared_since = now
            if peer.breaker.until is not None:
                peer.breaker.until += gap_s

    def oldest_served_version(self) -> int | None:
        """The oldest version that a server serves or loads, leaving out those that are late; None without any."""
        in_time = (peer for peer in self._peers.values() if not peer.late)
        return min((p.policy_version if p.policy_version >= 0 else p.wants_from for p in in_time), default=None)

    def totals(self) -> tuple[int, float]:
        """Response tokens of all servers that ever were, and the seconds that they had nothing to generate."""
        statuses = [peer.status for peers in (self._left, self._peers) for peer in peers.values() if peer.status]
        tokens = self._tokens_before + sum(status.tokens for status in statuses)
        return tokens, self._idle_s_before + sum(status.idle_s for status in statuses)

    def _is_late(self, peer: Peer, now: float) -> bool:
        return peer.behind_since is not None and now - peer.behind_since > self._late_s

    def _place(self, peer: Peer) -> None:
        if peer.has_room and self._peers.get(peer.identity) is peer:
            place = (peer.in_flight / peer.breaker.room(peer.capacity), peer.number, peer.stamp, peer)
            heapq.heappush(self._free.setdefault(peer.policy_version, []), place)
            self._places += 1

    def _top(self, version: int) -> _Place | None:
        heap = self._free[version]
        while heap and heap[0][2] != heap[0][3].stamp:
            heapq.heappop(heap)
            self._places -= 1
        if not heap:
            del self._free[version]
            return None
        return heap[0]
