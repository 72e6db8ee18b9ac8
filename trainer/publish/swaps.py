"""Whose turn is it to swap? This only decides; the intake tells it what it hears, and sends the `Swap`s that come out.

For the newest version a server of the pool is

    behind ──Prepared──▶ prepared ──Swap──▶ swapping ──Swapped──▶ current ──a new version──▶ behind
       ▲                                        │
       └────SwapFailed, Swapped to an older one─┘              absent: like behind, but nobody waits for it

**Disk**: whoever is prepared swaps at once (`publish.swap: together`), or a quarter of the servers that are not absent
at a time, those first whose last turn was longest ago (`rolling`).

**Broadcast**: in *rounds*, one at a time, each a process group of all that are prepared. A round begins when no server
is behind, or `publish.ready_timeout_s` after the first was prepared; who did not come is absent then. One server that
cannot be reached makes a round fail for all its members, and nobody can say which it was. So a server that failed in a
round is in *doubt* until it has swapped. Those in doubt have rounds of their own, of at most half the size of the one
that failed, and one that fails alone takes no more than a tenth of the time: those that are well find each other.

A turn lasts `rollout.swap_timeout_s` at most: a server that has not answered by then is absent until it says something.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from asyncppo.config import Config
from asyncppo.errors import WeightsError
from asyncppo.messages import GroupMember, Swap, WeightsReady

log = logging.getLogger("asyncppo.swaps")

State = Literal["behind", "prepared", "swapping", "current", "absent"]

_ROLLING = 4
"""Of so many servers one swaps at a time."""
_AGAIN_S = 2.0
"""A round that could not begin is tried again after so many seconds."""
_PAUSE = 9.0
"""After a turn alone that failed a server is left alone for so many times as long."""


class Broadcaster(Protocol):
    """Sends versions into the engines. Used by the intake's thread: nothing here waits."""

    @property
    def busy(self) -> bool:
        """Whether a round is running: from `begin` until everything is sent, or has failed."""

    def begin(
        self, version: int, manifest: str, members: Sequence[tuple[bytes, int]], group: str
    ) -> dict[bytes, GroupMember]:
        """Start a round, in the broadcaster's own thread.

        Args:
            version: the policy version to send.
            manifest: the checksum of its manifest.
            members: identity and engine ranks of each server, in the order of their ranks in the process group.
            group: the process group that all of them say they are in; empty if they do not agree.

        Returns:
            The place of each of them.

        Raises:
            WeightsError: it cannot begin, or does not have this version (any more).
        """

    def give_up(self, member: bytes) -> None:
        """It takes no part in the round that is running, if it is in it."""


@dataclass(slots=True, eq=False)
class _Server:
    identity: bytes
    name: str
    ranks: int
    told_at: float = -math.inf
    """When its last turn began."""
    state: State = "behind"
    since: float = 0.0
    """When it was prepared, or was told to swap."""
    told: Swap | None = None
    """Its Swap, while it is swapping."""
    company: int = 0
    """Servers of its round, while it is swapping; 0 on disk."""
    group: str = ""
    """The process group that its engine is in, as far as it has said."""
    limit: int | None = None
    """In doubt: how many servers a round with it may have at most."""
    not_before: float = 0.0
    """In doubt: when it may be in a round again, unless all are in doubt."""


