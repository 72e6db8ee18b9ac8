"""What generates: the seam between the rollout server and an inference engine, and the engine's scripted twin.

An engine answers one prompt n times under its current weights, and takes new weights in three phases while it does so:
`pause`, `load`, `resume`. Requests survive a swap; every token keeps the version of the weights that made it. The
versions are the engine's own report, never stamped on by the caller. Both engines pass tests/contract/test_engine.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from asyncppo.config import SamplingConfig
from asyncppo.errors import EngineError
from asyncppo.messages import Bucket, Float32, GroupMember, Int32

UNLOADED = -1
"""The policy version of an engine that has its starting weights and was never given any."""

Script = Callable[[tuple[int, ...], int, int], Sequence[tuple[int, float]]]
"""(prompt ids, index of the response, policy version) -> the response's tokens with their log-probs."""

Scores = Callable[[tuple[int, ...], int], Sequence[float]]
"""(ids, policy version) -> log-probs of ids[1:]."""


@dataclass(frozen=True)
class Response:
    """One answer to a prompt, of T tokens; the end-of-sequence token is one of them."""

    ids: Int32  # [T]
    logprobs: Float32  # [T], of the distribution that the token was drawn from, before top-p and top-k
    spans: list[tuple[int, int]]  # (policy version, tokens), rising, sum T
    truncated: bool
    text: str


@dataclass(frozen=True)
class Broadcast:
    """Weights that come from the trainer's process group while they are loaded."""

    buckets: list[Bucket]
    member: GroupMember


class Engine(Protocol):
    """An inference engine. Not thread-safe: everything happens in one event loop."""

    swap_mode: Literal["retract", "resubmit"]
    """What a swap does to running requests: the engine drops their cache and computes it anew (`retract`), or they are
    aborted, and sent again with what they have so far as prompt, under a fresh cache key (`resubmit`)."""
    self_tested: bool
    """Whether its swaps are known to be clean: `self_test` has proved it, or there is nothing to prove."""

    @property
    def description(self) -> str:
        """What it is, for people: `sglang 0.5.23 (cpu)`."""

    @property
    def ranks(self) -> int:
        """How many ranks it is in a broadcast's process group."""

    @property
    def policy_version(self) -> int:
        """The version whose weights it has; `UNLOADED` after `start` and `restart`."""

    async def start(self) -> None:
        """Get ready to generate.

        Raises:
            EngineError: it did not start, or not in time.
        """

    async def generate(self, prompt_ids: Int32, n: int, sampling: SamplingConfig) -> list[Response]:
        """Answer a prompt n times. Cancelling the caller's task stops the generation.

        Raises:
            EngineError: the engine failed, or its answer does not fit together.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, by the rule of `Response.text`, which is that of all its ids or begins it.

        Raises:
            EngineError: there is no tokenizer to decode with.
        """

    async def pause(self) -> None:
        """Stop generating; running requests wait, and lose nothing.

        Raises:
            EngineError: it did not.
        """

    async def load(self, weights: Path | Broadcast, policy_version: int) -> None:
        """Take the weights, from a directory or from the trainer. Called between `pause` and `resume`.

        Raises:
            EngineError: it did not; the old weights stay, or the engine is no longer `healthy`.
        """

    async def score(self, ids: Int32) -> Float32:
        """Log-probs of ids[1:], each under all before it, by the weights as they are and at temperature 1: [P-1].

        Not while it is paused.

        Raises:
            EngineError: it did not answer, or not with so many.
        """

    async def resume(self) -> None:
        """Go on generating, what ran before the pause included.

        Raises:
            EngineError: it did not.
        """

    async def healthy(self) -> bool:
        """Whether it lives and has the weights that it was given."""

    async def restart(self) -> None:
        """Bring it back up, with its starting weights.

        Raises:
            EngineError: it did not start, or not in time.
        """

    async def close(self) -> None:
        """End it, and every process of it."""


