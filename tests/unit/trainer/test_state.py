"""The stream's part of a checkpoint: groups come back as they were, and no number in the file is believed unchecked."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncppo.errors import ResumeError
from asyncppo.messages import Codec
from tests.stream_maker import a_group
from trainer.stream.ledger import BufferedState, LedgerState
from trainer.stream.state import GROUPS_FILE, HeldGroup, StreamState

pytestmark = pytest.mark.unit

LARGE = 1 << 20


def a_state(count: int = 3) -> StreamState:
    buffered = [
        BufferedState(position=2 * n, epoch=0, prompt_id=f"p{n}", oldest_version=0, uses=0) for n in range(count)
    ]
    ledger = LedgerState(next_position=9, unconsumed=[], admitted=3, consumed=0, dropped={}, buffered=buffered)
    return StreamState(ledger, [HeldGroup(position=2 * n, used_at=n - 1, group=a_group(n)) for n in range(count)])


def test_groups_come_back_byte_for_byte(tmp_path: Path) -> None:
    state = a_state()
    state.write(tmp_path / "stream")
    read = StreamState.read(state.ledger, tmp_path / "stream", LARGE)
    assert [(held.position, held.used_at) for held in read.held] == [(0, -1), (2, 0), (4, 1)]
    for ours, theirs in zip(state.held, read.held, strict=True):
        frames = [b"".join(bytes(frame) for frame in Codec(HeldGroup).encode(held)) for held in (ours, theirs)]
        assert frames[0] == frames[1]
        assert np.array_equal(theirs.group.behaviour_logprobs, ours.group.behaviour_logprobs)


def test_no_groups_are_an_empty_file(tmp_path: Path) -> None:
    state = a_state(0)
    state.write(tmp_path / "stream")
    assert StreamState.read(state.ledger, tmp_path / "stream", LARGE).held == []


def test_other_groups_than_the_ledgers_are_refused(tmp_path: Path) -> None:
    a_state(2).write(tmp_path / "stream")
    with pytest.raises(ResumeError, match="expected the 3 groups that the ledger says were buffered, found 2"):
        StreamState.read(a_state(3).ledger, tmp_path / "stream", LARGE)
    with pytest.raises(ResumeError, match=r"groups\.bin: the buffered groups cannot be read"):
        StreamState.read(a_state(3).ledger, tmp_path / "nowhere", LARGE)


def test_a_group_beyond_the_limit_of_a_message_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / GROUPS_FILE
    path.write_bytes(struct.pack("<II", 1, 1 << 31) + b"x")
    with pytest.raises(ResumeError, match=r"a group of 2147483648 bytes at byte 8: 1 are left"):
        StreamState.read(a_state(1).ledger, tmp_path, LARGE)
    path.write_bytes(struct.pack("<I", 1 << 30))
    with pytest.raises(ResumeError, match="expected 1 to 32 frames, found 1073741824"):
        StreamState.read(a_state(1).ledger, tmp_path, LARGE)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_says_the_same(tmp_path: Path, data: st.DataObject) -> None:
    state = a_state(2)
    directory = tmp_path / "stream"
    if not directory.exists():
        state.write(directory)
        (tmp_path / "whole").write_bytes((directory / GROUPS_FILE).read_bytes())
    damaged = bytearray((tmp_path / "whole").read_bytes())
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    else:
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    (directory / GROUPS_FILE).write_bytes(damaged)
    try:
        held = StreamState.read(state.ledger, directory, LARGE).held
    except ResumeError:
        return
    assert [each.position for each in held] == [0, 2]  # the manifest's checksum tells what changed in an array
