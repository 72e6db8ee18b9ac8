"""Random and mutated messages against the intake and the rollout server: none ends it, none enters that should not.

    .venvs/trainer/bin/python scripts/fuzz.py --messages 100000 --seed 0

Two servers answer their leases properly all the while, so that there is something to disturb, and the trainer takes its
batches. A message is random bytes, or a good one damaged: bits flipped, frames cut, dropped, doubled or exchanged, a
field of the header replaced by an odd value, an array by another; from a server of the pool, a stranger or a new name.
After each the intake has to live, its ledger to add up, and whatever entered the buffer to be a sound group of a prompt
that was leased. `--messages` go into the intake in memory, a tenth as many through real sockets, and as many as
into the intake into the rollout server. The last line is JSON; the exit code is 0 only if nothing was found.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
import zmq

from asyncppo.config import Config, from_tree
from asyncppo.errors import MessageError, RefusedError
from asyncppo.messages import (
    PROTOCOL,
    Ack,
    Cancel,
    Codec,
    Failed,
    Frames,
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
    ToRollout,
    ToTrainer,
    Unknown,
    WeightsReady,
    Welcome,
)
from asyncppo.metrics import Journal
from asyncppo.rewards import Grade
from asyncppo.transport.zmq import ZmqHub
from asyncppo.weights import write_manifest
from rollout_server.engine import ScriptedEngine
from rollout_server.loop import RolloutServer
from rollout_server.reward import Grader
from trainer.stream.buffer import BufferedGroup
from trainer.stream.intake import Identity, Intake
from trainer.stream.prompts import Prompt, Prompts

BATCH, STALENESS, GROUP_SIZE, VOCABULARY, LONGEST = 4, 2, 2, 100, 8

ODD: list[Any] = [
    *(0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**64 - 1, -(2**63)),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "x" * 5000, "a\x00b", "\x1b[31m", "../../etc/passwd", "\U0001f600" * 3, "alice"),
    *(b"", b"\xff" * 9, None, True, [], {}, [[[[[[[]]]]]]], {"type": "Group"}, [0, 1, 2], ["float32", [2], 1]),
    *(["int32", [2**40], 1], ["int32", [-1], 2], ["float32", [3, 3], 1], ["object", [1], 1], ["int32", [1], 77]),
]


def a_config(directory: Path) -> Config:
    """A small stream that never ends."""
    return from_tree(
        {
            "run": {"steps": 1 << 20, "directory": str(directory)},
            "data": {"train": "train.jsonl"},
            "actor": {"path": str(directory)},
            "sampling": {"group_size": GROUP_SIZE, "max_response_tokens": LONGEST},
            "stream": {
                "prompts_per_batch": BATCH,
                "max_staleness": STALENESS,
                "slow": "drop",
                "set_aside_s": 0.01,
                "lease_timeout_s": 5,
                "heartbeat_s": 0.5,
            },
            "rollout": {"max_groups": 4, "spill_mb": 1},
        }
    )


def a_hello(name: str, incarnation: str) -> Hello:
    """Of a server that fits."""
    return Hello(
        protocol=PROTOCOL,
        server=name,
        incarnation=incarnation,
        started=0.0,
        capacity=4,
        agreement="a",
        model="m",
        tokenizer="t",
        engine="scripted",
    )


def a_group(lease: Lease | int, version: int, trainer: str = "") -> Group:
    """A sound one."""
    tokens = 3 * GROUP_SIZE
    known = lease if isinstance(lease, Lease) else None
    return Group(
        lease=known.lease if known else int(lease),  # type: ignore[arg-type]
        trainer=trainer,
        epoch=known.epoch if known else 0,
        prompt_id=known.prompt_id if known else "p1",
        response_ids=np.arange(tokens, dtype=np.int32),
        lengths=np.full(GROUP_SIZE, 3, np.int32),
        behaviour_logprobs=np.full(tokens, -0.5, np.float32),
        span_versions=np.full(GROUP_SIZE, version, np.int32),
        span_lengths=np.full(GROUP_SIZE, 3, np.int32),
        span_counts=np.ones(GROUP_SIZE, np.int32),
        rewards=np.array([0, 1], np.float32),
        step_rewards=np.zeros(tokens, np.float32),
        truncated=np.zeros(GROUP_SIZE, np.uint8),
        reward_errors=np.zeros(GROUP_SIZE, np.uint8),
        generate_s=0.1,
        grade_s=0.1,
    )


class Mutator:
    """Damages messages, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._codec = Codec(ToTrainer)

    def frames(self, message: Message) -> Frames:
        """The message as bytes, damaged in one to three ways; now and then not at all."""
        chance = self.random
        frames: Frames = [bytes(frame) for frame in self._codec.encode(message)]
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
            frames = chance.choice((self._header, self._header, self._header, self._bits, self._count, self._array))(
                frames
            )
        return frames

    def noise(self) -> Frames:
        """Random bytes in random frames."""
        return [self.random.randbytes(self.random.choice((0, 1, 7, 60, 900))) for _ in range(self.random.randrange(6))]

    def _header(self, frames: Frames) -> Frames:
        try:
            tree = msgspec.msgpack.decode(frames[0])
        except (msgspec.DecodeError, IndexError, UnicodeDecodeError):
            return frames
        if not isinstance(tree, dict) or not tree:
            return frames
        where: Any = tree
        key: Any = self.random.choice(list(tree))
        while self.random.random() < 0.5 and isinstance(where[key], list | dict) and where[key]:
            where = where[key]
            key = self.random.choice(list(where)) if isinstance(where, dict) else self.random.randrange(len(where))
        if self.random.random() < 0.1 and isinstance(where, dict):
            del where[key]
        else:
            where[key] = self.random.choice(ODD)
        return [msgspec.msgpack.encode(tree), *frames[1:]]

    def _bits(self, frames: Frames) -> Frames:
        if not frames:
            return frames
        index = self.random.randrange(len(frames))
        data = bytearray(frames[index])
        for _ in range(self.random.choice((1, 1, 4)) if data else 0):
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return [*frames[:index], bytes(data), *frames[index + 1 :]]

    def _count(self, frames: Frames) -> Frames:
        frames = list(frames)
        if not frames:
            return [b""]
        index = self.random.randrange(len(frames))
        match self.random.randrange(4):
            case 0:
                del frames[index]
            case 1:
                frames.insert(index, frames[index])
            case 2:
                frames[index] = bytes(frames[index])[: self.random.randrange(len(frames[index]) + 1)]
            case _:
                other = self.random.randrange(len(frames))
                frames[index], frames[other] = frames[other], frames[index]
        return frames

    def _array(self, frames: Frames) -> Frames:
        """Other numbers of the same size: the header still fits."""
        if len(frames) < 2:
            return frames
        index = self.random.randrange(1, len(frames))
        size = len(frames[index]) // 4
        odd = self.random.choice((0, 1, 2, 3, -1, 99, 100, 2**31 - 1, -(2**31)))
        if self.random.random() < 0.5:
            array = np.full(size, odd, np.int32)
        else:
            value = self.random.choice((np.nan, np.inf, -np.inf, 3e38, -1.0, 0.0))
            array = np.full(size, value, np.float32).view(np.int32)
        if size and self.random.random() < 0.5:  # one of them alone
            one = np.frombuffer(bytes(frames[index])[: 4 * size], np.int32).copy()
            one[self.random.randrange(size)] = array[0]
            array = one
        return [*frames[:index], array.tobytes() + bytes(frames[index])[4 * size :], *frames[index + 1 :]]


