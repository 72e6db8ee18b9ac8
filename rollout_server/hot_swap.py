"""A published version of the weights, into the engine, while it generates: in two phases, and not trusted until probed.

    announced ▶ prepare (generation goes on) ▶ Prepared … Swap ▶ pause ▶ load ▶ resume ▶ probe ▶ Swapped, or SwapFailed

The announcement that came last is the one that counts, whatever its number: a trainer that went back to a checkpoint
announces a lower version. One that a later announcement overtakes before the trainer says `Swap` is skipped. What could
not be prepared (a shared directory may lag) is tried again when it is announced again. What could not be loaded is too,
but only a few times (`LOADS`), as every try costs a pause.

From the load until the engine has answered the probe as the trainer does, no response leaves `generation`. An engine
that answers wrongly loads once more (from disk; a broadcast needs another round), then it is *quarantined*: whatever
was being generated is taken back, the engine is restarted, and nothing is generated until a version is right.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import numpy as np

from asyncppo import weights
from asyncppo.errors import AsyncPPOError, EngineError, WeightsError
from asyncppo.messages import GroupMember, Prepared, Swap, SwapFailed, Swapped, WeightsReady, brief
from asyncppo.waits import waiting
from rollout_server.engine import UNLOADED, Broadcast, Engine

log = logging.getLogger("rollout_server.hot_swap")

LOADS_WITHOUT_RESTART = 2
"""Loads of a version that the engine may answer wrongly before it is restarted."""
LOADS = 3
"""Loads of a version that may fail or be answered wrongly; then it is not loaded again until another was announced."""
LOADS_THAT_KILL = 2
"""The same, of loads that take the engine down with them: each costs a restart, in which nothing is generated."""

_T = TypeVar("_T")
_Phase = Literal["pause_s", "load_s", "resume_s", "probe_s"]


class TakenBackError(AsyncPPOError):
    """A generation may have tokens of weights that are wrong: nothing of it counts, and it has to be made again."""


class _TooLateError(EngineError):
    """A phase that did not end in time: what the engine has now is not known."""


class HotSwap:
    """Which version the engine has, which one it should have, and the way from one to the other.

    Example:
        swap.announce(WeightsReady(policy_version=3, …))
        message = await swap.next()   # Prepared(policy_version=3, …), to be sent to the trainer, which answers:
        swap.tell(Swap(policy_version=3, …))
        message = await swap.next()   # Swapped(policy_version=3, …), or SwapFailed
        async with swap.generation():
            responses = await engine.generate(…)

    Args:
        engine: started before `next` is called.
        limit_s: `rollout.swap_timeout_s`.
    """

    def __init__(self, engine: Engine, limit_s: float) -> None:
        self._engine = engine
        self._limit_s = limit_s
        self._announced: WeightsReady | None = None  # what came last
        self._pending: WeightsReady | None = None  # what to load next
        self._prepared: WeightsReady | None = None  # what of it is prepared
        self._prepared_at = self._prepare_s = 0.0
        self._announcements = self._answered = 0  # heard, and heard when Prepared was said last
        self._told: tuple[WeightsReady, Swap] | None = None  # what is loaded now, whatever is announced meanwhile
        self._last_turn: Swap | None = None  # said twice it is no other round
        self._declined: deque[Swap] = deque()  # others take part in it, and must not wait for this server
        self._good: WeightsReady | None = None  # what the engine served last
        self._bad: WeightsReady | None = None  # what is not loaded any more, as long as nothing else was announced
        self._failures: Counter[tuple[int, str]] = Counter()  # loads that failed, by (version, manifest)
        self._group, self._lost_group = "", ""  # the process group of the last broadcast; one of before a restart
        self._verifying: asyncio.Future[weights.Manifest] | None = None  # also after its limit
        self._changed = asyncio.Event()
        self._engine_lock = asyncio.Lock()
        self._seconds: dict[_Phase, float] = {}
        self._generations: set[asyncio.Timeout] = set()
        self._settled = asyncio.Event()  # the weights that the engine has are known to be right
        self._decided = asyncio.Event()  # it serves, or is quarantined
        self.swapping = False
        """From the pause to the probe."""
        self.serving = False
        """The engine has published weights, and nothing is known against them."""
        self.quarantined = False
        """The engine took weights and answered their probe wrongly; until a version is right."""
        self.needs_restart = False
        """The engine is down, or not to be trusted: whoever watches it has to restart it (`engine_restarted`)."""

    @property
    def announced_version(self) -> int:
        """The version announced last; `UNLOADED` before the first."""
        return self._announced.policy_version if self._announced else UNLOADED

    @property
    def engine_lock(self) -> asyncio.Lock:
        """Held while the engine is swapped; hold it to look at the engine's health, or to restart it."""
        return self._engine_lock

    # --- what happens ------------------------------------------------------------------------------------------------

    def announce(self, ready: WeightsReady) -> None:
        """A version is published. Also for one that is prepared or loaded already: a trainer that returned wants to
        hear so."""
        if not _same(ready, self._announced):
            self._failures.clear()
        if not _same(ready, self._bad):
            self._bad = None
        self._announced = ready
        self._announcements += 1
        if self._pending is None or not _same(ready, self._pending) or ready.buckets != self._pending.buckets:
            self._pending = ready  # else what is being prepared goes on; other buckets are of another trainer
        self._changed.set()

    def tell(self, swap: Swap) -> None:
        """It is this server's turn. Ignored for anything but what is prepared, and declined where others take part."""
        wanted = self._prepared
        prepared = wanted is not None and wanted is self._pending and _key(swap) == _key(wanted)
        if wanted is not None and prepared and not self._told and bool(wanted.directory) == (swap.member is None):
            self._told, self._last_turn = (wanted, swap), swap
        elif swap.member is not None and not _same_turn(swap, self._last_turn):
            self._declined.append(swap)
        else:
            log.info("ignored: Swap to version %d, which is not what is prepared", swap.policy_version)
        self._changed.set()

    def engine_lost(self) -> None:
        """The engine is down and is about to be restarted."""
        self._distrust(restart=True)  # what still runs (in an engine that was only attached) is of nobody knows what

    def engine_restarted(self) -> None:
        """The engine has its starting weights: load what was announced last, or what worked last where that would not.

        What it served before is loaded without a `Swap`: the trainer counts it as serving that, and nothing is paused.
        """
        self.serving = self.needs_restart = False
        self._note()
        if self._group:
            self._group, self._lost_group = "", self._group
            self._answered = -1  # the trainer has to hear that it is in no group any more
        self._pending = self._announced
        if _same(self._announced, self._bad):
            self._pending = self._good if self._good and self._good.directory else None
        self._changed.set()

    # --- generations -------------------------------------------------------------------------------------------------

    async def until_serving(self, limit_s: float) -> None:
        """Wait until the engine may generate.

        Raises:
            EngineError: it is quarantined, or has no published weights after `limit_s`.
        """
        try:
            with waiting("the engine to have published weights", limit_s):
                async with asyncio.timeout(limit_s):
                    while not self.serving:
                        if self.quarantined:
                            raise EngineError("the engine is quarantined: it does not answer the probe of its weights")
                        await self._decided.wait()
        except TimeoutError:
            raise EngineError(f"waited {limit_s:g} s for the engine to have published weights") from None

    @asynccontextmanager
    async def generation(self) -> AsyncIterator[None]:
        """Around a generation. It ends when none of its tokens can be of weights that are not known to be right.

        Raises:
            TakenBackError: they may be of weights that are wrong, or the engine does not serve.
        """
        scope = asyncio.timeout(None)  # without a limit until `_distrust` ends it
        try:
            async with scope:
                if not self.serving:
                    raise TakenBackError("the engine has stopped serving")
                self._generations.add(scope)
                try:
                    yield
                    with waiting("the probe of new weights, before responses leave", 3 * self._limit_s):
                        await self._settled.wait()  # load, resume, probe: each has its limit, then `_distrust`
                finally:
                    self._generations.discard(scope)
        except TimeoutError:
            if not scope.expired():
                raise
            raise TakenBackError("the engine's weights have turned out to be wrong") from None

    def _distrust(self, *, restart: bool) -> None:
        """The weights that the engine has are wrong: take back whatever may have tokens of them."""
        self.serving = False
        self.needs_restart |= restart
        self._note()
        taken_back, self._generations = self._generations, set()
        for scope in taken_back:
            scope.reschedule(asyncio.get_running_loop().time())

    def _note(self) -> None:
        """Call when `serving` or `quarantined` has changed."""
        if self.serving or self.quarantined:
            self._decided.set()
        else:
            self._decided.clear()

    # --- the swap ----------------------------------------------------------------------------------------------------

    async def next(self) -> Prepared | Swapped | SwapFailed:
        """The next thing to tell the trainer, however long there is none: what was prepared, loaded, or neither."""
        while True:
            self._changed.clear()
            if self._declined:
                version = self._declined.popleft().policy_version
                return SwapFailed(
                    policy_version=version, reason="it is not what is prepared", quarantined=self.quarantined
                )
            told = self._told
            wanted = told[0] if told else self._pending
            if wanted is None or (self.needs_restart and not told):
                await self._changed.wait()
                continue
            try:
                outcome = await self._advance(wanted, told[1] if told else None)
            except (EngineError, WeightsError, OSError, ValueError) as error:
                outcome = self._failed(wanted, str(error))
            if outcome is not None:
                return outcome

    async def _advance(self, wanted: WeightsReady, swap: Swap | None) -> Prepared | Swapped | SwapFailed | None:
        """One step on the way of a version into the engine; None where there is nothing to say of it."""
        if self.serving and _same(wanted, self._good):
            self._done_with(wanted)
            return Swapped.at_once(*_key(wanted))
        served_before = _same(wanted, self._good) and bool(wanted.directory)
        has_other = self.serving or (self._good is not None and bool(self._good.directory))
        if _same(wanted, self._bad) and not served_before and has_other:
            return self._failed(wanted, "it could not be loaded before: it waits for another version")
        if self._prepared is not wanted:
            await self._prepare(wanted)
            if self._pending is not wanted:
                log.info("version %d is skipped: version %d is out", wanted.policy_version, self.announced_version)
                return None
            if not served_before:
                return self._say_prepared(wanted)
        elif swap is None and not served_before:
            return await self._turn(wanted)
        if self.needs_restart:
            raise EngineError("the engine is being restarted")  # at once: a broadcast's other members are waiting
        async with self._engine_lock:
            swapped = await self._swap(wanted, swap.member if swap else None)
        self._done_with(wanted)
        return swapped

    async def _prepare(self, wanted: WeightsReady) -> None:
        started = time.monotonic()
        version, tokens, logprobs = wanted.policy_version, wanted.probe_ids.size, wanted.probe_logprobs.size
        if tokens and logprobs != tokens - 1:
            raise WeightsError(f"version {version} has a probe of {tokens} tokens with {logprobs} log-probs")
        if wanted.directory:
            if self._verifying is not None and not self._verifying.done():  # a thread cannot be ended
                raise WeightsError(f"{wanted.directory}: an earlier version is still being read: does its disk hang?")
            verified = asyncio.to_thread(weights.verify, Path(wanted.directory), version, wanted.manifest)
            self._verifying = reading = asyncio.ensure_future(verified)
            reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait any more
            await self._limited(f"the checksums of version {version}", asyncio.shield(reading))
        else:
            async with self._engine_lock:
                if not await self._limited("the engine to say that it is well", self._engine.healthy()):
                    raise EngineError("the engine is not well: it has to be restarted first")
        self._prepared, self._prepared_at = wanted, time.monotonic()
        self._prepare_s = self._prepared_at - started

    def _say_prepared(self, wanted: WeightsReady) -> Prepared:
        self._answered = self._announcements
        return Prepared(
            policy_version=wanted.policy_version,
            manifest=wanted.manifest,
            prepare_s=self._prepare_s,
            group=self._group,
        )

    async def _turn(self, wanted: WeightsReady) -> Prepared | None:
        """Wait until something has changed; Prepared again if nothing does: it, or the Swap, may have been lost."""
        if self._answered != self._announcements:  # announced again, perhaps by a trainer that has never heard of it
            return self._say_prepared(wanted)
        try:
            with waiting(f"the trainer to say Swap to version {wanted.policy_version}", self._limit_s):
                async with asyncio.timeout(self._limit_s):
                    await self._changed.wait()
        except TimeoutError:
            log.warning("no Swap to version %d within %g s: Prepared again", wanted.policy_version, self._limit_s)
            return self._say_prepared(wanted)
        return None

    async def _swap(self, wanted: WeightsReady, member: GroupMember | None) -> Swapped:
        """Under the engine's lock: pause, load, resume, probe; and once more where the probe says that it is wrong."""
        started = time.monotonic()
        self._seconds = dict.fromkeys(("pause_s", "load_s", "resume_s", "probe_s"), 0.0)
        self.swapping = True
        try:
            if member is not None and member.name == self._lost_group:
                raise EngineError(f"the engine was restarted, and is no longer in process group {member.name}")
            while True:
                await self._pause()
                self._settled.clear()
                await self._load(wanted, member)
                gap = await self._resume_and_probe(wanted)
                if gap is None or gap <= wanted.tolerance:
                    break
                self._note_wrong_answer(wanted, gap)  # raises, unless it is loaded once more
        finally:
            self.swapping = False
        attempts = self._failures.pop(_key(wanted), 0) + 1
        self._bad, self._good = None if _same(wanted, self._bad) else self._bad, wanted
        self._group = member.name if member else self._group
        self.serving, self.quarantined = True, False
        self._settled.set()
        self._note()
        return Swapped(
            policy_version=wanted.policy_version,
            manifest=wanted.manifest,
            prepare_s=self._prepare_s,
            wait_s=max(0.0, started - self._prepared_at),
            pause_s=self._seconds["pause_s"],
            load_s=self._seconds["load_s"],
            resume_s=self._seconds["resume_s"],
            probe_s=self._seconds["probe_s"],
            probe_gap=gap,
            attempts=attempts,
        )

    async def _pause(self) -> None:
        try:
            await self._phase("pause_s", "the engine to pause", self._engine.pause())
        except EngineError as error:  # it has the old weights
            try:
                await self._phase("resume_s", "the engine to resume", self._engine.resume())
            except EngineError as second:
                self._give_up(error, f"and then: {second}")
            if isinstance(error, _TooLateError):
                self._distrust(restart=True)
            raise

    async def _load(self, wanted: WeightsReady, member: GroupMember | None) -> None:
        source = Broadcast(wanted.buckets, member) if member else Path(wanted.directory)
        loaded = self._engine.load(source, wanted.policy_version)
        try:
            await self._phase("load_s", f"the engine to load version {wanted.policy_version}", loaded)
        except EngineError as error:
            # of a broadcast that failed nobody knows whether it was this version's fault
            failures = self._count_failure(wanted) if member is None else 0
            try:
                await self._go_on_with_the_old(error)
            finally:
                if self.needs_restart and failures >= LOADS_THAT_KILL:
                    self._set_bad(wanted)
            raise

    async def _go_on_with_the_old(self, error: EngineError) -> None:
        """After a load that failed: resume, if the engine still has what it served before."""
        if isinstance(error, _TooLateError):
            self._give_up(error, "what it has now is not known")
        if not self.serving and self._engine.policy_version != UNLOADED:
            self._give_up(error, "and what it had before was wrong")
        old, gap = self._good, None
        try:
            await self._phase("resume_s", "the engine to resume", self._engine.resume())
            if not await self._limited("the engine to say that it is well", self._engine.healthy()):
                self._give_up(error, "and it is no longer well")
            if self.serving and old is not None:
                gap = await self._probe(old)
        except EngineError as second:
            if self.needs_restart:
                raise
            self._give_up(error, f"and then: {second}")
        if gap is not None and old is not None and not gap <= old.tolerance:
            self._give_up(error, f"and the weights from before are spoilt: {_too_far(gap, old)}")
        self._settled.set()

    def _give_up(self, error: EngineError, further: str) -> NoReturn:
        """The engine is no longer to be trusted."""
        self._distrust(restart=True)
        raise EngineError(f"{error}; {further}") from error

    async def _resume_and_probe(self, wanted: WeightsReady) -> float | None:
        try:
            await self._phase("resume_s", "the engine to resume", self._engine.resume())
            return await self._probe(wanted)
        except EngineError:  # nobody knows what its tokens are worth
            if self._count_failure(wanted) >= LOADS_THAT_KILL:
                self._set_bad(wanted)
            self._distrust(restart=True)
            raise

    async def _probe(self, ready: WeightsReady) -> float | None:
        """How far the engine's log-probs of the probe are from the trainer's, in nats; None without a probe."""
        if not ready.probe_ids.size:
            return None
        what = f"the engine's log-probs of the probe of version {ready.policy_version}"
        logprobs = await self._phase("probe_s", what, self._engine.score(ready.probe_ids))
        return float(np.abs(logprobs.astype(np.float64) - ready.probe_logprobs).mean())

    def _note_wrong_answer(self, wanted: WeightsReady, gap: float) -> None:
        failures = self._count_failure(wanted)
        if wanted.directory and failures < LOADS_WITHOUT_RESTART:
            self._distrust(restart=False)
            log.warning("version %d is loaded again: %s", wanted.policy_version, _too_far(gap, wanted))
            return
        self.quarantined = True
        self._distrust(restart=failures >= LOADS_WITHOUT_RESTART)
        raise EngineError(f"quarantined: {_too_far(gap, wanted)} (load {failures})")

    def _count_failure(self, wanted: WeightsReady) -> int:
        self._failures[_key(wanted)] += 1
        if self._failures[_key(wanted)] >= LOADS:
            self._set_bad(wanted)
            if _same(wanted, self._good):
                self._good = None
        return self._failures[_key(wanted)]

    def _set_bad(self, wanted: WeightsReady) -> None:
        if _same(wanted, self._announced):
            self._bad = wanted

    def _failed(self, wanted: WeightsReady, reason: str) -> SwapFailed:
        self._done_with(wanted)
        if _same(wanted, self._good) and not _same(wanted, self._announced) and not self.needs_restart:
            self._good = None  # there is nothing to fall back to: what was announced may be tried again
        has_nothing = self._engine.policy_version == UNLOADED and not self.needs_restart
        if self._pending is None and has_nothing and self._good and not _same(self._good, wanted):
            self._pending = self._good if self._good.directory else None
        return SwapFailed(policy_version=wanted.policy_version, reason=brief(reason), quarantined=self.quarantined)

    def _done_with(self, wanted: WeightsReady) -> None:
        self._prepared = self._told = None
        if self._pending is wanted:
            self._pending = None

    async def _phase(self, phase: _Phase, what: str, call: Awaitable[_T]) -> _T:
        started = time.monotonic()
        try:
            return await self._limited(what, call)
        finally:
            self._seconds[phase] += time.monotonic() - started

    async def _limited(self, what: str, call: Awaitable[_T]) -> _T:
        limit = asyncio.timeout(self._limit_s)
        try:
            with waiting(what, self._limit_s):
                async with limit:
                    return await call
        except TimeoutError:  # which an OSError of a file may be too
            if not limit.expired():
                raise
            raise _TooLateError(f"waited {self._limit_s:g} s for {what} (rollout.swap_timeout_s)") from None


def _key(message: WeightsReady | Swap) -> tuple[int, str]:
    return message.policy_version, message.manifest


def _same(one: WeightsReady | None, other: WeightsReady | None) -> bool:
    """Whether both are announcements of the same content under the same number."""
    if one is None or other is None:
        return one is other
    return _key(one) == _key(other)


def _same_turn(one: Swap, other: Swap | None) -> bool:
    """A process group outlives its rounds: the place in it alone says nothing."""
    return other is not None and (_key(one), one.member) == (_key(other), other.member)


def _too_far(gap: float, ready: WeightsReady) -> str:
    return (
        f"the engine's log-probs of the probe of version {ready.policy_version} are {gap:.3g} nats from the trainer's "
        f"on average, expected at most {ready.tolerance:g} (publish.tolerance)"
    )
