"""The supervisor: `python -m trainer` starts the learner and the critics as processes of their own, and ends them.

    consumes      the processes' exits, SIGINT and SIGTERM
    produces      their exit code: the first that is not 0
    waits for     the learner
    unblocked by  any process's end, or a signal

Each role is a torch.distributed world of its own, one process per device. On a stop only the learner is told: it
finishes its step, saves, and stops the critics. When any process fails, the others are ended: nothing trains on half an
ensemble.
"""

from __future__ import annotations

import logging
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

log = logging.getLogger("asyncppo.supervisor")

_LEAVE_S = 60.0
"""After the learner has ended, the critics have this long."""


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
        critics: dict[int, list[subprocess.Popen[bytes]]] = {}
        learner: list[subprocess.Popen[bytes]] = []
        try:
            if not config.critic.addresses:
                for index, address in enumerate(addresses):
                    arguments = [*config_arguments, "--role", "critic", "--index", str(index), "--address", address]
                    output = log_directory / f"critic-{index}.log"
                    critics[index] = _start(arguments, devices[f"critic {index}"], config.critic.processes, output)
            channels = [part for address in addresses for part in ("--address", address)]
            arguments = [*config_arguments, "--role", "learner", *channels]
            learner = _start(arguments, devices["learner"], config.actor.processes)
            return _watch(learner, critics, should_stop, log_directory)
        finally:
            for pid in end([*learner, *(process for ranks in critics.values() for process in ranks)], limit_s=15.0):
                log.warning("process %d did not end within 15 s and was killed", pid)


def _watch(
    learner: list[subprocess.Popen[bytes]],
    critics: dict[int, list[subprocess.Popen[bytes]]],
    should_stop: Callable[[], bool],
    log_directory: Path,
) -> int:
    told = False
    learner_ended: float | None = None
    while True:
        if should_stop() and not told:
            told = True
            log.info("stopping: the learner finishes its step and saves")
            for process in learner:
                process.terminate()
        for index, ranks in critics.items():
            if code := _failure(ranks):
                _show_tail(log_directory, index)
                log.error("critic %d ended with exit code %d; the others are ended too", index, code)
                for process in learner:
                    process.send_signal(signal.SIGUSR1)  # it waits for the critic, or is about to
                return max(code, 1)
        if code := _failure(learner):
            log.error("the learner ended with exit code %d; the others are ended too", code)
            return max(code, 1)
        if all(process.poll() == 0 for process in learner):
            if all(process.poll() == 0 for ranks in critics.values() for process in ranks):
                return 0
            learner_ended = learner_ended or time.monotonic()
            if time.monotonic() - learner_ended > _LEAVE_S:
                log.error("a critic is still there %.0f s after the learner has ended", _LEAVE_S)
                return 1
        time.sleep(0.1)


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


def _show_tail(log_directory: Path, index: int) -> None:
    for path in sorted(log_directory.glob(f"critic-{index}.log")):
        lines = path.read_text(errors="replace").splitlines()[-20:]
        log.error("the end of %s:\n%s", path, "\n".join(lines))
