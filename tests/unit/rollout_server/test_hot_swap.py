"""Claims about a weight swap: what is prepared, verified, probed and skipped, and what remains when it fails."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from asyncppo.config import SamplingConfig
from asyncppo.errors import EngineError
from asyncppo.messages import Bucket, GroupMember, Prepared, Swap, SwapFailed, Swapped, WeightsReady
from asyncppo.weights import write_manifest
from rollout_server import hot_swap
from rollout_server.engine import UNLOADED, Broadcast, Response, ScriptedEngine
from rollout_server.hot_swap import HotSwap, TakenBackError

pytestmark = pytest.mark.unit

Publish = Callable[..., WeightsReady]
LIMIT_S = 5.0
PROBE = np.array([3, 1, 4, 1], np.int32)


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """Publishes a version: a directory with one file and its manifest, and what the engine should score."""

    def publish(version: int, content: str = "weights", probe: bool = False) -> WeightsReady:
        directory = tmp_path / f"v{version}-{content}"
        directory.mkdir()
        (directory / "model.safetensors").write_text(content)
        manifest = write_manifest(directory, version)
        ready = WeightsReady(policy_version=version, directory=str(directory), manifest=manifest, tolerance=0.01)
        if not probe:
            return ready
        return msgspec.structs.replace(ready, probe_ids=PROBE, probe_logprobs=np.array(right((), version), np.float32))

    return publish


def broadcast(version: int, probe: bool = False) -> WeightsReady:
    return WeightsReady(
        policy_version=version,
        manifest=f"m{version}",
        buckets=[Bucket(["w"], ["float32"], [[2]])],
        probe_ids=PROBE if probe else np.empty(0, np.int32),
        probe_logprobs=np.array(right((), version) if probe else [], np.float32),
        tolerance=0.01,
    )


def member(name: str = "g1") -> GroupMember:
    return GroupMember(name=name, address="127.0.0.1", port=1, rank=1, world_size=2, backend="gloo")


def right(ids: tuple[int, ...], version: int) -> list[float]:
    """The probe's log-probs under a version."""
    return [-1.0 - version, -2.0, -3.0]


OnLoad = Callable[[Path | Broadcast, int], None]


class Scripted(ScriptedEngine):
    """Ten tokens, each 100 times the version plus its position. `wrong` loads answer the probe wrongly, from now on."""

    def __init__(self, on_load: OnLoad | None = None, token_s: float = 0.0, wrong: int = 0) -> None:
        def script(prompt: tuple[int, ...], index: int, version: int) -> list[tuple[int, float]]:
            return [(100 * version + position, -0.5) for position in range(10)]

        super().__init__(script, lambda ids: " ".join(map(str, ids)), token_s, on_load, self._score)
        self.loads: list[tuple[int, Path | Broadcast]] = []
        self.wrong = wrong
        self.restarts = 0
        self.is_wrong = False
        self.gap = 0.5

    def _score(self, ids: tuple[int, ...], version: int) -> list[float]:
        return [logprob - self.gap * self.is_wrong for logprob in right(ids, version)]

    async def load(self, weights: Path | Broadcast, policy_version: int) -> None:
        self.loads.append((policy_version, weights))
        await super().load(weights, policy_version)
        self.is_wrong = self.wrong > 0
        self.wrong -= self.is_wrong

    async def restart(self) -> None:
        self.restarts += 1
        await super().restart()

    @property
    def loaded(self) -> list[int]:
        return [version for version, _ in self.loads]


def scripted(on_load: OnLoad | None = None, token_s: float = 0.0, wrong: int = 0) -> Scripted:
    return Scripted(on_load, token_s, wrong)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario

    asyncio.run(limited())


async def told(swap: HotSwap, ready: WeightsReady, place: GroupMember | None = None) -> Prepared | Swapped | SwapFailed:
    """The trainer's answer to Prepared, and what comes of it."""
    swap.tell(Swap(policy_version=ready.policy_version, manifest=ready.manifest, member=place))
    return await swap.next()


async def swap_to(
    swap: HotSwap, ready: WeightsReady, place: GroupMember | None = None
) -> Prepared | Swapped | SwapFailed:
    """Announce a version, and tell the server to swap as soon as it is prepared."""
    swap.announce(ready)
    outcome = await swap.next()
    return await told(swap, ready, place) if isinstance(outcome, Prepared) else outcome


async def restart(swap: HotSwap, engine: ScriptedEngine) -> None:
    """What the engine's watch does."""
    swap.engine_lost()
    await engine.restart()
    swap.engine_restarted()


async def answer(swap: HotSwap, engine: ScriptedEngine) -> Response:
    async with swap.generation():
        return (await engine.generate(np.array([1], np.int32), 1, SamplingConfig()))[0]


