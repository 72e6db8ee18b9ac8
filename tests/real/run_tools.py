"""Starting the real programs from tests, watching a run's files, and proving that nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from asyncppo.metrics import EVENTS_FILE, METRICS_FILE, read

ROOT = Path(__file__).resolve().parent.parent.parent


class Programs:
    """A trainer and rollout servers of one small run; `end` leaves nothing behind, whatever the test did."""

    def __init__(self, base: Path, directory: Path, port: int, rollout_python: str = "", **overrides: Any) -> None:
        settings = {
            "run.name": "t",
            "run.directory": directory,
            "run.save_every": 0,
            "publish.directory": directory,
            "data.train": base / "data/train.jsonl",
            "eval.sets": f"{{6-op: {base / 'data/eval_6.jsonl'}}}",
            "eval.limit": 8,
            "eval.samples": 2,
            "sampling.group_size": 4,
            "sampling.max_response_tokens": 16,
            "stream.address": f"tcp://127.0.0.1:{port}",
            "stream.prompts_per_batch": 4,
            "stream.heartbeat_s": 0.5,
            "stream.batch_timeout_s": 150,
            "actor.path": base / "actor",
            "critic.path": base / "critic",
            "critic.minibatches": 1,
            "rollout.max_groups": 4,
        } | overrides
        self.arguments = ["--config", str(ROOT / "configs/demo.yaml")]
        self.arguments += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        self.run = directory / "t"
        self.directory = directory
        self._rollout_python = rollout_python
        self._started: list[subprocess.Popen[bytes]] = []

    def trainer(self, *more: str) -> subprocess.Popen[bytes]:
        """Start `python -m trainer`."""
        return self._start("trainer", [sys.executable, "-m", "trainer", *self.arguments, *more])

    def rollout(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        """Start `python -m rollout_server` with a real SGLang."""
        command = [self._rollout_python, "-m", "rollout_server", *self.arguments, "--name", name, *more]
        return self._start(f"rollout-{name}", command)

    def log(self, name: str) -> str:
        """What a program has printed."""
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def steps(self) -> list[dict[str, Any]]:
        """The run's metrics so far."""
        return list(read(self.run / METRICS_FILE))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The run's events of one kind so far."""
        return [event for event in read(self.run / EVENTS_FILE) if event["event"] == kind]

    def until(self, what: str, condition: Callable[[], Any], limit_s: float = 120.0) -> None:
        """Wait for a condition, by name and within a limit; all programs' logs are in the failure."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in self._logs())
                raise AssertionError(f"waited {limit_s:.0f} s for {what}\n{logs}")
            time.sleep(0.05)

    def ended(self, process: subprocess.Popen[bytes], limit_s: float = 60.0) -> int:
        """The exit code of a program that is about to end."""
        self.until(f"process {process.pid} to end", lambda: process.poll() is not None, limit_s)
        return int(process.wait())

    def left_behind(self) -> list[str]:
        """Command lines of processes of this run that still live: SGLang's, critics', workers' included."""
        mine = str(self.directory)
        found = []
        for process in psutil.process_iter(["cmdline", "environ", "status"]):
            info = process.info
            related = (
                mine in " ".join(info["cmdline"] or []) or (info["environ"] or {}).get("ASYNCPPO_TEST_RUN") == mine
            )
            if related and info["status"] != psutil.STATUS_ZOMBIE:
                found.append(" ".join(info["cmdline"] or [])[:200])
        return found

    def end(self) -> None:
        """Kill whatever the test left running."""
        for process in self._started:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()

    def _start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        self.directory.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ASYNCPPO_TEST_RUN": str(self.directory)}
        with (self.directory / f"{name}.log").open("ab") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self._started.append(process)
        return process

    def _logs(self) -> list[Path]:
        return sorted([*self.directory.glob("*.log"), *self.run.glob("logs/*.log")])
