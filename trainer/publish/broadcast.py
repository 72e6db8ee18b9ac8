"""Transport `broadcast`: the newest version is held in memory, and sent into the engines in rounds.

    consumes      versions (`put`), from the publisher; rounds (`begin`), from the intake
    produces      one process group for each set of members, and in it the version's buckets, one after the other
    waits for     the members to come into the group, and to take each bucket: `rollout.swap_timeout_s` for a round
    unblocked by  the members; `close` ends it

The trainer is rank 0. SGLang's end is `init_custom_process_group` (sglang/srt/utils): a TCP store at the address that
`GroupMember` gives, and on it a process group under the prefixes of `_prefixed`. A group whose round has failed is not
used again. A member that hangs holds up the round that it is in, and nothing else: it is this thread that waits.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
import torch
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from asyncppo.config import Config
from asyncppo.errors import ConfigError, WeightsError
from asyncppo.messages import MAX_HEADER_BYTES, Bucket, GroupMember, WeightsReady
from asyncppo.waits import waiting
from asyncppo.weights import Manifest, checksum_of
from trainer.model.export import checkpoint_weights
from trainer.publish.publisher import Weights, bytes_of, entries

log = logging.getLogger("asyncppo.publish")

_TICK_S = 0.5
_POLL_S = 0.001
_LEAVE_S = 2.0
_CLOSE_S = 10.0
"""The thread ends within this time, or is left behind."""
_SPARE = 4.0
"""NCCL ends the whole process when an operation outlives the group's timeout: ours comes first."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A version, ready to be sent."""

    version: int
    manifest: str
    buckets: list[torch.Tensor]  # each [bytes] uint8, on the CPU


@dataclass(slots=True)
class _Group:
    """A process group, from the moment that its members are told of it."""

    name: str
    members: list[tuple[bytes, int]]
    size: int
    port: int
    store: TCPStore | None
    processes: Any = None
    """The backend, once all have come."""
    flying: Any = None
    """The operation that was begun last."""

    def end(self) -> None:
        """Leave it, once no operation hangs any more (the group's timeout ends it): gloo's threads end no sooner, and a
        process that ends meanwhile is aborted."""
        while self.flying is not None and not self.flying.is_completed():
            time.sleep(_TICK_S)
        self.flying = self.processes = self.store = None