def test_a_published_version_is_loaded_and_its_phases_are_timed(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        assert (engine.policy_version, swap.announced_version) == (UNLOADED, UNLOADED)
        ready = publish(3, probe=True)
        swap.announce(ready)
        prepared = await swap.next()
        assert isinstance(prepared, Prepared)
        assert (prepared.policy_version, prepared.manifest, engine.loaded) == (3, ready.manifest, [])
        assert prepared.prepare_s > 0
        await asyncio.sleep(0.02)
        outcome = await told(swap, ready)
        assert isinstance(outcome, Swapped)
        assert (outcome.policy_version, engine.policy_version, swap.announced_version) == (3, 3, 3)
        assert outcome.manifest == ready.manifest
        assert outcome.prepare_s == prepared.prepare_s
        assert outcome.wait_s > 0.015
        assert min(outcome.pause_s, outcome.load_s, outcome.resume_s, outcome.probe_s) > 0
        assert outcome.probe_gap == pytest.approx(0, abs=1e-6)
        assert outcome.attempts == 1

    run(scenario())


def test_a_request_survives_the_swap_and_each_token_bears_the_version_that_made_it(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted(token_s=0.02)
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0))
        answers = asyncio.create_task(engine.generate(np.array([1], np.int32), 2, SamplingConfig()))
        await asyncio.sleep(0.08)
        await swap_to(swap, publish(1))
        for response in await answers:
            (first, before), (second, after) = response.spans
            assert (first, second, before + after) == (0, 1, 10)
            assert response.ids.tolist() == [*range(before), *range(100 + before, 110)]

    run(scenario())


def test_a_version_that_is_overtaken_before_its_turn_is_never_loaded(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        first, second, third, fourth = (publish(version) for version in (1, 2, 3, 4))
        swap.announce(first)
        swap.announce(second)
        waiting = asyncio.create_task(swap.next())
        await asyncio.sleep(0)  # version 2 is being verified
        swap.announce(third)
        prepared = await waiting
        assert isinstance(prepared, Prepared)
        assert prepared.policy_version == 3
        waiting = asyncio.create_task(swap.next())
        await asyncio.sleep(0)  # version 3 waits for its turn
        swap.announce(fourth)
        prepared = await waiting
        assert isinstance(prepared, Prepared)
        assert prepared.policy_version == 4
        swap.tell(Swap(policy_version=3, manifest=third.manifest))  # out of date
        waiting = asyncio.create_task(swap.next())
        await asyncio.sleep(0.02)
        assert engine.loaded == []
        swap.tell(Swap(policy_version=4, manifest=fourth.manifest))
        outcome = await waiting
        assert isinstance(outcome, Swapped)
        assert (outcome.policy_version, engine.loaded) == (4, [4])

    run(scenario())


def test_a_version_whose_turn_has_come_is_loaded_although_another_is_announced_meanwhile(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        first, second = broadcast(1), publish(2)
        swap.announce(first)
        assert isinstance(await swap.next(), Prepared)
        swap.tell(Swap(policy_version=1, manifest=first.manifest, member=member()))  # others take part in it
        swap.announce(second)
        outcomes = [await swap.next(), await swap.next(), await told(swap, second)]
        assert [type(outcome) for outcome in outcomes] == [Swapped, Prepared, Swapped]
        assert engine.loaded == [1, 2]

    run(scenario())


def test_prepared_is_said_again_when_no_turn_comes_and_when_the_version_is_announced_again(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, 0.15)
        ready = publish(1)
        swap.announce(ready)
        first = await swap.next()
        swap.announce(ready)  # by a trainer that came back, while Prepared was on its way to the one before
        started = time.monotonic()
        again = await swap.next()
        assert time.monotonic() - started < 0.1
        waiting = asyncio.create_task(swap.next())
        await asyncio.sleep(0.01)
        swap.announce(msgspec.structs.replace(ready))
        again_too = await waiting
        assert time.monotonic() - started < 0.1
        by_itself = await swap.next()
        assert 0.1 < time.monotonic() - started < 2
        for outcome in (first, again, again_too, by_itself):
            assert isinstance(outcome, Prepared)
            assert outcome.prepare_s == first.prepare_s  # type: ignore[union-attr]
        assert isinstance(await told(swap, ready), Swapped)

    run(scenario())


def test_the_last_announcement_counts_even_if_its_number_is_lower(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        for version in (5, 3):  # a trainer that went back to its checkpoint
            await swap_to(swap, publish(version))
        assert engine.policy_version == 3

    run(scenario())


def test_a_version_announced_again_is_confirmed_without_loading_it_but_other_content_is_loaded(
    publish: Publish,
) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        ready, other = publish(3), publish(3, "other")
        for announced in (ready, ready, other):
            assert isinstance(await swap_to(swap, announced), Swapped)
        assert [Path(str(source)).name for _, source in engine.loads] == ["v3-weights", "v3-other"]

    run(scenario())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: file.unlink(), "is missing from version 1"),
        (lambda file: file.write_text("other"), "differs from its checksum in version 1"),
        (lambda file: (file.parent / "manifest.json").write_text("{}"), "differs from the manifest that was announced"),
    ],
)
def test_weights_that_are_not_what_was_announced_never_reach_the_engine(
    publish: Publish, damage: Callable[[Path], None], says: str
) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0))
        ready = publish(1)
        damage(Path(ready.directory) / "model.safetensors")
        swap.announce(ready)
        outcome = await swap.next()
        assert isinstance(outcome, SwapFailed)
        assert says in outcome.reason
        assert (engine.policy_version, engine.loaded, swap.serving) == (0, [0], True)
        assert isinstance(await swap_to(swap, publish(2)), Swapped)  # the next version is tried all the same
        assert engine.policy_version == 2

    run(scenario())


