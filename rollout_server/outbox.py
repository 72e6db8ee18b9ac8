"""The outbox: finished groups until the trainer acknowledges them; on disk while the trainer is away.

A group is sent, sent again when no Ack comes, and forgotten at its Ack. At most `window` of them are on their way at
once. While no trainer is there the groups are written to `directory`, one file each, and leave memory: a server process
that ends takes none of them with it, and one that is started again under the same name offers what it finds. Files are
written beside their place and renamed, so each is there whole or not at all; they are not synced, so a host that loses
its power may lose them (a file that is not whole is thrown away, and its prompt leased again like any other's).

A disk that is full or fails costs nothing but memory: the groups stay where they are, and the log says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from asyncppo.errors import MessageError
from asyncppo.messages import Codec, Group

log = logging.getLogger("rollout_server.outbox")

_SUFFIX = ".group"
_PARTIAL = ".partial"


class _File(msgspec.Struct, array_like=True):
    """What a file holds."""

    checksum: int
    """CRC-32 of the frames, one after the other."""
    frames: list[bytes]


@dataclass(slots=True)
class _Kept:
    """One group: in memory, or in its file."""

    size: int
    group: Group | None
    sent: float | None = None
    """When it was sent last; None where it waits for its turn."""


class Outbox:
    """Groups by lease, in the order in which they were finished. Used by one event loop.

    Args:
        directory: this server's own; made when the first group is written.
        limit: bytes of groups that may wait before `full` is true.
        window: groups that are on their way at once.
    """

    def __init__(self, directory: Path, limit: int, window: int) -> None:
        self._directory = directory
        self._limit = limit
        self._window = window
        self._codec = Codec(Group, max_bytes=1 << 62)
        self._kept: dict[int, _Kept] = {}
        self._bytes = 0
        self._on_their_way = 0
        self._disk_fails = False
        for path in self._files():
            self._kept[int(path.name.removesuffix(_SUFFIX))] = _Kept(path.stat().st_size, None)
        self._bytes = sum(kept.size for kept in self._kept.values())
        if self._kept:
            log.info("%d groups of an earlier process are in %s: the trainer will be asked", len(self), directory)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def full(self) -> bool:
        """Whether no more groups should be made before the trainer has taken some."""
        return self._bytes >= self._limit

    def add(self, group: Group) -> None:
        """Keep a finished group until `forget`."""
        self.forget(group.lease)
        size = size_of(group)
        self._kept[group.lease] = _Kept(size, group)
        self._bytes += size

    def forget(self, lease: int) -> bool:
        """The trainer holds this group, or does not want it. Whether it was here."""
        kept = self._kept.pop(lease, None)
        if kept is None:
            return False
        self._bytes -= kept.size
        self._on_their_way -= kept.sent is not None
        if kept.group is None:
            self._remove(self._path(lease))
        return True

    def begin_again(self) -> None:
        """A trainer has come: whatever was sent before has to be sent once more."""
        for kept in self._kept.values():
            kept.sent = None
        self._on_their_way = 0

    def close(self) -> None:
        """Leave no empty directory."""
        with contextlib.suppress(OSError):  # it is not there, or holds groups
            self._directory.rmdir()

    async def spill(self, trainer_is_there: Callable[[], bool]) -> None:
        """Nobody takes groups now: what is in memory goes to disk, as far as there is room and the disk does it.

        Between two groups it ends if `trainer_is_there`.
        """
        on_disk = sum(kept.size for kept in self._kept.values() if kept.group is None)
        for lease, kept in list(self._kept.items()):
            if trainer_is_there():
                return
            if kept.group is None or self._kept.get(lease) is not kept:
                continue
            if on_disk + kept.size > self._limit or not await asyncio.to_thread(self._write, lease, kept.group):
                return
            if self._kept.get(lease) is kept:
                kept.group = None
                on_disk += kept.size
            else:  # it was acknowledged meanwhile
                self._remove(self._path(lease))

    def to_send(self, again_after_s: float) -> Iterator[Group]:
        """Groups whose turn it is: never sent, while the window has room, or sent longer ago than this. They count as
        sent when they are handed out."""
        now = time.monotonic()
        for lease, kept in list(self._kept.items()):
            if self._kept.get(lease) is not kept:
                continue
            if kept.sent is None:
                if self._on_their_way >= self._window:
                    continue
            elif now - kept.sent < again_after_s:
                continue
            group = kept.group or self._read(lease)
            if group is None:
                self.forget(lease)
                continue
            self._on_their_way += kept.sent is None
            kept.sent = now
            yield group

    def _write(self, lease: int, group: Group) -> bool:
        frames = [bytes(frame) for frame in self._codec.encode(group)]
        path = self._path(lease)
        partial = path.with_suffix(_PARTIAL)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(msgspec.msgpack.encode(_File(_checksum(frames), frames)))
            os.replace(partial, path)
        except OSError as error:
            if not self._disk_fails:
                log.warning("groups stay in memory, %s cannot be written: %s", path, error)
            self._disk_fails = True
            self._remove(partial)
            return False
        self._disk_fails = False
        return True

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed, the next process of this name will find it: %s", path, error)

    def _read(self, lease: int) -> Group | None:
        path = self._path(lease)
        try:
            file = msgspec.msgpack.decode(path.read_bytes(), type=_File)
            if _checksum(file.frames) != file.checksum:
                raise MessageError("its checksum is another")
            group = self._codec.decode(file.frames)
            if group.lease != lease:
                raise MessageError(f"it is of lease {group.lease}")
        except (OSError, msgspec.DecodeError, MessageError) as error:
            log.warning("%s is thrown away, its prompt will be leased again: %s", path, error)
            return None
        assert isinstance(group, Group)
        return group

    def _files(self) -> Iterator[Path]:
        try:
            for path in sorted(self._directory.glob(f"*{_PARTIAL}")):  # of a process that was killed meanwhile
                path.unlink()
            for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
                if path.name.removesuffix(_SUFFIX).isdecimal():
                    yield path
        except OSError as error:
            log.warning("%s cannot be read, what it holds is left there: %s", self._directory, error)

    def _path(self, lease: int) -> Path:
        return self._directory / f"{lease}{_SUFFIX}"


def size_of(group: Group) -> int:
    """Bytes of a group's arrays, about what it takes on the wire, in memory and on disk."""
    arrays = (
        group.response_ids,
        group.lengths,
        group.behaviour_logprobs,
        group.span_versions,
        group.span_lengths,
        group.span_counts,
        group.rewards,
        group.step_rewards,
        group.truncated,
        group.reward_errors,
    )
    return sum(array.nbytes for array in arrays)


def _checksum(frames: list[bytes]) -> int:
    checksum = 0
    for frame in frames:
        checksum = zlib.crc32(frame, checksum)
    return checksum
