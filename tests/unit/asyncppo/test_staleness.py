"""Staleness: the rule against the docstring and AReaL's formula, and a simulated house that may not break it.

The simulation runs the real ledger, buffer and rule under random schedules: servers of several speeds and capacities
that lag behind by swaps, prompts that take long, and, in bad weather, deaths, expired leases and engines that fall back
to an older version.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncppo.staleness import demands, in_time, may_admit, may_take, staleness
from tests.stream_maker import a_buffered, a_config, a_group_of_version, some_prompts
from trainer.stream.admission import Admission
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


def test_what_is_too_old_already_has_no_place_in_the_rest_of_the_run() -> None:
    ledger, buffer = Ledger(some_prompts(9), 1), Buffer(1, 1)
    admission = Admission(a_config(steps=3, batch=1, max_staleness=1), ledger, buffer)
    ledger.lease(b"alice", 0, now=0.0)  # due at 1
    admission.version = 2
    assert admission.allows(2)


# --- replay ----------------------------------------------------------------------------------------------------------


def test_the_worked_example_of_replay_in_the_docstring() -> None:
    house = House(random.Random(0), batch=2, bound=2, steps=100, ready=9, capacities=[9], utd=2)
    trained = []
    for version in range(5):
        house.version = version
        house.answer_everything_by(version)
        assert house.train()
        trained.append(sorted(prompt for (_, prompt), versions in house.used.items() if version in versions))
    a, b, c, d, e, f = (f"p{number}" for number in range(6))
    assert trained[:4] == [[a, b], [a, c], [b, c], [d, e]]
    assert trained[4] == [e, f]
    assert (house.ledger.admitted, house.ledger.lapsed) == (7, 1)


@pytest.mark.parametrize(
    ("groups", "uses"),
    [
        ({(5, 1): 3}, {5: 3}),  # one use each, as many as groups
        ({(7, 2): 3}, {7: 6}),
        ({(5, 2): 3, (6, 4): 1}, {5: 3, 6: 2}),  # no more than there are versions left: 5, and 5 and 6
        ({(4, 2): 9}, {}),  # in no batch any more
    ],
)
def test_a_group_demands_its_uses_but_one_a_version_at_most(
    groups: dict[tuple[int, int], int], uses: dict[int, int]
) -> None:
    assert demands(groups, version=5) == uses


def test_a_prompt_is_admitted_with_all_its_uses() -> None:
    rule = {"max_staleness": 3, "version": 0, "batch": 2, "oldest_version": 0}
    assert may_admit({3: 5}, utd=3, **rule)  # 8 uses in 4 batches of 2
    assert not may_admit({3: 6}, utd=3, **rule)
    assert may_admit({3: 4}, utd=9, **rule)  # it can make 4 uses only


@given(data=st.data(), batch=st.integers(1, 5), bound=SMALL, utd=st.integers(1, 4), version=st.integers(6, 12))
def test_admission_grants_while_fewer_groups_than_a_batch_are_there(
    data: st.DataObject, batch: int, bound: int, utd: int, version: int
) -> None:
    steps = version + data.draw(st.integers(1, 8))
    limit = data.draw(st.integers(0, bound))
    ledger = Ledger(some_prompts(5), bound, utd)
    buffer = Buffer(bound, batch)
    admission = Admission(a_config(steps=steps, batch=batch, max_staleness=bound), ledger, buffer)
    admission.limit_staleness(limit)
    admission.version = version
    for _ in range(data.draw(st.integers(0, batch - 1))):
        lease = ledger.lease(b"alice", data.draw(st.integers(version - bound, version)), now=0.0).lease
        ledger.receive(lease, ledger.records[lease].oldest_version)
        for _ in range(data.draw(st.integers(0, utd - 1))):
            ledger.use(lease)
    ledger.check()
    assert admission.allows(version)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("utd", [1, 2, 3, 4])
@pytest.mark.parametrize("bound", [0, 1, 2, 3, 4])
def test_a_trainer_that_is_the_slow_side_uses_each_group_as_often_as_its_age_allows(
    bound: int, utd: int, batch: int
) -> None:
    house = House(random.Random(0), batch, bound, steps=60, ready=1, capacities=[99], utd=utd)
    for version in range(60):
        house.version = version
        house.answer_everything_by(version)
        assert house.train()
    assert not house.ledger.dropped
    assert house.ledger.used == 60 * batch
    assert house.ledger.used / house.ledger.admitted == pytest.approx(min(utd, bound + 1), rel=0.05)
    assert house.ledger.in_flight == 0
    assert all(held.uses for held in house.buffer._groups.values())  # no more than the run needs


def test_a_prompt_leased_while_the_trainer_is_busy_has_one_use_less() -> None:
    house = House(random.Random(0), batch=2, bound=3, steps=60, ready=1, capacities=[99], utd=4)
    for version in range(60):
        house.version = version
        house.answer_everything_by(version)
        assert house.train()
        house.answer_everything_by(version)  # leased for the next batch, but drawn by this version
    assert house.ledger.used / house.ledger.admitted == pytest.approx(3, rel=0.1)


# --- as without replay -----------------------------------------------------------------------------------------------


def may_lease_once(ledger: Ledger, buffer: Buffer, served: int, bound: int, version: int, batch: int, run: int) -> bool:
    """Admission as it is where each group is used once; `run` batches in the run, one ready at most."""
    if ledger.consumed + ledger.unconsumed >= run * batch or len(buffer) >= batch:
        return False
    due = Counter(deadline for deadline in ledger.due.elements() if deadline >= version)
    due[served + bound] += 1
    return in_time(due, version=version, batch=batch)


def take_once(groups: list[BufferedGroup], due: Counter[int], bound: int, version: int, batch: int) -> list[int] | None:
    """Taking a batch as it is where each group is used once."""
    if len(groups) < batch:
        return None
    chosen = sorted(groups, key=lambda group: (group.oldest_version, group.lease))[:batch]
    deadlines = [group.oldest_version + bound for group in chosen]
    in_flight = due - Counter(group.oldest_version + bound for group in groups)
    worth_waiting = any(version <= deadline < max(deadlines) for deadline in in_flight)
    if worth_waiting and not may_take(due, deadlines, version=version, batch=batch):
        return None
    return [group.lease for group in chosen]


@settings(max_examples=300)
@given(
    data=st.data(),
    batch=st.integers(1, 4),
    bound=SMALL,
    version=st.integers(6, 9),
    left=st.integers(1, 8),
    ages=st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=14),
)
def test_with_one_use_a_group_replay_is_the_rule_without_it(
    data: st.DataObject, batch: int, bound: int, version: int, left: int, ages: list[tuple[int, bool]]
) -> None:
    ledger, buffer = Ledger(some_prompts(5), bound, utd=1), Buffer(bound, batch)
    admission = Admission(a_config(steps=version + left, batch=batch, max_staleness=bound), ledger, buffer)
    admission.version = version
    ledger.admitted = ledger.consumed = version * batch
    for age, arrived in ages:
        record = ledger.lease(b"alice", version - min(age, bound), now=0.0)
        if arrived:
            ledger.receive(record.lease, record.oldest_version)
            buffer.add(
                a_buffered(
                    record.oldest_version, record.lease, record.prompt, a_group_of_version(record.oldest_version)
                )
            )
    served = version - data.draw(SMALL)
    expected = may_lease_once(ledger, buffer, served, bound, version, batch, version + left)
    assert admission.allows(served) == expected
    wanted = take_once(list(buffer._groups.values()), ledger.due, bound, version, batch)
    taken = buffer.take(version, ledger.due)
    assert (None if taken is None else [group.lease for group in taken]) == wanted


# --- the brake -------------------------------------------------------------------------------------------------------


def test_a_lowered_bound_holds_leases_back_until_what_is_there_is_used() -> None:
    ledger, buffer = Ledger(some_prompts(9), 2), Buffer(2, 2)
    admission = Admission(a_config(steps=99, batch=2, max_staleness=2, stream={"ready_batches": 9}), ledger, buffer)
    leases = []
    while admission.allows(0):
        leases.append(ledger.lease(b"alice", 0, now=0.0).lease)
    assert len(leases) == 6
    admission.limit_staleness(1)
    for version, (in_use, granted) in enumerate([(2, 0), (2, 2), (2, 2)]):
        for lease in leases[:in_use]:
            ledger.receive(lease, ledger.records[lease].oldest_version)
            ledger.use(lease)
        del leases[:in_use]
        admission.version = version + 1
        before = len(leases)
        while admission.allows(version + 1):
            leases.append(ledger.lease(b"alice", version + 1, now=0.0).lease)
        assert len(leases) - before == granted, version
        assert len(leases) == 4  # (1 + 1)·B
    admission.limit_staleness(2)
    assert admission.allows(3)


def test_further_uses_that_a_lowered_bound_ends_leave_their_places_to_new_prompts() -> None:
    ledger, buffer = Ledger(some_prompts(9), 2, utd=2), Buffer(2, 2)
    admission = Admission(a_config(steps=99, batch=2, max_staleness=2), ledger, buffer)
    for _ in range(3):
        lease = ledger.lease(b"alice", 0, now=0.0).lease
        ledger.receive(lease, 0)
        ledger.use(lease)
    admission.version = 1
    admission.limit_staleness(0)
    granted = 0
    while admission.allows(1):
        ledger.lease(b"alice", 1, now=0.0)
        granted += 1
    assert granted == 2


def test_a_lowered_bound_ends_further_uses_but_no_first_one() -> None:
    buffer = Buffer(2, 1)
    buffer.add(a_buffered(0, 1))
    buffer.add(a_buffered(0, 2, uses=1))
    assert buffer.remove_stale(1, limit=1) == []
    assert [held.lease for held in buffer.remove_stale(2, limit=1)] == [2]
    assert [held.lease for held in buffer.remove_stale(3, limit=1)] == [1]


@pytest.mark.parametrize("bound", [-1, 3])
def test_the_bound_is_never_raised_above_the_configured_one(bound: int) -> None:
    admission = Admission(a_config(max_staleness=2), Ledger(some_prompts(1), 2), Buffer(2, 2))
    with pytest.raises(ValueError, match=rf"from 0 to stream\.max_staleness \(2\), got {bound}"):
        admission.limit_staleness(bound)


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
        self, rng: random.Random, batch: int, bound: int, steps: int, ready: int, capacities: list[int], utd: int = 1
    ) -> None:
        self.rng, self.batch, self.bound, self.steps, self.utd = rng, batch, bound, steps, utd
        config = a_config(steps=steps, batch=batch, max_staleness=bound, stream={"ready_batches": ready})
        self.ledger = Ledger(some_prompts(7), bound, utd)
        self.buffer = Buffer(bound, batch)
        self.admission = Admission(config, self.ledger, self.buffer)
        self.version = 0
        self.servers = [Server(b"s%d" % n, capacity, 0) for n, capacity in enumerate(capacities)]
        self.used: dict[tuple[int, str], list[int]] = defaultdict(list)
        """(epoch, prompt) to the versions that it was used at."""
        self.slow: set[int] = set()

    def grant(self) -> None:
        for server in self.servers:
            while len(server.works_on) < server.capacity and self.admission.allows(server.version):
                record = self.ledger.lease(server.name, server.version, now=0.0)
                server.works_on[record.lease] = server.version
                if self.rng.random() < 0.2:
                    self.slow.add(record.lease)
            self.ledger.check()

    def answer(self, *, slow_too: bool) -> None:
        """One lease of one server comes back; or the engine was swapped before it had begun with it."""
        server = self.rng.choice(self.servers)
        ready = [lease for lease in server.works_on if slow_too or lease not in self.slow]
        if ready:
            self.finish(server, self.rng.choice(ready))

    def answer_everything_by(self, version: int) -> None:
        """All servers serve this version, get what they may have and answer it at once, in the order of the leases."""
        for server in self.servers:
            server.version = version
        self.grant()
        for server in self.servers:
            for lease in list(server.works_on):
                self.finish(server, lease)

    def finish(self, server: Server, lease: int) -> None:
        oldest = self.rng.choice([server.works_on.pop(lease), server.version])
        if lease not in self.ledger.records or self.ledger.records[lease].peer != server.name:
            return  # the trainer has given up on it
        record = self.ledger.records[lease]
        held = BufferedGroup(lease, record.position, record.epoch, record.prompt, a_group_of_version(oldest, lease))
        self.ledger.receive(lease, held.oldest_version)
        self.buffer.add(held)
        self.ledger.check()

    def swap(self) -> None:
        server = self.rng.choice(self.servers)
        server.version = self.rng.randint(min(server.version, self.version), self.version)

    def train(self) -> bool:
        """Take the next batch if there is one; then publish, at once or later."""
        if self.version < self.admission.version:
            self.version += 1
            return False
        self.remove_stale()
        taken = self.buffer.take(self.version, self.ledger.due)
        if taken is None:
            return False
        assert len({held.lease for held in taken}) == self.batch
        for held in taken:
            assert staleness(self.version, held.oldest_version) <= self.bound
            versions = self.used[held.epoch, held.prompt.prompt_id]
            assert held.uses == len(versions)
            versions.append(self.version)
            if self.ledger.use(held.lease):
                self.buffer.return_used(held, self.version)
            self.ledger.check()
        self.admission.version = self.version + 1
        self.remove_stale()
        return True

    def remove_stale(self) -> None:
        for stale in self.buffer.remove_stale(self.admission.version, self.admission.limit):
            if stale.uses:
                self.ledger.lapse(stale.lease)
            else:
                self.ledger.drop(stale.lease, "too stale")
            self.ledger.check()

    def brake(self) -> None:
        self.admission.limit_staleness(self.rng.randint(0, self.bound))

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
            self.ledger.drop(self.rng.choice(held), "expired")  # not NOT_COMPLETED: no prompt is to be given up here
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
        while self.admission.version < self.steps:
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
        """Used at `utd` versions at most, or still to be used: nothing lost, nothing too often."""
        if any(len(versions) > self.utd or len(set(versions)) < len(versions) for versions in self.used.values()):
            return False
        sequence = self.ledger.prompts.after(0)
        state = self.ledger.state()
        fresh = [next(sequence) for _ in range(state.next_position)]
        never_used = [held.position for held in state.buffered if not held.uses]
        left = [fresh[position] for position in [*state.unconsumed, *never_used]]
        return sorted([*self.used, *((epoch, p.prompt_id) for epoch, p in left)]) == sorted(
            (epoch, p.prompt_id) for epoch, p in fresh
        )


HOUSES = st.builds(
    House,
    rng=st.integers(0, 2**32).map(random.Random),
    batch=st.integers(1, 4),
    bound=st.integers(0, 4),
    steps=st.integers(1, 12),
    ready=st.integers(1, 3),
    capacities=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)


REPLAYING_HOUSES = st.builds(
    House,
    rng=st.integers(0, 2**32).map(random.Random),
    batch=st.integers(1, 4),
    bound=st.integers(0, 4),
    steps=st.integers(1, 12),
    ready=st.integers(1, 3),
    capacities=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    utd=st.integers(2, 4),
)


@settings(max_examples=120, deadline=None)
@given(house=HOUSES, weather=st.sets(st.just("brake")))
def test_in_good_weather_nothing_is_dropped_and_every_batch_comes(house: House, weather: set[str]) -> None:
    house.run(weather=sorted(weather))
    assert house.ledger.consumed == house.ledger.admitted == house.steps * house.batch
    assert not house.ledger.dropped
    assert house.every_prompt_is_accounted_for()


@settings(max_examples=250, deadline=None)
@given(house=REPLAYING_HOUSES, weather=st.sets(st.just("brake")))
def test_with_replay_in_good_weather_no_group_goes_unused_for_being_slow(house: House, weather: set[str]) -> None:
    house.run(weather=sorted(weather))
    assert not house.ledger.dropped
    assert house.ledger.used == house.steps * house.batch
    assert house.every_prompt_is_accounted_for()


@settings(max_examples=250, deadline=None)
@given(house=REPLAYING_HOUSES, weather=st.sets(st.sampled_from(["die", "expire", "fall_back", "brake"]), min_size=1))
def test_with_replay_in_bad_weather_every_batch_comes_and_no_prompt_is_lost(house: House, weather: set[str]) -> None:
    house.run(weather=sorted(weather))
    assert house.ledger.used == house.steps * house.batch
    assert house.every_prompt_is_accounted_for()


@settings(max_examples=120, deadline=None)
@given(house=HOUSES, weather=st.sets(st.sampled_from(["die", "expire", "fall_back"]), min_size=1))
def test_in_bad_weather_no_batch_is_too_stale_every_batch_comes_and_no_prompt_is_lost(
    house: House, weather: set[str]
) -> None:
    house.run(weather=sorted(weather))
    assert house.ledger.consumed == house.steps * house.batch
    assert house.every_prompt_is_accounted_for()
