"""Checkpoints: one directory each, written beside its place and renamed, with everything that a resume needs.

The layout and the manifest are `asyncppo/checkpoints.py`'s. All ranks write their parts (`begin`), which is quick: into
the page cache. Then training goes on, while a thread of rank 0 makes the manifest, brings all to the disk, reads it
back, renames, and removes what retention lets go. Nothing is removed before a newer one is whole on the disk.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from asyncppo import checkpoints
from asyncppo.checkpoints import CONFIG, DAMAGED, FORMAT, MANIFEST, PARTIAL, STATE, STEP, Manifest
from asyncppo.config import Config, dump
from asyncppo.errors import CheckpointError, ResumeError, StallError
from asyncppo.metrics import Journal
from asyncppo.waits import waiting
from trainer.stream.ledger import LedgerState

log = logging.getLogger("asyncppo.checkpoint")

_REPLACED = ".replaced-"
_LAST_S = 60.0
"""A process that ends waits so long for its save in progress."""


class GuardState(msgspec.Struct, frozen=True, kw_only=True):
    """What the guard counts."""

    brake_level: int = 0
    good_steps: int = 0
    """In a row, since the brake last changed."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    collapsed_for: int = 0
    """Steps in a row in which the critics were one."""


class TrainerState(msgspec.Struct, frozen=True, kw_only=True):
    """What the learner itself has to remember."""

    policy_version: int
    critics: int
    actor_path: str
    critic_paths: list[str]
    critic_errors: list[float]
    """Running squared error of each critic (`algorithm.aggregation: confidence`); empty before the first step."""
    ledger: LedgerState
    guard: GuardState = GuardState()
    format: int = FORMAT

    def parts(self) -> list[str]:
        """The directories without which it is not complete."""
        return ["actor", *(f"critic_{index}" for index in range(self.critics))]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        config: of the run.
        journal: for the events `checkpoint_saved`, `checkpoint_failed` and `checkpoint_damaged`; rank 0 has one.
        agree: whether something is so on all ranks (`World.agree`); all ranks call it at the same places.
        on_whole: is told, in the thread that writes, of every checkpoint that is whole in its place, with its version,
            before any older one goes.
    """

    def __init__(
        self,
        config: Config,
        journal: Journal | None = None,
        agree: Callable[[bool], bool] = lambda good: good,
        on_whole: Callable[[Path, int], None] | None = None,
    ) -> None:
        self._config = config
        self._root = config.run_directory / "checkpoints"
        self._journal = journal
        self._agree = agree
        self._on_whole = on_whole
        self._writer: threading.Thread | None = None
        self._outcomes: queue.SimpleQueue[tuple[int, int, float, str]] = queue.SimpleQueue()
        self._failure = ""

    def save(self, state: TrainerState, write_parts: Callable[[Path], None], *, first_rank: bool) -> Path:
        """Write a checkpoint and wait until it is whole on the disk; the last good one stays until then.

        Raises:
            CheckpointError: it could not be written; what was there before still is.
        """
        self.begin(state, write_parts, first_rank=first_rank)
        self.wait()
        return self._place(state.policy_version)

    def begin(self, state: TrainerState, write_parts: Callable[[Path], None], *, first_rank: bool) -> None:
        """Write the parts, on all ranks; the rest is done while training goes on. A failure is told by `report`.

        Args:
            state: the learner's own part.
            write_parts: writes `actor`, `critic_m` and `stream` under the directory given; all ranks call it.
            first_rank: whether this process makes the directory and renames it.

        Raises:
            StallError: the save before this one has not reached the disk within `guard.stall_s`.
        """
        version = state.policy_version
        partial = self._root / f"{PARTIAL}{version:08d}"
        started = time.monotonic()
        if first_rank:
            self._join()
        self.report()
        self._failure = ""
        if first_rank:
            self._failure = _why(lambda: self._prepare(partial))
        if self._agree(not self._failure):
            self._failure = _why(lambda: write_parts(partial))
            if self._agree(not self._failure) and first_rank:
                self._writer = threading.Thread(
                    target=self._finish, args=(state, partial, started), name="checkpoint writer", daemon=True
                )  # a daemon: a disk that hangs must not keep a process that has given up
                self._writer.start()
                return
        if first_rank:
            shutil.rmtree(partial, ignore_errors=True)
            self._failure = self._failure or "another rank could not write its part; its log says why"
            self._outcomes.put((version, 0, 0.0, self._failure))
            self.report()
        elif self._failure:
            log.error("checkpoint %d: this rank could not write its part: %s", version, self._failure)

    def report(self) -> None:
        """Say what has become of saves since the last call: a line and an event each. Never waits."""
        while not self._outcomes.empty():
            version, size, seconds, failure = self._outcomes.get_nowait()
            self._failure = failure
            if failure:
                log.error("checkpoint %d was not saved, the last good one is untouched: %s", version, failure)
                if self._journal:
                    self._journal.event("checkpoint_failed", policy_version=version, reason=failure)
                continue
            log.info("saved %s, %.1f MB in %.1f s", self._place(version), size / 1e6, seconds)
            if self._journal:
                self._journal.event("checkpoint_saved", policy_version=version, bytes=size, seconds=seconds)

    def close(self) -> None:
        """A process that ends, whyever, lets the save in progress reach the disk, for a minute at most."""
        if self._writer is not None:
            with waiting("the last checkpoint to reach the disk", _LAST_S):
                self._writer.join(_LAST_S)
            if self._writer.is_alive():
                log.error("the checkpoint in progress did not reach the disk within %.0f s, and is lost", _LAST_S)

    def settled(self) -> bool:
        """Wait for the end of the save in progress, if there is one; whether the last one is whole. All ranks call it.

        Raises:
            StallError: it has not ended within `guard.stall_s`.
        """
        self._join()
        self.report()
        return self._agree(not self._failure)

    def wait(self) -> None:
        """Until the save in progress is whole on the disk. All ranks call it.

        Raises:
            CheckpointError: the last save failed, on any rank.
            StallError: it has not ended within `guard.stall_s`.
        """
        if not self.settled():
            raise CheckpointError(
                f"the last checkpoint could not be saved: {self._failure or 'rank 0 says why'}; "
                f"what was whole in {self._root} still is"
            )

    def latest(self) -> tuple[Path, TrainerState] | None:
        """The newest whole checkpoint, every file read; None if this run has not made any.

        For rank 0, before anything is saved: what killed saves left is removed, and a checkpoint that is damaged is
        renamed to `damaged-…` and passed over.

        Raises:
            ResumeError: it belongs to other models than the config names, or is of an earlier version of asyncppo; or
                there are checkpoints, and none of them is whole.
        """
        if not self._root.is_dir():
            return None
        try:
            self._remove_leftovers()
            for path in sorted(self._root.glob(f"{STEP}*"), reverse=True):
                if checkpoints.is_old(path):
                    raise ResumeError(
                        f"{path}: was written by an earlier version of asyncppo, in another format: finish the run "
                        "with that version, or choose another run.name"
                    )
                wrong = checkpoints.problems(path)
                if not wrong:
                    return path, self._ours(path)
                self._put_aside(path, wrong)
        except OSError as error:
            raise ResumeError(f"{self._root}: cannot be read or put in order: {error}") from error
        aside = sorted(path.name for path in self._root.glob(f"{DAMAGED}*"))
        if aside:
            raise ResumeError(
                f"{self._root}: no checkpoint is whole ({', '.join(aside)}), and the run does not silently begin anew: "
                "restore one (`asyncppo checkpoint verify` says what each lacks), or remove this directory, or choose "
                "another run.name"
            )
        return None

    def _ours(self, path: Path) -> TrainerState:
        manifest = checkpoints.read_manifest(path)
        critics = self._config.critic_paths
        if (manifest.actor_path, manifest.critic_paths) != (self._config.actor.path, critics):
            raise ResumeError(
                f"{path}: made with {len(manifest.critic_paths)} critics, actor {manifest.actor_path}, critics "
                f"{manifest.critic_paths}; the config says {len(critics)}, {self._config.actor.path}, {critics}: "
                "choose another run.name"
            )
        try:
            state = msgspec.json.decode((path / STATE).read_bytes(), type=TrainerState)
        except msgspec.DecodeError as error:
            raise ResumeError(f"{path / STATE}: another version of asyncppo wrote it: {error}") from None
        missing = [part for part in state.parts() if part not in manifest.parts]
        if missing:
            raise ResumeError(f"{path}: is not complete, without {', '.join(missing)}: go on from another one")
        if manifest.run != self._config.run.name:
            log.info("%s was made by the run %s", path, manifest.run)
        return state

    def _put_aside(self, path: Path, wrong: list[str]) -> None:
        aside = path.with_name(DAMAGED + path.name)
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{DAMAGED}{path.name}-{number}")
        os.replace(path, aside)
        checkpoints.flush_names(self._root)
        log.error("%s IS DAMAGED and is now %s: %s; the one before it is tried", path, aside.name, "; ".join(wrong))
        if self._journal:
            self._journal.event("checkpoint_damaged", checkpoint=path.name, renamed=aside.name, problems=wrong)

    def _place(self, version: int) -> Path:
        return self._root / f"{STEP}{version:08d}"

    def _join(self) -> None:
        if self._writer is None:
            return
        limit = self._config.guard.stall_s
        with waiting("the last checkpoint to reach the disk", limit):
            self._writer.join(limit)
        if self._writer.is_alive():
            raise StallError(f"waited {limit:.0f} s for a checkpoint to reach the disk (guard.stall_s)")
        self._writer = None

    def _remove_leftovers(self) -> None:
        for replaced in self._root.glob(f"{_REPLACED}*"):  # killed between the two renames of `_finish`
            place = self._root / replaced.name.removeprefix(_REPLACED)
            if not place.exists():
                os.replace(replaced, place)
        for left in [*self._root.glob(f"{PARTIAL}*"), *self._root.glob(f"{_REPLACED}*")]:
            try:
                shutil.rmtree(left)
            except OSError as error:  # it is in nobody's way
                log.warning("%s could not be removed: %s", left, error)

    def _prepare(self, partial: Path) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        wanted = max((manifest.bytes for _, manifest in self._whole()[-1:]), default=0)
        free = shutil.disk_usage(self._root).free
        if free < wanted:
            raise CheckpointError(
                f"{self._root} has {free / 1e6:.1f} MB free, and the last checkpoint has {wanted / 1e6:.1f} MB: make "
                "room, or keep fewer (run.keep_checkpoints, run.keep_every)"
            )
        partial.mkdir()

    def _finish(self, state: TrainerState, partial: Path, started: float) -> None:
        """In a thread of its own: from written parts to a checkpoint that is on the disk under its name."""
        size, failure = 0, ""
        try:
            size = self._commit(state, partial)
        except Exception as error:  # whatever it is, a thread that ends without an outcome would pass for a success
            failure = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            shutil.rmtree(partial, ignore_errors=True)
        self._outcomes.put((state.policy_version, size, time.monotonic() - started, failure))
        if not failure:
            self._retain()  # after the outcome, which is what it is whatever becomes of older ones

    def _commit(self, state: TrainerState, partial: Path) -> int:
        (partial / STATE).write_bytes(msgspec.json.format(msgspec.json.encode(state)))
        (partial / CONFIG).write_bytes(dump(self._config))
        parts = sorted(path.name for path in partial.iterdir() if path.is_dir() and any(path.iterdir()))
        missing = [part for part in state.parts() if part not in parts]
        if missing:
            raise CheckpointError(f"nobody has written {', '.join(missing)}")
        manifest = Manifest(
            format=FORMAT,
            policy_version=state.policy_version,
            run=self._config.run.name,
            time=time.time(),
            actor_path=state.actor_path,
            critic_paths=state.critic_paths,
            parts=parts,
            files={},
        )
        manifest = checkpoints.write_manifest(partial, manifest)
        checkpoints.flush_to_disk(partial)
        if wrong := checkpoints.problems(partial):
            raise CheckpointError(f"what was read back from the disk is not what was written: {'; '.join(wrong)}")
        final = self._place(state.policy_version)
        replaced = self._root / (_REPLACED + final.name)
        if final.exists():
            os.replace(final, replaced)
        os.replace(partial, final)
        checkpoints.flush_names(self._root)
        shutil.rmtree(replaced, ignore_errors=True)
        if self._on_whole:
            self._on_whole(final, state.policy_version)
        return manifest.bytes

    def _retain(self) -> None:
        """Never fails: what cannot be removed stays, and the new one is whole whatever becomes of the others."""
        run = self._config.run
        whole = {manifest.policy_version: path for path, manifest in self._whole()}
        keep = checkpoints.kept(whole, run.keep_checkpoints, run.keep_every)
        for version in whole.keys() - keep.keys():
            gone = self._root / f"{PARTIAL}removed-{version:08d}"  # never half removed under its name
            try:
                os.replace(whole[version], gone)
                shutil.rmtree(gone)
            except OSError as error:
                log.warning("%s could not be removed: %s", whole[version], error)

    def _whole(self) -> list[tuple[Path, Manifest]]:
        """Those whose files are all there in their sizes, oldest first. One that cannot be read is left alone."""
        found = []
        for path in sorted(self._root.glob(f"{STEP}*")):
            try:
                if (path / MANIFEST).is_file() and not checkpoints.problems(path, checksums=False):
                    found.append((path, checkpoints.read_manifest(path)))
            except OSError as error:
                log.warning("%s cannot be read, and is left as it is: %s", path, error)
        return found


def _why(attempt: Callable[[], None]) -> str:
    """Why it failed, or nothing if it did not."""
    try:
        attempt()
    except (OSError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
    return ""


def choose(found: Checkpoints | None, share: Callable[[str], str]) -> tuple[Path, TrainerState] | None:
    """What all ranks go on from: rank 0 looks (`Checkpoints.latest`), the others have None and do as it says.

    Args:
        found: the checkpoints, on rank 0.
        share: rank 0's text, on every rank; all call it.

    Raises:
        ResumeError: as `latest`, on every rank.
    """
    choice = _Choice()
    if found is not None:
        try:
            latest = found.latest()
        except ResumeError as error:
            choice = _Choice(refused=str(error))
        else:
            choice = _Choice(path=str(latest[0]), state=latest[1]) if latest else _Choice()
    choice = msgspec.json.decode(share(msgspec.json.encode(choice).decode()), type=_Choice)
    if choice.refused:
        raise ResumeError(choice.refused)
    return (Path(choice.path), choice.state) if choice.state else None


class _Choice(msgspec.Struct, frozen=True, kw_only=True):
    path: str = ""
    state: TrainerState | None = None
    refused: str = ""
