"""The processes of a chaos run: a trainer and its rollout servers, started by one command each, again and again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil

from asyncppo.config import Config, load
from asyncppo.ports import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "ASYNCPPO_CHAOS"
"""In the environment of every process of a run: its directory."""
ENDLESS = 1_000_000
"""Steps of the run while faults last; then it is told how many there are."""
PROMPTS = 37
SERVERS = ("a", "b", "c")


@dataclass
class Member:
    """A program that a cluster manager keeps running."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    starts: int = 0
    due: float | None = None
    """When it is to be started again."""

    def start(self, *more: str) -> None:
        """Start it, or start it again."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*self.command, *more],
                cwd=ROOT,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started, self.due = time.monotonic(), None
        self.starts += 1

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.poll() if self.process else None

    def send(self, number: signal.Signals) -> bool:
        """A signal to it alone; False if it is gone."""
        if self.process is None or self.code is not None:
            return False
        self.process.send_signal(number)
        return True

    def family(self) -> list[psutil.Process]:
        """It, and all processes below it."""
        if self.process is None or self.code is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def role(self, *words: str) -> psutil.Process | None:
        """The process below it that has these words in its command line."""
        for process in self.family()[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline())
                if all(word in line for word in words):
                    return process
        return None

    def said(self, lines: int = 3) -> str:
        """The last lines of its log that say something is wrong, else its last line."""
        text = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        bad = [line for line in text[-60:] if any(word in line for word in ("ERROR", "Error", "error:"))]
        return " | ".join((bad or text)[-lines:])


@dataclass
class Cluster:
    """A small run in a directory of its own.

    Args:
        directory: for everything: data, model, logs, and the run itself in `disk`.
        seed: of the run; an odd one trains with replay; it also says how often checkpoints are made.
        engine: `deepspeed` or `plain`.
        real_python: the interpreter of the rollout environment: server `a` then has a real SGLang.
        token_s: seconds of a token of the scripted engines.
    """

    directory: Path
    seed: int
    engine: str = "deepspeed"
    real_python: str | None = None
    token_s: float = 0.03
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.ports = {name: free_port() for name in SERVERS}
        self.disk = self.directory / "disk"
        self.disk.mkdir(parents=True, exist_ok=True)
        self.config_file = self.directory / "config.yaml"
        self.config = self._write()
        self.run = self.config.run_directory
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", MARK: str(self.directory)}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "CHAOS_TOKEN_S": str(self.token_s)}
        arguments = ["--config", str(self.config_file)]
        self.trainer = Member(
            "trainer", [sys.executable, "-m", "trainer", *arguments], self.directory / "logs/trainer.log", environment
        )
        self.servers = {}
        for name in SERVERS:
            real = self.real_python is not None and name == SERVERS[0]
            program = (
                [str(self.real_python), "-m", "rollout_server"]
                if real
                else [sys.executable, "-m", "tests.chaos.server"]
            )
            command = [*program, *arguments, "--name", name, "--trainer", f"tcp://127.0.0.1:{self.ports[name]}"]
            self.servers[name] = Member(name, command, self.directory / f"logs/{name}.log", environment)

    @property
    def members(self) -> list[Member]:
        """All of them, the trainer first."""
        return [self.trainer, *self.servers.values()]

    def with_steps(self, steps: int) -> Config:
        """The config of the run that ends after so many."""
        return load(self.config_file, [f"run.steps={steps}"])

    def end(self) -> list[str]:
        """Kill what is left of this run; returns the command lines of what was left although its parent had ended."""
        own = {process.pid for member in self.members for process in member.family()}
        orphans = []
        mine = []
        for process in psutil.process_iter(["pid", "cmdline", "environ", "status"]):
            info = process.info
            if (info["environ"] or {}).get(MARK) == str(self.directory) and info["status"] != psutil.STATUS_ZOMBIE:
                mine.append(process)
                if process.pid not in own:
                    orphans.append(" ".join(info["cmdline"] or [])[:160])
        for process in mine:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(mine, timeout=10)
        return orphans

    def _write(self) -> Config:
        model = self._model()
        rows = [{"id": f"p{n}", "prompt": f"Compute {n}+1.", "answer": str(n + 1)} for n in range(PROMPTS)]
        data = self.directory / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        replay = self.seed % 2 == 1
        tree: dict[str, dict[str, Any]] = {
            "run": {
                "name": "run",
                "directory": str(self.disk),
                "seed": self.seed,
                "steps": ENDLESS,
                "save_every": (1, 2, 5)[self.seed % 3],
            }
            | {"keep_checkpoints": 3, "inspect_every": 0},
            "data": {"train": str(data)},
            "eval": {"sets": {}},
            "sampling": {"group_size": 4, "max_response_tokens": 8},
            "reward": {"function": "tests.chaos.rewards:by_chance", "timeout_s": 2.0},
            "stream": {"address": self.address, "prompts_per_batch": 4, "max_staleness": 2, "heartbeat_s": 0.3}
            | {"lease_timeout_s": 10.0, "batch_timeout_s": 120.0, "set_aside_s": 1.0},
            "algorithm": {"reuse": "replay", "utd": 2} if replay else {"reuse": "epochs", "utd": 1},
            "actor": {"path": str(model), "engine": self.engine},
            "critic": {
                "path": str(model),
                "engine": self.engine,
                "minibatches": 1,
                "timeout_s": 90.0,
                "restarts": 1000,
            },
            "guard": {"min_ess": 0.0, "stall_s": 90.0},
            "rollout": {"max_groups": 4, "connect_timeout_s": 600.0, "request_timeout_s": 60.0}
            | {"swap_timeout_s": 20.0, "start_timeout_s": 300.0},
            # scripted engines have no weights that a probe could be right under
            "publish": {"directory": str(self.directory / "weights"), "probe": False},
        }
        for section, values in self.changes.items():
            tree[section] = tree.get(section, {}) | values
        base = {"base": str(ROOT / "configs/demo.yaml")}
        self.config_file.write_bytes(msgspec.yaml.encode(base | tree))
        config = load(self.config_file)
        # demo.yaml's sets are merged with none, so they are taken out of the resolved config
        whole = msgspec.to_builtins(config)
        whole["eval"]["sets"] = {}
        self.config_file.write_bytes(msgspec.yaml.encode(whole))
        return load(self.config_file)

    def _model(self) -> Path:
        if self.real_python is not None:  # a model that SGLang serves
            from trainer.tiny_base.base import make_base

            make_base(self.directory / "base", quick=True)
            return self.directory / "base/actor"
        from tests.model_maker import make_model

        return make_model(self.directory / "model")


def wait_for(holds: Callable[[], Any], limit_s: float, step_s: float = 0.1) -> bool:
    """Whether it came to hold within the limit."""
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(step_s)
    return True