class BroadcastTransport:
    """`Transport` and `Broadcaster` (trainer/publish/swaps.py) in one: it holds the newest version and sends it.

    Args:
        config: the run's.
        device: the trainer's; with CUDA at both ends the tensors go by NCCL.

    Raises:
        ConfigError: the address is none of this host.
    """

    name = "broadcast"

    def __init__(self, config: Config, device: torch.device) -> None:
        self._host = address(config)
        self._family = _family(self._host)
        self._bucket_bytes = config.publish.bucket_mb << 20
        self._timeout_s = config.rollout.swap_timeout_s
        self._device = device
        nccl = device.type == "cuda" and config.rollout.device != "cpu"
        self._backend: Literal["gloo", "nccl"] = "nccl" if nccl else "gloo"
        self._changed = threading.Condition()
        self._held: _Held | None = None
        self._group: _Group | None = None
        self._round: tuple[_Held, _Group] | None = None
        self._ended: list[_Group] = []
        """Groups that are to be left before the next one is made."""
        self._closing = False
        self._given_up = False
        self._failure: BaseException | None = None
        self._stream: Any = None
        self._run_id = uuid.uuid4().hex[:8]
        self._groups = 0
        self._thread = threading.Thread(target=self._run, name="broadcast", daemon=True)
        self._thread.start()

    # --- the publisher's side ----------------------------------------------------------------------------------------

    def put(self, version: int, weights: Weights, model: Any) -> WeightsReady:
        """Hold a version in the place of the one before, which a round in progress still sends to its end.

        Raises:
            ConfigError: its tensors are too many to be announced.
        """
        tensors = checkpoint_weights(model, weights)
        manifest = checksum_of(Manifest(policy_version=version, files={}, tensors=entries(tensors)).encode())
        buckets = plan(tensors, self._bucket_bytes)
        size = len(msgspec.msgpack.encode(buckets))
        if size > MAX_HEADER_BYTES // 2:
            raise ConfigError(
                f"the names of {len(tensors)} tensors are {size} bytes, too much for a message of {MAX_HEADER_BYTES}: "
                "set publish.transport to disk"
            )
        flat = [_joined([tensors[name] for name in bucket.names], self._backend == "nccl") for bucket in buckets]
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._held = _Held(version, manifest, flat)
        return WeightsReady(policy_version=version, manifest=manifest, buckets=buckets)

    def remove_before(self, version: int) -> None:
        """Nothing: only the newest version is held."""

    # --- the intake's side -------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a round is running: from `begin` until everything is sent, or has failed."""
        with self._changed:
            return self._round is not None

    def begin(
        self, version: int, manifest: str, members: Sequence[tuple[bytes, int]], group: str
    ) -> dict[bytes, GroupMember]:
        """Start a round in this transport's thread. The group of the last round is used again if its round was whole,
        it has the same members, in the same order, and all of them are still in it.

        Args:
            version: the policy version to send.
            manifest: its manifest's checksum.
            members: identity and engine ranks of each server, in the order of their ranks.
            group: the process group that all of them say they are in; empty if they do not agree.

        Returns:
            The place of each of them.

        Raises:
            WeightsError: a round is running, this is not the newest version, or no port can be opened.
        """
        with self._changed:
            held = self._held
            if self._failure is not None:
                raise self._failure
            if self._closing:
                raise WeightsError("no round can begin: the trainer ends")
            if self._round is not None:
                raise WeightsError("no round can begin: one is running")
            if held is None or (held.version, held.manifest) != (version, manifest):
                newest = f"version {held.version} is" if held else "none is"
                raise WeightsError(f"version {version} ({manifest[:8]}…) cannot be sent: {newest} held")
            same = self._group is not None and (self._group.name, self._group.members) == (group, list(members))
            if self._group is None or not same:
                if self._group is not None:
                    self._ended.append(self._group)
                self._group = None
                self._group = self._open(list(members))
            place = self._group
            self._round = held, place
            self._given_up = False
            self._changed.notify_all()
        places: dict[bytes, GroupMember] = {}
        rank = 1
        for identity, ranks in members:
            places[identity] = GroupMember(
                name=place.name,
                address=self._host,
                port=place.port,
                rank=rank,
                world_size=place.size,
                backend=self._backend,
            )
            rank += ranks
        return places

    def give_up(self, member: bytes) -> None:
        """It takes no part in the round that is running, if it is in it: the others are not to wait for it."""
        with self._changed:
            if self._round is not None and any(identity == member for identity, _ in self._round[1].members):
                self._given_up = True

    def _open(self, members: list[tuple[bytes, int]]) -> _Group:
        """A store that listens already, on the one address that the members are told."""
        self._groups += 1
        size = 1 + sum(ranks for _, ranks in members)
        try:
            listening = socket.create_server((self._host, 0), family=self._family, backlog=1024)
            port = listening.getsockname()[1]
            store = TCPStore(
                self._host,
                port,
                size,
                is_master=True,
                timeout=timedelta(seconds=self._timeout_s),
                wait_for_workers=False,
                master_listen_fd=listening.detach(),
            )
        except (OSError, RuntimeError) as error:  # torch's own errors are RuntimeErrors
            raise WeightsError(f"no port of {self._host} can be opened for a broadcast: {error}") from error
        return _Group(f"asyncppo-{self._run_id}-{self._groups}", members, size, port, store)

    # --- the owner's side --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the round in progress and the thread, within seconds: one that hangs is left behind."""
        with self._changed:
            self._closing = True
            self._held = None
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("a broadcast hangs: after %.0f s it is left behind", _CLOSE_S)

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # raised again by `put` and `begin`
            log.exception("the broadcaster failed")
            with self._changed:
                self._failure, self._round = error, None

    def _serve(self) -> None:
        if self._backend == "nccl":
            torch.cuda.set_device(self._device)
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # not the one of training
        leaving: list[threading.Thread] = []
        while True:
            with self._changed:
                while self._round is None and not self._closing:
                    self._changed.wait(_TICK_S)
                if self._round is None:
                    break
                held, group = self._round
                ended, self._ended = self._ended, []
            leaving = [thread for thread in leaving if thread.is_alive()] + [_leave(old) for old in ended]
            failed = self._send_or_fail(held, group)
            with self._changed:
                self._round = None
                if failed and self._group is group:
                    self._group = None
            if failed:
                leaving.append(_leave(group))
            del held, group
        leaving += [_leave(left) for left in [*self._ended, *([self._group] if self._group else [])]]
        give_up_at = time.monotonic() + _LEAVE_S
        for thread in leaving:  # a process that ends while gloo is ending its threads is aborted; one that hangs is not
            thread.join(max(0.0, give_up_at - time.monotonic()))

    def _send_or_fail(self, held: _Held, group: _Group) -> bool:
        """Whether it failed. The members say so themselves, and the pool tells them again; here it is only said why."""
        began = time.monotonic()
        try:
            self._send(held, group, began + self._timeout_s)
        except (RuntimeError, WeightsError) as error:  # torch's own errors are RuntimeErrors
            log.warning(
                "the broadcast of version %d to %d servers failed after %.1f s: %s",
                held.version,
                len(group.members),
                time.monotonic() - began,
                str(error).splitlines()[0],
            )
            return True
        log.debug("version %d was broadcast in %.3f s", held.version, time.monotonic() - began)
        return False

    def _send(self, held: _Held, group: _Group, deadline: float) -> None:
        with waiting(f"{len(group.members)} servers to take version {held.version}", self._timeout_s):
            if group.processes is None:
                if self._backend == "gloo":  # each rank leaves its address; who waits inside gloo cannot be stopped
                    self._until(lambda: self._come(group) >= group.size - 1, deadline, lambda: self._missing(group))
                group.processes = self._join(group, deadline)
            options = BroadcastOptions()
            options.timeout = timedelta(seconds=self._timeout_s)
            options.rootRank = options.rootTensor = 0
            options.asyncOp = True
            flying: tuple[Any, torch.Tensor] | None = None
            for number, bucket in enumerate(held.buckets):
                ready = self._staged(bucket)  # while the last one flies
                if flying:
                    self._arrive(flying[0], deadline, number - 1)
                group.flying = self._begin(group, ready, options, deadline)
                flying = group.flying, ready
            if flying:
                self._arrive(flying[0], deadline, len(held.buckets) - 1)

    def _come(self, group: _Group) -> int:
        """Engine ranks that have come into a gloo group."""
        assert group.store is not None
        return sum(key.startswith(f"{group.name}/") for key in group.store.list_keys())

    def _missing(self, group: _Group) -> str:
        return f"{group.size - 1 - self._come(group)} of {group.size - 1} engine ranks did not come into the group"

    def _join(self, group: _Group, deadline: float) -> Any:
        """This end of the process group; returns when all have come."""
        assert group.store is not None
        store = _prefixed(group.store, group.name, "cuda" if self._backend == "nccl" else "cpu")
        if self._backend == "nccl":
            from torch._C._distributed_c10d import ProcessGroupNCCL  # only CUDA builds have it

            nccl = ProcessGroupNCCL.Options()
            nccl._timeout = timedelta(seconds=_SPARE * self._timeout_s)
            return ProcessGroupNCCL(store, 0, group.size, nccl)
        gloo = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in its stubs
        gloo._devices = [ProcessGroupGloo.create_device(hostname=self._host)]
        gloo._timeout = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        gloo._threads = 2
        return ProcessGroupGloo(store, 0, group.size, gloo)

    def _begin(self, group: _Group, ready: torch.Tensor, options: BroadcastOptions, deadline: float) -> Any:
        """The operation, begun. NCCL connects with the first one, and waits without a limit for members that never
        come: in a thread of its own, which is left behind then."""
        if self._backend == "gloo" or group.flying is not None:
            return group.processes.broadcast([ready], options)
        begun: Future[Any] = Future()

        def connect() -> None:
            try:
                torch.cuda.set_device(self._device)
                begun.set_result(group.processes.broadcast([ready], options))
            except BaseException as error:  # raised again by `result`
                begun.set_exception(error)

        threading.Thread(target=connect, name=f"into {group.name}", daemon=True).start()
        self._until(begun.done, deadline, lambda: "not all engine ranks came into the group")
        return begun.result()

    def _staged(self, bucket: torch.Tensor) -> torch.Tensor:
        """The bucket where the backend takes it from."""
        if self._backend == "gloo":
            return bucket
        with torch.cuda.stream(self._stream):
            staged = bucket.to(self._device, non_blocking=True)
        self._stream.synchronize()
        return staged

    def _arrive(self, work: Any, deadline: float, number: int) -> None:
        self._until(work.is_completed, deadline, lambda: f"bucket {number} was not taken by all")
        work.wait()  # raises what went wrong

    def _until(self, done: Callable[[], bool], deadline: float, what: Callable[[], str]) -> None:
        while not done():
            if self._closing:
                raise WeightsError("the trainer ends")
            if self._given_up:
                raise WeightsError("a member has left, or said that it takes no part")
            if time.monotonic() > deadline:
                raise WeightsError(f"{what()} within {self._timeout_s:.0f} s (rollout.swap_timeout_s)")
            time.sleep(_POLL_S)


