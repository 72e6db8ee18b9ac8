"""Claims about checkpoints: one is whole or does not count, and the last good one outlives a killed save."""

import contextlib
import errno
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import xxhash

from asyncppo import checkpoints
from asyncppo.checkpoints import read_manifest
from asyncppo.config import Config, load
from asyncppo.errors import CheckpointError, ResumeError, StallError
from asyncppo.metrics import EVENTS_FILE, Journal, read
from tests.model_maker import a_batch, a_config
from trainer import checkpoint as module
from trainer.checkpoint import Checkpoints, GuardState, TrainerState, choose
from trainer.guard import Brake, SkippedSteps
from trainer.model.states import Fragment, Progress, write
from trainer.stream.ledger import Ledger
from trainer.stream.prompts import Prompt, Prompts
from trainer.targets import TargetBuilder

pytestmark = pytest.mark.unit

PARTS = ("actor", "critic_0", "critic_1")


def a_state(config: Config, version: int) -> TrainerState:
    return TrainerState(
        policy_version=version,
        critics=config.algorithm.critics,
        actor_path=config.actor.path,
        critic_paths=config.critic_paths,
        critic_errors=[0.1, 1 / 3],
        ledger=a_ledger().state(),
    )


def a_ledger() -> Ledger:
    """Three prompts leased, one of them lost with its server."""
    prompts = Prompts([Prompt(f"p{n}", np.array([n], dtype=np.int32), "1") for n in range(4)], seed=0, shuffle=True)
    ledger = Ledger(prompts, max_staleness=2)
    leases = [ledger.lease(b"server", 0, 0.0).lease for _ in range(3)]
    ledger.drop(leases[1], "server left")
    return ledger


def writer(version: int, parts: Sequence[str] = PARTS, content: str = "") -> Callable[[Path], None]:
    def write_parts(directory: Path) -> None:
        for part in parts:
            (directory / part).mkdir()
            (directory / part / "weights").write_text(content or f"{part} {version}")

    return write_parts


def save(config: Config, version: int, content: str = "", parts: Sequence[str] = PARTS) -> Path:
    return Checkpoints(config).save(a_state(config, version), writer(version, parts, content), first_rank=True)


def root(config: Config) -> Path:
    return config.run_directory / "checkpoints"


def names(config: Config) -> list[str]:
    return sorted(path.name for path in root(config).iterdir())


def events(config: Config, name: str) -> list[dict[str, Any]]:
    return [event for event in read(config.run_directory / EVENTS_FILE) if event["event"] == name]