class Swaps:
    """See the module. Not thread-safe: the intake guards it. Times are seconds of one clock.

    Args:
        config: the run's.
        broadcaster: of the transport `broadcast`. None: `disk`.

    Example:
        swaps.joined(b"alice/1", "alice", ranks=1)
        swaps.announced(weights)
        swaps.prepared(b"alice/1", 0, weights.manifest, now)
        swaps.due(now)                        # [(b"alice/1", Swap(policy_version=0, …))]
        swaps.swapped(b"alice/1", 0)
    """

    def __init__(self, config: Config, broadcaster: Broadcaster | None = None) -> None:
        self._rolling = config.publish.swap == "rolling"
        self._ready_timeout_s = config.publish.ready_timeout_s
        self._turn_s = config.rollout.swap_timeout_s
        self._broadcaster = broadcaster
        self._newest: WeightsReady | None = None
        self._servers: dict[bytes, _Server] = {}
        self._in: dict[State, dict[bytes, _Server]] = {state: {} for state in get_args(State)}
        """State to the servers that are in it, in the order in which they came into it."""
        self._repeated: list[tuple[bytes, Swap]] = []
        """To be said once more."""
        self._first_ready: float | None = None
        """When the first server was prepared since the last round began, whatever was announced since."""
        self._not_before = 0.0
        self._doubtful_next = False
        """Where servers in doubt and others are prepared, they take turns."""

    # --- what is heard -----------------------------------------------------------------------------------------------

    def joined(self, identity: bytes, name: str, ranks: int) -> None:
        """A server comes to the pool: `ranks` engine ranks, and nothing to hold against it."""
        self.left(identity)
        self._servers[identity] = self._in["behind"][identity] = _Server(identity, name, ranks)

    def left(self, identity: bytes) -> None:
        """A server leaves the pool, if it was there."""
        server = self._servers.pop(identity, None)
        if server is not None:
            self._give_up(server)
            del self._in[server.state][identity]

    def announced(self, weights: WeightsReady) -> None:
        """This is the newest version now. A server that swaps to an older one goes on with that."""
        self._newest = weights
        self._not_before = 0.0
        self._repeated.clear()
        for state in ("current", "prepared"):
            for server in list(self._in[state].values()):
                self._move(server, "behind")

    def prepared(self, identity: bytes, version: int, manifest: str, now: float, group: str = "") -> bool:
        """A server is prepared for this, its engine in that process group. False, and nothing else changes, where it is
        not the newest version."""
        server = self._servers[identity]
        server.group = group
        if not self._is_newest(version, manifest):
            return False
        if server.told is not None and self._is_newest(server.told.policy_version, server.told.manifest):
            self._repeated.append((identity, server.told))  # its Swap was lost, and its turn goes on
        elif server.state != "prepared":
            self._move(server, "prepared", now)
            if server.limit is None and self._first_ready is None:
                self._first_ready = now
        return True

    def swapped(self, identity: bytes, version: int) -> None:
        """A server serves this version of this process: it need not have been told to."""
        server = self._servers[identity]
        newest = self._newest is not None and version == self._newest.policy_version
        goes_on = server.state == "prepared" or (server.told is not None and server.told.policy_version > version)
        if newest or not goes_on:
            server.limit = None
            self._move(server, "current" if newest else "behind")

    def failed(self, identity: bytes, version: int, now: float) -> None:
        """A server could not prepare for this version, or not swap to it."""
        server = self._servers[identity]
        if server.state == "swapping":
            self._give_up(server)
            self._fail(server, now, "behind")
        elif server.state != "absent" and self._newest is not None and version == self._newest.policy_version:
            self._move(server, "behind")  # it was prepared, or had the version, and its engine went down

    def late(self, identity: bytes) -> None:
        """A server has been behind for too long (`Pool.look_around`)."""
        server = self._servers[identity]
        if server.state in ("behind", "swapping"):
            self._move(server, "absent")

    def forgive_silence(self, gap_s: float) -> None:
        """This process stood still for so many seconds: every server has so much longer."""
        for server in self._servers.values():
            server.since += gap_s
            server.told_at += gap_s
            server.not_before += gap_s
        if self._first_ready is not None:
            self._first_ready += gap_s

    # --- what comes out ----------------------------------------------------------------------------------------------

    def due(self, now: float) -> list[tuple[bytes, Swap]]:
        """Who is to be told to swap. To be asked after everything that is heard, and a few times a second."""
        turns, self._repeated = self._repeated, []
        swapping = self._in["swapping"]
        while swapping and now - (first := next(iter(swapping.values()))).since > self._turn_s:
            log.warning("%s has not swapped within %.0f s (rollout.swap_timeout_s)", first.name, self._turn_s)
            self._fail(first, now, "absent")
        if self._in["prepared"] and now >= self._not_before:
            turns += self._on_disk(now) if self._broadcaster is None else self._round(self._broadcaster, now)
        return [(identity, swap) for identity, swap in turns if identity in self._servers]

    def _on_disk(self, now: float) -> list[tuple[bytes, Swap]]:
        turns: Iterable[_Server] = list(self._in["prepared"].values())
        if self._rolling:
            share = max(1, (len(self._servers) - len(self._in["absent"])) // _ROLLING)
            turns = heapq.nsmallest(share - len(self._in["swapping"]), turns, key=_told_at)
        return [(server.identity, self._tell(server, now)) for server in turns]

    def _round(self, broadcaster: Broadcaster, now: float) -> list[tuple[bytes, Swap]]:
        members = [] if broadcaster.busy else self._members(now)
        if not members:
            return []
        assert self._newest is not None, "a server is prepared, and nothing was announced"
        version, manifest = self._newest.policy_version, self._newest.manifest
        try:
            ranks = [(server.identity, server.ranks) for server in members]
            groups = {server.group for server in members}
            places = broadcaster.begin(version, manifest, ranks, groups.pop() if len(groups) == 1 else "")
        except WeightsError as error:
            log.warning("version %d is not broadcast, and tried again in %.0f s: %s", version, _AGAIN_S, error)
            self._not_before = now + _AGAIN_S
            return []
        if members[0].limit is None:
            self._first_ready, self._doubtful_next = None, True
        else:
            self._doubtful_next = False
        return [(s.identity, self._tell(s, now, places[s.identity], len(members))) for s in members]

    def _members(self, now: float) -> list[_Server]:
        """Of the round that begins now, in an order that depends on nothing else; none: it is too early."""
        prepared = self._in["prepared"].values()
        sure = [server for server in prepared if server.limit is None]
        others = any(s.limit is None and s.state != "absent" for s in self._servers.values())
        doubtful = [s for s in prepared if s.limit is not None and (now >= s.not_before or not others)]
        doubtful.sort(key=_told_at)  # so that everyone has a turn, however fast versions come
        if doubtful and (self._doubtful_next or not sure):
            limit = doubtful[0].limit or 1
            members = [s for s in doubtful if s.limit is not None and s.limit >= limit][:limit]
        else:
            awaited = [*self._in["behind"].values(), *filter(self._swaps_to_older, self._in["swapping"].values())]
            if awaited and self._first_ready is not None and now - self._first_ready < self._ready_timeout_s:
                return []
            for server in awaited if sure else []:
                log.warning("%s is not prepared: the next version is broadcast without it", server.name)
                self._fail(server, now, "absent")
            members = sure
        return sorted(members, key=lambda server: server.identity)

    def _is_newest(self, version: int, manifest: str) -> bool:
        newest = self._newest
        return newest is not None and (version, manifest) == (newest.policy_version, newest.manifest)

    def _swaps_to_older(self, server: _Server) -> bool:
        return server.told is not None and not self._is_newest(server.told.policy_version, server.told.manifest)

    def _tell(self, server: _Server, now: float, member: GroupMember | None = None, company: int = 0) -> Swap:
        assert self._newest is not None, "a server is prepared, and nothing was announced"
        self._move(server, "swapping", now)
        server.told_at = now
        server.told = Swap(policy_version=self._newest.policy_version, manifest=self._newest.manifest, member=member)
        server.company = company
        return server.told

    def _fail(self, server: _Server, now: float, state: State) -> None:
        """It did not use its turn, if it had one."""
        if server.company:
            server.limit = max(1, server.company // 2)
            server.not_before = now + _PAUSE * (now - server.since) if server.company == 1 else 0.0
        self._move(server, state)

    def _give_up(self, server: _Server) -> None:
        """The others of its round, if it is in one, are not to wait for it."""
        if server.company and self._broadcaster is not None:
            self._broadcaster.give_up(server.identity)

    def _move(self, server: _Server, state: State, now: float = 0.0) -> None:
        if state == "behind" and server.limit is not None:
            state = "absent"
        del self._in[server.state][server.identity]
        self._in[state][server.identity] = server
        server.state, server.since, server.told, server.company = state, now, None, 0


def _told_at(server: _Server) -> float:
    return server.told_at