def address(config: Config) -> str:
    """The host by which the servers reach the trainer.

    Raises:
        ConfigError: `publish.address` has to say, or what it says is no address of this host.
    """
    host = config.publish.address or urlsplit(config.stream.address).hostname or ""
    if host in ("", "*", "0.0.0.0", "::"):
        raise ConfigError(
            f"publish.transport is broadcast and stream.address is {config.stream.address}, on every interface: "
            "set publish.address to the name or address by which the rollout servers reach this host"
        )
    try:
        socket.create_server((host, 0), family=_family(host)).close()
    except OSError as error:
        raise ConfigError(
            f"{host} is no address of this host ({error}): set publish.address to the one by which the rollout servers "
            "reach it"
        ) from None
    return host


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


def plan(weights: Weights, bucket_bytes: int) -> list[Bucket]:
    """Which tensors travel together: in their order, of one dtype, so many bytes at most; a larger one goes alone."""
    buckets: list[Bucket] = []
    size = 0
    for name, tensor in weights.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if not buckets or size + tensor.nbytes > bucket_bytes or buckets[-1].dtypes[-1] != dtype:
            buckets.append(Bucket([], [], []))
            size = 0
        bucket = buckets[-1]
        bucket.names.append(name)
        bucket.dtypes.append(dtype)
        bucket.shapes.append(list(tensor.shape))
        size += tensor.nbytes
    return buckets


def _joined(tensors: Sequence[torch.Tensor], pinned: bool) -> torch.Tensor:
    """The bytes of tensors, one after the other, [bytes] uint8."""
    parts = [bytes_of(tensor) for tensor in tensors]
    whole = torch.empty(sum(len(part) for part in parts), dtype=torch.uint8, pin_memory=pinned)
    torch.cat(parts, out=whole)
    return whole


def _prefixed(store: TCPStore, name: str, device: str) -> PrefixStore:
    """The part of a store that a process group of this name uses, as `init_custom_process_group` (the first prefix) and
    torch's `_new_process_group_helper` (the others) nest them."""
    return PrefixStore(f"{device}/", PrefixStore(f"{name}/", PrefixStore(name, store)))


def _leave(group: _Group) -> threading.Thread:
    """Leave a group in a thread of its own: the end of one whose operation hangs waits for that operation's timeout."""
    thread = threading.Thread(target=group.end, name=f"end of {group.name}", daemon=True)
    thread.start()
    return thread