def test_the_latest_checkpoint_is_what_was_saved(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    save(config, 9)
    path = save(config, 10)
    found = Checkpoints(config).latest()
    assert found == (path, a_state(config, 10))
    assert (path / "critic_1" / "weights").read_text() == "critic_1 10"


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert Checkpoints(a_config(tmp_path)).latest() is None


def test_the_manifest_names_every_file_whoever_wrote_it_with_size_and_checksum(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    path = save(config, 3, parts=[*PARTS, "stream"])
    (path / "stream" / "weights").stat()
    manifest = read_manifest(path)
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert set(manifest.files) == files - {"manifest.json"}
    assert set(manifest.parts) == {*PARTS, "stream"}
    entry = manifest.files["stream/weights"]
    assert (entry.bytes, entry.xxh3) == (8, xxhash.xxh3_128(b"stream 3").hexdigest())
    assert (manifest.policy_version, manifest.run, manifest.actor_path) == (3, "test", config.actor.path)
    assert load(path / "config.yaml") == config


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def damage(kind: str, path: Path) -> None:
    match kind:
        case "a flipped bit of a weight":
            flip(path / "actor" / "weights", 3)
        case "a file that is cut":
            os.truncate(path / "critic_0" / "weights", 4)
        case "a file that is gone":
            (path / "critic_1" / "weights").unlink()
        case "a part that is gone":
            shutil.rmtree(path / "critic_1")
        case "a flipped bit of the counts":
            flip(path / "trainer.json", 40)
        case "no manifest":
            (path / "manifest.json").unlink()
        case "a torn manifest":
            os.truncate(path / "manifest.json", 40)
        case "an empty manifest":
            os.truncate(path / "manifest.json", 0)
        case "an altered manifest":
            text = (path / "manifest.json").read_text()
            (path / "manifest.json").write_text(text.replace('"run": "test"', '"run": "tesu"'))
        case "nothing but its name":
            shutil.rmtree(path)
            path.mkdir()


DAMAGES = {
    "a flipped bit of a weight": "actor/weights differs from its checksum",
    "a file that is cut": "critic_0/weights has 4 bytes instead of 10",
    "a file that is gone": "critic_1/weights is missing",
    "a part that is gone": "critic_1/weights is missing",
    "a flipped bit of the counts": "trainer.json differs from its checksum",
    "no manifest": "manifest.json is missing",
    "a torn manifest": "manifest.json is torn or altered",
    "an empty manifest": "manifest.json is torn or altered",
    "an altered manifest": "manifest.json differs from its own checksum",
    "nothing but its name": "manifest.json is missing",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_put_aside_with_what_is_wrong_and_the_one_before_it_is_used(
    tmp_path: Path, kind: str, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    config = a_config(tmp_path, "run.keep_checkpoints=9")
    good, bad = save(config, 1), save(config, 2)
    damage(kind, bad)
    assert Checkpoints(config, journal).latest() == (good, a_state(config, 1))
    assert names(config) == ["damaged-step_00000002", "step_00000001"]
    (event,) = events(config, "checkpoint_damaged")
    assert DAMAGES[kind] in event["problems"][0]
    assert DAMAGES[kind] in caplog.text
    assert Checkpoints(config).latest() == (good, a_state(config, 1))
    save(config, 2)  # the version is made again
    damage(kind, root(config) / "step_00000002")
    assert Checkpoints(config).latest() == (good, a_state(config, 1))
    assert names(config) == ["damaged-step_00000002", "damaged-step_00000002-2", "step_00000001"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_begin_anew(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    for version in (1, 2):
        damage("a torn manifest", save(config, version))
    for _ in range(2):  # the next start says so too
        with pytest.raises(ResumeError, match=r"no checkpoint is whole.*run\.name"):
            Checkpoints(config).latest()
    shutil.rmtree(root(config))  # as the message says
    assert Checkpoints(config).latest() is None


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config(tmp_path)
    save(config, 1)

    def broken(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(checkpoints, "checksum", broken)
    with pytest.raises(ResumeError, match="Input/output error"):
        Checkpoints(config).latest()
    assert names(config) == ["step_00000001"]


def test_a_checkpoint_of_an_earlier_version_of_asyncppo_is_refused_by_that_name(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    path = root(config) / "step_00000004"
    (path / "actor").mkdir(parents=True)
    (path / "trainer.json").write_text('{"policy_version": 4, "critics": 2, "ledger": {}}')
    with pytest.raises(ResumeError, match="earlier version of asyncppo"):
        Checkpoints(config).latest()
    assert names(config) == ["step_00000004"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_the_others_removed(tmp_path: Path, keep: int) -> None:
    config = a_config(tmp_path, f"run.keep_checkpoints={keep}")
    for version in (2, 10, 100, 1000):
        save(config, version)
    assert names(config) == [f"step_{version:08d}" for version in (2, 10, 100, 1000)][-keep:]


def test_multiples_of_keep_every_are_kept_for_good(tmp_path: Path) -> None:
    config = a_config(tmp_path, "run.keep_checkpoints=1", "run.keep_every=20")
    for version in range(10, 80, 10):
        save(config, version)
    assert names(config) == [f"step_{version:08d}" for version in (20, 40, 60, 70)]


def test_a_damaged_newer_one_does_not_count_as_one_of_the_newest(tmp_path: Path) -> None:
    config = a_config(tmp_path, "run.keep_checkpoints=2")
    save(config, 1)
    damage("a file that is cut", save(config, 2))
    save(config, 3)
    assert names(config) == ["step_00000001", "step_00000002", "step_00000003"]


def test_nothing_is_removed_before_the_newer_one_was_read_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config(tmp_path, "run.keep_checkpoints=1")
    save(config, 1)
    flush = checkpoints.flush_to_disk

    def a_disk_that_lies(directory: Path) -> None:
        flush(directory)
        flip(directory / "actor" / "weights", 0)

    monkeypatch.setattr(checkpoints, "flush_to_disk", a_disk_that_lies)
    with pytest.raises(CheckpointError, match=r"read back from the disk.*actor/weights differs"):
        save(config, 2)
    assert names(config) == ["step_00000001"]
    assert Checkpoints(config).latest() == (root(config) / "step_00000001", a_state(config, 1))


def test_those_who_are_told_of_a_whole_checkpoint_still_find_the_one_before_it(tmp_path: Path) -> None:
    config = a_config(tmp_path, "run.keep_checkpoints=1")
    seen: list[tuple[str, int, list[str]]] = []
    store = Checkpoints(config, on_whole=lambda path, version: seen.append((path.name, version, names(config))))
    for version in (1, 2):
        store.save(a_state(config, version), writer(version), first_rank=True)
    assert seen[1] == ("step_00000002", 2, ["step_00000001", "step_00000002"])
    assert names(config) == ["step_00000002"]


def test_saving_a_version_again_replaces_it(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    save(config, 7, content="first")
    path = save(config, 7, content="second")
    assert names(config) == ["step_00000007"]
    assert (path / "actor" / "weights").read_text() == "second"


def test_a_version_that_was_being_replaced_when_the_process_died_comes_back(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    path = save(config, 7)
    path.rename(path.with_name(".replaced-step_00000007"))
    assert Checkpoints(config).latest() == (path, a_state(config, 7))
    assert names(config) == ["step_00000007"]


def test_what_a_killed_save_left_is_removed_at_the_start(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    path = save(config, 7)
    path.rename(path.with_name(".partial-00000008"))
    assert Checkpoints(config).latest() is None
    assert names(config) == []


def test_a_save_without_one_of_its_parts_never_becomes_a_checkpoint(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    with pytest.raises(CheckpointError, match="nobody has written critic_1"):
        save(config, 2, parts=PARTS[:2])
    assert names(config) == []


def test_the_next_save_waits_for_the_one_before_it_and_training_for_neither(tmp_path: Path, journal: Journal) -> None:
    config = a_config(tmp_path)
    store = Checkpoints(config, journal)
    go_on = threading.Event()
    flush = checkpoints.flush_to_disk

    def slow(directory: Path) -> None:
        assert go_on.wait(20)
        flush(directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "flush_to_disk", slow)
        store.begin(a_state(config, 1), writer(1), first_rank=True)  # comes back although the disk does not
        store.report()
        assert events(config, "checkpoint_saved") == []
        second = threading.Thread(target=store.begin, args=(a_state(config, 2), writer(2)), kwargs={"first_rank": True})
        second.start()
        time.sleep(0.2)
        assert names(config) == [".partial-00000001"]  # the second one has not begun
        go_on.set()
        second.join(20)
        store.wait()
    assert names(config) == ["step_00000001", "step_00000002"]
    assert [event["policy_version"] for event in events(config, "checkpoint_saved")] == [1, 2]
    assert events(config, "checkpoint_saved")[0]["bytes"] == read_manifest(root(config) / "step_00000001").bytes


def test_a_disk_that_never_answers_is_a_stall_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = a_config(tmp_path, "guard.stall_s=0.2")
    store, never = Checkpoints(config), threading.Event()
    monkeypatch.setattr(checkpoints, "flush_to_disk", lambda directory: never.wait(20))
    store.begin(a_state(config, 1), writer(1), first_rank=True)
    with pytest.raises(StallError, match=r"checkpoint to reach the disk \(guard.stall_s\)"):
        store.begin(a_state(config, 2), writer(2), first_rank=True)
    never.set()


@pytest.mark.parametrize("where", ["write", "flush", "rename"])
def test_a_write_that_fails_is_told_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, journal: Journal
) -> None:
    config = a_config(tmp_path, "run.keep_checkpoints=1")
    good = save(config, 1)
    store = Checkpoints(config, journal)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write: Callable[[Path], None] = full if where == "write" else writer(2)
    with monkeypatch.context() as patch:
        if where == "flush":
            patch.setattr(checkpoints, "flush_to_disk", full)
        if where == "rename":
            patch.setattr(os, "replace", full)
        store.begin(a_state(config, 2), write, first_rank=True)
        assert not store.settled()  # and the run would go on
    (event,) = events(config, "checkpoint_failed")
    assert (event["policy_version"], "No space left" in event["reason"]) == (2, True)
    with pytest.raises(CheckpointError, match="No space left"):
        store.wait()  # at the end of the run
    assert names(config) == ["step_00000001"]
    assert Checkpoints(config).latest() == (good, a_state(config, 1))
    store.save(a_state(config, 3), writer(3), first_rank=True)
    assert names(config) == ["step_00000003"]


def test_a_save_that_would_fill_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = a_config(tmp_path)
    size = read_manifest(save(config, 1)).bytes
    for free, fits in ((size - 1, False), (size, True)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        seen: list[Path] = []
        store = Checkpoints(config)
        store.begin(a_state(config, 2), lambda to, seen=seen: (seen.append(to), writer(2)(to))[0], first_rank=True)
        assert store.settled() == fits
        assert len(seen) == fits
    assert names(config) == ["step_00000001", "step_00000002"]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(a_config(tmp_path).run_directory)
    yield journal
    journal.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_on_a_disk_that_is_really_full_the_last_good_checkpoint_stays_and_the_next_one_that_fits_is_saved(
    tmp_path: Path, small_disk: Path
) -> None:
    config = a_config(tmp_path, f"run.directory={small_disk}", "run.keep_checkpoints=1")
    good = save(config, 1, content="x" * 100_000)  # 300 kB of 1024

    def tensors(count: int) -> Callable[[Path], None]:
        def write_parts(directory: Path) -> None:
            for part in PARTS:
                values = Fragment("weight", "w", 0, torch.ones(count))
                write(directory / part, [values], {"w": (count,)}, Progress(0, 0), torch.device("cpu"))

        return write_parts

    store = Checkpoints(config)
    store.begin(a_state(config, 2), tensors(100_000), first_rank=True)  # 1.2 MB: the second part does not fit
    assert not store.settled()
    assert names(config) == ["step_00000001"]
    assert Checkpoints(config).latest() == (good, a_state(config, 1))
    store.save(a_state(config, 3), tensors(20_000), first_rank=True)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:  # until there is no space left
            file.write(bytes(4096))
    store.begin(a_state(config, 4), tensors(20_000), first_rank=True)
    assert not store.settled()
    assert names(config) == ["step_00000003"]
    assert not checkpoints.problems(root(config) / "step_00000003")
    filler.unlink()
    store.save(a_state(config, 5), tensors(20_000), first_rank=True)
    assert names(config) == ["step_00000005"]


class Ranks:
    """`agree` of two threads, as `World.agree` of two processes."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=20)
        self._said = [True, True]

    def of(self, rank: int) -> Callable[[bool], bool]:
        def agree(good: bool) -> bool:
            self._said[rank] = good
            self._barrier.wait()
            both = all(self._said)
            self._barrier.wait()
            return both

        return agree


@pytest.mark.parametrize("failing", [0, 1, None])
def test_ranks_agree_on_whether_a_save_has_succeeded_and_none_hangs(tmp_path: Path, failing: int | None) -> None:
    config, ranks = a_config(tmp_path), Ranks()
    stores = [Checkpoints(config, agree=ranks.of(rank)) for rank in range(2)]
    answers: dict[int, list[bool]] = {0: [], 1: []}

    def run(rank: int) -> None:
        def fails(directory: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        for version, bad in ((1, failing), (2, None)):
            own = writer(version) if rank == 0 else lambda directory: None
            write_parts = fails if bad == rank else own
            stores[rank].begin(a_state(config, version), write_parts, first_rank=rank == 0)
            answers[rank].append(stores[rank].settled())

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert answers == {0: [failing is None, True], 1: [failing is None, True]}
    assert names(config) == [f"step_{version:08d}" for version in ((1, 2) if failing is None else (2,))]


def test_all_ranks_go_on_from_what_rank_0_has_chosen(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    save(config, 1)
    said: list[str] = []

    def share(text: str) -> str:
        said.append(text)
        return said[0]

    first = choose(Checkpoints(config), share)
    save(config, 2)  # that the file system shows it a newer one by now does not matter to the other rank
    assert choose(None, share) == first == (root(config) / "step_00000001", a_state(config, 1))
    said.clear()
    for path in root(config).iterdir():
        damage("no manifest", path)
    for found in (Checkpoints(config), None):
        with pytest.raises(ResumeError, match="no checkpoint is whole"):
            choose(found, share)
    said.clear()
    shutil.rmtree(root(config))
    assert choose(Checkpoints(config), share) is None
    assert choose(None, share) is None


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.critics=1",
        "actor.path=another/actor",
        "critic.path=another/critic",
        "critic.each=[{}, {path: another/critic}]",
    ],
)
def test_a_checkpoint_of_other_models_is_refused_with_what_differs(tmp_path: Path, override: str) -> None:
    path = save(a_config(tmp_path), 3)
    with pytest.raises(ResumeError) as caught:
        Checkpoints(a_config(tmp_path, override)).latest()
    message = str(caught.value)
    assert message.startswith(str(path))
    assert ("config says 1" if "critics=1" in override else "another/") in message
    assert "\n" not in message


def test_the_guards_counts_come_back(tmp_path: Path) -> None:
    config = a_config(tmp_path, "algorithm.utd=2", "guard.recover_after=3", "guard.min_ess=0.5")
    brake = Brake(config, None)
    brake.observe(0, 0.1, math.nan)
    brake.observe(1, 0.9, math.nan)
    brake.observe(2, 0.9, math.nan)
    counts = GuardState(brake_level=brake.level, good_steps=brake.good_steps, skipped=5, skipped_in_a_row=2)
    state = msgspec.structs.replace(a_state(config, 3), guard=counts)
    Checkpoints(config).save(state, writer(3), first_rank=True)
    found = Checkpoints(config).latest()
    assert found
    resumed = Brake(config, None, found[1].guard)
    assert (resumed.level, resumed.passes) == (1, 1)
    resumed.observe(3, 0.9, math.nan)  # the third good one
    assert (resumed.level, resumed.passes) == (0, 2)
    skipped = SkippedSteps(config, None, found[1].guard)
    assert (skipped.count, skipped.in_a_row) == (5, 2)


KILLED = """
import os, sys
from asyncppo.config import load
from trainer.checkpoint import Checkpoints, TrainerState
from trainer.stream.ledger import Ledger
from trainer.stream.prompts import Prompts

config = load(sys.argv[1])

def write_parts(directory):
    (directory / "actor").mkdir()
    (directory / "actor" / "weights").write_text("half")
    os._exit(9)

state = TrainerState(
    policy_version=int(sys.argv[2]), critics=2, actor_path=config.actor.path, critic_paths=config.critic_paths,
    critic_errors=[], ledger=Ledger(Prompts([], seed=0, shuffle=False), max_staleness=0).state(),
)
Checkpoints(config).save(state, write_parts, first_rank=True)
"""


@pytest.mark.parametrize("version", [6, 5])
def test_a_process_killed_in_the_middle_of_a_save_leaves_the_last_good_one(tmp_path: Path, version: int) -> None:
    config = a_config(tmp_path, "run.keep_checkpoints=1")
    good = save(config, 5)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), str(version)]
    killed = subprocess.run(command, capture_output=True, timeout=60, cwd=Path(__file__).parents[3])
    assert killed.returncode == 9, killed.stderr.decode()
    assert Checkpoints(config).latest() == (good, a_state(config, 5))
    assert (good / "actor" / "weights").read_text() == "actor 5"
    save(config, 6)  # and what it left is in nobody's way
    assert names(config) == ["step_00000006"]


def test_running_errors_of_the_critics_come_back_to_the_last_bit(tmp_path: Path) -> None:
    config = a_config(tmp_path, "algorithm.aggregation=confidence")
    batch = a_batch()
    builder = TargetBuilder(config)
    builder.build(batch, torch.stack((torch.linspace(0, 1, 23), torch.linspace(1, -1, 23))), None)
    state = msgspec.structs.replace(a_state(config, 4), critic_errors=builder.errors)
    Checkpoints(config).save(state, writer(4), first_rank=True)
    found = Checkpoints(config).latest()
    assert found
    assert len(builder.errors) == 2
    assert TargetBuilder(config, found[1].critic_errors).errors == builder.errors


# --- whatever goes wrong beside training -----------------------------------------------------------------------------


def test_any_error_of_the_writer_is_a_save_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = a_config(tmp_path)

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(checkpoints, "flush_to_disk", no_memory)
    with pytest.raises(CheckpointError, match="MemoryError"):
        save(config, 1)
    assert names(config) == []


def test_an_old_checkpoint_that_cannot_be_read_stops_no_later_save_and_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config(tmp_path, "run.keep_checkpoints=1")
    old = save(config, 1)
    real = checkpoints.problems

    def away(path: Path, **arguments: bool) -> list[str]:
        if path == old:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, **arguments)

    monkeypatch.setattr(checkpoints, "problems", away)
    save(config, 2)
    save(config, 3)
    assert names(config) == ["step_00000001", "step_00000003"]


def test_a_disk_that_hangs_keeps_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = a_config(tmp_path)
    hangs = threading.Event()
    monkeypatch.setattr(checkpoints, "flush_to_disk", lambda directory: hangs.wait(30))
    monkeypatch.setattr(module, "_LAST_S", 0.1)
    saves = Checkpoints(config)
    saves.begin(a_state(config, 1), writer(1), first_rank=True)
    (thread,) = [each for each in threading.enumerate() if each.name == "checkpoint writer"]
    assert thread.daemon
    saves.close()  # returns although the writer has not
    assert thread.is_alive()
    hangs.set()
    thread.join(10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_becomes_of_older_ones_a_checkpoint_that_is_whole_is_a_success(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config(tmp_path)

    def broken(*_: object) -> None:
        raise RuntimeError("retention is broken")

    monkeypatch.setattr(checkpoints, "kept", broken)
    saves = Checkpoints(config, journal)
    saves.save(a_state(config, 1), writer(1), first_rank=True)
    assert len(events(config, "checkpoint_saved")) == 1
