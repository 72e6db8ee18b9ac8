"""Whose turn it is to swap: by disk together or rolling, by broadcast in rounds; and that nothing waits forever."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncppo.errors import WeightsError
from asyncppo.messages import GroupMember, Swap
from tests.stream_maker import a_config, weights_of
from trainer.publish.swaps import Swaps

pytestmark = pytest.mark.unit

TURN_S, READY_S = 20.0, 5.0
"""`rollout.swap_timeout_s`, `publish.ready_timeout_s`."""


class Rounds:
    """A broadcaster whose rounds the test ends."""

    def __init__(self) -> None:
        self.busy = False
        self.begun: list[tuple[int, list[bytes]]] = []
        self.groups: list[str] = []
        self.given_up: list[bytes] = []
        self.refuses = False

    def give_up(self, member: bytes) -> None:
        self.given_up.append(member)

    def begin(
        self, version: int, manifest: str, members: Sequence[tuple[bytes, int]], group: str
    ) -> dict[bytes, GroupMember]:
        assert not self.busy, "two rounds at once"
        assert manifest == weights_of(version).manifest
        if self.refuses:
            raise WeightsError("the port is taken")
        self.busy = True
        self.begun.append((version, [identity for identity, _ in members]))
        self.groups.append(group)
        places, rank = {}, 1
        size = 1 + sum(ranks for _, ranks in members)
        for identity, ranks in members:
            places[identity] = GroupMember(
                name=f"g{len(self.begun)}", address="a", port=1, rank=rank, world_size=size, backend="gloo"
            )
            rank += ranks
        return places


def some_swaps(names: str, swap: str = "together", rounds: Rounds | None = None) -> Swaps:
    """Servers a, b, … of one rank each, which serve nothing yet; version 0 is announced."""
    config = a_config(
        publish={"swap": swap, "ready_timeout_s": READY_S},
        rollout={"swap_timeout_s": TURN_S},
    )
    swaps = Swaps(config, rounds)
    for name in names:
        swaps.joined(name.encode(), name, 1)
    swaps.announced(weights_of(0))
    return swaps


def prepare(swaps: Swaps, names: str, version: int = 0, now: float = 0.0) -> None:
    for name in names:
        assert swaps.prepared(name.encode(), version, weights_of(version).manifest, now)


def swapped(swaps: Swaps, names: str, version: int = 0) -> None:
    for name in names:
        swaps.swapped(name.encode(), version)


def failed(swaps: Swaps, names: str, version: int = 0, now: float = 0.0) -> None:
    for name in names:
        swaps.failed(name.encode(), version, now)


def due(swaps: Swaps, now: float = 0.0) -> str:
    """The names of those whose turn it is."""
    return "".join(identity.decode() for identity, _ in swaps.due(now))


# --- disk ------------------------------------------------------------------------------------------------------------


def test_together_whoever_is_prepared_swaps_at_once_and_once() -> None:
    swaps = some_swaps("abc")
    assert swaps.due(0.0) == []
    prepare(swaps, "b")
    [(identity, swap)] = swaps.due(0.0)
    assert identity == b"b"
    assert (swap.policy_version, swap.manifest, swap.member) == (0, "checksum-0", None)
    prepare(swaps, "ca")
    assert due(swaps) == "ca"
    assert due(swaps) == ""


def test_what_is_prepared_for_an_older_version_or_another_content_is_ignored() -> None:
    swaps = some_swaps("a")
    assert not swaps.prepared(b"a", 1, "checksum-1", 0.0)
    assert not swaps.prepared(b"a", 0, "of another trainer", 0.0)
    prepare(swaps, "a")
    swaps.announced(weights_of(1))
    assert due(swaps) == ""
    assert not swaps.prepared(b"a", 0, "checksum-0", 0.0)
    prepare(swaps, "a", 1)
    assert [swap.policy_version for _, swap in swaps.due(0.0)] == [1]


def test_a_server_whose_swap_was_lost_is_told_again_when_it_says_that_it_is_prepared() -> None:
    rounds = Rounds()
    for swaps in (some_swaps("ab"), some_swaps("ab", "rolling"), some_swaps("ab", rounds=rounds)):
        prepare(swaps, "ab")
        first = dict(swaps.due(0.0))
        again = sorted(first)[0].decode()
        prepare(swaps, again, now=1.0)
        assert swaps.due(1.0) == [(again.encode(), first[again.encode()])]
    assert len(rounds.begun) == 1


def test_whoever_is_not_there_or_not_prepared_any_more_is_not_told() -> None:
    swaps = some_swaps("abc")
    prepare(swaps, "a")
    failed(swaps, "a")  # its engine has gone down
    assert due(swaps) == ""
    prepare(swaps, "bc")
    assert due(swaps) == "bc"
    prepare(swaps, "bc")
    swaps.left(b"b")
    assert due(swaps) == "c"
    prepare(swaps, "c")
    swaps.announced(weights_of(1))
    assert due(swaps) == ""


def test_rolling_a_quarter_swaps_at_a_time_those_first_whose_last_turn_was_longest_ago() -> None:
    swaps = some_swaps("abcdefgh", "rolling")
    for name in "abcdefgh":
        prepare(swaps, name)
    assert due(swaps) == "ab"
    swapped(swaps, "a")
    assert due(swaps) == "c"
    failed(swaps, "b")
    assert due(swaps) == "d"
    swaps.left(b"c")
    assert due(swaps) == ""  # one of seven
    swapped(swaps, "d")
    assert due(swaps) == "e"
    swaps.announced(weights_of(1))  # e goes on to version 0, and holds its place
    prepare(swaps, "adfgh", 1)
    assert due(swaps) == ""
    swapped(swaps, "e")
    assert due(swaps) == "f"  # a and d have had a turn


def test_rolling_however_fast_versions_come_every_server_has_its_turn() -> None:
    swaps = some_swaps("abcdefgh", "rolling")
    told: Counter[str] = Counter()
    for version in range(40):
        swaps.announced(weights_of(version))
        prepare(swaps, "abcdefgh", version)  # always in this order, and two turns before the next version
        for _ in range(2):
            names = due(swaps, float(version))
            told.update(names)
            swapped(swaps, names, version)
    assert set(told.values()) == {20}


def test_rolling_a_server_that_does_not_answer_holds_its_place_for_a_while_only() -> None:
    swaps = some_swaps("abc", "rolling")
    prepare(swaps, "abc")
    assert due(swaps) == "a"
    assert due(swaps, TURN_S) == ""
    assert due(swaps, TURN_S + 1) == "b"
    swaps.late(b"b")
    assert due(swaps, TURN_S + 1) == "c"
    swapped(swaps, "ab")  # they were only slow
    swapped(swaps, "c")
    swaps.announced(weights_of(1))
    prepare(swaps, "abc", 1)
    assert due(swaps, TURN_S + 1) == "a"


def test_rolling_a_server_that_is_late_does_not_count() -> None:
    swaps = some_swaps("abcdefgh", "rolling")
    swaps.late(b"h")
    prepare(swaps, "abc")
    assert due(swaps) == "a"
    prepare(swaps, "h")  # it is back
    assert due(swaps) == "b"


def test_a_stop_of_the_trainer_takes_no_turn_away() -> None:
    swaps = some_swaps("ab", "rolling")
    prepare(swaps, "ab")
    assert due(swaps) == "a"
    swaps.forgive_silence(1000.0)
    assert due(swaps, 1001.0) == ""
    assert due(swaps, 1001.0 + TURN_S) == "b"


def test_a_server_whose_engine_was_restarted_swaps_again() -> None:
    swaps = some_swaps("a")
    prepare(swaps, "a")
    assert due(swaps) == "a"
    swapped(swaps, "a")
    prepare(swaps, "a", now=9.0)
    assert due(swaps, 9.0) == "a"


# --- broadcast -------------------------------------------------------------------------------------------------------


def test_a_round_waits_for_every_server_that_is_behind_and_gives_each_its_place() -> None:
    rounds = Rounds()
    swaps = some_swaps("ba", rounds=rounds)
    swaps.joined(b"c", "c", 2)
    swaps.joined(b"d", "d", 1)
    prepare(swaps, "db")
    assert due(swaps) == ""
    prepare(swaps, "ac")
    members = {identity: swap.member for identity, swap in swaps.due(0.0)}
    assert [(name, m.rank, m.world_size) for name, m in members.items() if m] == [
        (b"a", 1, 6),
        (b"b", 2, 6),
        (b"c", 3, 6),
        (b"d", 5, 6),
    ]
    assert rounds.begun == [(0, [b"a", b"b", b"c", b"d"])]


def test_a_round_begins_without_those_that_are_not_prepared_in_time_and_no_later_one_waits_for_them() -> None:
    rounds = Rounds()
    swaps = some_swaps("abc", rounds=rounds)
    prepare(swaps, "a", now=0.0)
    prepare(swaps, "b", now=READY_S - 1)
    assert due(swaps, READY_S - 0.1) == ""
    assert due(swaps, READY_S) == "ab"
    swapped(swaps, "ab")
    rounds.busy = False
    swaps.announced(weights_of(1))
    prepare(swaps, "ab", 1, now=20.0)
    assert due(swaps, 20.0) == "ab"
    rounds.busy = False
    swapped(swaps, "ab", 1)
    prepare(swaps, "c", 1, now=21.0)  # it is back, and has a round of its own
    assert due(swaps, 21.0) == "c"
    swapped(swaps, "c", 1)
    rounds.busy = False
    swaps.announced(weights_of(2))
    prepare(swaps, "ab", 2, now=30.0)
    assert due(swaps, 30.0) == ""  # and is waited for again


def test_versions_that_come_faster_than_a_server_prepares_do_not_put_off_the_round() -> None:
    rounds = Rounds()
    swaps = some_swaps("ab", rounds=rounds)
    for version in range(20):  # one a second; b never is prepared
        swaps.announced(weights_of(version))
        prepare(swaps, "a", version, now=float(version))
        if due(swaps, float(version)):
            assert version == READY_S
            return
    raise AssertionError("no round")


def test_no_round_begins_while_another_runs_and_a_late_joiner_has_its_own() -> None:
    rounds = Rounds()
    swaps = some_swaps("ab", rounds=rounds)
    prepare(swaps, "ab")
    assert due(swaps) == "ab"
    swaps.joined(b"c", "c", 1)
    prepare(swaps, "c", now=1.0)
    assert due(swaps, 1.0) == ""
    rounds.busy = False
    assert due(swaps, 1.0) == "c"  # a and b have what they need, and may still probe


def test_a_server_that_swaps_to_an_older_version_is_waited_for() -> None:
    rounds = Rounds()
    swaps = some_swaps("ab", rounds=rounds)
    prepare(swaps, "ab")
    assert due(swaps) == "ab"
    swaps.announced(weights_of(1))
    rounds.busy = False
    swapped(swaps, "a")
    prepare(swaps, "a", 1, now=1.0)
    assert due(swaps, 1.0) == ""
    swapped(swaps, "b")
    assert due(swaps, 1.0) == ""  # it prepares now
    prepare(swaps, "b", 1, now=2.0)
    assert due(swaps, 2.0) == "ab"


def test_a_round_that_cannot_begin_is_tried_again_and_its_members_stay_prepared() -> None:
    rounds = Rounds()
    swaps = some_swaps("ab", rounds=rounds)
    rounds.refuses = True
    prepare(swaps, "ab")
    assert due(swaps) == ""
    rounds.refuses = False
    assert due(swaps, 1.0) == ""
    assert due(swaps, 2.0) == "ab"


def test_a_group_is_used_again_only_if_all_members_say_that_they_are_in_it() -> None:
    rounds = Rounds()
    swaps = some_swaps("ab", rounds=rounds)
    for version, said in enumerate((("", ""), ("g1", "g1"), ("g1", ""), ("g1", "g2"))):
        swaps.announced(weights_of(version))
        for identity, group in zip((b"a", b"b"), said, strict=True):
            swaps.prepared(identity, version, weights_of(version).manifest, 0, group)
        assert len(swaps.due(0)) == 2
        rounds.busy = False
        for identity in (b"a", b"b"):
            swaps.swapped(identity, version)
    assert rounds.groups == ["", "g1", "", ""]


def test_the_others_of_a_round_do_not_wait_for_a_member_that_fails_or_leaves() -> None:
    rounds = Rounds()
    swaps = some_swaps("abc", rounds=rounds)
    for identity in (b"a", b"b", b"c"):
        swaps.prepared(identity, 0, weights_of(0).manifest, 0)
    assert len(swaps.due(0)) == 3
    swaps.failed(b"a", 0, 1)
    swaps.left(b"b")
    assert rounds.given_up == [b"a", b"b"]


def test_a_round_that_could_not_begin_holds_no_newer_version_up() -> None:
    rounds = Rounds()
    swaps = some_swaps("a", rounds=rounds)
    swaps.prepared(b"a", 0, weights_of(0).manifest, 0)
    rounds.refuses = True
    assert swaps.due(0) == []
    rounds.refuses = False
    swaps.announced(weights_of(1))
    swaps.prepared(b"a", 1, weights_of(1).manifest, 0)
    assert [swap.policy_version for _, swap in swaps.due(0)] == [1]


def test_a_member_that_lets_rounds_fail_is_found_and_the_others_swap() -> None:
    rounds = Rounds()
    swaps = some_swaps("abcd", rounds=rounds)
    version, now, members = 0, 0.0, []
    waiting, served = set("abcd"), set()
    while served != set("abc"):
        prepare(swaps, "".join(sorted(waiting)), version, now)
        waiting.clear()
        members = list(due(swaps, now))
        assert members, f"nobody's turn; {served} have swapped"
        assert len(rounds.begun) < 8
        rounds.busy = False
        if "d" in members:
            now += TURN_S
            failed(swaps, "".join(members), version, now)
            waiting |= set(members)
        else:
            swapped(swaps, "".join(members), version)
            served |= set(members)
    # From now on the others have their rounds without it, whatever it says.
    for version in range(1, 10):
        now += TURN_S
        swaps.announced(weights_of(version))
        prepare(swaps, "dabc" if version % 2 else "abc", version, now)
        while "a" not in (members := list(due(swaps, now))):
            assert members == ["d"]
            now += TURN_S
            failed(swaps, "d", version, now)
            rounds.busy = False
        assert members == ["a", "b", "c"]
        rounds.busy = False
        swapped(swaps, "abc", version)
    alone = [names for _, names in rounds.begun if names == [b"d"]]
    assert len(alone) <= 3  # a tenth of the time


def test_the_only_server_is_tried_again_at_once_and_one_that_has_swapped_is_trusted_again() -> None:
    rounds = Rounds()
    swaps = some_swaps("a", rounds=rounds)
    for attempt in range(3):
        prepare(swaps, "a", now=float(attempt))
        assert due(swaps, float(attempt)) == "a"
        failed(swaps, "a", now=float(attempt) + 0.5)
        rounds.busy = False
    prepare(swaps, "a", now=4.0)
    assert due(swaps, 4.0) == "a"
    swapped(swaps, "a")
    rounds.busy = False
    swaps.joined(b"b", "b", 1)
    swaps.announced(weights_of(1))
    prepare(swaps, "b", 1, now=5.0)
    assert due(swaps, 5.0) == ""  # waits for a
    prepare(swaps, "a", 1, now=5.5)
    assert due(swaps, 5.5) == "ab"


def in_doubt(swaps: Swaps, rounds: Rounds, names: str, at: float = 0.0) -> None:
    """These servers, the only ones that are prepared, fail in a round of version 0 that takes a second."""
    prepare(swaps, names, now=at)
    assert due(swaps, at + READY_S) == names
    failed(swaps, names, now=at + READY_S + 1)
    rounds.busy = False


def test_those_in_doubt_and_the_others_take_turns() -> None:
    rounds = Rounds()
    swaps = some_swaps("abcd", rounds=rounds)
    in_doubt(swaps, rounds, "cd")
    turns = []
    for version in range(1, 5):  # so fast that somebody else is always prepared
        swaps.announced(weights_of(version))
        prepare(swaps, "abcd", version, now=100.0 * version)
        members = due(swaps, 100.0 * version)
        turns.append(members)
        if members in ("c", "d"):
            failed(swaps, members, version, now=100.0 * version + 1)
        else:
            swapped(swaps, members, version)
        rounds.busy = False
    assert turns == ["c", "ab", "d", "ab"]


def test_a_round_of_those_in_doubt_is_no_larger_than_any_of_them_may_have() -> None:
    rounds = Rounds()
    swaps = some_swaps("abcdef", rounds=rounds)
    in_doubt(swaps, rounds, "abcdef")
    prepare(swaps, "fedcba", now=10.0)
    assert due(swaps, 10.0) == "def"  # half of them
    failed(swaps, "def", now=11.0)
    rounds.busy = False
    prepare(swaps, "fed", now=12.0)
    swaps.left(b"c")
    assert due(swaps, 12.0) == "ab"  # their last turn was before that of the others, which must have one alone
    rounds.busy = False
    swapped(swaps, "ab")
    assert due(swaps, 13.0) == "f"


def test_one_that_fails_alone_is_tried_at_once_where_all_others_are_absent() -> None:
    rounds = Rounds()
    swaps = some_swaps("ab", rounds=rounds)
    in_doubt(swaps, rounds, "a")  # without b
    prepare(swaps, "a", now=10.0)
    assert due(swaps, 10.0) == "a"


def test_a_server_that_waits_for_its_time_makes_nobody_absent() -> None:
    rounds = Rounds()
    swaps = some_swaps("a", rounds=rounds)
    in_doubt(swaps, rounds, "a")
    swaps.joined(b"b", "b", 1)
    swaps.joined(b"c", "c", 1)
    prepare(swaps, "a", now=7.0)
    assert due(swaps, 7.0) == ""  # it took a second, and waits for nine
    prepare(swaps, "b", now=7.5)
    assert due(swaps, 7.5) == ""  # c is waited for
    prepare(swaps, "c", now=8.0)
    assert due(swaps, 8.0) == "bc"


def test_a_word_on_an_older_version_takes_no_turn_away() -> None:
    swaps = some_swaps("ab", "rolling")
    swapped(swaps, "ab")
    swaps.announced(weights_of(1))
    prepare(swaps, "ab", 1)
    swapped(swaps, "b")  # it was asked twice
    assert due(swaps) == "a"
    swapped(swaps, "a")
    assert due(swaps) == ""
    swapped(swaps, "a", 1)
    assert due(swaps) == "b"


# --- whatever happens ------------------------------------------------------------------------------------------------

TICK_S = 0.5
ENDS_S = 60 * TURN_S


@dataclass
class Server:
    """One server: well, hung (says nothing more), or cut off (prepares, and lets every round with it fail)."""

    identity: bytes
    ranks: int
    nature: str
    to_prepare: float | None = None
    """When it will say that it is prepared."""
    told: Swap | None = None
    """While it is swapping."""
    turn: Swap | None = None
    """Its last one: the same when it is told again."""
    turn_since: float = 0.0
    ends_at: float = 0.0
    works: bool = True
    behind_since: float = 0.0
    served: int = -1
    turns: int = 0


@dataclass
class World:
    """Servers, their pool, and a broadcaster, all by one clock."""

    rng: random.Random
    mode: str
    calm_at: float
    now: float = 0.0
    version: int = -1
    servers: dict[bytes, Server] = field(default_factory=dict)
    round_ends: float = 0.0
    number: int = 0
    shares: dict[float, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        swap = "rolling" if self.mode == "rolling" else "together"
        config = a_config(
            publish={"swap": swap, "ready_timeout_s": READY_S},
            rollout={"swap_timeout_s": TURN_S},
        )
        self.swaps = Swaps(config, self if self.mode == "broadcast" else None)

    @property
    def busy(self) -> bool:
        return self.now < self.round_ends

    def give_up(self, member: bytes) -> None:
        """Its rounds end by themselves."""

    def begin(
        self, version: int, manifest: str, members: Sequence[tuple[bytes, int]], group: str
    ) -> dict[bytes, GroupMember]:
        assert not self.busy, "two rounds at once"
        assert (version, manifest) == (self.version, weights_of(version).manifest)
        assert len(dict(members)) == len(members) > 0
        if self.now < self.calm_at and self.rng.random() < 0.1:
            raise WeightsError("not now")
        places, rank = {}, 1
        size = 1 + sum(ranks for _, ranks in members)
        for identity, ranks in members:
            assert ranks == self.servers[identity].ranks
            places[identity] = GroupMember(name="g", address="a", port=1, rank=rank, world_size=size, backend="gloo")
            rank += ranks
        self.round_ends = self.now + TICK_S  # until `tell` knows
        return places

    def run(self) -> None:
        for _ in range(self.rng.randint(1, 8)):
            self.join()
        self.announce()
        while self.now < self.calm_at:
            self.step()
            if self.rng.random() < 0.15:
                self.rng.choice([self.join, self.leave, self.announce, self.announce, self.break_one])()
        for server in self.servers.values():
            server.turns = 0
        self.announce()
        while self.now < self.calm_at + ENDS_S and not self.is_settled():
            self.step()
        assert self.is_settled(), f"version {self.version}: {list(self.servers.values())}"

    def is_settled(self) -> bool:
        """Every server that is well serves the newest version, and every one that answers has had a turn."""
        well = [s for s in self.servers.values() if s.nature == "well"]
        answer = [s for s in self.servers.values() if s.nature != "hung"]
        return all(s.served == self.version for s in well) and all(s.turns or s.served == self.version for s in answer)

    # --- what happens ---

    def join(self) -> None:
        if len(self.servers) < 9:
            self.number += 1
            nature = self.rng.choice(["well"] * 4 + ["cut off"])
            server = Server(b"%d" % self.number, self.rng.choice([1, 1, 2]), nature, behind_since=self.now)
            self.servers[server.identity] = server
            self.swaps.joined(server.identity, str(self.number), server.ranks)
            self.tell_weights(server)

    def leave(self) -> None:
        if self.servers:
            identity = self.rng.choice(list(self.servers))
            del self.servers[identity]
            self.swaps.left(identity)

    def break_one(self) -> None:
        if self.servers and self.rng.random() < 0.3:
            self.rng.choice(list(self.servers.values())).nature = "hung"

    def announce(self) -> None:
        self.version += 1
        self.swaps.announced(weights_of(self.version))
        for server in self.servers.values():
            self.tell_weights(server)
            if server.served == self.version - 1:
                server.behind_since = self.now

    def tell_weights(self, server: Server, after_s: float = 0.0) -> None:
        if server.told is None:
            server.to_prepare = self.now + after_s + self.rng.choice([0.0, 0.2, 1.0, 1.5 * READY_S])

    def step(self) -> None:
        self.now += TICK_S
        for server in list(self.servers.values()):
            self.act(server)
        self.tell(self.swaps.due(self.now))

    def act(self, server: Server) -> None:
        if self.now - server.behind_since > 2 * TURN_S and server.served < self.version and server.told is None:
            self.swaps.late(server.identity)  # as the pool does, and more often
        if server.nature == "hung":
            return
        if server.told is not None and self.now >= server.ends_at:
            version, works, server.told = server.told.policy_version, server.works, None
            if works:
                server.served = version
                server.behind_since = self.now
                self.swaps.swapped(server.identity, version)
            else:
                self.swaps.failed(server.identity, version, self.now)
            if server.served < self.version:
                self.tell_weights(server, 0.0 if works else 2.0)
        elif server.told is None and server.to_prepare is not None and self.now >= server.to_prepare:
            if self.rng.random() < 0.1 and self.now < self.calm_at:
                self.swaps.failed(server.identity, self.version, self.now)
                self.tell_weights(server, 2.0)
            else:
                self.swaps.prepared(server.identity, self.version, weights_of(self.version).manifest, self.now)
                server.to_prepare = self.now + TURN_S  # again, if nothing comes

    def tell(self, turns: list[tuple[bytes, Swap]]) -> None:
        assert len({identity for identity, _ in turns}) == len(turns)
        swaps: list[Server] = []
        works, seconds = self.rng.random() < 0.95, self.rng.uniform(0, 3)
        for identity, swap in turns:
            server = self.servers[identity]
            assert (swap.policy_version, swap.manifest) == (self.version, weights_of(self.version).manifest)
            assert (swap.member is not None) == (self.mode == "broadcast")
            if swap is not server.turn:
                server.turn, server.turn_since = swap, self.now
            is_lost = self.now < self.calm_at and self.rng.random() < 0.05
            if is_lost or server.nature == "hung" or server.told is not None:
                works = False
            else:
                server.told, server.turns = swap, server.turns + 1
                swaps.append(server)
        works &= all(server.nature == "well" for server in swaps)
        for server in swaps:
            if self.mode == "broadcast":  # all or none
                server.works = works
                server.ends_at = self.now + (
                    seconds + self.rng.uniform(0, 2) if works else TURN_S * self.rng.choice([0.9, 1.2])
                )
            else:
                server.works = server.nature == "well" and self.rng.random() < 0.9
                server.ends_at = self.now + self.rng.uniform(0, 3)
        if swaps and self.mode == "broadcast":
            self.round_ends = self.now + (seconds if works else TURN_S)
        if self.mode == "rolling":
            self.shares[self.now] = max(1, len(self.servers) // 4)
            swapping = [s for s in self.servers.values() if s.told and self.now - s.turn_since <= TURN_S]
            # A turn goes on though the pool, and so the share, may have become smaller since.
            assert len(swapping) <= max(share for at, share in self.shares.items() if self.now - at <= TURN_S)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["together", "rolling", "broadcast"]),
    calm_at=st.sampled_from([0.0, 20.0, 100.0, 400.0]),
)
def test_whatever_happens_nobody_waits_forever_and_turns_are_as_many_as_they_may_be(**schedule: Any) -> None:
    World(random.Random(schedule.pop("seed")), **schedule).run()
