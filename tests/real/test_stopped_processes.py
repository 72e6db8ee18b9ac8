"""A process that is stopped (SIGSTOP) is silent without being gone: heartbeats notice, both ways, and it comes back."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncppo import ports
from asyncppo.metrics import EVENTS_FILE, read
from tests.stream_process import HEARTBEAT_S

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

SCRIPT = Path(__file__).parents[1] / "stream_process.py"
LONG = 30.0
DEAD_S = 10 * HEARTBEAT_S


class Processes:
    """A trainer's stream and rollout servers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._address = f"tcp://127.0.0.1:{ports.free_port()}"
        self._all: dict[str, subprocess.Popen[bytes]] = {}
        (directory / "config.json").write_text("{}")
        (directory / "tokenizer.json").write_text("{}")

    def start(self, *roles: str) -> None:
        for role in roles:
            with (self._directory / f"{role}.log").open("ab") as output:
                command = [sys.executable, str(SCRIPT), role, self._address, str(self._directory)]
                self._all[role] = subprocess.Popen(command, stdout=output, stderr=output)

    def send(self, role: str, number: signal.Signals) -> None:
        self._all[role].send_signal(number)

    def log(self, role: str) -> str:
        return (self._directory / f"{role}.log").read_text()

    def events(self, event: str, server: str | None = None) -> list[dict[str, Any]]:
        found = [entry for entry in read(self._directory / "run" / EVENTS_FILE) if entry["event"] == event]
        return [entry for entry in found if server in (None, entry.get("server"))]

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LONG
        while not condition():
            alive = {role: process.poll() for role, process in self._all.items()}
            assert time.monotonic() < deadline, f"{what}: {alive} {self.log('trainer')[-2000:]}"
            assert set(alive.values()) == {None}, f"{what}: {alive} {self.log('trainer')[-2000:]}"
            time.sleep(0.02)

    def more_batches(self, count: int = 5) -> None:
        before = len(self.events("batch"))
        self.wait(f"{count} more batches", lambda: len(self.events("batch")) >= before + count)

    def end(self) -> None:
        for process in self._all.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(10)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    started = Processes(tmp_path)
    yield started
    started.end()


def test_a_stopped_server_is_dead_after_ten_heartbeats_holds_nobody_up_and_joins_again(processes: Processes) -> None:
    processes.start("trainer", "alice", "bob")
    processes.wait("both have joined", lambda: len(processes.events("server_joined")) == 2)
    processes.more_batches()
    stopped = time.monotonic()
    processes.send("alice", signal.SIGSTOP)
    processes.wait("its death is noticed", lambda: bool(processes.events("server_left", "alice")))
    assert DEAD_S * 0.8 < time.monotonic() - stopped < DEAD_S + 5
    assert "nothing heard" in processes.events("server_left", "alice")[0]["reason"]
    processes.more_batches()  # by bob alone
    processes.send("alice", signal.SIGCONT)
    processes.wait("it is back", lambda: len(processes.events("server_joined", "alice")) == 2)
    processes.more_batches()
    assert processes.events("server_left", "bob") == []
    assert "Hello again" in processes.log("alice")


def test_a_stopped_trainer_is_missed_after_ten_heartbeats_and_goes_on_with_its_servers(processes: Processes) -> None:
    processes.start("trainer", "alice", "bob", "carol")  # the first that it hears of again is not the only one it keeps
    processes.wait("all have joined", lambda: len(processes.events("server_joined")) == 3)
    processes.more_batches()
    processes.send("trainer", signal.SIGSTOP)
    processes.wait("its silence is noticed", lambda: "nothing heard of the trainer for 1 s" in processes.log("alice"))
    time.sleep(DEAD_S)
    processes.send("trainer", signal.SIGCONT)
    processes.more_batches()
    assert processes.events("server_left") == []  # the silence was the trainer's own
    assert "this process stood still" in processes.log("trainer")
