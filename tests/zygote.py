"""Starts `python -m trainer` in a second instead of ten: a process that has imported PyTorch and DeepSpeed, and forks.

    zygote = Zygote()
    pid = zygote.start(["--config", …], {"OMP_NUM_THREADS": "1"}, log)     # a supervisor, which forks its children too
    zygote.poll(pid)                                                        # its exit code; -9 of one that was killed

What runs in the forks is the product as it is, but for `subprocess.Popen` in the supervisor: it forks, where that
starts an interpreter. With `ASYNCPPO_CRASH` in its environment the learner kills itself (tests/real/crash_points.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil

ROOT = Path(__file__).resolve().parent.parent
_PR_SET_CHILD_SUBREAPER = 36


class Zygote:
    """The test's end. `close` kills every process that was forked."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, arguments: list[str], environment: dict[str, str], log: Path) -> int:
        """The pid of a new `python -m trainer`."""
        return int(self._ask({"arguments": arguments, "environment": environment, "log": str(log)}))

    def poll(self, pid: int) -> int | None:
        """Its exit code, or None while it runs."""
        code = self._ask({"poll": pid})
        return None if code is None else int(code)

    def alive(self) -> list[psutil.Process]:
        """All forks that run, those whose supervisor is gone included."""
        forks = psutil.Process(self._process.pid).children(recursive=True)
        return [fork for fork in forks if fork.is_running() and fork.status() != psutil.STATUS_ZOMBIE]

    def kill(self) -> None:
        """Kill all forks."""
        for fork in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                fork.kill()

    def close(self) -> None:
        """Kill all forks, and end it."""
        self.kill()
        self._process.communicate(timeout=10)

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Fork:
    """What the supervisor uses of `subprocess.Popen`."""

    def __init__(
        self, command: list[str], *, env: dict[str, str], stdout: Any = None, stderr: Any = None, **_: Any
    ) -> None:
        self.args = command
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number, stream in ((1, stdout), (2, stderr)):
                if stream is not None:
                    os.dup2(stream.fileno(), number)
            _become(command[3:], env)

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _become(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Be `python -m trainer` with these arguments, in this process, to its end."""
    code = 70
    try:
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # TMPDIR is looked at again
        sys.argv = ["trainer", *arguments]
        if environment.get("ASYNCPPO_CRASH") and "learner" in arguments:
            from tests.real import crash_points

            crash_points.install(environment["ASYNCPPO_CRASH"])
        runpy.run_module("trainer", run_name="__main__")
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)  # the zygote's own endings are not this process's


def _serve() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # children of a supervisor that was killed are its own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints while it is imported
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  its first import takes two seconds
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import trainer.preflight
    import trainer.roles
    import trainer.supervisor

    trainer.supervisor.subprocess = SimpleNamespace(Popen=Fork, DEVNULL=subprocess.DEVNULL)  # type: ignore[attr-defined]
    ended: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = os.waitstatus_to_exitcode(found[1])
        if "poll" in question:
            answer = ended.get(question["poll"])
        else:
            answer = os.fork()
            if answer == 0:
                os.setsid()
                log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(log, 1)
                os.dup2(log, 2)
                _become(question["arguments"], dict(os.environ) | question["environment"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
