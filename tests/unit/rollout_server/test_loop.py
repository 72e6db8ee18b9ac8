"""Claims about the rollout server, against a trainer written out here: a scripted engine, a transport in memory."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from msgspec.structs import replace

from asyncppo.config import Config, RewardConfig, from_tree
from asyncppo.errors import EngineError, RefusedError, UserError
from asyncppo.messages import (
    MAX_TEXT,
    PROTOCOL,
    Ack,
    Cancel,
    Failed,
    Goodbye,
    Group,
    Hello,
    Lease,
    Message,
    Prepared,
    Pulse,
    Refused,
    Status,
    Stop,
    Swap,
    SwapFailed,
    Swapped,
    Unknown,
    WeightsReady,
    Welcome,
)
from asyncppo.rewards import Grade
from asyncppo.transport.memory import MemoryHub, MemoryLink
from asyncppo.weights import write_manifest
from rollout_server import loop
from rollout_server.engine import UNLOADED, Broadcast, ScriptedEngine
from rollout_server.loop import RolloutServer
from rollout_server.reward import Grader
from tests.stream_maker import a_group

pytestmark = pytest.mark.unit

M = TypeVar("M", bound=Message)
TOKENS = 8
HEARTBEAT_S = 0.05


class ScriptedGrader(Grader):
    """1 where the text is the answer; without processes."""

    def __init__(self) -> None:
        self.closed = False

    async def grade(self, texts: Sequence[str], answer: str) -> list[Grade]:
        return [Grade(float(text == answer), error=text == "?") for text in texts]

    def close(self) -> None:
        self.closed = True


def script(prompt: tuple[int, ...], index: int, version: int) -> list[tuple[int, float]]:
    """Response i to a prompt p under version v: TOKENS times 100 v + 10 i + p."""
    return [(100 * version + 10 * index + prompt[0], -0.25 * (index + 1))] * TOKENS


class World:
    """One server under test, and the trainer's end of its line."""

    def __init__(
        self, directory: Path, token_s: float = 0.0, on_load: Callable[[Path | Broadcast, int], None] | None = None
    ) -> None:
        self.directory = directory
        (directory / "config.json").write_text("{}")
        (directory / "tokenizer.json").write_text("{}")
        self.config = self.make_config()
        self.hub = MemoryHub()
        self.spoilt = 0.0  # how far the engine is from what it should score, in nats
        self.engine = ScriptedEngine(script, lambda ids: str(ids[-1]), token_s, on_load, self.scores)
        self.grader: ScriptedGrader = ScriptedGrader()
        self.peer = b""
        self.heard: list[Message] = []
        self.tells = True  # says Swap to whoever is prepared
        self.server: RolloutServer
        self.running: asyncio.Task[None]

    def make_config(self, **rollout: Any) -> Config:
        tree = {
            "run": {"directory": str(self.directory / "runs")},
            "data": {"train": "x"},
            "actor": {"path": str(self.directory)},
            "stream": {"heartbeat_s": HEARTBEAT_S},
            "sampling": {"group_size": 2, "max_response_tokens": TOKENS},
            "rollout": {"max_groups": 4, "connect_timeout_s": 5, "start_timeout_s": 2, "swap_timeout_s": 2} | rollout,
        }
        return from_tree(tree)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[RolloutServer]:
        """The server runs within; at the end it is stopped and has ended without an error."""
        self.start()
        yield self.server
        self.server.stop("the test is over")
        await self.running

    def start(self) -> None:
        link = self.hub.link(b"me")
        self.server = RolloutServer(self.config, link, self.engine, self.grader, "me", str(self.directory), "i1")
        self.running = asyncio.create_task(self.server.run())

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.hub.send(self.peer or b"me", message)

    async def expect(self, kind: type[M], **fields: Any) -> M:
        """The next message of this kind with these fields; others that come before it are put on `heard`."""
        while True:
            got = self.hub.receive(0)
            if got is None:
                if self.running.done():
                    await self.running
                    raise AssertionError(f"the server ended while the test waited for {kind.__name__}")
                await asyncio.sleep(0.002)
                continue
            self.peer, message = got
            if isinstance(message, Prepared) and self.tells:
                self.send(Swap(policy_version=message.policy_version, manifest=message.manifest))
            if isinstance(message, kind) and all(getattr(message, name) == value for name, value in fields.items()):
                return message
            self.heard.append(message)

    async def quiet(self, seconds: float) -> list[Message]:
        """What comes within so many seconds, heartbeats left out."""
        await asyncio.sleep(seconds)
        came = []
        while (got := self.hub.receive(0)) is not None:
            if not isinstance(got[1], Status):
                came.append(got[1])
        return came

    def scores(self, ids: tuple[int, ...], version: int) -> list[float]:
        return [-1.0 - version - self.spoilt] * (len(ids) - 1)

    def publish(self, version: int, probe: bool = False) -> WeightsReady:
        directory = self.directory / f"v{version}"
        directory.mkdir()
        (directory / "model.safetensors").write_text(f"weights {version}")
        ready = WeightsReady(
            policy_version=version, directory=str(directory), manifest=write_manifest(directory, version)
        )
        if not probe:
            return ready
        logprobs = np.array([-1.0 - version] * 2, np.float32)
        return replace(ready, probe_ids=np.array([3, 1, 4], np.int32), probe_logprobs=logprobs, tolerance=0.01)

    async def welcome(self, version: int = 0) -> WeightsReady:
        """Hello, Welcome, the first weights, Swapped."""
        await self.expect(Hello)
        ready = self.publish(version)
        self.send(welcome(), ready)
        await self.expect(Swapped, policy_version=version)
        return ready