def refuse(bad: int) -> OnLoad:
    def on_load(source: Path | Broadcast, version: int) -> None:
        if version == bad:
            raise EngineError(f"version {version} does not fit")

    return on_load


def test_an_engine_that_cannot_load_goes_on_with_the_old_version(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted(refuse(1), token_s=0.01)
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0, probe=True))
        answers = asyncio.create_task(answer(swap, engine))
        await asyncio.sleep(0.03)
        outcome = await swap_to(swap, publish(1, probe=True))
        assert isinstance(outcome, SwapFailed)
        assert (outcome.reason, outcome.quarantined) == ("version 1 does not fit", False)
        assert (await answers).spans == [(0, 10)]

    run(scenario())


def test_a_restarted_engine_gets_what_it_served_again_without_asking_and_another_version_only_when_told(
    publish: Publish,
) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(4))
        await restart(swap, engine)
        assert (engine.policy_version, swap.serving) == (UNLOADED, False)
        assert isinstance(await swap.next(), Swapped)
        assert (engine.policy_version, swap.serving) == (4, True)
        ready = publish(5)
        swap.announce(ready)
        assert isinstance(await swap.next(), Prepared)
        await restart(swap, engine)  # it is prepared all the same
        assert isinstance(await told(swap, ready), Swapped)
        assert engine.loaded == [4, 4, 5]

    run(scenario())


def test_a_restarted_engine_that_was_served_by_broadcast_takes_part_in_another_round() -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        ready = broadcast(4)
        assert isinstance(await swap_to(swap, ready, member("g1")), Swapped)
        swap.announce(broadcast(5))
        prepared = await swap.next()
        assert isinstance(prepared, Prepared)
        assert prepared.group == "g1"
        await restart(swap, engine)
        prepared = await swap.next()  # at once, although it has said so: it is in no group any more
        assert isinstance(prepared, Prepared)
        assert prepared.group == ""
        swap.announce(ready)
        assert isinstance(await swap.next(), Prepared)
        outcome = await told(swap, ready, member("g1"))
        assert isinstance(outcome, SwapFailed)  # at once: the trainer would wait for one that is not in it
        assert outcome.reason == "the engine was restarted, and is no longer in process group g1"
        assert isinstance(await swap_to(swap, msgspec.structs.replace(ready), member("g2")), Swapped)
        assert engine.loads[-1] == (4, Broadcast(ready.buckets, member("g2")))

    run(scenario())


def test_a_version_that_killed_the_engine_twice_is_not_loaded_again_the_last_good_one_is(publish: Publish) -> None:
    async def scenario() -> None:
        engine: Scripted

        def on_load(source: Path | Broadcast, version: int) -> None:
            if version == 1:
                engine.die()
                raise EngineError("gone while it loaded version 1")

        engine = scripted(on_load)
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0))
        ready = publish(1)
        outcome = await swap_to(swap, ready)
        assert isinstance(outcome, SwapFailed)
        assert outcome.reason == "gone while it loaded version 1; and then: the scripted engine is dead"
        assert swap.needs_restart
        await restart(swap, engine)
        assert isinstance(await swap.next(), Prepared)
        assert isinstance(await told(swap, ready), SwapFailed)
        await restart(swap, engine)
        assert isinstance(await swap.next(), Swapped)
        assert engine.loaded == [0, 1, 1, 0]

    run(scenario())


