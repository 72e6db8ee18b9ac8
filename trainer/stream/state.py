"""What a checkpoint keeps of the stream: the ledger (in trainer.json) and the buffered groups, whole (in `stream/`).

    stream/groups.bin    for each group: the number of its frames, their sizes (all uint32, little endian), the frames

The frames are the messages' own (asyncppo/messages.py), so nothing is pickled and every size is bounded before it is
believed. Which critic learns from which response is not kept: it is drawn from (seed, prompt id, epoch) again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from asyncppo.errors import MessageError, ResumeError
from asyncppo.messages import MAX_FRAMES, MAX_HEADER_BYTES, Codec, Frames, Group, Message
from trainer.stream.ledger import LedgerState

GROUPS_FILE = "groups.bin"
_NUMBER = struct.Struct("<I")


class HeldGroup(Message, frozen=True, kw_only=True):
    """A group that was buffered."""

    position: int
    used_at: int
    group: Group


@dataclass(frozen=True)
class StreamState:
    """The stream at one moment, between two batches."""

    ledger: LedgerState
    held: list[HeldGroup] = field(default_factory=list)
    """The groups of `ledger.buffered`, in its order."""

    def write(self, directory: Path) -> None:
        """Write the groups into a directory that this makes; the ledger travels in the trainer's own state."""
        directory.mkdir(parents=True)
        codec = Codec(HeldGroup)
        with (directory / GROUPS_FILE).open("wb") as file:
            for held in self.held:
                frames = codec.encode(held)
                file.write(b"".join(_NUMBER.pack(number) for number in (len(frames), *map(len, frames))))
                for frame in frames:
                    file.write(frame)

    @classmethod
    def read(cls, ledger: LedgerState, directory: Path, max_bytes: int) -> StreamState:
        """What `write` wrote, of this ledger.

        Args:
            ledger: of the same checkpoint.
            directory: of the groups.
            max_bytes: a larger group is refused, as it is on the wire (`stream.max_message_mb`).

        Raises:
            ResumeError: the file is not there, is damaged, or holds other groups than the ledger says.
        """
        path = directory / GROUPS_FILE
        codec = Codec(HeldGroup, max_bytes + MAX_HEADER_BYTES)
        try:
            held = [codec.decode(frames) for frames in _frames(path.read_bytes(), max_bytes + MAX_HEADER_BYTES)]
        except (OSError, MessageError) as error:
            raise ResumeError(f"{path}: the buffered groups cannot be read: {error}") from error
        found, expected = [group.position for group in held], [group.position for group in ledger.buffered]
        if found != expected:
            raise ResumeError(
                f"{path}: expected the {len(expected)} groups that the ledger says were buffered, found {len(found)}, "
                "or others: the checkpoint is not whole"
            )
        return cls(ledger, held)


def _frames(data: bytes, max_bytes: int) -> Iterator[Frames]:
    """The frames of each message in `data`.

    Raises:
        MessageError: a number of frames, or a size, that cannot be.
    """
    view, place = memoryview(data), 0

    def numbers(count: int) -> list[int]:
        nonlocal place
        if len(view) - place < count * _NUMBER.size:
            raise MessageError(f"{len(view)} bytes, and the sizes of frames are cut off at {place}")
        found = [_NUMBER.unpack_from(view, place + index * _NUMBER.size)[0] for index in range(count)]
        place += count * _NUMBER.size
        return found

    while place < len(view):
        (count,) = numbers(1)
        if not 1 <= count <= MAX_FRAMES:
            raise MessageError(f"expected 1 to {MAX_FRAMES} frames, found {count} at byte {place}")
        sizes = numbers(count)
        if sum(sizes) > min(max_bytes, len(view) - place):
            raise MessageError(
                f"a group of {sum(sizes)} bytes at byte {place}: {len(view) - place} are left, at most {max_bytes} are "
                "allowed (stream.max_message_mb)"
            )
        frames: Frames = []
        for size in sizes:
            frames.append(view[place : place + size])
            place += size
        yield frames