class ScriptedEngine:
    """`Engine` that says what a script says: deterministic, for tests and plain runs.

    All responses of a request grow by one token at a time. The token at position t comes from the script under the
    weights loaded at that moment, so a swap shows in the tokens and in the spans.

    Example: a script of `[(7, -0.5), (2, -0.1)]` under version 0 and of `[(8, -0.6), (9, -0.4), (2, -0.1)]` under
    version 1, swapped after one token, gives ids `[7, 9, 2]` with spans `[(0, 1), (1, 2)]`.

    Args:
        script: see `Script`; a response ends where its script ends.
        decode: token ids to text.
        token_s: seconds of one token.
        on_load: called with weights and version by `load`; may raise EngineError, as real weights may not fit.
        scores: see `Scores`; without it `score` is an EngineError.
        ranks: see `Engine.ranks`.
    """

    swap_mode: Literal["retract", "resubmit"] = "retract"
    self_tested = True

    def __init__(
        self,
        script: Script,
        decode: Callable[[Sequence[int]], str],
        token_s: float = 0.0,
        on_load: Callable[[Path | Broadcast, int], None] | None = None,
        scores: Scores | None = None,
        ranks: int = 1,
    ) -> None:
        self._script = script
        self._decode = decode
        self._token_s = token_s
        self._on_load = on_load
        self._scores = scores
        self._ranks = ranks
        self._running = asyncio.Event()
        self._running.set()
        self._alive = False
        self._version = UNLOADED
        self.generating = 0
        """Requests being answered now."""

    @property
    def description(self) -> str:
        return "scripted"

    @property
    def ranks(self) -> int:
        return self._ranks

    @property
    def policy_version(self) -> int:
        return self._version

    def die(self) -> None:
        """Fail everything until `restart`, as a crash does."""
        self._alive = False
        self._running.set()

    async def start(self) -> None:
        self._alive, self._version = True, UNLOADED

    async def generate(self, prompt_ids: Int32, n: int, sampling: SamplingConfig) -> list[Response]:
        prompt = tuple(int(token) for token in prompt_ids)
        tokens: list[list[tuple[int, float, int]]] = [[] for _ in range(n)]  # (id, log-prob, version)
        unfinished = set(range(n))
        self.generating += 1
        try:
            while unfinished:
                await asyncio.sleep(self._token_s)
                await self._running.wait()
                self._check_alive()
                for index in list(unfinished):
                    script, made = self._script(prompt, index, self._version), tokens[index]
                    if len(made) < min(len(script), sampling.max_response_tokens):
                        made.append((*script[len(made)], self._version))
                    if len(made) >= min(len(script), sampling.max_response_tokens):
                        unfinished.discard(index)
        finally:
            self.generating -= 1
        return [self._response(prompt, index, made) for index, made in enumerate(tokens)]

    def _response(self, prompt: tuple[int, ...], index: int, made: list[tuple[int, float, int]]) -> Response:
        if not made:
            raise EngineError("the script gave an empty response: end-of-sequence is a token, expected at least that")
        spans: list[tuple[int, int]] = []
        for _, _, version in made:
            if spans and spans[-1][0] == version:
                spans[-1] = (version, spans[-1][1] + 1)
            else:
                spans.append((version, 1))
        ids = [token for token, _, _ in made]
        return Response(
            ids=np.array(ids, np.int32),
            logprobs=np.array([logprob for _, logprob, _ in made], np.float32),
            spans=spans,
            truncated=len(made) < len(self._script(prompt, index, made[-1][2])),
            text=self._decode(ids),
        )

    def decode(self, ids: Sequence[int]) -> str:
        return self._decode(ids)

    async def pause(self) -> None:
        self._check_alive()
        self._running.clear()

    async def load(self, weights: Path | Broadcast, policy_version: int) -> None:
        self._check_alive()
        if self._on_load is not None:
            self._on_load(weights, policy_version)
        self._version = policy_version

    async def score(self, ids: Int32) -> Float32:
        await asyncio.sleep(self._token_s)
        self._check_alive()
        if not self._running.is_set():
            raise EngineError("the scripted engine is paused: it scores nothing before it is resumed")
        if self._scores is None:
            raise EngineError("the scripted engine has no scores: give it some")
        logprobs = np.array(self._scores(tuple(ids.tolist()), self._version), np.float32)
        if logprobs.shape != (ids.size - 1,):
            raise EngineError(f"the script gave log-probs of shape {logprobs.shape}, expected {(ids.size - 1,)}")
        return logprobs

    async def resume(self) -> None:
        self._check_alive()
        self._running.set()

    async def healthy(self) -> bool:
        return self._alive

    async def restart(self) -> None:
        await self.start()

    async def close(self) -> None:
        self.die()

    def _check_alive(self) -> None:
        if not self._alive:
            raise EngineError("the scripted engine is dead")
