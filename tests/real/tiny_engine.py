"""A rollout server for tests of swaps: everything but SGLang is real, and it fails when and where it is told to.

Its engine is a Hugging Face model with real weights, from real files or a real process group. A response is random
tokens with the log-probs that these weights give them, so a response under a wrong label is seen in its log-probs. The
label is the engine's own: it takes the number that it was told to load, whatever it has really loaded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed import distributed_c10d as c10d
from transformers import AutoModelForCausalLM

import rollout_server.hot_swap
from asyncppo.config import Config, SamplingConfig, load
from asyncppo.errors import EngineError
from asyncppo.messages import Float32, GroupMember, Int32, Message, Prepared, Swapped, WeightsReady
from asyncppo.transport.base import Link
from asyncppo.transport.zmq import ZmqLink
from rollout_server.engine import UNLOADED, Broadcast, Response
from rollout_server.loop import RolloutServer
from tests.stream_process import RightAway

TOKEN_S = 0.004
TOKENS = 24
"""Of a response."""
SCORE_S = 0.2
"""A probe takes longer than a whole response: what leaves before it has passed would be seen."""

Phase = Literal["prepare", "prepared", "pause", "load", "bucket", "loaded", "resume", "score", "swapped"]


class Faults:
    """What goes wrong, `HOW:PHASE:N`, several separated by commas: the Nth time that it comes to a phase; or
    `HOW:PHASE:vN`: when it comes there after version N was announced, however often it has come there before.

    `kill` and `stop` are signals to this process, `hang` never returns, `fail` is an EngineError, `lie` says that it
    was done and does nothing.
    """

    def __init__(self, text: str) -> None:
        self.announced = -1
        """The version announced last."""
        self._wanted = {}
        self._wanted_from = {}
        for part in filter(None, text.split(",")):
            how, phase, number = part.split(":")
            if number.startswith("v"):
                self._wanted_from[phase] = (int(number[1:]), how)
            else:
                self._wanted[phase, int(number)] = how
        self._seen: Counter[str] = Counter()

    async def at(self, phase: Phase) -> bool:
        """The engine comes to a phase. Whether it is to lie about it."""
        how = self._next(phase)
        if how == "hang":
            await asyncio.Event().wait()
        if how == "fail":
            raise EngineError(f"as told, it fails at {phase}")
        return how == "lie"

    def now(self, phase: Phase) -> None:
        """The same outside the event loop."""
        if self._next(phase) == "fail":
            raise EngineError(f"as told, it fails at {phase}")

    def _next(self, phase: Phase) -> str | None:
        self._seen[phase] += 1
        how = self._wanted.get((phase, self._seen[phase]))
        if phase in self._wanted_from and self.announced >= self._wanted_from[phase][0]:
            how = self._wanted_from[phase][1]
        if how in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        return how


class TinyEngine:
    """`Engine` as the module says."""

    swap_mode: Literal["retract", "resubmit"] = "retract"
    self_tested = True
    ranks = 1
    description = "tiny"

    def __init__(self, model: Path, faults: Faults, limit_s: float = 5.0) -> None:
        self._path, self._faults, self._limit_s = model, faults, limit_s
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._draw = np.random.default_rng(os.getpid())
        self._running = asyncio.Event()
        self._group: tuple[str, Any] | None = None
        self._whole = True
        self._version = UNLOADED

    @property
    def policy_version(self) -> int:
        return self._version

    async def start(self) -> None:
        self._take(load_file(self._path / "model.safetensors"))
        self._version, self._whole, self._group = UNLOADED, True, None
        self._running.set()

    async def restart(self) -> None:
        await self.start()

    async def close(self) -> None:
        self._running.set()

    async def healthy(self) -> bool:
        return self._whole and self._running.is_set()

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    async def generate(self, prompt_ids: Int32, n: int, sampling: SamplingConfig) -> list[Response]:
        rows = [self._draw.integers(10, 380, TOKENS).astype(np.int32) for _ in range(n)]
        logprobs: list[list[float]] = [[] for _ in rows]
        versions: list[int] = []
        while len(versions) < TOKENS:
            await asyncio.sleep(TOKEN_S * 8)
            await self._running.wait()
            for row, values in zip(rows, logprobs, strict=True):  # eight at a time, by the weights of the moment
                known = len(prompt_ids) + len(values)
                scores = self._score(np.concatenate([prompt_ids, row[: len(values) + 8]]))
                values += scores[known - 1 :].tolist()
            versions += [self._version] * (len(logprobs[0]) - len(versions))
        spans = [(version, versions.count(version)) for version in sorted(set(versions))]
        return [
            Response(row, np.array(values, np.float32), spans, True, "nothing")
            for row, values in zip(rows, logprobs, strict=True)
        ]

    async def pause(self) -> None:
        await self._faults.at("pause")
        self._running.clear()

    async def resume(self) -> None:
        await self._faults.at("resume")
        if not self._whole:
            raise EngineError("it has half of some weights")
        self._running.set()

    async def score(self, ids: Int32) -> Float32:
        await self._faults.at("score")
        if not self._running.is_set():
            raise EngineError("it is paused")
        await asyncio.sleep(SCORE_S)
        return self._score(ids)

    async def load(self, weights: Path | Broadcast, policy_version: int) -> None:
        lie = await self._faults.at("load")
        self._whole = False
        if isinstance(weights, Broadcast):
            tensors = await asyncio.to_thread(self._receive, weights)
        else:
            tensors = load_file(weights / "model.safetensors")
        if not lie:
            self._take(tensors)
        self._version, self._whole = policy_version, True
        await self._faults.at("loaded")

    @torch.no_grad()
    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        parameters = dict(self._model.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)

    @torch.no_grad()
    def _score(self, ids: Int32) -> Float32:
        tokens = torch.from_numpy(ids.astype(np.int64))
        logprobs = self._model(tokens[None]).logits[0, :-1].log_softmax(-1)
        return np.asarray(logprobs.gather(-1, tokens[1:, None])[:, 0].numpy(), np.float32)

    # --- the process group, as SGLang joins one ----------------------------------------------------------------------

    def _receive(self, weights: Broadcast) -> dict[str, torch.Tensor]:
        try:
            group = self._join(weights.member)
            tensors = {}
            for bucket in weights.buckets:
                self._faults.now("bucket")
                dtypes = [getattr(torch, name) for name in bucket.dtypes]
                sizes = [
                    int(np.prod(shape)) * dtype.itemsize for shape, dtype in zip(bucket.shapes, dtypes, strict=True)
                ]
                flat = torch.empty(sum(sizes), dtype=torch.uint8)
                dist.broadcast(flat, src=0, group=group)
                parts = zip(bucket.names, bucket.shapes, dtypes, flat.split(sizes), strict=True)
                tensors |= {name: part.view(dtype).view(shape) for name, shape, dtype, part in parts}
        except RuntimeError as error:
            raise EngineError(f"the broadcast failed: {error}") from error
        return tensors

    def _join(self, member: GroupMember) -> Any:
        if self._group and self._group[0] == member.name:
            return self._group[1]
        if self._group:
            dist.destroy_process_group(self._group[1])
        timeout = c10d.timedelta(seconds=self._limit_s)
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        store = dist.TCPStore(member.address, member.port, member.world_size, False, timeout)
        group, _ = c10d._new_process_group_helper(
            member.world_size,
            member.rank,
            [],
            c10d.Backend(member.backend),
            dist.PrefixStore(member.name, store),
            group_name=member.name,
            timeout=timeout,
        )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(member.world_size)}
        self._group = member.name, group
        return group


class FaultyLink:
    """A link that comes to the phases `prepared` and `swapped` when these messages are sent."""

    def __init__(self, link: Link, faults: Faults) -> None:
        self._link, self._faults = link, faults
        self.hint = ""

    async def receive(self) -> Any:
        message = await self._link.receive()
        if isinstance(message, WeightsReady):
            self._faults.announced = message.policy_version
        return message

    async def send(self, message: Message) -> None:
        if isinstance(message, Swapped):
            await self._faults.at("swapped")
        await self._link.send(message)
        if isinstance(message, Prepared):
            await self._faults.at("prepared")

    def close(self) -> None:
        self._link.close()


async def serve(config: Config, name: str, faults: Faults) -> None:
    """Until the trainer says Stop, or the fault."""
    incarnation = uuid.uuid4().hex
    link = FaultyLink(ZmqLink(config.stream.address, f"{name}/{incarnation}".encode()), faults)
    engine = TinyEngine(Path(config.actor.path), faults, config.rollout.swap_timeout_s)
    await RolloutServer(config, link, engine, RightAway(), name, config.actor.path, incarnation).run()


def run(config_file: Path, name: str, fault: str, log: Path) -> None:
    """A whole server, in a process that was forked for it."""
    sys.stderr = log.open("w", buffering=1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
    torch.set_num_threads(1)
    faults = Faults(fault)
    verify = rollout_server.hot_swap.weights.verify

    def faulty_verify(*arguments: Any) -> None:
        faults.now("prepare")
        verify(*arguments)

    rollout_server.hot_swap.weights.verify = faulty_verify
    asyncio.run(serve(load(config_file), name, faults))