def test_a_version_whose_probe_killed_the_engine_twice_is_not_loaded_again_the_last_good_one_is(
    publish: Publish,
) -> None:
    class DiesOfProbes(Scripted):
        async def score(self, ids: Any) -> Any:
            if self.policy_version == 1:
                raise EngineError("no answer")
            return await super().score(ids)

    async def scenario() -> None:
        engine = DiesOfProbes()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0, probe=True))
        ready = publish(1, probe=True)
        assert isinstance(await swap_to(swap, ready), SwapFailed)
        assert swap.needs_restart
        await restart(swap, engine)
        assert isinstance(await swap.next(), Prepared)
        assert isinstance(await told(swap, ready), SwapFailed)
        await restart(swap, engine)
        assert isinstance(await swap.next(), Swapped)
        assert (engine.loaded, swap.serving) == ([0, 1, 1, 0], True)

    run(scenario())


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_a_version_that_was_given_up_is_tried_again_where_there_is_nothing_to_go_back_to(
    publish: Publish, transport: str
) -> None:
    def make(version: int) -> WeightsReady:
        return broadcast(version, probe=True) if transport == "broadcast" else publish(version, probe=True)

    def place() -> GroupMember | None:
        return member(f"g{next(groups)}") if transport == "broadcast" else None

    async def server(swap: HotSwap, engine: Scripted, ready: WeightsReady) -> None:
        while not isinstance(outcome := await swap.next(), Swapped):
            if isinstance(outcome, Prepared):
                swap.tell(Swap(policy_version=1, manifest=ready.manifest, member=place()))
            if swap.needs_restart:
                await restart(swap, engine)

    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        first, ready = make(0), make(1)
        await swap_to(swap, first, place())
        if first.directory:
            shutil.rmtree(first.directory)  # of old versions few are kept
        engine.wrong = hot_swap.LOADS  # a fault that passes
        async with asyncio.timeout(5):
            serving = asyncio.create_task(server(swap, engine, ready))
            while not serving.done():
                swap.announce(msgspec.structs.replace(ready))
                await asyncio.sleep(0.02)
            await serving
        assert (engine.policy_version, swap.serving, swap.quarantined) == (1, True, False)

    groups = itertools.count()
    run(scenario())


def test_what_a_lost_engine_was_generating_is_taken_back_even_if_it_survives_the_restart(publish: Publish) -> None:
    class Attached(Scripted):
        """One that runs already: a restart only gives it other weights."""

        async def restart(self) -> None:
            self.restarts += 1

    async def scenario() -> None:
        engine = Attached(token_s=0.02)
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0))
        running = asyncio.create_task(answer(swap, engine))
        await asyncio.sleep(0.05)
        await restart(swap, engine)
        assert isinstance(await swap.next(), Swapped)
        with pytest.raises(TakenBackError):
            await running

    run(scenario())


def test_a_version_that_met_a_dead_engine_is_loaded_after_the_restart(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0))
        engine.die()
        ready = publish(1)
        assert isinstance(await swap_to(swap, ready), SwapFailed)
        await restart(swap, engine)
        assert isinstance(await swap.next(), Prepared)
        assert isinstance(await told(swap, ready), Swapped)
        assert engine.policy_version == 1

    run(scenario())


def test_an_engine_that_is_not_well_does_not_prepare_for_a_broadcast_nor_keep_the_others_waiting() -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        ready = broadcast(1)
        swap.announce(ready)
        assert isinstance(await swap.next(), Prepared)
        swap.engine_lost()  # it is being restarted, which takes a minute
        outcome = await told(swap, ready, member())
        assert isinstance(outcome, SwapFailed)
        assert outcome.reason == "the engine is being restarted"
        swap.engine_restarted()
        engine.die()
        outcome = await swap_to(swap, msgspec.structs.replace(ready))
        assert isinstance(outcome, SwapFailed)
        assert "not well" in outcome.reason

    run(scenario())


def test_a_round_of_a_broadcast_that_is_not_prepared_is_declined_and_a_turn_on_disk_is_ignored(
    publish: Publish,
) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        outcome = await told(swap, broadcast(7), member())
        assert isinstance(outcome, SwapFailed)
        assert outcome.policy_version == 7
        assert isinstance(await swap_to(swap, broadcast(1), member("g2")), Swapped)
        swap.tell(Swap(policy_version=1, manifest="m1", member=member("g2")))  # the same round, said twice
        ready = publish(8)
        swap.tell(Swap(policy_version=8, manifest=ready.manifest))
        swap.announce(ready)
        assert isinstance(await swap.next(), Prepared)
        assert engine.loaded == [1]

    run(scenario())


def test_a_round_in_the_group_of_the_last_one_is_declined_if_it_is_not_prepared() -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        assert isinstance(await swap_to(swap, broadcast(1), member("g1")), Swapped)
        async with asyncio.timeout(1):  # the round's other members wait for this one
            outcome = await told(swap, broadcast(2), member("g1"))
        assert isinstance(outcome, SwapFailed)
        assert outcome.policy_version == 2

    run(scenario())


