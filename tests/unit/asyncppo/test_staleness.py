"""Staleness: the rule against the docstring and AReaL's formula, and a simulated house that may not break it.

The simulation runs the real ledger, buffer and rule under random schedules: servers of several speeds and capacities
that lag behind by swaps, prompts that take long, and, in bad weather, deaths, expired leases and engines that fall back
to an older version.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncppo.staleness import in_time, may_admit, may_take, staleness
from tests.stream_maker import a_group_of_version, some_prompts
from trainer.stream.buffer import Buffer, BufferedGroup
from trainer.stream.ledger import Ledger

pytestmark = pytest.mark.unit

SMALL = st.integers(0, 6)


# --- the worked example and the formula ------------------------------------------------------------------------------


def test_staleness_is_the_distance_to_the_oldest_token() -> None:
    assert staleness(5, 5) == 0
    assert staleness(5, 2) == 3


def test_the_worked_example_of_the_docstring() -> None:
    rule = {"max_staleness": 1, "batch": 2}
    # at v = 0 admission grants 4 leases, all due at 1; a fifth would break due(1) <= 2·2
    due: Counter[int] = Counter()
    for _ in range(4):
        assert may_admit(due, oldest_version=0, version=0, **rule)
        due[1] += 1
    assert not may_admit(due, oldest_version=0, version=0, **rule)

    # three have arrived: the batch at v = 0 takes two, and due(1) = 2 <= (1 − 1 + 1)·2, so nothing waits
    assert may_take(due, [1, 1], version=0, batch=2)
    due[1] -= 2

    # at v = 1 the servers have swapped: two new leases, due at 2, not three
    for _ in range(2):
        assert may_admit(due, oldest_version=1, version=1, **rule)
        due[2] += 1
    assert not may_admit(due, oldest_version=1, version=1, **rule)

    # if both overtake the slow group, the batch at v = 1 may not hold them both, nor one of them with the buffered one:
    # the slow one is due now, so the batch waits for it
    assert not may_take(due, [2, 2], version=1, batch=2)
    assert not may_take(due, [1, 2], version=1, batch=2)
    assert may_take(due, [1, 1], version=1, batch=2)


@given(batch=st.integers(1, 5), bound=SMALL, first=SMALL, trained=SMALL, unconsumed=st.integers(0, 40))
def test_admission_is_areals_formula_when_all_servers_serve_the_newest(
    batch: int, bound: int, first: int, trained: int, unconsumed: int
) -> None:
    version, consumed = first + trained, trained * batch
    formula = consumed + unconsumed < (version + bound + 1 - first) * batch
    due = {version + bound: unconsumed}
    assert may_admit(due, oldest_version=version, max_staleness=bound, version=version, batch=batch) == formula


@given(due=st.dictionaries(SMALL, st.integers(1, 6)), version=SMALL, batch=st.integers(1, 4))
def test_in_time_is_that_the_earliest_due_first_schedule_meets_every_deadline(
    due: dict[int, int], version: int, batch: int
) -> None:
    queue = sorted(Counter(due).elements())
    meets_all = all(version + place // batch <= deadline for place, deadline in enumerate(queue))
    assert in_time(due, version=version, batch=batch) == meets_all


def test_a_bound_of_zero_admits_one_batch_for_each_version() -> None:
    rule = {"max_staleness": 0, "version": 3, "batch": 2}
    assert may_admit({}, oldest_version=3, **rule)
    assert may_admit({3: 1}, oldest_version=3, **rule)
    assert not may_admit({3: 2}, oldest_version=3, **rule)


def test_a_server_that_lags_behind_more_than_the_bound_gets_nothing() -> None:
    assert may_admit({}, oldest_version=3, max_staleness=2, version=5, batch=1)
    assert not may_admit({}, oldest_version=2, max_staleness=2, version=5, batch=1)


def test_what_is_too_old_already_does_not_hold_up_the_others() -> None:
    # a group due at 1 that is still on its way at version 2 will be dropped when it comes: nothing may wait for it
    assert may_admit({1: 1}, oldest_version=2, max_staleness=1, version=2, batch=2)
    assert may_take({1: 1, 3: 2}, [3, 3], version=2, batch=2)


# --- the simulated house ---------------------------------------------------------------------------------------------


@dataclass
class Server:
    name: bytes
    capacity: int
    version: int
    works_on: dict[int, int] = field(default_factory=dict)
    """Lease to the version that drew its first token."""


class House:
    """Trainer and servers in one thread; every method is one event."""

    def __init__(
        self, rng: random.Random, batch: int, bound: int, steps: int, ready: int, capacities: list[int]
    ) -> None:
        self.rng, self.batch, self.bound, self.steps, self.ready = rng, batch, bound, steps, ready
        self.ledger = Ledger(some_prompts(5, shuffle=True), bound)
        self.buffer = Buffer(bound, batch)
        self.version = self.next_version = 0
        self.servers = [Server(b"s%d" % n, capacity, 0) for n, capacity in enumerate(capacities)]
        self.consumed: list[tuple[int, str]] = []
        self.slow: set[int] = set()

    def grant(self) -> None:
        for server in self.servers:
            while len(server.works_on) < server.capacity and self._may_lease(server.version):
                record = self.ledger.lease(server.name, server.version, now=0.0)
                server.works_on[record.lease] = server.version
                if self.rng.random() < 0.2:
                    self.slow.add(record.lease)
            self.ledger.check()

    def _may_lease(self, served: int) -> bool:
        if self.ledger.consumed + self.ledger.unconsumed >= self.steps * self.batch:
            return False  # enough for the whole run
        if len(self.buffer) >= self.ready * self.batch:
            return False  # so many batches wait already
        return may_admit(
            self.ledger.due,
            oldest_version=served,
            max_staleness=self.bound,
            version=self.next_version,
            batch=self.batch,
        )

    def answer(self, *, slow_too: bool) -> None:
        """One lease of one server comes back; or the engine was swapped before it had begun with it."""
        server = self.rng.choice(self.servers)
        ready = [lease for lease in server.works_on if slow_too or lease not in self.slow]
        if ready:
            self.finish(server, self.rng.choice(ready))

    def finish(self, server: Server, lease: int) -> None:
        oldest = self.rng.choice([server.works_on.pop(lease), server.version])
        if lease not in self.ledger.records or self.ledger.records[lease].peer != server.name:
            return  # the trainer has given up on it
        record = self.ledger.records[lease]
        held = BufferedGroup(lease, record.epoch, record.prompt, a_group_of_version(oldest, lease))
        self.ledger.receive(lease, held.oldest_version)
        self.buffer.add(held)
        self.ledger.check()

    def swap(self) -> None:
        server = self.rng.choice(self.servers)
        server.version = self.rng.randint(min(server.version, self.version), self.version)

    def train(self) -> bool:
        """Take the next batch if there is one; then publish, at once or later."""
        if self.version < self.next_version:
            self.version += 1
            return False
        for stale in self.buffer.remove_stale(self.version):
            self.ledger.drop(stale.lease, "too stale")
        taken = self.buffer.take(self.version, self.ledger.due)
        if taken is None:
            return False
        assert len(taken) == self.batch
        assert all(staleness(self.version, held.oldest_version) <= self.bound for held in taken)
        self.ledger.consume(held.lease for held in taken)
        self.ledger.check()
        self.consumed += [(held.epoch, held.prompt.prompt_id) for held in taken]
        self.next_version = self.version + 1
        return True

    # bad weather

    def die(self) -> None:
        server = self.rng.choice(self.servers)
        for lease in self.ledger.held_by(server.name):
            self.ledger.drop(lease, "server left")
        self.servers.remove(server)
        back_at = self.rng.randint(max(0, self.version - 2), self.version)
        self.servers.append(Server(server.name + b"'", server.capacity, back_at))
        self.ledger.check()

    def expire(self) -> None:
        held = [record.lease for record in self.ledger.records.values() if not record.buffered]
        if held:
            self.ledger.drop(self.rng.choice(held), "not completed")
            self.ledger.check()

    def fall_back(self) -> None:
        """An engine restarts, and what it has in flight is answered by an older version than the lease says."""
        server = self.rng.choice(self.servers)
        server.version = self.rng.randint(0, server.version)
        server.works_on = dict.fromkeys(server.works_on, server.version)

    def run(self, weather: list[str], patience: int = 12) -> None:
        """Random events until every batch is trained. After some without a batch everything catches up: then there
        must be one."""
        without = 0
        while self.next_version < self.steps:
            event = self.rng.choice(["grant", "answer", "answer", "swap", "train", *weather])
            without += 1
            match event:
                case "train":
                    without = 0 if self.train() else without
                case "answer":
                    self.answer(slow_too=False)
                case _:
                    getattr(self, event)()
            if without > patience:
                assert self.catch_up(), (
                    f"deadlock at version {self.version}: due {dict(self.ledger.due)}, {len(self.buffer)} buffered"
                )
                without = 0

    def catch_up(self) -> bool:
        """All servers swap and answer what they have, round by round; whether a batch came of it."""
        for _ in range(self.batch * (self.bound + 2) + 2):
            if self.train():
                return True
            for server in self.servers:
                for lease in list(server.works_on):
                    self.finish(server, lease)
                server.version = self.version
            self.grant()
        return False

    def every_prompt_is_accounted_for(self) -> bool:
        """Consumed once each, or still to be consumed: nothing lost, nothing twice."""
        sequence = self.ledger.prompts.after(0)
        state = self.ledger.state()
        fresh = [next(sequence) for _ in range(state.next_position)]
        left = [fresh[position] for position in state.unconsumed]
        return sorted([*self.consumed, *((epoch, p.prompt_id) for epoch, p in left)]) == sorted(
            (epoch, p.prompt_id) for epoch, p in fresh
        )


HOUSES = st.builds(
    House,
    rng=st.integers(0, 2**32).map(random.Random),
    batch=st.integers(1, 4),
    bound=st.integers(0, 3),
    steps=st.integers(1, 10),
    ready=st.integers(1, 3),
    capacities=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)


@settings(max_examples=120, deadline=None)
@given(house=HOUSES)
def test_in_good_weather_nothing_is_dropped_and_every_batch_comes(house: House) -> None:
    house.run(weather=[])
    assert house.ledger.consumed == house.ledger.admitted == house.steps * house.batch
    assert not house.ledger.dropped
    assert house.every_prompt_is_accounted_for()


@settings(max_examples=120, deadline=None)
@given(house=HOUSES, weather=st.sets(st.sampled_from(["die", "expire", "fall_back"]), min_size=1))
def test_in_bad_weather_no_batch_is_too_stale_every_batch_comes_and_no_prompt_is_lost(
    house: House, weather: set[str]
) -> None:
    house.run(weather=sorted(weather))
    assert house.ledger.consumed == house.steps * house.batch
    assert house.every_prompt_is_accounted_for()
