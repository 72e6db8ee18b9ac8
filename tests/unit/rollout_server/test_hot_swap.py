"""Claims about a weight swap: what is verified, what is skipped, and what remains when it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from asyncppo.config import SamplingConfig
from asyncppo.errors import EngineError
from asyncppo.messages import SwapFailed, Swapped, WeightsReady
from asyncppo.weights import write_manifest
from rollout_server import hot_swap
from rollout_server.engine import UNLOADED, ScriptedEngine
from rollout_server.hot_swap import HotSwap

pytestmark = pytest.mark.unit

Publish = Callable[..., WeightsReady]


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """Publishes a version: a directory with one file and its manifest."""

    def publish(version: int, content: str = "weights") -> WeightsReady:
        directory = tmp_path / f"v{version}-{content}"
        directory.mkdir()
        (directory / "model.safetensors").write_text(content)
        manifest = write_manifest(directory, version)
        return WeightsReady(policy_version=version, directory=str(directory), manifest=manifest)

    return publish


def scripted(on_load: Callable[[Path, int], None] | None = None, token_s: float = 0.0) -> ScriptedEngine:
    """Ten tokens, each 100 times the version plus its position."""

    def script(prompt: tuple[int, ...], index: int, version: int) -> list[tuple[int, float]]:
        return [(100 * version + position, -0.5) for position in range(10)]

    return ScriptedEngine(script, lambda ids: " ".join(map(str, ids)), token_s, on_load)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario

    asyncio.run(limited())


def test_a_published_version_is_loaded_and_its_phases_are_timed(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine)
        assert (engine.policy_version, swap.announced_version) == (UNLOADED, UNLOADED)
        ready = publish(3)
        swap.announce(ready)
        outcome = await swap.next()
        assert isinstance(outcome, Swapped)
        assert (outcome.policy_version, engine.policy_version, swap.announced_version) == (3, 3, 3)
        assert outcome.manifest == ready.manifest
        assert min(outcome.verify_s, outcome.pause_s, outcome.load_s, outcome.resume_s) >= 0
        assert outcome.verify_s > 0

    run(scenario())


def test_a_request_survives_the_swap_and_each_token_bears_the_version_that_made_it(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted(token_s=0.02)
        await engine.start()
        swap = HotSwap(engine)
        swap.announce(publish(0))
        await swap.next()
        answers = asyncio.create_task(engine.generate(np.array([1], np.int32), 2, SamplingConfig()))
        await asyncio.sleep(0.08)
        swap.announce(publish(1))
        await swap.next()
        for response in await answers:
            (first, before), (second, after) = response.spans
            assert (first, second, before + after) == (0, 1, 10)
            assert response.ids.tolist() == [*range(before), *range(100 + before, 110)]

    run(scenario())


def test_a_version_that_is_overtaken_before_its_loading_is_never_loaded(publish: Publish) -> None:
    async def scenario() -> None:
        loads: list[int] = []
        engine = scripted(lambda _, version: loads.append(version))
        await engine.start()
        swap = HotSwap(engine)
        swap.announce(publish(1))
        swap.announce(publish(2))
        waiting = asyncio.create_task(swap.next())
        await asyncio.sleep(0)  # version 2 is being verified
        swap.announce(publish(3))
        outcome = await waiting
        assert isinstance(outcome, Swapped)
        assert (outcome.policy_version, loads) == (3, [3])

    run(scenario())


def test_the_last_announcement_counts_even_if_its_number_is_lower(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine)
        for version in (5, 3):  # a trainer that went back to its checkpoint
            swap.announce(publish(version))
            await swap.next()
        assert engine.policy_version == 3

    run(scenario())


def test_a_version_announced_again_is_confirmed_without_loading_it_but_other_content_is_loaded(
    publish: Publish,
) -> None:
    async def scenario() -> None:
        loads: list[str] = []
        engine = scripted(lambda directory, _: loads.append(directory.name))
        await engine.start()
        swap = HotSwap(engine)
        ready, other = publish(3), publish(3, "other")
        for announced in (ready, ready, other):
            swap.announce(announced)
            assert isinstance(await swap.next(), Swapped)
        assert loads == ["v3-weights", "v3-other"]

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
        loads: list[int] = []
        engine = scripted(lambda _, version: loads.append(version))
        await engine.start()
        swap = HotSwap(engine)
        swap.announce(publish(0))
        await swap.next()
        ready = publish(1)
        damage(Path(ready.directory) / "model.safetensors")
        swap.announce(ready)
        outcome = await swap.next()
        assert isinstance(outcome, SwapFailed)
        assert says in outcome.reason
        assert (engine.policy_version, loads) == (0, [0])
        swap.announce(publish(2))  # the next version is tried all the same
        assert isinstance(await swap.next(), Swapped)
        assert engine.policy_version == 2

    run(scenario())


def refuse(bad: int) -> Callable[[Path, int], None]:
    def on_load(directory: Path, version: int) -> None:
        if version == bad:
            raise EngineError(f"version {version} does not fit")

    return on_load


def test_an_engine_that_cannot_load_goes_on_with_the_old_version(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted(refuse(1), token_s=0.01)
        await engine.start()
        swap = HotSwap(engine)
        swap.announce(publish(0))
        await swap.next()
        answers = asyncio.create_task(engine.generate(np.array([1], np.int32), 1, SamplingConfig()))
        await asyncio.sleep(0.03)
        swap.announce(publish(1))
        outcome = await swap.next()
        assert isinstance(outcome, SwapFailed)
        assert outcome.reason == "version 1 does not fit"
        assert (await answers)[0].spans == [(0, 10)]

    run(scenario())


def test_a_restarted_engine_gets_the_announced_version_again(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine)
        swap.announce(publish(4))
        await swap.next()
        await engine.restart()
        swap.engine_restarted()
        assert engine.policy_version == UNLOADED
        assert isinstance(await swap.next(), Swapped)
        assert engine.policy_version == 4

    run(scenario())


def test_a_version_that_killed_the_engine_is_not_loaded_again_the_last_good_one_is(publish: Publish) -> None:
    async def scenario() -> None:
        engine: ScriptedEngine

        def on_load(directory: Path, version: int) -> None:
            if version == 1:
                engine.die()
                raise EngineError("gone while it loaded version 1")

        engine = scripted(on_load)
        await engine.start()
        swap = HotSwap(engine)
        swap.announce(publish(0))
        await swap.next()
        swap.announce(publish(1))
        outcome = await swap.next()
        assert isinstance(outcome, SwapFailed)
        assert outcome.reason == "gone while it loaded version 1; and then: the scripted engine is dead"
        await engine.restart()
        swap.engine_restarted()
        assert isinstance(await swap.next(), Swapped)
        assert engine.policy_version == 0

    run(scenario())


def test_a_version_that_met_a_dead_engine_is_loaded_after_the_restart(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine)
        swap.announce(publish(0))
        await swap.next()
        engine.die()
        swap.announce(publish(1))
        assert isinstance(await swap.next(), SwapFailed)
        await engine.restart()
        swap.engine_restarted()
        assert isinstance(await swap.next(), Swapped)
        assert engine.policy_version == 1

    run(scenario())


@pytest.mark.parametrize("occasion", ["announced again", "engine restarted"])
def test_weights_that_could_not_be_verified_are_tried_again(publish: Publish, occasion: str) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine)
        ready = publish(1)
        weights = Path(ready.directory) / "model.safetensors"
        weights.rename(weights.with_suffix(".later"))  # a shared directory that lags
        swap.announce(ready)
        assert isinstance(await swap.next(), SwapFailed)
        weights.with_suffix(".later").rename(weights)
        if occasion == "announced again":
            swap.announce(msgspec.structs.replace(ready))
        else:
            await engine.restart()
            swap.engine_restarted()
        assert isinstance(await swap.next(), Swapped)
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
        swap = HotSwap(engine)
        ready = publish(1)
        swap.announce(ready)
        waiting = asyncio.create_task(swap.next())
        await asyncio.sleep(0.03)
        swap.announce(msgspec.structs.replace(ready))
        assert isinstance(await waiting, Swapped)
        assert verified == [1]

    run(scenario())


def test_weights_that_the_engine_refused_are_loaded_again_only_after_another_announcement(publish: Publish) -> None:
    async def scenario() -> None:
        loads: list[int] = []

        def on_load(directory: Path, version: int) -> None:
            loads.append(version)
            refuse(1)(directory, version)

        engine = scripted(on_load)
        await engine.start()
        swap = HotSwap(engine)
        ready = publish(1)
        for announced in (publish(0), ready, msgspec.structs.replace(ready)):
            swap.announce(announced)
            outcome = await swap.next()
        assert isinstance(outcome, SwapFailed)
        assert "could not load it before" in outcome.reason
        assert loads == [0, 1]
        for announced in (publish(2), ready):
            swap.announce(announced)
            await swap.next()
        assert loads == [0, 1, 2, 1]

    run(scenario())


def test_weights_that_met_a_dead_engine_are_loaded_when_they_are_announced_again(publish: Publish) -> None:
    async def scenario() -> None:
        engine = scripted()
        await engine.start()
        swap = HotSwap(engine)
        swap.announce(publish(0))
        await swap.next()
        engine.die()
        ready = publish(1)
        swap.announce(ready)
        assert isinstance(await swap.next(), SwapFailed)
        await engine.restart()
        swap.announce(msgspec.structs.replace(ready))
        assert isinstance(await swap.next(), Swapped)
        assert engine.policy_version == 1

    run(scenario())