class Server:
    """A rollout server that does what it should; the fuzz speaks in its name as well."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.leases: dict[int, Lease] = {}
        self.version = -1
        self.trainer = ""
        self.starts = 0
        self.start()

    def start(self) -> None:
        """A new process."""
        self.starts += 1
        self.identity = f"{self.name}/{self.starts}".encode()
        self.leases, self.version = {}, -1
        self.to_say: deque[Message] = deque([a_hello(self.name, str(self.starts))])

    def hear(self, message: Message) -> None:
        """A message of the trainer."""
        match message:
            case Welcome():
                self.trainer = message.trainer
            case Lease():
                self.leases[message.lease] = message
            case Cancel():
                for lease in message.leases:
                    self.leases.pop(lease, None)
            case Ack():
                self.leases.pop(message.lease, None)
            case WeightsReady():
                self.to_say.append(_prepared(message.policy_version, message.manifest))
            case Swap():
                self.version = message.policy_version
                self.to_say.append(_swapped(self.version, message.manifest))
            case Unknown():
                if not any(isinstance(waiting, Hello) for waiting in self.to_say):
                    self.to_say.append(a_hello(self.name, str(self.starts)))
            case Refused():
                self.start()  # as a person would


class IntakeFuzz:
    """A `Hub` that makes up what comes in, and looks after each message at what became of it."""

    address = "fuzz"

    def __init__(self, directory: Path, seed: int, messages: int) -> None:
        self.mutator = Mutator(seed)
        self.found: list[str] = []
        self.counts: Counter[str] = Counter()
        self.done = threading.Event()
        self._left = messages
        self._codec = Codec(ToTrainer, 1 << 20)
        self._good = [Server("alice"), Server("bob")]
        self._granted: dict[int, tuple[bytes, Lease]] = {}
        self._checked: set[int] = set()
        self._version = 0
        self._journal = Journal(directory)
        prompts = [Prompt(f"p{n}", np.arange(3, dtype=np.int32), str(n)) for n in range(50)]
        self.intake = Intake(
            a_config(directory),
            self,
            Prompts(prompts, 0, True),
            Identity("a", "m", "t", vocabulary=VOCABULARY),
            self._journal,
        )

    def run(self, limit_s: float) -> None:
        """To the end of the messages, or of the intake."""
        self.intake.start()
        self.intake.announce(_weights(0))
        if not self.done.wait(limit_s):
            self.found.append(f"not through after {limit_s:.0f} s")
        try:
            self.intake.counts()
        except BaseException as error:
            self.found.append(f"the intake ended: {type(error).__name__}: {error}")
        self.intake.close(None)
        self._journal.close()

    # --- what the intake sees ---

    def receive(self, timeout_s: float) -> tuple[bytes, Any] | None:
        if self.done.is_set():
            time.sleep(timeout_s)
            return None
        self._look()
        if self._left <= 0:
            self.done.set()
            return None
        server = self.mutator.random.choice(self._good)
        if self.mutator.random.random() < 0.4:
            message = self._good_message(server)
            return None if message is None else (server.identity, message)
        self._left -= 1
        frames = (
            self.mutator.noise()
            if self.mutator.random.random() < 0.1
            else self.mutator.frames(self._original(self.mutator.random, server))
        )
        sender = self._sender(self.mutator.random, server)
        try:
            message = self._codec.decode(frames)
        except MessageError:
            self.counts["do not decode"] += 1
            raise
        self.counts["decode"] += 1
        return sender, message

    def send(self, peer: bytes, message: Message) -> bool:
        if isinstance(message, Lease):
            self._granted[message.lease] = (peer, message)
        for server in self._good:
            if server.identity == peer:
                server.hear(message)
        return True

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass

    # --- making it up ---

    def _good_message(self, server: Server) -> Message | None:
        if server.to_say:
            return server.to_say.popleft()
        if server.leases and self.mutator.random.random() < 0.7:
            lease = self.mutator.random.choice(list(server.leases.values()))
            return a_group(lease, max(server.version, 0), server.trainer)
        return _status(server.version)

    def _original(self, chance: random.Random, server: Server) -> Message:
        lease: Lease | int = chance.randrange(1 << 20)
        if server.leases and chance.random() < 0.8:
            lease = chance.choice(list(server.leases.values()))
        elif self._granted and chance.random() < 0.5:
            lease = chance.choice(list(self._granted.values()))[1]
        number = lease.lease if isinstance(lease, Lease) else lease
        manifest = "none" if chance.random() < 0.8 else "another trainer's"
        makers: list[Callable[[], Message]] = [
            *[lambda: a_group(lease, max(server.version, 0), server.trainer)] * 8,
            lambda: a_hello(server.name, str(server.starts)),
            lambda: a_hello(chance.choice(("carol", "dave", "x" * 300, "a b")), chance.choice(("1", "2"))),
            lambda: Failed(lease=number, reason="no"),
            lambda: _status(server.version),
            lambda: _prepared(self._version, manifest),
            lambda: _swapped(self._version, manifest),
            lambda: SwapFailed(policy_version=self._version, reason="no", quarantined=chance.random() < 0.1),
            *([lambda: Goodbye(reason="bye")] if chance.random() < 0.05 else []),
        ]
        return chance.choice(makers)()

    def _sender(self, chance: random.Random, server: Server) -> bytes:
        others = (b"", b"\xff" * 255, b"carol/1", b"dave/1", b"stranger", self._good[0].identity)
        return server.identity if chance.random() < 0.75 else chance.choice(others)

    # --- looking at it ---

    def _look(self) -> None:
        intake = self.intake
        try:
            intake._ledger.check()
        except Exception as error:
            self.found.append(f"the ledger: {error}")
            self.done.set()
        for lease, held in list(intake._buffer._groups.items()):
            if lease not in self._checked:
                self._checked.add(lease)
                self._check(held)
        while sum(held.oldest_version >= self._version - STALENESS for held in intake._buffer.by_position()) >= BATCH:
            batch = intake.take(self._version, lambda: False)
            assert batch is not None
            self.counts["consumed"] += len(batch)
            self._version += 1
            intake.announce(_weights(self._version))

    def _check(self, held: BufferedGroup) -> None:
        """By its own rules, not by `Group.check`."""
        group = held.group
        self.counts["entered"] += 1
        granted = self._granted.get(group.lease)
        spans = iter(zip(group.span_versions.tolist(), group.span_lengths.tolist(), strict=True))
        problems = []
        if granted is None:  # adopted (`Intake._receive_kept`): its prompt waited to be leased again
            self.counts["adopted"] += 1
            leased = {(lease.epoch, lease.prompt_id) for _, lease in self._granted.values()}
            if group.trainer != self.intake._incarnation or (group.epoch, group.prompt_id) not in leased:
                problems.append("nobody ever leased it")
        elif (granted[1].epoch, granted[1].prompt_id) != (held.epoch, held.prompt.prompt_id):
            problems.append("it answers another prompt")
        if group.lengths.tolist() != [n for n in group.lengths.tolist() if 1 <= n <= LONGEST]:
            problems.append(f"lengths {group.lengths.tolist()}")
        if len(group.lengths) != GROUP_SIZE or group.lengths.sum() != len(group.response_ids):
            problems.append("sizes")
        if not all(0 <= token < VOCABULARY for token in group.response_ids.tolist()):
            problems.append("tokens")
        for length, count in zip(group.lengths.tolist(), group.span_counts.tolist(), strict=True):
            own = [next(spans) for _ in range(count)]
            if sum(tokens for _, tokens in own) != length or [v for v, _ in own] != sorted(v for v, _ in own):
                problems.append("spans")
            if not all(0 <= version <= self._version for version, _ in own):
                problems.append("versions")
        for name in ("behaviour_logprobs", "rewards", "step_rewards"):
            if not all(map(_is_finite, getattr(group, name).tolist())):
                problems.append(name)
        if max(group.behaviour_logprobs.tolist()) > 1 or max(map(abs, group.rewards.tolist())) > 1e10:
            problems.append("a log-prob or a reward beyond reason")
        if {*group.truncated.tolist(), *group.reward_errors.tolist()} - {0, 1}:
            problems.append("flags")
        self.found += [f"lease {group.lease} entered the buffer: {problem}" for problem in problems]


def _is_finite(value: float) -> bool:
    return value - value == 0.0


def _weights(version: int) -> WeightsReady:
    return WeightsReady(policy_version=version, directory="/nowhere", manifest="none")


def _prepared(version: int, manifest: str) -> Prepared:
    return Prepared(policy_version=version, manifest=manifest, prepare_s=0.1)


def _swapped(version: int, manifest: str) -> Swapped:
    times = dict.fromkeys(("prepare_s", "wait_s", "pause_s", "load_s", "resume_s", "probe_s"), 0.1)
    return Swapped(policy_version=version, manifest=manifest, probe_gap=1e-6, **times)


def _status(version: int) -> Status:
    return Status(
        policy_version=version,
        groups_in_flight=0,
        unacknowledged=0,
        responses=0,
        tokens=0,
        idle_s=0.0,
        reward_errors=0,
        engine_restarts=0,
        state="generating",
    )


def fuzz_intake(seed: int, messages: int, limit_s: float = 3000.0) -> IntakeFuzz:
    """`messages` in memory; see `found` of what comes back."""
    with tempfile.TemporaryDirectory(prefix="asyncppo-fuzz-") as directory:
        fuzz = IntakeFuzz(Path(directory), seed, messages)
        fuzz.run(limit_s)
        return fuzz


def fuzz_sockets(seed: int, messages: int) -> tuple[list[str], Counter[str]]:
    """Raw multipart messages from sockets of many identities into a real hub with an intake behind it."""
    found: list[str] = []
    mutator = Mutator(seed)
    chance = mutator.random
    with tempfile.TemporaryDirectory(prefix="asyncppo-fuzz-") as directory:
        config = a_config(Path(directory))
        prompts = [Prompt(f"p{n}", np.arange(3, dtype=np.int32), str(n)) for n in range(50)]
        hub = ZmqHub("tcp://127.0.0.1:0", 1 << 20)
        journal = Journal(Path(directory))
        intake = Intake(config, hub, Prompts(prompts, 0, True), Identity("a", "m", "t", VOCABULARY), journal)
        intake.start()
        intake.announce(_weights(0))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        sockets = []
        for index in range(20):
            socket = context.socket(zmq.DEALER)
            if index % 4:
                socket.setsockopt(zmq.ROUTING_ID, f"alice/{index}".encode())
            socket.setsockopt(zmq.LINGER, 2000)
            socket.connect(hub.address)
            sockets.append(socket)
        originals: list[Callable[[], Message]] = [
            lambda: a_hello("alice", str(chance.randrange(3))),
            lambda: a_group(chance.randrange(100), 0),
            lambda: _status(0),
            lambda: Failed(lease=1, reason="no"),
            lambda: _prepared(0, "none"),
            lambda: _swapped(0, ""),
        ]
        for number in range(messages):
            frames = mutator.noise() if chance.random() < 0.2 else mutator.frames(chance.choice(originals)())
            chance.choice(sockets).send_multipart(frames or [b""])
            if number % 50 == 0:
                time.sleep(0.005)
                for socket in sockets:
                    while socket.poll(0):
                        socket.recv_multipart()
        # A proper server still gets in, is leased to, and acknowledged.
        with context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.ROUTING_ID, b"proper")
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(hub.address)
            codec, ours = Codec(ToRollout), Codec(ToTrainer)
            server = Server("proper")
            deadline = time.monotonic() + 60
            acknowledged = False
            while not acknowledged and time.monotonic() < deadline:
                while server.to_say:
                    socket.send_multipart(ours.encode(server.to_say.popleft()))
                for lease in server.leases.values():
                    socket.send_multipart(ours.encode(a_group(lease, 0, server.trainer)))
                if socket.poll(200):
                    message = codec.decode(socket.recv_multipart())
                    server.hear(message)
                    acknowledged = isinstance(message, Ack)
            if not acknowledged:
                found.append("a proper server got no group in within 60 s after the noise")
        try:
            counts = intake.counts()
            result = Counter({"malformed": counts.malformed, "servers": counts.servers})
            intake._ledger.check()
        except BaseException as error:
            found.append(f"the intake ended: {type(error).__name__}: {error}")
            result = Counter()
        for socket in sockets:
            socket.close(0)
        context.term()
        intake.close(None)
        journal.close()
    return found, result


# --- the rollout server ----------------------------------------------------------------------------------------------


class _Grader(Grader):
    def __init__(self) -> None:
        pass

    async def grade(self, texts: Sequence[str], answer: str) -> list[Grade]:
        return [Grade(1.0, error=False) for _ in texts]

    def close(self) -> None:
        pass


class _Link:
    """A `Link` on which the trainer says what the fuzz makes up."""

    def __init__(self, fuzz: RolloutFuzz) -> None:
        self._fuzz = fuzz
        self._codec = Codec(ToRollout, 1 << 20)
        self._said = 0

    async def receive(self) -> Any:
        self._said += 1
        if self._said % 20 == 0:
            await asyncio.sleep(0)
        if self._said % 200 == 0:
            await asyncio.sleep(0.002)  # tasks that were started get their turn
        return self._codec.decode(await self._fuzz.next_frames())

    async def send(self, message: Message) -> None:
        self._fuzz.heard(message)

    def close(self) -> None:
        pass


class RolloutFuzz:
    """A trainer out of its mind; between whiles a sane one, which has to be answered."""

    def __init__(self, directory: Path, seed: int, messages: int) -> None:
        self.found: list[str] = []
        self.counts: Counter[str] = Counter()
        self._directory = directory
        self._mutator = Mutator(seed)
        self._left = messages
        self._proofs: deque[Message] = deque()
        self._lease = 1 << 40
        (directory / "config.json").write_text("{}")
        (directory / "tokenizer.json").write_text("{}")
        published = directory / "v0"
        published.mkdir()
        (published / "model.safetensors").write_text("weights")
        self._weights = WeightsReady(policy_version=0, directory=str(published), manifest=write_manifest(published, 0))

    async def run(self) -> None:
        """Server after server, as some messages end one properly, to the end of the messages."""
        while self._left > 0 and not self.found:
            engine = ScriptedEngine(lambda p, i, v: [(1, -0.5)] * 3, lambda ids: "x", 0.0)
            config = a_config(self._directory)
            server = RolloutServer(config, _Link(self), engine, _Grader(), "fuzzed", str(self._directory), "i1")
            self.counts["servers"] += 1
            self._proofs.extend((self._welcome(), self._weights))
            try:
                async with asyncio.timeout(3000):
                    await server.run()
            except RefusedError:
                self.counts["refused"] += 1
            except BaseException as error:
                self.found.append(f"the rollout server ended: {type(error).__name__}: {error}")

    async def next_frames(self) -> Frames:
        codec = Codec(ToTrainer)
        if self._proofs:
            return [bytes(frame) for frame in codec.encode(self._proofs.popleft())]
        if self._left <= 0:
            return [bytes(frame) for frame in codec.encode(Stop(reason="the fuzz is over"))]
        self._left -= 1
        if self._left % 400 == 0:
            await self._prove()
        if self._mutator.random.random() < 0.1:
            return self._mutator.noise()
        return self._mutator.frames(self._original(self._mutator.random))

    async def _prove(self) -> None:
        """A good lease has to be answered."""
        self._lease += 1
        self._proofs.extend((self._welcome(), self._weights, self._good_lease(self._lease)))

    def heard(self, message: Message) -> None:
        if isinstance(message, Group):
            self.counts["groups"] += 1
            if message.lease == self._lease:
                self.counts["proofs"] += 1
            self._proofs.append(Ack(lease=message.lease))
        elif isinstance(message, Prepared):
            self._proofs.append(Swap(policy_version=message.policy_version, manifest=message.manifest))
        elif isinstance(message, Hello):
            self._proofs.extend((self._welcome(), self._weights))

    def _welcome(self) -> Welcome:
        return Welcome(run="fuzz", heartbeat_s=0.5, trainer="t")

    def _good_lease(self, number: int) -> Lease:
        return Lease(
            lease=number,
            epoch=0,
            prompt_id="p",
            prompt_ids=np.arange(3, dtype=np.int32),
            answer="1",
            group_size=GROUP_SIZE,
            purpose="train",
        )

    def _original(self, chance: random.Random) -> Message:
        makers: list[Callable[[], Message]] = [
            *[lambda: self._good_lease(chance.randrange(1 << 30))] * 4,
            lambda: Ack(lease=chance.randrange(1 << 30)),
            lambda: Cancel(leases=[chance.randrange(1 << 30)]),
            self._welcome,
            lambda: self._weights,
            lambda: Swap(policy_version=0, manifest=self._weights.manifest),
            lambda: Pulse(policy_version=0),
            lambda: Unknown(),
            *([lambda: Stop(reason="x"), lambda: Refused(reason="x")] if chance.random() < 0.01 else []),
        ]
        return chance.choice(makers)()


def fuzz_rollout(seed: int, messages: int) -> RolloutFuzz:
    """`messages` into rollout servers; see `found` of what comes back."""
    with tempfile.TemporaryDirectory(prefix="asyncppo-fuzz-") as directory:
        fuzz = RolloutFuzz(Path(directory), seed, messages)
        asyncio.run(fuzz.run())
        if not fuzz.counts["proofs"]:
            fuzz.found.append("no good lease was answered")
        return fuzz


def main(
    messages: Annotated[int, typer.Option(min=100, help="Into the intake in memory, and into the rollout server.")],
    seed: Annotated[int, typer.Option(help="Of everything that is made up.")] = 0,
) -> None:
    """Fuzz the intake in memory, through sockets, and the rollout server."""
    logging.disable(logging.CRITICAL)
    started = time.monotonic()
    intake = fuzz_intake(seed, messages)
    sockets_found, sockets = fuzz_sockets(seed, messages // 10)
    rollout = fuzz_rollout(seed, messages)
    found = [*intake.found, *sockets_found, *rollout.found]
    for line in found[:50]:
        print(line)
    print(
        json.dumps(
            {
                "seed": seed,
                "messages": {"intake": messages, "sockets": messages // 10, "rollout_server": messages},
                "intake": dict(intake.counts),
                "sockets": dict(sockets),
                "rollout_server": dict(rollout.counts),
                "found": len(found),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    )
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    typer.run(main)
