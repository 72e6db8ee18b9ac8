"""The outbox: nothing finished is lost while the trainer is away, by memory, disk or a new process of the same name."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from asyncppo.messages import Group
from rollout_server.outbox import Outbox, size_of
from tests.stream_maker import a_group

pytestmark = pytest.mark.unit

ONE = size_of(a_group())


def nobody_is_there() -> bool:
    return False


def an_outbox(directory: Path, groups: int = 100, window: int = 100) -> Outbox:
    return Outbox(directory / "spill", groups * ONE, window)


def spilled(directory: Path, *leases: int, groups: int = 100) -> Outbox:
    outbox = an_outbox(directory, groups)
    for lease in leases:
        outbox.add(a_group(lease))
    asyncio.run(outbox.spill(nobody_is_there))
    return outbox


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "spill").iterdir())


def sent(outbox: Outbox, again_after_s: float = 60.0) -> list[int]:
    return [group.lease for group in outbox.to_send(again_after_s)]


def test_groups_go_out_once_in_their_order_and_again_when_no_ack_comes(tmp_path: Path) -> None:
    outbox = an_outbox(tmp_path)
    for lease in (3, 1, 2):
        outbox.add(a_group(lease))
    assert sent(outbox) == [3, 1, 2]
    assert sent(outbox) == []
    assert sent(outbox, again_after_s=0.0) == [3, 1, 2]
    assert outbox.forget(1)
    assert not outbox.forget(1)
    outbox.begin_again()
    assert sent(outbox) == [3, 2]


def test_no_more_than_the_window_is_on_its_way(tmp_path: Path) -> None:
    outbox = an_outbox(tmp_path, window=2)
    for lease in range(5):
        outbox.add(a_group(lease))
    assert sent(outbox) == [0, 1]
    outbox.forget(0)
    assert sent(outbox) == [2]
    outbox.begin_again()
    assert sent(outbox) == [1, 2]


def test_what_is_spilled_is_found_by_the_next_process_of_that_name_exactly_as_it_was(tmp_path: Path) -> None:
    spilled(tmp_path, 5, 6)
    assert files(tmp_path) == ["5.group", "6.group"]
    again = an_outbox(tmp_path)
    assert len(again) == 2
    (group, _) = list(again.to_send(60.0))
    for name in Group.__struct_fields__:
        ours, theirs = getattr(a_group(5), name), getattr(group, name)
        assert np.array_equal(ours, theirs) if isinstance(ours, np.ndarray) else ours == theirs, name
    again.forget(5)
    assert files(tmp_path) == ["6.group"]
    again.forget(6)
    again.close()
    assert not (tmp_path / "spill").exists()


def test_a_group_that_is_on_disk_is_not_in_memory_too(tmp_path: Path) -> None:
    outbox = spilled(tmp_path, 5)
    assert outbox._kept[5].group is None
    assert sent(outbox) == [5]
    assert outbox._kept[5].group is None


def test_it_is_full_at_its_limit_and_no_more_than_that_goes_to_disk(tmp_path: Path) -> None:
    outbox = spilled(tmp_path, 1, 2, groups=3)
    assert not outbox.full
    outbox.add(a_group(3))
    outbox.add(a_group(4))
    assert outbox.full
    asyncio.run(outbox.spill(nobody_is_there))
    assert files(tmp_path) == ["1.group", "2.group", "3.group"]
    assert sent(outbox) == [1, 2, 3, 4]  # the last from memory
    outbox.forget(1)
    outbox.forget(2)
    assert not outbox.full


def test_a_disk_that_fails_costs_memory_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "spill").write_text("a file where the directory should be")
    outbox = spilled(tmp_path, 1, 2)
    asyncio.run(outbox.spill(nobody_is_there))
    assert sent(outbox) == [1, 2]
    assert outbox.forget(1)
    assert caplog.text.count("groups stay in memory") == 1
    (tmp_path / "spill").unlink()
    asyncio.run(outbox.spill(nobody_is_there))
    assert files(tmp_path) == ["2.group"]


def test_a_full_disk_leaves_no_half_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    outbox = spilled(tmp_path, 1)
    assert files(tmp_path) == []
    assert "No space left" in caplog.text
    assert sent(outbox) == [1]


@pytest.mark.parametrize("how", ["cut", "one bit", "empty", "another lease"])
def test_a_damaged_file_is_thrown_away_and_said(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    spilled(tmp_path, 1, 2)
    path = tmp_path / "spill" / "1.group"
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    other = (tmp_path / "spill" / "2.group").read_bytes()
    path.write_bytes({"cut": whole[:-7], "one bit": flipped, "empty": b"", "another lease": other}[how])
    outbox = an_outbox(tmp_path)
    assert sent(outbox) == [2]
    assert len(outbox) == 1
    assert files(tmp_path) == ["2.group"]
    assert "1.group is thrown away" in caplog.text


def test_what_a_killed_process_left_half_written_and_what_is_not_ours_is_no_group(tmp_path: Path) -> None:
    spilled(tmp_path, 1)
    (tmp_path / "spill" / "9.partial").write_bytes(b"half")
    (tmp_path / "spill" / "notes.group").write_bytes(b"")
    assert len(an_outbox(tmp_path)) == 1
    assert files(tmp_path) == ["1.group", "notes.group"]


def test_an_ack_while_the_file_is_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        outbox = an_outbox(tmp_path)
        outbox.add(a_group(1))
        write = outbox._write
        monkeypatch.setattr(outbox, "_write", lambda lease, group: (outbox.forget(lease), write(lease, group))[1])
        await outbox.spill(nobody_is_there)
        assert len(outbox) == 0

    asyncio.run(scenario())
    assert files(tmp_path) == []


def test_spilling_ends_between_two_groups_once_a_trainer_is_there(tmp_path: Path) -> None:
    outbox = an_outbox(tmp_path)
    for lease in (1, 2, 3):
        outbox.add(a_group(lease))
    asyncio.run(outbox.spill(lambda: outbox._kept[1].group is None))  # it comes while the first is written
    assert files(tmp_path) == ["1.group"]
