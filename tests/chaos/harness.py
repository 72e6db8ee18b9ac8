"""Does what the schedule says to a cluster, starts again what died, and watches whether the run gets on.

consumes      the schedule, exits of the programs, the run's metrics
produces      faults, restarts, lines on the terminal; a `Summary` with the audit
waits for     steps of the run, each time with a limit; what passes it is a stall
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from asyncppo import checkpoints
from asyncppo.metrics import EVENTS_FILE, METRICS_FILE, read
from tests.chaos.audit import Findings, audit
from tests.chaos.cluster import Cluster, Member, wait_for
from tests.chaos.faults import Fault, schedule
from tests.chaos.proxy import FINE, Proxy

START_S = 180.0
"""From the first start to the first step."""
STALL_S = 90.0
"""A step takes no longer, start of a trainer included, once the last fault is over and every program runs."""
FINAL_S = 240.0
"""The end of the run, without faults."""
NEAR_S = 20.0
"""A fault explains what happens so long after it is over."""
CALM_STEPS = 3
_DISK_MB = 256
_SPARE_BYTES = 8192


@dataclass
class Summary:
    """The last line of the output."""

    seed: int
    seconds: float = 0.0
    steps: int = 0
    completed: bool = False
    kills: int = 0
    stops: int = 0
    restarts: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    """Of programs that nobody had killed or asked to end, with their exit codes."""
    deaths_unexplained: int = 0
    """Such exits when no fault was near."""
    stalls_unexplained: int = 0
    left_behind: list[str] = field(default_factory=list)
    adopted: int = 0
    """Groups of leases from before, at most by one process of the trainer."""
    resumed: int = 0
    findings: Findings = field(default_factory=Findings)

    @property
    def good(self) -> bool:
        """Whether the run was complete and kept its promises."""
        return (
            self.completed
            and self.findings.good
            and not self.stalls_unexplained
            and not self.deaths_unexplained
            and not self.left_behind
        )

    def line(self) -> dict[str, Any]:
        """For JSON."""
        found = self.findings
        return {
            "good": self.good,
            "seed": self.seed,
            "completed": self.completed,
            "steps": self.steps,
            "groups": found.groups,
            "lost": found.lost,
            "duplicated": found.duplicated,
            "over_bound": found.over_bound,
            "problems": len(found.problems),
            "kills": self.kills,
            "stops": self.stops,
            "restarts": self.restarts,
            "stalls_unexplained": self.stalls_unexplained,
            "deaths_unexplained": self.deaths_unexplained,
            "left_behind": len(self.left_behind),
            "resumed": self.resumed,
            "adopted": self.adopted,
            "given_up": found.given_up,
            "dropped": dict(found.dropped),
            "faults": dict(self.faults),
            "skipped": dict(self.skipped),
            "exits": dict(self.exits),
            "messages": dict(self.messages),
            "seconds": round(self.seconds, 1),
        }


class Chaos:
    """One run of it.

    Args:
        cluster: not started.
        seconds: how long faults are made.
        faults: which, in order.
        say: gets every line for people.
        observe: is called some times a second after the last fault.
    """

    def __init__(
        self,
        cluster: Cluster,
        seconds: float,
        faults: Iterator[Fault] | None = None,
        say: Callable[[str], None] = print,
        observe: Callable[[], None] = lambda: None,
    ) -> None:
        self._cluster = cluster
        self._seconds = seconds
        self._faults = schedule(cluster.seed) if faults is None else faults
        self._print = say
        self._observe = observe
        self._rng = random.Random(cluster.seed + 1)
        self._proxy = Proxy(cluster.ports, cluster.address, cluster.seed)
        self._began = time.monotonic()
        self._undo: list[tuple[float, str, Callable[[], None]]] = []
        self._expected: set[str] = set()  # members whose end was our doing
        self._mounted = False
        self._ending = False
        self._rows = -1
        self._last_progress = self._last_fault = self._last_said = time.monotonic()
        self.summary = Summary(cluster.seed)

    def run(self) -> Summary:
        """The whole of it; leaves no process behind, and the run directory in its place."""
        summary = self.summary
        try:
            self._mounted = self._mount()
            self._proxy.start()
            for member in self._cluster.members:
                member.start()
            if not self._waits(lambda: self._step() > 0, START_S, "the first step"):
                return summary
            self._make_faults()
            self._finish()
        finally:
            summary.messages = self._proxy.counts
            self._proxy.close()
            summary.seconds = time.monotonic() - self._began
            summary.left_behind = self._cluster.end()
            for line in summary.left_behind:
                self._say(f"left behind: {line}")
            self._unmount()
        return summary

    # --- faults ------------------------------------------------------------------------------------------------------

    def _make_faults(self) -> None:
        end = time.monotonic() + self._seconds
        for fault in self._faults:
            self._tick_until(min(end, time.monotonic() + fault.after_s))
            if time.monotonic() >= end:
                return
            if fault.kind == "calm":
                self._calm()
                continue
            if "rollout" not in fault.kind and "network" not in fault.kind and "partition" not in fault.kind:
                # what makes the trainer begin again would, made often enough, let it never get anywhere
                self._waits(self._trainer_gets_on, STALL_S, "a step")
            said = getattr(self, "_" + fault.kind.replace(" ", "_"))(fault)
            self._last_fault = time.monotonic()
            if said is None:
                self.summary.skipped[fault.kind] += 1
                self._say(f"{fault.kind}: not possible now")
            else:
                self.summary.faults[fault.kind] += 1
                self._say(f"{fault.kind}: {said}")
        while time.monotonic() < end:
            self._tick()
            self._observe()

    def _calm(self) -> None:
        self._undo_all()
        there = self._step()
        if self._waits(lambda: self._step() >= there + CALM_STEPS, STALL_S, f"{CALM_STEPS} steps in a calm"):
            self.summary.faults["calm"] += 1
            self._say(f"calm: step {there} to {self._step()}")

    def _kill_trainer(self, fault: Fault) -> str | None:
        family = self._cluster.trainer.family()
        for process in family:
            self._kill(process)
        self._expected.add("trainer")
        return f"{len(family)} processes" if family else None

    def _kill_supervisor(self, fault: Fault) -> str | None:
        family = self._cluster.trainer.family()
        self._expected.add("trainer")
        return self._kill(family[0]) if family else None

    def _kill_learner(self, fault: Fault) -> str | None:
        self._expected.add("trainer")
        return self._kill(self._cluster.trainer.role("--role learner"))

    def _kill_critic(self, fault: Fault) -> str | None:
        return self._kill(self._critic(fault))

    def _kill_rollout(self, fault: Fault) -> str | None:
        member = self._cluster.servers[fault.server]
        self._expected.add(member.name)
        family = member.family()
        return f"{fault.server}, {self._kill(family[0])}" if family else None

    def _stop_learner(self, fault: Fault) -> str | None:
        return self._stop(self._cluster.trainer.role("--role learner"), fault.lasts_s)

    def _stop_critic(self, fault: Fault) -> str | None:
        return self._stop(self._critic(fault), fault.lasts_s)

    def _stop_rollout(self, fault: Fault) -> str | None:
        family = self._cluster.servers[fault.server].family()
        said = self._stop(family[0] if family else None, fault.lasts_s)
        return f"{fault.server}, {said}" if said else None

    def _restart_trainer(self, fault: Fault) -> str | None:
        return self._terminate(self._cluster.trainer)

    def _restart_rollout(self, fault: Fault) -> str | None:
        said = self._terminate(self._cluster.servers[fault.server])
        return f"{fault.server}, {said}" if said else None

    def _partition(self, fault: Fault) -> str:
        return f"{fault.server} {self._weather([fault.server], fault)}"

    def _partition_all(self, fault: Fault) -> str:
        return self._weather(list(self._cluster.servers), fault)

    def _bad_network(self, fault: Fault) -> str:
        weather = fault.weather
        said = self._weather(list(self._cluster.servers), fault)
        return f"{said}: {weather.drop:.0%} lost, {weather.duplicate:.0%} twice, up to {weather.delay_s:g} s late"

    def _corrupt_network(self, fault: Fault) -> str:
        return f"{fault.server} {self._weather([fault.server], fault)}: {fault.weather.corrupt:.0%}"

    def _full_disk(self, fault: Fault) -> str | None:
        if not self._mounted:
            return None
        filler = self._cluster.disk / "filler"
        free = shutil.disk_usage(self._cluster.disk).free
        with contextlib.suppress(OSError), filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - _SPARE_BYTES))
        self._later(fault.lasts_s, "the disk has room again", lambda: filler.unlink(missing_ok=True))
        return f"for {fault.lasts_s:.1f} s"

    def _corrupt_checkpoint(self, fault: Fault) -> str | None:
        if not self._kill_trainer(fault):
            return None
        wait_for(lambda: self._cluster.trainer.code is not None, 10)
        there = [path for path in checkpoints.in_run(self._cluster.run) if path.name.startswith(checkpoints.STEP)]
        whole = [path for path in there if not checkpoints.problems(path)]
        if len(whole) < 2:
            return None
        files = sorted(path for path in whole[-1].rglob("*") if path.is_file() and path.stat().st_size)
        chosen = files[int(fault.draw * len(files))]
        data = bytearray(chosen.read_bytes())
        how = ("a bit", "the end", "the file")[int(fault.draw * 1000) % 3]
        if how == "a bit":
            data[int(fault.draw * len(data))] ^= 1 << int(fault.draw * 8)
            chosen.write_bytes(data)
        elif how == "the end":
            chosen.write_bytes(data[: len(data) // 2])
        else:
            chosen.unlink()
        return f"{whole[-1].name}/{chosen.relative_to(whole[-1])}, {how}"

    # --- how ---------------------------------------------------------------------------------------------------------

    def _critic(self, fault: Fault) -> psutil.Process | None:
        return self._cluster.trainer.role("--role critic", f"--index {fault.critic}")

    def _kill(self, process: psutil.Process | None) -> str | None:
        if process is None:
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            self.summary.kills += 1
        return f"pid {process.pid}"

    def _stop(self, process: psutil.Process | None, seconds: float) -> str | None:
        if process is None:
            return None

        def go_on() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
            self.summary.stops += 1
        self._later(seconds, f"pid {process.pid} goes on", go_on)
        return f"pid {process.pid} for {seconds:.1f} s"

    def _terminate(self, member: Member) -> str | None:
        self._expected.add(member.name)
        if not member.send(signal.SIGTERM):
            return None
        if not self._waits(lambda: member.code is not None or member.due is not None, STALL_S, f"{member.name} to end"):
            for process in member.family():
                self._kill(process)
        return "it has ended"

    def _weather(self, servers: list[str], fault: Fault) -> str:
        def clear() -> None:
            for name in servers:
                self._proxy.set_weather(name, FINE)

        for name in servers:
            self._proxy.set_weather(name, fault.weather)
        self._later(fault.lasts_s, f"the network of {', '.join(servers)} is fine again", clear)
        return f"for {fault.lasts_s:.1f} s"

    def _later(self, seconds: float, what: str, undo: Callable[[], None]) -> None:
        self._undo.append((time.monotonic() + seconds, what, undo))

    def _undo_all(self) -> None:
        for _, _, undo in self._undo:
            undo()
        self._undo = []

    # --- the cluster manager -----------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        for entry in [entry for entry in self._undo if entry[0] <= now]:
            self._undo.remove(entry)
            entry[2]()
            self._last_fault = now
            self._say(entry[1])
        for member in self._cluster.members:
            if member.code is not None and member.due is None and not self._ending:
                self._has_ended(member, now)
            if member.due is not None and now >= member.due and not self._ending:
                member.start()
                self.summary.restarts += 1
        rows = self._step()
        if rows > self._rows:
            self._last_progress = now
        self._rows = rows  # a resume takes some back
        if now - self._last_said > 10:
            self._say(f"step {rows}")
        time.sleep(0.05)

    def _has_ended(self, member: Member, now: float) -> None:
        member.due = now + self._rng.uniform(0.3, 2.0)
        if member.name in self._expected:
            self._expected.discard(member.name)
            return
        self.summary.exits[f"{member.name} {member.code}"] += 1
        near = self._undo or now - self._last_fault < NEAR_S
        self.summary.deaths_unexplained += not near
        self._say(f"{member.name} ended with {member.code}{'' if near else ', UNEXPLAINED'}: {member.said()}")

    def _tick_until(self, moment: float) -> None:
        while time.monotonic() < moment:
            self._tick()

    def _waits(self, holds: Callable[[], bool], limit_s: float, what: str) -> bool:
        """Until it holds; a stall if that takes longer than the limit after everything runs and no fault is there."""
        while not holds():
            self._tick()
            busy = max([self._last_fault, self._last_progress, *(m.started for m in self._cluster.members)])
            if time.monotonic() - busy > limit_s and not self._undo:
                self.summary.stalls_unexplained += 1
                self._say(f"STALL: waited {limit_s:.0f} s for {what}; {self._cluster.trainer.said()}")
                self._last_progress = time.monotonic()
                return False
        return True

    def _trainer_gets_on(self) -> bool:
        trainer = self._cluster.trainer
        return trainer.code is None and self._last_progress > trainer.started

    def _step(self) -> int:
        """The last step in the metrics; a resume takes it back."""
        path = self._cluster.run / METRICS_FILE
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 8192))
                lines = [
                    line for line in file.read().splitlines() if line.startswith(b'{"step":') and line.endswith(b"}")
                ]
        except FileNotFoundError:
            return 0
        return int(lines[-1].split(b":", 1)[1].split(b",", 1)[0]) if lines else 0

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Without faults: the run is told how long it is, and has to complete."""
        self._undo_all()
        there = self._step()
        self._waits(lambda: self._step() >= there + CALM_STEPS, STALL_S, "the run to get on after the last fault")
        self._terminate(self._cluster.trainer)
        self._ending = True
        trainer = self._cluster.trainer
        if trainer.code is None:  # the tick had started it again already
            for process in trainer.family():
                self._kill(process)
            wait_for(lambda: trainer.code is not None, 10)
        steps = self._step() + 10
        self._say(f"no more faults: the run is to complete {steps} steps")
        deadline = time.monotonic() + FINAL_S
        while time.monotonic() < deadline and not self.summary.completed:
            trainer.start("--set", f"run.steps={steps}")
            self._tick_until_code(trainer, deadline)
            if trainer.code == 0:
                self.summary.completed = True
            elif trainer.code is not None:
                self.summary.exits[f"trainer {trainer.code}"] += 1
                self.summary.deaths_unexplained += 1
                self._say(f"trainer ended with {trainer.code}: {trainer.said()}")
                time.sleep(1)
        for server in self._cluster.servers.values():
            if self.summary.completed and not self._has_left(server):
                self._say(f"server {server.name} has not ended with the run")
                self.summary.left_behind.append(server.name)
        self.summary.steps = self._step()
        if self.summary.completed:
            self.summary.findings = audit(self._cluster.with_steps(steps))
            for problem in self.summary.findings.problems[:20]:
                self._say(f"audit: {problem}")
        else:
            self._say(f"the run did not complete within {FINAL_S:.0f} s: {trainer.said()}")
        events = list(read(self._cluster.run / EVENTS_FILE))
        self.summary.resumed = sum(event.get("resumed", False) for event in events if event["event"] == "start")
        rows = read(self._cluster.run / METRICS_FILE)
        self.summary.adopted = max((row["stream/adopted"] for row in rows), default=0)

    def _has_left(self, server: Member) -> bool:
        return wait_for(lambda: server.code is not None, 30)

    def _tick_until_code(self, member: Member, deadline: float) -> None:
        while member.code is None and time.monotonic() < deadline:
            for server in self._cluster.servers.values():
                if server.code is not None and server.code != 0:
                    server.start()
                    self.summary.restarts += 1
            self._tick()

    # --- disk --------------------------------------------------------------------------------------------------------

    def _mount(self) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(self._cluster.disk)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except OSError as error:
            done = subprocess.CompletedProcess(command, 1, "", str(error))
        if done.returncode:
            self._say(f"no disk will be filled: a tmpfs cannot be mounted here ({done.stderr.strip()})")
        return done.returncode == 0

    def _unmount(self) -> None:
        """What the run left is copied to where it would be without the mount."""
        if self._mounted:
            kept = self._cluster.directory / "kept"
            shutil.copytree(self._cluster.disk, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("filler"))
            subprocess.run(["umount", "-l", str(self._cluster.disk)], check=True, timeout=30)
            shutil.copytree(kept, self._cluster.disk, dirs_exist_ok=True)
            shutil.rmtree(kept)

    def _say(self, text: str) -> None:
        self._last_said = time.monotonic()
        self._print(f"{time.monotonic() - self._began:7.1f} s  step {self._step():4d}  {text}")
