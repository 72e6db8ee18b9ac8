"""The real intake, ledger, buffer and admission under random schedules: servers of any speed that join, swap, fail, go
out of reach, die and come back; a trainer that is killed at any moment and goes on from its last checkpoint.

Time is simulated, messages go by hand, nothing else is replaced. Weights have contents here: a version that was rolled
back and made again has another one, and tokens bear the content that drew them. So a batch can be judged by what it is
made of, and the whole run by its ledger.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncppo.messages import (
    Ack,
    Cancel,
    Failed,
    Goodbye,
    Group,
    GroupMember,
    Lease,
    Message,
    Pulse,
    Swap,
    SwapFailed,
    Unknown,
    WeightsReady,
    Welcome,
)
from asyncppo.metrics import Journal
from asyncppo.staleness import staleness
from tests.stream_maker import a_config, a_group, a_hello, a_prepared, a_status, a_swapped, some_prompts
from trainer.stream import intake as intake_module
from trainer.stream.buffer import BufferedGroup
from trainer.stream.intake import Identity, Intake
from trainer.stream.ledger import Ledger, LedgerState
from trainer.stream.state import StreamState

pytestmark = pytest.mark.unit

PROMPTS = 5
TICK_S = 0.05
PATIENCE = 150
"""Events without a batch after which the weather is good until there is one."""
LIMIT = 6000
"""Events without a batch, in good weather for most of them, that are a deadlock."""


class Killed(BaseException):
    """The trainer's process is gone; or the run is complete."""


class Paper:
    """A journal in memory: the ledger's lines."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def ledger(self, **line: Any) -> None:
        self.lines.append(msgspec.json.decode(msgspec.json.encode(line)))

    def event(self, event: str, **details: Any) -> None:
        """Nobody reads it."""

    def sizes(self) -> tuple[int, int]:
        return 0, len(self.lines)

    def sync(self) -> None:
        """It is as safe as it gets."""

    @property
    def batches(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "groups" in line]


class NoWait(threading.Condition):
    """Nothing comes while the one thread waits."""

    def wait(self, timeout: float | None = None) -> bool:
        return True


@dataclass
class Server:
    """A rollout server: what it has been told, does, and keeps until it is acknowledged."""

    name: str
    life: int = 0
    version: int = -1
    content: int = -1
    trainer: str = ""
    welcome: bool = False
    out_of_reach: bool = False
    told: int = -1
    """The version that was announced last."""
    announced: WeightsReady | None = None
    may_swap: bool = False
    """It was told to swap to what is announced."""
    works_on: dict[int, tuple[Lease, list[tuple[int, int]]]] = field(default_factory=dict)
    """Lease to what drew its tokens so far, as (version, content)."""
    outbox: dict[int, Group] = field(default_factory=dict)

    @property
    def identity(self) -> bytes:
        return f"{self.name}/{self.life}".encode()

    def hear(self, message: Message) -> None:
        match message:
            case Welcome():
                if message.trainer != self.trainer:
                    self.works_on.clear()
                self.trainer, self.welcome = message.trainer, True
            case Unknown():
                self.works_on.clear()
                self.welcome = False
            case WeightsReady():
                self.announced, self.told, self.may_swap = message, message.policy_version, False
            case Swap() if self.announced and message.manifest == self.announced.manifest:
                self.may_swap = True
            case Pulse() if message.policy_version != self.told:
                self.welcome = False  # an announcement was lost: Hello again
            case Lease():
                self.works_on[message.lease] = (message, [(self.version, self.content)])
            case Ack():
                self.outbox.pop(message.lease, None)
            case Cancel():
                for lease in message.leases:
                    self.works_on.pop(lease, None)

    def swap(self, *, fails: bool) -> Message | None:
        """The next of its two phases; Prepared again as long as it is not told to swap."""
        if self.announced is None:
            return None
        version, manifest = self.announced.policy_version, self.announced.manifest
        if self.content == int(manifest):  # it has it, and was not heard
            self.announced = None
            return a_swapped(version, manifest)
        if fails:
            self.announced = None
            return SwapFailed(policy_version=version, reason="it did")
        if not self.may_swap:
            return a_prepared(version, manifest)
        self.version, self.content, self.announced = version, int(manifest), None
        for _, spans in self.works_on.values():
            spans.append((self.version, self.content))
        return a_swapped(version, manifest)

    def quarantine(self) -> SwapFailed:
        """It has new weights and not those that it should have; nothing that it drew by them leaves it."""
        self.works_on.clear()
        self.version = self.content = -1
        return SwapFailed(policy_version=self.told, reason="the probe", quarantined=True)

    def finish(self, lease: int) -> Group:
        asked, spans = self.works_on.pop(lease)
        group = a_group(
            lease,
            [[(version, 1) for version, _ in spans]] * 2,
            trainer=self.trainer,
            epoch=asked.epoch,
            prompt_id=asked.prompt_id,
            response_ids=np.array([content for _, content in spans] * 2, np.int32),
        )
        self.outbox[lease] = group
        return group

    def die(self) -> None:
        self.__init__(self.name, self.life + 1)  # type: ignore[misc]


class Rounds:
    """A broadcaster; each of its rounds takes a moment."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._until = 0.0

    @property
    def busy(self) -> bool:
        return self._house.now < self._until

    def give_up(self, member: bytes) -> None:
        """Its rounds end by themselves."""

    def begin(
        self, version: int, manifest: str, members: Sequence[tuple[bytes, int]], group: str
    ) -> dict[bytes, GroupMember]:
        assert not self.busy
        assert (version, manifest) == (self._house.published, str(self._house.contents[version]))
        self._until = self._house.now + self._house.rng.choice([0, 0.1, 1])
        size = len(members) + 1
        return {
            identity: GroupMember(name="g", address="a", port=1, rank=rank, world_size=size, backend="gloo")
            for rank, (identity, _) in enumerate(members, start=1)
        }