def test_a_round_that_begins_while_a_restarted_engine_prepares_anew_is_declined() -> None:
    class SlowToTell(Scripted):
        is_slow = False

        async def healthy(self) -> bool:
            await asyncio.sleep(0.1 * self.is_slow)
            return await super().healthy()

    async def scenario() -> None:
        engine = SlowToTell()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        assert isinstance(await swap_to(swap, broadcast(1), member("g1")), Swapped)
        ready = broadcast(2)
        for _ in range(2):
            swap.announce(msgspec.structs.replace(ready))
            assert isinstance(await swap.next(), Prepared)
        engine.is_slow = True
        await restart(swap, engine)
        waiting = asyncio.create_task(swap.next())
        await asyncio.sleep(0.05)
        swap.tell(Swap(policy_version=2, manifest=ready.manifest, member=member("g1")))
        async with asyncio.timeout(1):
            outcomes = [await waiting, await swap.next()]
        assert any(isinstance(outcome, SwapFailed) for outcome in outcomes)

    run(scenario())


def test_a_broadcast_that_failed_is_not_held_against_its_version() -> None:
    async def scenario() -> None:
        failing = [True] * 5

        def on_load(source: Path | Broadcast, version: int) -> None:
            if failing:
                failing.pop()
                raise EngineError("another member has gone")

        engine = scripted(on_load)
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        for _ in range(5):
            assert isinstance(await swap_to(swap, broadcast(1), member()), SwapFailed)
        assert isinstance(await swap_to(swap, broadcast(1), member()), Swapped)

    run(scenario())


@pytest.mark.parametrize("occasion", ["announced again", "engine restarted"])
def test_weights_that_could_not_be_verified_are_tried_again(publish: Publish, occasion: str) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        ready = publish(1)
        weights = Path(ready.directory) / "model.safetensors"
        weights.rename(weights.with_suffix(".later"))  # a shared directory that lags
        swap.announce(ready)
        assert isinstance(await swap.next(), SwapFailed)
        weights.with_suffix(".later").rename(weights)
        if occasion == "announced again":
            swap.announce(msgspec.structs.replace(ready))
        else:
            await restart(swap, engine)
        assert isinstance(await swap.next(), Prepared)
        assert isinstance(await told(swap, ready), Swapped)
        assert engine.policy_version == 1

    run(scenario())


def test_weights_announced_again_while_they_are_verified_are_not_verified_anew(
    publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        verified: list[int] = []
        verify = hot_swap.weights.verify

        def slowly(directory: Path, version: int, manifest: str) -> None:
            verified.append(version)
            time.sleep(0.1)
            verify(directory, version, manifest)

        monkeypatch.setattr(hot_swap.weights, "verify", slowly)
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        ready = publish(1)
        swap.announce(ready)
        waiting = asyncio.create_task(swap.next())
        await asyncio.sleep(0.03)
        swap.announce(msgspec.structs.replace(ready))
        assert isinstance(await waiting, Prepared)
        assert isinstance(await told(swap, ready), Swapped)
        assert verified == [1]

    run(scenario())


def test_weights_that_the_engine_refuses_are_tried_three_times_and_then_only_after_another_announcement(
    publish: Publish,
) -> None:
    async def scenario() -> None:
        engine = scripted(refuse(1))
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0))
        ready = publish(1)
        for _ in range(hot_swap.LOADS + 2):
            outcome = await swap_to(swap, msgspec.structs.replace(ready))
            assert isinstance(outcome, SwapFailed)
        assert "could not be loaded before" in outcome.reason
        assert engine.loaded == [0, 1, 1, 1]
        assert swap.serving
        await swap_to(swap, publish(2))
        for _ in range(2):
            await swap_to(swap, msgspec.structs.replace(ready))
        assert engine.loaded == [0, 1, 1, 1, 2, 1, 1]

    run(scenario())


def test_weights_that_met_a_dead_engine_are_loaded_when_they_are_announced_again(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0))
        engine.die()
        ready = publish(1)
        assert isinstance(await swap_to(swap, ready), SwapFailed)
        swap.engine_lost()
        await engine.restart()
        swap.announce(msgspec.structs.replace(ready))
        swap.engine_restarted()
        assert isinstance(await swap.next(), Prepared)
        assert isinstance(await told(swap, ready), Swapped)
        assert engine.policy_version == 1

    run(scenario())


# --- the probe -------------------------------------------------------------------------------------------------------


def test_an_engine_within_the_tolerance_is_right_and_one_beyond_it_is_not(publish: Publish) -> None:
    async def scenario() -> None:
        for gap, outcome_type in ((0.009, Swapped), (0.011, SwapFailed), (float("nan"), SwapFailed)):
            engine = scripted(wrong=9)
            engine.gap = gap
            await engine.start()
            swap = HotSwap(engine, LIMIT_S)
            outcome = await swap_to(swap, msgspec.structs.replace(ready))
            assert isinstance(outcome, outcome_type), gap
            if isinstance(outcome, Swapped):
                assert outcome.probe_gap == pytest.approx(gap, abs=1e-5)

    ready = publish(1, probe=True)
    run(scenario())


