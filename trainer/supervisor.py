"""The supervisor: `python -m trainer` starts the learner and the critics as processes of their own, and ends them.

    consumes      the processes' exits, SIGINT and SIGTERM
    produces      their exit code: the first that is not 0
    waits for     the learner
    unblocked by  any process's end, or a signal

Each role is a torch.distributed world of its own, one process per device. On a stop only the learner is told: it
finishes its step, saves, and stops the critics. A critic that dies is started again, all its ranks, up to
`critic.restarts` times; the learner waits and brings it to where it was (`trainer.model.critics`). When that is used
up, or the learner fails, the others are ended: nothing trains on half an ensemble.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from asyncppo.config import Config
from asyncppo.lifetime import end
from asyncppo.ports import free_port
from asyncppo.waits import waiting

log = logging.getLogger("asyncppo.supervisor")

_LEAVE_S = 60.0
"""After the learner has ended, the critics have this long."""
_LATE_S = 5.0
"""After the learner has ended, a critic that was started again and does not know it is ended after this time."""
_UNUSABLE = 2
"""The exit code of a process that was given what cannot work: it would not work a second time."""
_FIRST_WAIT_S = 1.0
"""Before a critic is started again for the first time; twice as long each time."""
_LONGEST_WAIT_S = 30.0
_STEADY_S = 3600.0
"""A critic that has lived so long is not one that cannot live: its restarts count anew."""


def supervise(config: Config, config_arguments: list[str], should_stop: Callable[[], bool], log_directory: Path) -> int:
    """Run the learner and the critics to their end; returns the exit code.

    Args:
        config: the checked config.
        config_arguments: the command line that makes the same config in a child.
        should_stop: whether a stop was asked for.
        log_directory: the critics' logs go there; the learner's goes to this process's stderr.
    """
    log_directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="asyncppo-") as sockets:
        addresses = config.critic.addresses or [
            f"ipc://{sockets}/critic-{index}" for index in range(config.algorithm.critics)
        ]
        devices = _devices(config)
        critics: list[_Critic] = []
        learner: list[subprocess.Popen[bytes]] = []
        try:
            if not config.critic.addresses:
                for index, address in enumerate(addresses):
                    arguments = [*config_arguments, "--role", "critic", "--index", str(index), "--address", address]
                    output = log_directory / f"critic-{index}.log"
                    critics.append(_Critic(config, index, arguments, devices[f"critic {index}"], output))
            channels = [part for address in addresses for part in ("--address", address)]
            arguments = [*config_arguments, "--role", "learner", *channels]
            learner = _start(arguments, devices["learner"], config.actor.processes)
            with waiting("the learner and the critics to end", math.inf):
                return _watch(learner, critics, should_stop)
        finally:
            for pid in end([*learner, *(process for critic in critics for process in critic.ranks)], limit_s=15.0):
                log.warning("process %d did not end within 15 s and was killed", pid)


class _Critic:
    """One critic's processes, and how often they were started again."""

    def __init__(self, config: Config, index: int, arguments: list[str], devices: list[int], output: Path) -> None:
        self.index = index
        self.restarts = 0
        self._config = config
        self._arguments = arguments
        self._devices = devices
        self._output = output
        self._due: float | None = None
        self._launch()

    @property
    def is_gone(self) -> bool:
        """Whether all its processes have ended with 0, or one that was to be started again no longer need be."""
        return self._due is not None or all(process.poll() == 0 for process in self.ranks)

    def look(self, *, is_needed: bool) -> int | None:
        """Start it again if it has died; the exit code when it has died once too often.

        Args:
            is_needed: the learner is there: even one that ended with 0 has died then, unless the learner ends, too.
        """
        if self._due is not None:
            if is_needed and time.monotonic() >= self._due:
                self._launch()
            return None
        code = _failure(self.ranks)
        if code is None:
            return None
        _show_tail(self._output)
        if not is_needed or code == _UNUSABLE:
            return code
        if time.monotonic() - self._started > _STEADY_S:
            self.restarts = 0
        if self.restarts >= self._config.critic.restarts:
            return code
        self.restarts += 1
        wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (self.restarts - 1))
        end(self.ranks, limit_s=2.0)  # ranks without the one that died have nothing to say any more
        self._due = time.monotonic() + wait_s
        log.warning(
            "critic %d ended with exit code %d; it is started again in %.0f s (%d of %d, critic.restarts)",
            self.index,
            code,
            wait_s,
            self.restarts,
            self._config.critic.restarts,
        )
        return None

    def dismiss(self) -> None:
        """The learner has ended well: one that was started again so late that it was not told ends now."""
        if self.restarts:
            end(self.ranks, limit_s=15.0)
            self._due = math.inf

    def _launch(self) -> None:
        self.ranks = _start(self._arguments, self._devices, self._config.critic.processes, self._output)
        self._started = time.monotonic()
        self._due = None


def _watch(learner: list[subprocess.Popen[bytes]], critics: list[_Critic], should_stop: Callable[[], bool]) -> int:
    told = False
    learner_ended: float | None = None
    while True:
        if should_stop() and not told:
            told = True
            log.info("stopping: the learner finishes its step and saves")
            for process in learner:
                process.terminate()
        for critic in critics:
            if code := critic.look(is_needed=learner_ended is None):
                log.error("critic %d ended with exit code %d; the others are ended too", critic.index, code)
                for process in learner:
                    process.send_signal(signal.SIGUSR1)  # it waits for the critic, or is about to
                return _exit_code(code)
        if code := _failure(learner):
            log.error("the learner ended with exit code %d; the others are ended too", code)
            return _exit_code(code)
        if all(process.poll() == 0 for process in learner):
            if learner_ended is None:
                learner_ended = time.monotonic()
            if time.monotonic() - learner_ended > _LATE_S:
                for critic in critics:
                    critic.dismiss()
            if all(critic.is_gone for critic in critics):
                return 0
            if time.monotonic() - learner_ended > _LEAVE_S:
                log.error("a critic is still there %.0f s after the learner has ended", _LEAVE_S)
                return 1
        time.sleep(0.1)


def _exit_code(of_child: int) -> int:
    """2 where what was given cannot work, else 1: children end by signals, and libraries with codes of their own."""
    return _UNUSABLE if of_child == _UNUSABLE else 1


def _failure(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """The exit code of the first rank that ended with another than 0."""
    return next((code for process in ranks if (code := process.poll())), None)


def _start(
    arguments: list[str], devices: list[int], processes: int, output: Path | None = None
) -> list[subprocess.Popen[bytes]]:
    port = free_port() if processes > 1 else 0
    started = []
    for rank in range(processes):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_RANK": str(rank if devices else 0),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ASYNCPPO_SUPERVISED": str(os.getpid()),
        }
        environment.setdefault("OMP_NUM_THREADS", "1")
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        sink = None if output is None else output.open("ab")
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "trainer", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone
            )
        )
        if sink is not None:
            sink.close()
    return started


def _devices(config: Config) -> dict[str, list[int]]:
    """GPU indices of each role; empty lists on a CPU."""
    roles = {"learner": config.actor.processes}
    roles |= {f"critic {index}": config.critic.processes for index in range(config.algorithm.critics)}
    if not torch.cuda.is_available():
        return {role: [] for role in roles}
    named = [*config.actor.devices, *config.critic.devices]
    pool = iter(named or range(sum(roles.values())))
    return {role: [next(pool) for _ in range(count)] for role, count in roles.items()}


def _show_tail(path: Path) -> None:
    if path.exists():
        lines = path.read_text(errors="replace").splitlines()[-20:]
        log.error("the end of %s:\n%s", path, "\n".join(lines))
