"""A published version of the weights, into the engine, while it generates.

    verify (in a thread, generation goes on) ▶ pause ▶ load ▶ resume ▶ Swapped, or SwapFailed

The announcement that came last is the one that counts, whatever its number: a trainer that went back to a checkpoint
announces a lower version. One that a later announcement overtakes before it is loaded is skipped. One that could not be
verified (a shared directory may lag) is tried again when it is announced again; one that the engine would not load is
not, until another one was announced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from asyncppo import weights
from asyncppo.errors import EngineError, WeightsError
from asyncppo.messages import SwapFailed, Swapped, WeightsReady, brief
from rollout_server.engine import UNLOADED, Engine

log = logging.getLogger("rollout_server.hot_swap")


class HotSwap:
    """Which version the engine has, which one it should have, and the way from one to the other.

    Example:
        swap.announce(WeightsReady(policy_version=3, …))
        message = await swap.next()   # Swapped(policy_version=3, …), or SwapFailed
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._announced: WeightsReady | None = None  # what came last
        self._pending: WeightsReady | None = None  # what to load now
        self._good: WeightsReady | None = None  # what the engine loaded last
        self._bad: WeightsReady | None = None  # what would not load, as long as nothing else was announced
        self._changed = asyncio.Event()
        self._engine_lock = asyncio.Lock()
        self.swapping = False

    @property
    def announced_version(self) -> int:
        """The version announced last; `UNLOADED` before the first."""
        return self._announced.policy_version if self._announced else UNLOADED

    @property
    def engine_lock(self) -> asyncio.Lock:
        """Held while the engine is swapped; hold it to look at the engine's health, or to restart it."""
        return self._engine_lock

    def announce(self, ready: WeightsReady) -> None:
        """A version is published. Also for one that is loaded already: a trainer that returned wants its Swapped."""
        if not _same(ready, self._bad):
            self._bad = None
        self._announced = ready
        if self._pending is None or not _same(ready, self._pending):  # one that is being verified goes on
            self._pending = ready
        self._changed.set()

    def engine_restarted(self) -> None:
        """The engine has lost its weights: load what was announced last, or what worked last where that would not."""
        self._pending = self._good if _same(self._announced, self._bad) else self._announced
        self._changed.set()

    async def next(self) -> Swapped | SwapFailed:
        """Wait for a version to load, however long none comes, and try to load it."""
        while True:
            self._changed.clear()
            wanted = self._pending
            if wanted is None:
                await self._changed.wait()
                continue
            outcome = await self._try(wanted)
            if outcome is not None:
                return outcome
            log.info("version %d is skipped: version %d is out", wanted.policy_version, self.announced_version)

    async def _try(self, wanted: WeightsReady) -> Swapped | SwapFailed | None:
        """Load one version; None if another was announced before its loading began."""
        version, directory = wanted.policy_version, Path(wanted.directory)
        if self._has(wanted):
            self._pending = None
            return Swapped(
                policy_version=version,
                manifest=wanted.manifest,
                verify_s=0.0,
                pause_s=0.0,
                load_s=0.0,
                resume_s=0.0,
            )
        if _same(wanted, self._bad) and not _same(wanted, self._good):
            return self._failed(wanted, "the engine could not load it before; it waits for another version")
        try:
            started = time.monotonic()
            await asyncio.to_thread(weights.verify, directory, version, wanted.manifest)
            verify_s = time.monotonic() - started
            async with self._engine_lock:
                if self._pending is not wanted:
                    return None
                self._pending = None
                return await self._swap(wanted, verify_s)
        except (EngineError, WeightsError, OSError, ValueError) as error:
            return self._failed(wanted, str(error))

    def _failed(self, wanted: WeightsReady, reason: str) -> SwapFailed:
        if self._pending in (wanted, None):
            fall_back = self._engine.policy_version == UNLOADED and not _same(self._good, wanted)
            self._pending = self._good if fall_back else None
        return SwapFailed(policy_version=wanted.policy_version, reason=brief(reason))

    def _has(self, wanted: WeightsReady) -> bool:
        return _same(self._good, wanted) and self._engine.policy_version == wanted.policy_version

    async def _swap(self, wanted: WeightsReady, verify_s: float) -> Swapped:
        self.swapping = True
        try:
            started = time.monotonic()
            try:
                await self._engine.pause()
                paused = time.monotonic()
                self._bad = wanted  # until it has loaded
                await self._engine.load(Path(wanted.directory), wanted.policy_version)
            except EngineError as error:
                await self._go_on_after(error)
                raise
            loaded = time.monotonic()
            self._bad, self._good = None, wanted
            await self._engine.resume()
            resumed = time.monotonic()
        finally:
            self.swapping = False
        return Swapped(
            policy_version=wanted.policy_version,
            manifest=wanted.manifest,
            verify_s=verify_s,
            pause_s=paused - started,
            load_s=loaded - paused,
            resume_s=resumed - loaded,
        )

    async def _go_on_after(self, error: EngineError) -> None:
        """Resume with the old weights; where even that fails, the engine's watch will restart it."""
        try:
            await self._engine.resume()
        except EngineError as second:
            raise EngineError(f"{error}; and then: {second}") from error


def _same(one: WeightsReady | None, other: WeightsReady | None) -> bool:
    """Whether both are announcements of the same content under the same number."""
    if one is None or other is None:
        return one is other
    return (one.policy_version, one.manifest) == (other.policy_version, other.manifest)