def test_one_wrong_answer_loads_once_more_and_whatever_was_generated_is_taken_back(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted(token_s=0.01)
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0, probe=True))
        engine.wrong = 1
        running = asyncio.create_task(answer(swap, engine))
        await asyncio.sleep(0.03)
        outcome = await swap_to(swap, publish(1, probe=True))
        assert isinstance(outcome, Swapped)
        assert (outcome.attempts, engine.loaded, outcome.probe_gap) == (2, [0, 1, 1], pytest.approx(0, abs=1e-6))
        with pytest.raises(TakenBackError):
            await running
        assert (await answer(swap, engine)).spans == [(1, 10)]
        assert (swap.serving, swap.quarantined, swap.needs_restart) == (True, False, False)

    run(scenario())


def test_no_response_leaves_before_the_probe_has_passed(publish: Publish) -> None:
    class SlowToScore(Scripted):
        async def score(self, ids: Any) -> Any:
            await asyncio.sleep(0.2)
            return await super().score(ids)

    async def scenario() -> None:
        for wrong in (False, True):
            engine = SlowToScore(token_s=0.005)
            await engine.start()
            swap = HotSwap(engine, LIMIT_S)
            ready = [publish(version, f"{wrong}", probe=True) for version in (0, 1)]
            await swap_to(swap, ready[0])
            engine.wrong = 1 if wrong else 0
            running = asyncio.create_task(answer(swap, engine))
            await asyncio.sleep(0.02)
            swapping = asyncio.create_task(swap_to(swap, ready[1]))
            while engine.generating:  # the engine has answered, across the swap
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.05)
            assert not swapping.done()
            assert swap.swapping
            assert not running.done()
            assert isinstance(await swapping, Swapped)
            if wrong:
                with pytest.raises(TakenBackError):
                    await running
            else:
                assert [version for version, _ in (await running).spans] == [0, 1]

    run(scenario())


def test_an_engine_that_answers_wrongly_twice_is_quarantined_until_a_version_is_right(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted(wrong=2)
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        ready = publish(1, probe=True)
        outcome = await swap_to(swap, ready)
        assert isinstance(outcome, SwapFailed)
        assert outcome.quarantined
        assert "0.5 nats" in outcome.reason
        assert "(publish.tolerance)" in outcome.reason
        assert (swap.serving, swap.quarantined, swap.needs_restart) == (False, True, True)
        with pytest.raises(EngineError, match="quarantined"):
            await swap.until_serving(1)
        with pytest.raises(TakenBackError):
            await answer(swap, engine)
        swap.announce(msgspec.structs.replace(ready))
        waiting = asyncio.create_task(swap.next())
        await asyncio.sleep(0.05)
        assert not waiting.done()  # not before the restart
        await restart(swap, engine)
        assert swap.quarantined
        assert isinstance(await waiting, Prepared)
        outcome = await told(swap, ready)
        assert isinstance(outcome, Swapped)
        assert (outcome.attempts, swap.serving, swap.quarantined) == (3, True, False)
        await swap.until_serving(1)

    run(scenario())


def test_a_version_that_a_fresh_engine_answers_wrongly_too_is_given_up_for_the_last_good_one(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0, probe=True))
        engine.wrong = 3
        ready = publish(1, probe=True)
        assert isinstance(await swap_to(swap, ready), SwapFailed)
        await restart(swap, engine)
        assert isinstance(await swap.next(), Prepared)
        outcome = await told(swap, ready)
        assert isinstance(outcome, SwapFailed)
        assert outcome.quarantined
        assert swap.needs_restart
        await restart(swap, engine)
        outcome = await swap.next()
        assert isinstance(outcome, Swapped)
        assert (outcome.policy_version, swap.quarantined, swap.serving) == (0, False, True)
        outcome = await swap_to(swap, msgspec.structs.replace(ready))
        assert isinstance(outcome, SwapFailed)
        assert "waits for another version" in outcome.reason
        assert engine.loaded == [0, 1, 1, 1, 0]
        assert isinstance(await swap_to(swap, publish(2, probe=True)), Swapped)

    run(scenario())


def test_a_good_version_that_is_no_longer_right_after_restarts_is_not_loaded_for_ever(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0, probe=True))
        engine.wrong = 99
        for _ in range(2):
            await restart(swap, engine)
            outcome = await swap.next()
            assert isinstance(outcome, SwapFailed)
            assert outcome.quarantined
        await restart(swap, engine)
        waiting = asyncio.create_task(swap.next())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert engine.loaded == [0, 0, 0, 0]
        engine.wrong = 0
        ready = publish(1, probe=True)
        swap.announce(ready)
        assert isinstance(await waiting, Prepared)
        assert isinstance(await told(swap, ready), Swapped)

    run(scenario())