def welcome(trainer: str = "t1") -> Welcome:
    return Welcome(run="r", heartbeat_s=HEARTBEAT_S, trainer=trainer)


def a_lease(number: int, token: int = 7, answer: str = "7", group_size: int = 2) -> Lease:
    return Lease(
        lease=number,
        epoch=0,
        prompt_id=str(number),
        prompt_ids=np.array([token], np.int32),
        answer=answer,
        group_size=group_size,
        purpose="train",
    )


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await scenario

    asyncio.run(limited())


def test_hello_says_what_the_trainer_has_to_agree_with_and_the_engine_starts_only_after_welcome(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving():
            hello = await world.expect(Hello)
            assert (hello.protocol, hello.server, hello.incarnation, hello.capacity) == (PROTOCOL, "me", "i1", 4)
            assert hello.agreement == world.config.agreement_hash()
            assert hello.engine == "scripted"
            await world.expect(Hello)  # said again until it is answered
            assert not await world.engine.healthy()
            world.send(welcome())
            await world.expect(Status)
            assert await world.engine.healthy()

    run(scenario())


def test_a_lease_becomes_a_group_with_tokens_logprobs_spans_and_rewards(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving():
            await world.welcome()
            world.send(a_lease(11))
            group = await world.expect(Group)
            group.check(2)
            assert group.lease == 11
            assert group.response_ids.tolist() == [7] * TOKENS + [17] * TOKENS
            assert group.behaviour_logprobs.tolist() == [-0.25] * TOKENS + [-0.5] * TOKENS
            assert group.lengths.tolist() == [TOKENS, TOKENS]
            assert (group.span_versions.tolist(), group.span_lengths.tolist()) == ([0, 0], [TOKENS, TOKENS])
            assert group.rewards.tolist() == [1.0, 0.0]
            assert (group.truncated.tolist(), group.reward_errors.tolist()) == ([0, 0], [0, 0])
            world.send(Ack(lease=11))
            status = await world.expect(Status, unacknowledged=0, responses=2)
            assert (status.tokens, status.groups_in_flight, status.policy_version) == (2 * TOKENS, 0, 0)
            assert status.state == "waiting for leases"
            assert status.idle_s > 0

    run(scenario())


class DenseGrader(ScriptedGrader):
    """Steps that end at the characters 4 and 6, whatever the text; an error where the text begins with 9."""

    async def grade(self, texts: Sequence[str], answer: str) -> list[Grade]:
        return [
            Grade(0.0, True) if text.startswith("9") else Grade(0.5, False, ((6, -0.25), (4, 0.5))) for text in texts
        ]


def one_by_one(ids: Sequence[int]) -> str:
    """Token 7 is the text `7,`."""
    return "".join(f"{token}," for token in ids)


def test_process_rewards_stand_on_the_tokens_that_complete_their_steps(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.engine = ScriptedEngine(script, one_by_one)
        world.grader = DenseGrader()
        async with world.serving():
            await world.welcome()
            world.send(a_lease(1))  # 7,7,7,… and 17,17,17,…
            group = await world.expect(Group, lease=1)
            group.check(2)
            first = [0, 0.5, -0.25, 0, 0, 0, 0, 0]
            second = [0, 0.25, 0, 0, 0, 0, 0, 0]  # both in `17,17,`
            assert group.step_rewards.tolist() == first + second
            assert group.rewards.tolist() == [0.5, 0.5]
            world.send(Ack(lease=1), a_lease(2, token=9))  # the first fails, the second is 19,19,…
            group = await world.expect(Group, lease=2)
            assert group.step_rewards.tolist() == [0] * TOKENS + second
            assert group.reward_errors.tolist() == [1, 0]
            world.send(Ack(lease=2), replace(a_lease(3), purpose="eval"))
            group = await world.expect(Group, lease=3)
            assert (group.step_rewards.tolist(), group.rewards.tolist()) == ([], [0.5, 0.5])

    run(scenario())


def test_a_group_without_process_rewards_carries_none_and_decodes_nothing(tmp_path: Path) -> None:
    def decode(ids: Sequence[int]) -> str:
        assert len(ids) == TOKENS, "a part of a response was decoded"
        return str(ids[-1])

    async def scenario() -> None:
        world = World(tmp_path)
        world.engine = ScriptedEngine(script, decode)
        async with world.serving():
            await world.welcome()
            world.send(a_lease(1))
            assert (await world.expect(Group)).step_rewards.tolist() == []

    run(scenario())


def test_a_response_whose_tokens_are_not_its_text_is_a_reward_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        times = itertools.count()
        world.engine = ScriptedEngine(script, lambda _: f"{next(times)} times")
        world.grader = DenseGrader()
        async with world.serving():
            await world.welcome()
            world.send(a_lease(1))
            group = await world.expect(Group)
            group.check(2)
            assert (group.reward_errors.tolist(), group.rewards.tolist()) == ([1, 1], [0, 0])
            assert group.step_rewards.tolist() == [0] * 2 * TOKENS
            await world.expect(Status, reward_errors=2)

    run(scenario())


def test_a_long_response_loses_reward_in_training_and_not_in_an_evaluation(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        penalty = RewardConfig(overlong_buffer=4, overlong_penalty=0.5)
        sampling = replace(world.config.sampling, max_response_tokens=TOKENS + 1)
        world.config = replace(world.config, reward=penalty, sampling=sampling)
        async with world.serving():
            await world.welcome()
            world.send(a_lease(1))
            group = await world.expect(Group, lease=1)
            group.check(2)
            assert group.rewards.tolist() == [1 - 0.375, -0.375]  # 8 tokens of 9: 3 of the buffer's 4
            world.send(Ack(lease=1), replace(a_lease(2), purpose="eval"))
            assert (await world.expect(Group, lease=2)).rewards.tolist() == [1, 0]

    run(scenario())


def test_nothing_is_generated_before_the_first_published_weights_are_loaded(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving():
            await world.expect(Hello)
            world.send(welcome(), a_lease(1))
            status = await world.expect(Status, groups_in_flight=1)
            assert (status.state, status.policy_version) == ("starting", UNLOADED)
            assert world.engine.generating == 0
            world.send(world.publish(5))
            await world.expect(Swapped, policy_version=5)
            assert (await world.expect(Group)).span_versions.tolist() == [5, 5]

    run(scenario())


def test_a_swap_in_the_middle_of_a_generation_shows_in_tokens_and_spans(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, token_s=0.1)
        async with world.serving(), pulsing(world):
            await world.welcome(0)
            world.send(a_lease(1, group_size=1))
            await world.expect(Status, state="generating")
            await asyncio.sleep(0.25)  # two tokens
            world.send(world.publish(1))
            group = await world.expect(Group)
            before, after = group.span_lengths.tolist()
            assert group.span_versions.tolist() == [0, 1]
            assert group.response_ids.tolist() == [7] * before + [107] * after
            assert before + after == TOKENS

    run(scenario())


def test_a_group_is_sent_again_after_a_new_hello_until_it_is_acknowledged(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving():
            ready = await world.welcome()
            world.send(a_lease(1))
            first = await world.expect(Group, lease=1)
            world.send(Unknown())  # the trainer lost its memory; the acknowledgement never came
            await world.expect(Hello)
            world.send(welcome("t2"), ready)
            again = await world.expect(Group, lease=1)
            assert again.response_ids.tolist() == first.response_ids.tolist()
            await world.expect(Swapped, policy_version=0)  # confirmed to the new trainer, without loading it again
            world.send(Ack(lease=1))
            await world.expect(Status, unacknowledged=0)

    run(scenario())


def test_a_group_whose_ack_was_lost_is_sent_again_on_the_same_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving():
            await world.welcome()
            world.send(a_lease(1))
            await world.expect(Group, lease=1)
            pulses = asyncio.create_task(pulse(world))
            await world.expect(Group, lease=1)
            world.send(Ack(lease=1))
            await world.expect(Status, unacknowledged=0)
            pulses.cancel()
            assert not any(isinstance(message, Hello) for message in world.heard)

    run(scenario())


async def pulse(world: World, version: int = 0) -> None:
    while True:
        world.send(Pulse(policy_version=version))
        await asyncio.sleep(HEARTBEAT_S)


@asynccontextmanager
async def pulsing(world: World) -> AsyncIterator[None]:
    """The trainer is not silent, however long a generation takes."""
    pulses = asyncio.create_task(pulse(world, UNLOADED))
    yield
    pulses.cancel()


def test_a_silent_trainer_hears_hello_again_after_ten_heartbeats(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving():
            await world.welcome()
            started = time.monotonic()
            await world.expect(Hello)
            assert time.monotonic() - started > 5 * HEARTBEAT_S  # ten, less what passed before `started`

    run(scenario())


def test_a_pulse_with_a_version_that_was_never_announced_here_makes_the_server_say_hello(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving():
            await world.welcome(0)
            ready = world.publish(1)  # its announcement is lost on the way
            world.send(Pulse(policy_version=1))
            await world.expect(Hello)
            world.send(welcome(), ready)
            await world.expect(Swapped, policy_version=1)

    run(scenario())


def test_a_pulse_of_a_trainer_that_has_not_published_yet_is_no_lost_announcement(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving():
            await world.welcome(0)
            world.send(Pulse(policy_version=-1))
            assert not [message for message in await world.quiet(5 * HEARTBEAT_S) if isinstance(message, Hello)]

    run(scenario())


@pytest.mark.parametrize("how", ["unknown", "another trainer"])
def test_leases_in_progress_are_void_for_a_trainer_that_does_not_know_them(tmp_path: Path, how: str) -> None:
    async def scenario() -> None:
        world = World(tmp_path, token_s=0.12)  # an answer takes longer than the silence
        async with world.serving():
            ready = await world.welcome()
            world.send(a_lease(1))
            await world.expect(Status, state="generating")
            if how == "unknown":
                world.send(Unknown())
            await world.expect(Hello)
            world.send(welcome("t2"), ready, a_lease(1, token=9))  # the number comes again, for another prompt
            pulses = asyncio.create_task(pulse(world))
            group = await world.expect(Group, lease=1)
            pulses.cancel()
            assert group.response_ids.tolist() == [9] * TOKENS + [19] * TOKENS
            assert not any(isinstance(message, Group) for message in world.heard)

    run(scenario())


def test_leases_are_void_at_the_welcome_of_the_same_trainer_too_if_it_had_lost_this_server(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, token_s=0.05)
        async with world.serving():
            ready = await world.welcome()
            world.send(a_lease(1))
            await world.expect(Status, state="generating")
            world.send(Unknown())  # it has leased that prompt to another, or is about to
            await world.expect(Hello)
            assert world.server.status().groups_in_flight == 1  # goes on until a trainer is there
            world.send(welcome(), ready)
            await world.expect(Status, groups_in_flight=0)
            assert not any(isinstance(message, Group) for message in world.heard + await world.quiet(0.6))

    run(scenario())


def test_leases_in_progress_outlive_a_silence_of_the_same_trainer(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, token_s=0.12)  # the answer takes longer than the silence
        async with world.serving():
            ready = await world.welcome()
            world.send(a_lease(1))
            await world.expect(Hello)
            world.send(welcome(), ready)
            pulses = asyncio.create_task(pulse(world))
            assert (await world.expect(Group, lease=1)).response_ids[0] == 7
            pulses.cancel()

    run(scenario())


def test_a_refusal_ends_the_server_with_its_reason_and_without_an_engine(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.start()
        await world.expect(Hello)
        world.send(Refused(reason="model: the trainer has a, the rollout server b"))
        with pytest.raises(RefusedError, match="refused this server: model: the trainer has a"):
            await world.running
        assert world.engine.policy_version == UNLOADED
        assert world.grader.closed

    run(scenario())


def test_a_server_without_a_trainer_gives_up_and_says_for_how_long_it_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.config = world.make_config(connect_timeout_s=0.2)
        monkeypatch.setattr(MemoryLink, "hint", "a hint of the link")
        world.start()
        with pytest.raises(
            UserError, match=r"no trainer answered within 0\.2 s \(rollout\.connect_timeout_s\)"
        ) as caught:
            await world.running
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith("(--trainer)? a hint of the link")
        assert world.grader.closed

    run(scenario())


def test_a_lease_outlives_the_engine_that_died_under_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, token_s=0.05)
        async with world.serving():
            await world.welcome(3)
            world.send(a_lease(1))
            await world.expect(Status, state="generating")
            world.engine.die()
            assert (await world.expect(Swapped)).policy_version == 3  # the restarted engine got its weights back
            world.send(Pulse(policy_version=3))  # the trainer lives: no reason to say Hello again
            group = await world.expect(Group)
            assert group.span_versions.tolist() == [3, 3]
            world.send(Ack(lease=1))
            status = await world.expect(Status, unacknowledged=0, groups_in_flight=0)
            assert status.engine_restarts == 1

    run(scenario())


def test_an_idle_engine_that_dies_is_restarted_before_anybody_needs_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving():
            await world.welcome(3)
            world.engine.die()
            await world.expect(Swapped, policy_version=3)
            await world.expect(Status, engine_restarts=1)

    run(scenario())


def test_a_lease_that_fails_twice_is_given_back_with_the_reason(tmp_path: Path) -> None:
    class Refusing(ScriptedEngine):
        attempts = 0

        async def generate(self, *args: Any) -> Any:
            self.attempts += 1
            raise EngineError("HTTP 400: this prompt is too long")

    async def scenario() -> None:
        world = World(tmp_path)
        world.engine = Refusing(script, str)
        async with world.serving():
            await world.welcome()
            world.send(a_lease(1))
            failed = await world.expect(Failed, lease=1)
            assert failed.reason == "HTTP 400: this prompt is too long"
            assert world.engine.attempts == 2
            await world.expect(Status, groups_in_flight=0, unacknowledged=0, engine_restarts=0)

    run(scenario())


def test_an_engine_that_dies_again_and_again_ends_the_server(tmp_path: Path) -> None:
    class Dying(ScriptedEngine):
        async def generate(self, *args: Any) -> Any:
            self.die()
            raise EngineError("gone")

    async def scenario() -> None:
        world = World(tmp_path)
        world.engine = Dying(script, str)
        world.start()
        await world.welcome()
        with pytest.raises(EngineError, match="scripted failed 4 times and answered nothing in between"):
            await lease_for_ever(world)

    run(scenario())


async def lease_for_ever(world: World) -> None:
    while True:
        world.send(a_lease(1))
        await world.expect(Failed)


def test_weights_that_do_not_load_leave_the_server_generating_with_the_old_ones(tmp_path: Path) -> None:
    def on_load(weights: Path | Broadcast, version: int) -> None:
        if version == 1:
            raise EngineError("shapes differ")

    async def scenario() -> None:
        world = World(tmp_path, on_load=on_load)
        async with world.serving():
            await world.welcome(0)
            world.send(world.publish(1))
            assert (await world.expect(SwapFailed, policy_version=1)).reason == "shapes differ"
            world.send(a_lease(1))
            assert (await world.expect(Group)).span_versions.tolist() == [0, 0]
            world.send(Ack(lease=1), world.publish(2))
            await world.expect(Swapped, policy_version=2)

    run(scenario())


def test_a_server_generates_until_it_is_told_to_swap(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, token_s=0.02)
        async with world.serving(), pulsing(world):
            await world.welcome(0)
            world.tells = False
            ready = world.publish(1)
            world.send(ready)
            prepared = await world.expect(Prepared, policy_version=1, manifest=ready.manifest)
            assert prepared.prepare_s > 0
            world.send(a_lease(1))
            assert (await world.expect(Group)).span_versions.tolist() == [0, 0]
            world.send(Ack(lease=1), Swap(policy_version=1, manifest="another"))
            assert not [message for message in await world.quiet(0.2) if isinstance(message, Swapped)]
            world.send(Swap(policy_version=1, manifest=ready.manifest))
            await world.expect(Swapped, policy_version=1)

    run(scenario())


def test_no_token_of_wrong_weights_leaves_and_its_lease_is_generated_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        def on_load(weights: Path | Broadcast, version: int) -> None:
            loads.append(version)
            world.spoilt = 1.0 if loads == [0, 1] else 0.0  # the first load of version 1 goes wrong

        loads: list[int] = []
        world = World(tmp_path, token_s=0.1, on_load=on_load)
        async with world.serving(), pulsing(world):
            await world.expect(Hello)
            world.send(welcome(), world.publish(0, probe=True))
            await world.expect(Swapped, policy_version=0)
            world.send(a_lease(1))
            await world.expect(Status, state="generating")
            await asyncio.sleep(0.25)  # two tokens
            world.send(world.publish(1, probe=True))
            swapped = await world.expect(Swapped, policy_version=1)
            assert swapped.attempts == 2
            assert swapped.probe_gap == pytest.approx(0, abs=1e-6)
            group = await world.expect(Group, lease=1)
            assert group.span_versions.tolist() == [1, 1]  # from its first token
            assert not any(isinstance(message, Failed) for message in world.heard)
            assert world.engine.generating == 0

    run(scenario())


def test_a_quarantined_server_gives_its_leases_back_and_comes_back_with_a_restarted_engine(tmp_path: Path) -> None:
    async def scenario() -> None:
        class Watched(ScriptedEngine):
            may_restart = asyncio.Event()

            async def restart(self) -> None:
                await self.may_restart.wait()
                await super().restart()

        def on_load(weights: Path | Broadcast, version: int) -> None:
            loads.append(version)
            world.spoilt = 1.0 if loads in ([0, 1], [0, 1, 1]) else 0.0

        loads: list[int] = []
        world = World(tmp_path)
        world.engine = Watched(script, lambda ids: str(ids[-1]), 0.1, on_load, world.scores)
        async with world.serving(), pulsing(world):
            await world.welcome(0)
            world.send(a_lease(1))
            await world.expect(Status, state="generating")
            await asyncio.sleep(0.25)  # two tokens
            world.send(world.publish(1, probe=True))
            failed = await world.expect(SwapFailed, policy_version=1)
            assert failed.quarantined
            assert "1 nats from the trainer's" in failed.reason
            given_back = await world.expect(Failed, lease=1)
            assert "quarantined" in given_back.reason
            assert not any(isinstance(message, Failed) for message in world.heard)
            status = await world.expect(Status, state="quarantined")
            assert (status.policy_version, status.groups_in_flight) == (UNLOADED, 0)
            world.send(a_lease(2))
            assert "quarantined" in (await world.expect(Failed, lease=2)).reason  # at once
            world.engine.may_restart.set()
            assert (await world.expect(Swapped, policy_version=1)).attempts == 3
            assert loads == [0, 1, 1, 1]
            world.send(a_lease(3))
            assert (await world.expect(Group, lease=3)).span_versions.tolist() == [1, 1]
            await world.expect(Status, engine_restarts=1)

    run(scenario())


def test_the_first_start_of_an_engine_is_tested_once_and_before_its_first_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[str] = []

    async def test(engine: Any, model: str, config: Config) -> None:
        assert engine.policy_version == UNLOADED
        tested.append(model)
        engine.self_tested = True

    async def scenario() -> None:
        world = World(tmp_path)
        world.engine.self_tested = False
        async with world.serving():
            await world.welcome(0)
            assert tested == [str(tmp_path)]
            world.engine.die()
            await world.expect(Swapped, policy_version=0)
            assert len(tested) == 1

    monkeypatch.setattr(loop, "self_test", test)
    run(scenario())


@pytest.mark.parametrize("found", ["retract", "resubmit"])
def test_a_trainer_hears_how_the_engine_is_swapped_if_the_self_test_has_changed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    class Falls(ScriptedEngine):
        @property
        def description(self) -> str:
            return f"scripted, swapped by {self.swap_mode}"

    async def test(engine: Any, model: str, config: Config) -> None:
        engine.swap_mode, engine.self_tested = found, True

    async def scenario() -> None:
        world = World(tmp_path)
        world.engine = Falls(script, lambda ids: str(ids[-1]), 0.0, None, world.scores)
        world.engine.self_tested = False
        async with world.serving(), pulsing(world):  # else it says Hello for the silence
            assert (await world.expect(Hello)).engine == "scripted, swapped by retract"
            world.send(welcome())
            if found == "resubmit":
                assert (await world.expect(Hello, engine="scripted, swapped by resubmit")).incarnation == "i1"
                world.send(welcome())
            world.send(world.publish(0))
            await world.expect(Swapped)
            assert not any(isinstance(message, Hello) for message in world.heard)

    monkeypatch.setattr(loop, "self_test", test)
    run(scenario())


@pytest.mark.parametrize("how", ["not clean", "without end", "switched off", "known to be clean"])
def test_an_engine_whose_swaps_are_not_clean_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def test(*_: Any) -> None:
        if how == "without end":
            await asyncio.Event().wait()
        raise EngineError("token 7 is of the old weights")

    async def scenario() -> None:
        world = World(tmp_path)
        limit_s = 0.1 if how == "without end" else 2
        world.config = world.make_config(
            start_timeout_s=limit_s, swap_timeout_s=limit_s, self_test=how != "switched off"
        )
        world.engine.self_tested = how == "known to be clean"
        world.start()
        if how in ("switched off", "known to be clean"):
            await world.welcome(0)
            world.server.stop("the test is over")
            await world.running
            return
        await world.expect(Hello)
        world.send(welcome(), world.publish(0))
        says = "token 7 is of the old weights" if how == "not clean" else r"waited 0\.2 s for the self-test of scripted"
        with pytest.raises(EngineError, match=says):
            await world.expect(Swapped)

    monkeypatch.setattr(loop, "self_test", test)
    run(scenario())


def test_a_cancelled_lease_stops_generating_and_is_never_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, token_s=0.05)
        async with world.serving():
            await world.welcome()
            world.send(a_lease(1), a_lease(2))
            await world.expect(Status, groups_in_flight=2, state="generating")
            world.send(Cancel(leases=[1, 99]))
            await world.expect(Status, groups_in_flight=1)
            assert world.engine.generating == 1
            assert (await world.expect(Group)).lease == 2
            assert not any(isinstance(message, Group) for message in await world.quiet(0.5))

    run(scenario())


def test_an_ack_for_a_lease_in_progress_ends_it_as_it_is_no_longer_wanted(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, token_s=0.05)
        async with world.serving():
            await world.welcome()
            world.send(a_lease(1))
            await world.expect(Status, state="generating")
            world.send(Ack(lease=1))
            await world.expect(Status, groups_in_flight=0, state="waiting for leases")
            assert world.engine.generating == 0

    run(scenario())


def test_a_lease_of_no_responses_is_given_back_and_the_server_lives(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving():
            await world.welcome()
            world.send(a_lease(1, group_size=0), a_lease(2))
            assert "expected at least 1" in (await world.expect(Failed, lease=1)).reason
            await world.expect(Group, lease=2)

    run(scenario())


def test_a_message_that_does_not_decode_is_counted_and_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving() as server:
            await world.welcome()
            world.hub._peers[b"me"]([b"not msgpack"])
            world.hub._peers[b"me"]([])
            world.send(a_lease(1))
            await world.expect(Group)
            assert server.malformed == 2

    run(scenario())


@pytest.mark.parametrize("who", ["trainer", "signal"])
def test_a_stop_ends_leases_says_goodbye_and_closes_grader_and_engine(tmp_path: Path, who: str) -> None:
    async def scenario() -> None:
        world = World(tmp_path, token_s=1.0)
        world.start()
        await world.welcome()
        world.send(a_lease(1))
        await world.expect(Status, state="generating")
        if who == "trainer":
            world.send(Stop(reason="the run is complete"))
            goodbye = await world.expect(Goodbye)
            assert goodbye.reason == "the trainer says: the run is complete"
        else:
            world.server.stop("SIGTERM")
            assert (await world.expect(Goodbye)).reason == "SIGTERM"
        await world.running
        assert world.grader.closed
        assert not await world.engine.healthy()
        assert world.engine.generating == 0

    run(scenario())


# --- while the trainer is away ---------------------------------------------------------------------------------------


def spill_files(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "runs" / "run" / "spill" / "me").glob("*"))


def test_a_group_says_who_leased_it_and_what_it_answers(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving():
            await world.welcome()
            world.send(replace(a_lease(5), epoch=3, prompt_id="sum"))
            group = await world.expect(Group)
            assert (group.trainer, group.epoch, group.prompt_id) == ("t1", 3, "sum")

    run(scenario())


def test_what_is_finished_while_the_trainer_is_away_waits_on_disk_and_is_offered_to_the_next_one(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        world = World(tmp_path, token_s=0.04)
        async with world.serving():
            ready = await world.welcome()
            world.send(a_lease(1), Unknown())  # the trainer has been started again; the answer takes 0.3 s
            await world.expect(Hello)
            deadline = time.monotonic() + 5
            while spill_files(tmp_path) != ["1.group"]:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            assert not [message for message in await world.quiet(0.1) if isinstance(message, Group)]
            world.send(welcome("t2"), ready)
            group = await world.expect(Group, lease=1)
            assert group.trainer == "t1"
            world.send(Ack(lease=1))
            await world.expect(Status, unacknowledged=0)
            assert spill_files(tmp_path) == []

    run(scenario())


def test_a_spill_disk_that_hangs_does_not_silence_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, mended = threading.Event(), threading.Event()

    def write(lease: int, group: Group) -> bool:
        hangs.set()
        return not mended.wait(10)

    async def scenario() -> None:
        world = World(tmp_path, token_s=0.01)
        async with world.serving() as server:
            ready = await world.welcome()
            monkeypatch.setattr(server._outbox, "_write", write)
            world.send(a_lease(1), Unknown())
            await world.expect(Hello)
            while not hangs.is_set():
                await asyncio.sleep(0.01)
            await asyncio.sleep(2 * HEARTBEAT_S)
            world.send(welcome("t2"), ready)
            await world.expect(Group, lease=1)
            for _ in range(3):
                await world.expect(Status)
            assert not mended.is_set()
            mended.set()

    try:
        run(scenario())
    finally:
        mended.set()


def test_a_new_process_of_the_same_name_offers_what_the_old_one_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, token_s=0.01)
        async with world.serving():
            await world.welcome()
            world.send(a_lease(1), a_lease(2), Unknown())
            while len(spill_files(tmp_path)) < 2:
                await asyncio.sleep(0.01)
        world.peer = b""
        async with world.serving():
            await world.expect(Hello)
            world.send(welcome("t2"))
            first, second = await world.expect(Group), await world.expect(Group)
            assert {first.lease, second.lease} == {1, 2}
            world.send(Ack(lease=1), Ack(lease=2))
            await world.expect(Status, unacknowledged=0)
        assert spill_files(tmp_path) == []

    run(scenario())


def test_generation_pauses_while_the_outbox_is_full_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        async with world.serving():
            await world.welcome()
            world.server._outbox._limit = 1
            world.send(a_lease(1))
            await world.expect(Group, lease=1)
            world.send(a_lease(2))
            await world.expect(Status, state="outbox full", groups_in_flight=1)
            world.send(Ack(lease=1))
            await world.expect(Group, lease=2)

    run(scenario())
    assert "generation pauses: 1 finished groups wait" in caplog.text


def test_a_group_that_is_too_large_to_be_sent_is_given_back_with_the_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.config = replace(world.config, stream=replace(world.config.stream, max_message_mb=1))

        async with world.serving():
            await world.welcome()
            world.server._check_size(make_group_of(100_000, 20_000))
            with pytest.raises(EngineError, match=r"at most stream\.max_message_mb \(1\)"):
                world.server._check_size(make_group_of(100_000, 80_000))

    run(scenario())


def make_group_of(*lengths: int) -> Group:
    return a_group(1, [[(0, length)] for length in lengths])


@pytest.mark.parametrize("reason", ["x" * 1_000_000, "\x1b[31mred\x00"], ids=["endless", "control characters"])
def test_a_reason_of_the_engine_arrives_however_it_looks(tmp_path: Path, reason: str) -> None:
    async def scenario() -> None:
        world = World(tmp_path)

        async def fail(*_: Any) -> None:
            raise EngineError(reason)

        async with world.serving():
            await world.welcome()
            world.engine.generate = fail  # type: ignore[assignment,method-assign]
            world.send(a_lease(1))
            failed = await world.expect(Failed, lease=1)
            assert len(failed.reason) <= MAX_TEXT
            assert failed.reason.isprintable()

    run(scenario())