@dataclass
class Checkpoint:
    state: StreamState
    contents: list[int]
    """Of the versions up to this one."""


class House:
    """A trainer in many lives, and its servers. It is the intake's hub: `receive` is where everything happens."""

    address = "simulated"

    def __init__(
        self,
        seed: int,
        batch: int,
        bound: int,
        steps: int,
        utd: int,
        servers: int,
        slow: str,
        weather: set[str],
        publish: str = "together",
        beside: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.beside = beside  # training goes on while a version is published
        self.batch, self.bound, self.steps, self.utd, self.weather = batch, bound, steps, utd, sorted(weather)
        self.config = a_config(
            steps=steps,
            batch=batch,
            max_staleness=bound,
            sampling={"max_response_tokens": 50},
            algorithm={"utd": utd, "reuse": "replay"},
            publish={"swap": "rolling" if publish == "rolling" else "together", "ready_timeout_s": 1},
            rollout={"swap_timeout_s": 5},
            stream={
                "ready_batches": self.rng.choice([1, 1, 3]),
                "heartbeat_s": 0.2,
                "lease_timeout_s": 20,
                "batch_timeout_s": 1e9,
                "set_aside_s": 1,
                "slow": slow,
            },
        )
        self.broadcaster = Rounds(self) if publish == "broadcast" else None
        self.servers = [Server(f"s{number}") for number in range(servers)]
        self.paper = Paper()
        self.checkpoint: Checkpoint | None = None
        self.contents: list[int] = []
        self.version = self.published = -1
        """About to be trained; announced last: training may be ahead."""
        self.made = 0
        self.now = 100.0
        self.calm = 0
        self.waited = 0
        self.complete = False
        self.kills = self.adopted = 0
        self.inbox: deque[tuple[bytes, Message]] = deque()

    # --- the trainer's lives -----------------------------------------------------------------------------------------

    def run(self) -> None:
        while not self.complete:
            self.live()
        self.check_the_end()

    def live(self) -> None:
        """From a start to a kill, or to the end of the run."""
        state, self.contents = None, []
        if self.checkpoint is not None:
            ledger = msgspec.json.decode(msgspec.json.encode(self.checkpoint.state.ledger), type=LedgerState)
            state = StreamState(ledger, self.checkpoint.state.held)
            self.contents = list(self.checkpoint.contents)
        self.paper.lines = self.paper.lines[: state.ledger.ledger_bytes if state else 0]
        self.version = self.published = -1
        self.inbox.clear()
        identity = Identity("agreement", "model", "tokenizer")
        journal = cast("Journal", self.paper)
        self.intake = Intake(self.config, self, some_prompts(PROMPTS), identity, journal, self.broadcaster)
        self.intake._changed = NoWait()
        self.intake.start(state)
        self.intake._thread.join(60)
        assert not self.intake._thread.is_alive(), "the intake hangs"
        self.adopted += self.intake._adopted
        if not isinstance(self.intake._failure, Killed):
            assert self.intake._failure is not None
            raise self.intake._failure

    def receive(self, timeout_s: float) -> tuple[bytes, Message] | None:
        self.now += TICK_S
        self.waited += 1
        assert self.waited < LIMIT, f"deadlock at version {self.version}: {self.intake.counts()}"
        if self.waited > PATIENCE:
            self.calm = 60
        self.calm -= 1
        if self.inbox:
            return self.inbox.popleft()
        if self.version < 0:
            self.begin()
        elif self.published < self.version and self.rng.random() < 0.2:
            self.announce()
        elif self.rng.random() < 0.25:
            self.learn()
        elif self.calm > 0 or self.rng.random() < 0.8:
            self.serve(self.rng.choice(self.servers))
        elif self.weather:
            getattr(self, self.rng.choice(self.weather))(self.rng.choice(self.servers))
        return self.inbox.popleft() if self.inbox else None

    def send(self, peer: bytes, message: Message) -> bool:
        for server in self.servers:
            is_lost = isinstance(message, Ack) and self.calm <= 0 and self.rng.random() < 0.5
            if server.identity == peer and not server.out_of_reach and not is_lost:
                server.hear(message)
        return True

    def wake(self) -> None:
        """The one thread is awake."""

    def close(self) -> None:
        """Nothing to let go of."""

    # --- the learner -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The restored version is published; servers may have come before."""
        if self.rng.random() < 0.2:
            self.serve(self.rng.choice(self.servers))
            return
        self.version = len(self.contents) - 1 if self.contents else 0
        if not self.contents:
            self.contents = [0]  # the starting weights are what they are
        self.announce()
        self.end_if_complete()

    def announce(self) -> None:
        self.published = version = self.version
        self.intake.announce(WeightsReady(policy_version=version, directory="", manifest=str(self.contents[version])))
        self.inbox.extend((s.identity, a_status()) for s in self.servers if s.welcome and not s.out_of_reach)

    def learn(self) -> None:
        """A step, if there is a batch; killed anywhere in it, perhaps."""
        asked: list[bool] = []

        def should_stop() -> bool:
            asked.append(True)
            return len(asked) > 1

        groups = self.intake.take(self.version, should_stop)
        if groups is None:
            return
        self.waited = 0
        self.check_batch(groups)
        self.perhaps_killed()
        self.made += 1
        self.contents.append(self.made)
        self.version += 1
        if not (self.beside and self.rng.random() < 0.5) or self.version == self.steps:
            self.announce()  # else later, unless a newer one overtakes it
        self.perhaps_killed()
        if self.rng.random() < 0.4 or self.version == self.steps:
            state = self.intake.state()
            self.perhaps_killed()  # it was written, and not renamed
            self.checkpoint = Checkpoint(state, list(self.contents))
            self.perhaps_killed()
        self.end_if_complete()

    def end_if_complete(self) -> None:
        if self.version == self.steps:
            self.complete = True
            raise Killed

    def perhaps_killed(self) -> None:
        if "kill" in self.weather and self.kills < 6 and self.rng.random() < 0.07:
            self.kills += 1
            raise Killed

    # --- the servers, in good weather and in bad ---------------------------------------------------------------------

    def say(self, server: Server, message: Message) -> None:
        if not server.out_of_reach:
            self.inbox.append((server.identity, message))

    def serve(self, server: Server) -> None:
        if server.out_of_reach and (self.calm > 0 or self.rng.random() < 0.02):
            server.out_of_reach = False
        if not server.welcome:
            self.say(server, a_hello(server.name, str(server.life), capacity=self.rng.randint(1, 5)))
            return
        doing = self.rng.choice(["swap", "finish", "finish", "resend"])
        fails = "fail" in self.weather and self.calm <= 0 and self.rng.random() < 0.1
        if doing == "swap" and (said := server.swap(fails=fails)):
            self.say(server, said)
        elif doing == "finish" and server.works_on:
            lease = self.rng.choice(list(server.works_on))
            if server.works_on[lease][1][0][0] < 0:  # it came when there were no weights to answer it with
                del server.works_on[lease]
                self.say(server, Failed(lease=lease, reason="in quarantine"))
                return
            group = server.finish(lease)
            if self.rng.random() < 0.7:  # else it is lost on its way, and is sent again
                self.say(server, group)
        else:
            status = a_status(server.version)
            in_quarantine = server.version < 0 <= server.told
            self.say(server, msgspec.structs.replace(status, state="quarantined") if in_quarantine else status)
            for group in list(server.outbox.values()):
                self.say(server, group)

    def duplicate(self, server: Server) -> None:
        for group in [*server.outbox.values(), *server.outbox.values()]:
            self.say(server, group)

    def fail(self, server: Server) -> None:
        if server.works_on and self.rng.random() < 0.3:
            lease = self.rng.choice(list(server.works_on))
            del server.works_on[lease]
            self.say(server, Failed(lease=lease, reason="it did"))

    def quarantine(self, server: Server) -> None:
        if server.welcome and server.told >= 0 and self.rng.random() < 0.3:
            self.say(server, server.quarantine())

    def part(self, server: Server) -> None:
        """It cannot be reached until the intake has given up on it, or a while less."""
        server.out_of_reach = True

    def die(self, server: Server) -> None:
        if self.rng.random() < 0.3:
            server.die()

    def leave(self, server: Server) -> None:
        if self.rng.random() < 0.3:
            self.say(server, Goodbye(reason=""))
            server.welcome = False
            server.works_on.clear()

    def kill(self, _: Server) -> None:
        if self.kills < 6 and self.rng.random() < 0.05:
            self.kills += 1
            raise Killed

    # --- what holds --------------------------------------------------------------------------------------------------

    def check_batch(self, groups: list[BufferedGroup]) -> None:
        assert len({held.position for held in groups}) == self.batch
        before = Counter((e, p) for line in self.paper.batches[:-1] for e, p, _ in line["groups"])
        for held in groups:
            assert staleness(self.version, held.oldest_version) <= self.bound
            assert held.uses == before[held.epoch, held.prompt.prompt_id]
            assert (held.group.epoch, held.group.prompt_id) == (held.epoch, held.prompt.prompt_id)
            drew = zip(held.group.span_versions.tolist(), held.group.response_ids.tolist(), strict=True)
            assert all(self.contents[version] == content for version, content in drew), "drawn by what was rolled back"

    def check_the_end(self) -> None:
        lines = self.paper.batches
        assert [line["version"] for line in lines] == list(range(self.steps))
        uses: dict[tuple[int, str], list[int]] = {}
        for line in lines:
            for epoch, prompt_id, use in line["groups"]:
                uses.setdefault((epoch, prompt_id), []).append(use)
        assert all(made == list(range(1, len(made) + 1)) and len(made) <= self.utd for made in uses.values())
        assert self.checkpoint is not None
        ledger = self.checkpoint.state.ledger
        sequence = some_prompts(PROMPTS).after(0)
        begun = [(epoch, prompt.prompt_id) for epoch, prompt in (next(sequence) for _ in range(ledger.next_position))]
        unused = [begun[position] for position in ledger.unconsumed]
        unused += [(held.epoch, held.prompt_id) for held in ledger.buffered if not held.uses]
        done = [(line["epoch"], line["prompt_id"]) for line in self.paper.lines if line.get("again") is False]
        assert sorted([*uses, *unused, *done]) == sorted(begun), "a prompt is lost, or in two places"
        lapsed = sum(line["lapsed"] for line in self.paper.lines if "lapsed" in line)
        assert (ledger.used, ledger.lapsed) == (self.steps * self.batch, lapsed)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of expected warnings, and a simulated kill that looks like a failure."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def run_house(**arguments: Any) -> House:
    house = House(**arguments)
    clock = SimpleNamespace(monotonic=lambda: house.now)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intake_module, "time", clock)
        house.run()
    return house