def test_wrong_weights_of_a_broadcast_are_quarantined_at_once_and_a_round_more_may_mend_them() -> None:
    async def scenario() -> None:
        engine = scripted(wrong=1)
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        ready = broadcast(1, probe=True)
        outcome = await swap_to(swap, ready, member())
        assert isinstance(outcome, SwapFailed)
        assert (outcome.quarantined, swap.needs_restart, swap.serving) == (True, False, False)
        outcome = await swap_to(swap, msgspec.structs.replace(ready), member())
        assert isinstance(outcome, Swapped)
        assert (outcome.attempts, swap.quarantined, engine.restarts) == (2, False, 0)
        assert isinstance(engine.loads[0][1], Broadcast)

    run(scenario())


def test_an_engine_that_cannot_be_asked_has_to_be_restarted_and_is_not_quarantined(publish: Publish) -> None:
    class Mute(Scripted):
        async def score(self, ids: Any) -> Any:
            raise EngineError("no answer")

    async def scenario() -> None:
        engine = Mute(token_s=0.02)
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0))
        running = asyncio.create_task(answer(swap, engine))
        await asyncio.sleep(0.03)
        outcome = await swap_to(swap, publish(1, probe=True))
        assert isinstance(outcome, SwapFailed)
        assert (outcome.quarantined, swap.needs_restart, swap.serving) == (False, True, False)
        with pytest.raises(TakenBackError):
            await running

    run(scenario())


def test_an_engine_whose_old_weights_are_spoilt_by_a_failed_load_stops_serving(publish: Publish) -> None:
    async def scenario() -> None:
        engine: Scripted

        def on_load(source: Path | Broadcast, version: int) -> None:
            if version == 1:
                engine.is_wrong = True
                raise EngineError("half of version 1 is in")

        engine = scripted(on_load, token_s=0.01)
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0, probe=True))
        running = asyncio.create_task(answer(swap, engine))
        await asyncio.sleep(0.03)
        outcome = await swap_to(swap, publish(1))
        assert isinstance(outcome, SwapFailed)
        assert "half of version 1 is in; and the weights from before are spoilt" in outcome.reason
        assert (swap.serving, swap.needs_restart) == (False, True)
        with pytest.raises(TakenBackError):
            await running

    run(scenario())


def test_an_engine_with_wrong_weights_that_refuses_the_second_load_has_to_be_restarted(publish: Publish) -> None:
    async def scenario() -> None:
        engine: Scripted

        def on_load(source: Path | Broadcast, version: int) -> None:
            if engine.loaded == [0, 1, 1]:
                raise EngineError("busy")

        engine = scripted(on_load)
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        await swap_to(swap, publish(0, probe=True))
        engine.wrong = 1
        outcome = await swap_to(swap, publish(1, probe=True))
        assert isinstance(outcome, SwapFailed)
        assert outcome.reason == "busy; and what it had before was wrong"
        assert (swap.serving, swap.needs_restart) == (False, True)

    run(scenario())


@pytest.mark.parametrize("phase", ["pause", "load", "resume", "score", "healthy"])
def test_a_phase_that_never_ends_is_ended_by_its_limit(publish: Publish, phase: str) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, 0.1)
        await swap_to(swap, publish(0, probe=True))
        hanging = asyncio.Event()

        async def hang(*_: Any) -> None:
            await hanging.wait()

        setattr(engine, phase, hang)
        started = time.monotonic()
        outcome = await swap_to(swap, broadcast(1, probe=True), member())
        assert isinstance(outcome, SwapFailed)
        assert "waited 0.1 s for" in outcome.reason
        assert "(rollout.swap_timeout_s)" in outcome.reason
        assert time.monotonic() - started < 1
        assert swap.needs_restart == (phase != "healthy")
        assert swap.serving == (phase == "healthy")

    run(scenario())


def test_a_verification_that_never_ends_is_ended_by_its_limit(
    publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(hot_swap.weights, "verify", lambda *_: time.sleep(0.5))
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, 0.1)
        outcome = await swap_to(swap, publish(0))
        assert isinstance(outcome, SwapFailed)
        assert outcome.reason == "waited 0.1 s for the checksums of version 0 (rollout.swap_timeout_s)"
        assert not swap.needs_restart

    run(scenario())


def test_a_disk_that_hangs_holds_one_thread_however_often_a_version_is_announced(
    publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, 0.02)
        ready = publish(0)
        for _ in range(8):
            outcome = await swap_to(swap, msgspec.structs.replace(ready))
            assert isinstance(outcome, SwapFailed)
        assert len(begun) == 1
        assert "does its disk hang?" in outcome.reason
        hanging.set()
        while not isinstance(outcome, Swapped):  # the thread has to end
            await asyncio.sleep(0.01)
            outcome = await swap_to(swap, msgspec.structs.replace(ready))

    def hang(*_: Any) -> None:
        begun.append(1)
        hanging.wait(5)

    begun: list[int] = []
    hanging = threading.Event()
    monkeypatch.setattr(hot_swap.weights, "verify", hang)
    try:
        run(scenario())
    finally:
        hanging.set()


def test_an_announcement_whose_probe_does_not_fit_together_is_refused(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine, LIMIT_S)
        outcome = await swap_to(swap, msgspec.structs.replace(publish(1, probe=True), probe_ids=PROBE[:2]))
        assert isinstance(outcome, SwapFailed)
        assert outcome.reason == "version 1 has a probe of 2 tokens with 3 log-probs"
        assert engine.loaded == []

    run(scenario())


def test_nobody_waits_for_an_engine_longer_than_was_asked_for() -> None:
    async def scenario() -> None:
        swap = HotSwap(scripted(), LIMIT_S)
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"waited 0\.1 s for the engine to have published weights"):
            await swap.until_serving(0.1)
        assert time.monotonic() - started < 1

    run(scenario())


# --- everything at once ----------------------------------------------------------------------------------------------


class Faulty(Scripted):
    """Its tokens are 1 where wrong weights make them, else 0. Loads fail, spoil, kill; scores fail; by a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(token_s=0.001)
        self._script = lambda prompt, index, version: [(int(self.is_wrong), -0.5)] * 10
        self.random = random.Random(seed)
        self.faults = True

    def _strikes(self, probability: float) -> bool:
        return self.faults and self.random.random() < probability

    async def load(self, weights: Path | Broadcast, policy_version: int) -> None:
        await asyncio.sleep(0.001)
        if self._strikes(0.1):
            self.is_wrong = self._strikes(0.5)  # half of it is in
            raise EngineError("refused")
        if self._strikes(0.1):
            self.die()
        await super().load(weights, policy_version)
        self.is_wrong = self._strikes(0.3)

    async def score(self, ids: Any) -> Any:
        await asyncio.sleep(0.003)
        if self._strikes(0.1):
            raise EngineError("no answer")
        return await super().score(ids)

    async def restart(self) -> None:
        await super().restart()
        self.is_wrong = False


@pytest.mark.parametrize("seed", range(6))
def test_whatever_fails_no_wrong_token_leaves_and_the_newest_version_is_served_in_the_end(
    publish: Publish, seed: int
) -> None:
    async def trainer() -> None:
        """Announces version after version, and again what is behind; loses messages."""
        while True:
            outcome = await swap.next()
            outcomes[type(outcome)] += 1
            if isinstance(outcome, Prepared) and not engine._strikes(0.1):
                place = None if newest.directory else member(f"g{outcomes.total()}")
                swap.tell(Swap(policy_version=outcome.policy_version, manifest=outcome.manifest, member=place))

    async def announcing() -> None:
        nonlocal newest
        for version in itertools.count(1):
            await asyncio.sleep(0.02)
            if engine.faults and engine.random.random() < 0.5:
                newest = publish(version, probe=True) if version % 2 else broadcast(version, probe=True)
            elif swap.serving and engine.policy_version == newest.policy_version:
                continue
            swap.announce(msgspec.structs.replace(newest))

    async def watching() -> None:
        while True:
            await asyncio.sleep(0.004)
            async with swap.engine_lock:
                if swap.needs_restart or not await engine.healthy():
                    swap.engine_lost()
                    await engine.restart()
                    await asyncio.sleep(0.002)
                    swap.engine_restarted()

    async def generating() -> None:
        while True:
            try:
                await swap.until_serving(LIMIT_S)
                response = await answer(swap, engine)
            except TakenBackError:
                outcomes[TakenBackError] += 1
            except EngineError:
                await asyncio.sleep(0.001)
            else:
                outcomes[Response] += 1
                assert response.ids.tolist() == [0] * 10

    async def scenario() -> None:
        nonlocal newest
        await engine.start()
        swap.announce(newest)
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(work)
                for work in (trainer(), announcing(), watching(), *(generating() for _ in "abc"))
            ]
            await asyncio.sleep(1.5)
            engine.faults = False
            newest = publish(10_000, probe=True)
            swap.announce(newest)
            while not (swap.serving and engine.policy_version == 10_000):
                await asyncio.sleep(0.005)
            before = outcomes[Response]
            while outcomes[Response] < before + 3:
                await asyncio.sleep(0.005)
            for task in running:
                task.cancel()
        assert not engine.is_wrong
        assert min(outcomes[kind] for kind in (Prepared, Swapped, SwapFailed, Response)) > 3
        assert outcomes[TakenBackError] > 0

    engine, outcomes, newest = Faulty(seed), Counter[type](), publish(0, probe=True)
    swap = HotSwap(engine, 0.05)
    run(scenario())