BAD_WEATHER = ["kill", "part", "die", "leave", "fail", "quarantine", "duplicate"]

SCHEDULES = {
    "seed": st.integers(0, 2**32),
    "batch": st.integers(1, 4),
    "bound": st.integers(0, 3),
    "steps": st.integers(2, 9),
    "servers": st.integers(1, 4),
    "slow": st.sampled_from(["wait", "drop"]),
    "weather": st.sets(st.sampled_from(BAD_WEATHER)),
    "publish": st.sampled_from(["together", "rolling", "broadcast"]),
    "beside": st.booleans(),
}


@settings(max_examples=400, deadline=None)
@given(utd=st.just(1), **SCHEDULES)
def test_whatever_dies_and_whenever_each_prompt_is_consumed_once_and_no_batch_is_too_stale(**schedule: Any) -> None:
    run_house(**schedule)


@settings(max_examples=400, deadline=None)
@given(utd=st.integers(2, 4), **SCHEDULES)
def test_with_replay_whatever_dies_no_use_is_repeated_or_lost(**schedule: Any) -> None:
    run_house(**schedule)


def test_groups_that_servers_kept_are_adopted_and_never_what_was_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # with schedules that have enough of both in them: else the tests above would say nothing of either
    answers: Counter[tuple[str | None, bool]] = Counter()
    objection = Ledger.objection

    def counted(ledger: Ledger, trainer: str, newest: int, epoch: int, prompt_id: str) -> str | None:
        answer = objection(ledger, trainer, newest, epoch, prompt_id)
        answers[answer, (epoch, prompt_id) in ledger._again] += 1
        return answer

    monkeypatch.setattr(Ledger, "objection", counted)
    houses = [
        run_house(
            seed=seed, batch=2, bound=3, steps=8, utd=1 + seed % 2, servers=3, slow="wait", weather={"kill", "part"}
        )
        for seed in range(150)
    ]
    assert sum(house.kills for house in houses) > 300
    assert sum(house.adopted for house in houses) > 100
    assert answers["rolled back", True] >= 3, "of prompts that wait for an answer"
