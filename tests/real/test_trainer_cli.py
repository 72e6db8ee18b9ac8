"""`python -m trainer` as a user meets it: what cannot work exits 2 with one line; no end leaves a process behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

from asyncppo import ports
from asyncppo.config import Config
from asyncppo.metrics import EVENTS_FILE, read
from tests.model_maker import a_config, a_model
from trainer.checkpoint import Checkpoints

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

REPOSITORY = Path(__file__).parents[2]
START_S = 120
"""A loaded machine takes this long at most to import PyTorch three times."""


def command(directory: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "trainer", "--config", str(directory / "config.yaml"), *arguments]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


# --- what cannot work ------------------------------------------------------------------------------------------------

BAD = {
    "unknown key": (("algorithm.utdd=2",), "unknown key algorithm.utdd; did you mean algorithm.utd?"),
    "utd 5": (("algorithm.utd=5",), "algorithm.utd: expected `int` <= 4"),
    "max_staleness -1": (("stream.max_staleness=-1",), "stream.max_staleness: expected `int` >= 0"),
    "missing model": (("actor.path={directory}/none",), "{directory}/none: there is no such model directory"),
    "missing hub model": (("actor.path=nobody/nothing",), "nobody/nothing: there is no such model directory"),
    "empty dataset": (("data.train={directory}/empty.jsonl",), "{directory}/empty.jsonl: the dataset is empty"),
    "no loopback": (("stream.address=tcp://0.0.0.0:{port}",), "tcp://0.0.0.0:{port} is not loopback"),
    "port taken": (("stream.address=tcp://127.0.0.1:{taken}",), "cannot listen on tcp://127.0.0.1:{taken}"),
}


def refusal(directory: Path, *arguments: str) -> str:
    """The one error line of a command that has to exit 2."""
    started = time.monotonic()
    ended = subprocess.run(
        command(directory, *arguments), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=90
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - started < 60
    lines = ended.stderr.splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    assert len(errors) == 1, ended.stderr
    assert errors[0].startswith("error: ")
    return errors[0].removeprefix("error: ")


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_exits_2_with_one_line_and_starts_nothing(tmp_path: Path, case: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        places = {"directory": tmp_path, "port": ports.free_port(), "taken": holder.getsockname()[1]}
        a_config(tmp_path, f"stream.address=tcp://127.0.0.1:{places['port']}")
        (tmp_path / "empty.jsonl").touch()
        overrides, expected = BAD[case]
        arguments = [part for override in overrides for part in ("--set", override.format(**places))]
        if not any(override.startswith("stream.address") for override in overrides):
            arguments += ["--set", f"stream.address=tcp://127.0.0.1:{places['port']}"]
        assert expected.format(**places) in refusal(tmp_path, *arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("--role", "learner", "--set", "algorithm.critics=0", "--set", "stream.address=tcp://0.0.0.0:{port}"),
            "tcp://0.0.0.0:{port} is not loopback",
        ),
        (
            ("--role", "learner", "--address", "ipc:///tmp/none", "--address", "tcp://10.1.2.3:{port}"),
            "tcp://10.1.2.3:{port} is not loopback",
        ),
        (("--role", "learner"), "the learner has the addresses of 0 critics, and algorithm.critics is 2"),
        (("--role", "critic", "--address", "tcp://0.0.0.0:{port}"), "tcp://0.0.0.0:{port} is not loopback"),
        (("--role", "critic", "--index", "1"), "critic 1 has no address"),
        (("--role", "teacher"), "--role teacher: expected all, learner or critic"),
        (("--resume", "maybe"), "--resume maybe: expected auto or never"),
    ],
)
def test_a_role_that_is_started_by_hand_refuses_what_cannot_work_too(
    tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    a_config(tmp_path)
    port = ports.free_port()
    assert expected.format(port=port) in refusal(tmp_path, *(part.format(port=port) for part in arguments))


# --- ends ------------------------------------------------------------------------------------------------------------


class Run:
    """A trainer with two critics that waits for rollout servers, and all the processes it started."""

    def __init__(self, directory: Path, *overrides: str) -> None:
        settings = [f"stream.address=tcp://127.0.0.1:{ports.free_port()}", *overrides]
        self.config: Config = a_config(directory, *settings)
        arguments = [part for setting in settings for part in ("--set", setting)]
        self.log = directory / "trainer.log"
        with self.log.open("ab") as sink:
            self.supervisor = psutil.Popen(
                command(directory, *arguments), cwd=REPOSITORY, env=environment(), stdout=sink, stderr=sink
            )
        self.family: list[psutil.Process] = [self.supervisor]

    def wait_until(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not holds():
            assert self.supervisor.poll() is None, self.said()
            assert time.monotonic() < deadline, f"waited for: {what}\n{self.said()}"
            time.sleep(0.1)
        self.family = [self.supervisor, *self.supervisor.children(recursive=True)]

    def wait_until_it_waits_for_servers(self) -> None:
        self.wait_until("version 0 to be published", lambda: (self.config.weights_directory / "v00000000").exists())

    def role(self, *words: str) -> psutil.Process:
        (found,) = [process for process in self.family[1:] if set(words) <= set(process.cmdline())]
        return found

    def said(self) -> str:
        logs = [self.log, *sorted((self.config.run_directory / "logs").glob("*.log"))]
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')}" for log in logs if log.exists())

    def left_behind(self, within_s: float) -> list[psutil.Process]:
        return psutil.wait_procs(self.family, timeout=within_s)[1]

    def end(self) -> None:
        """Leave nothing of a failed test behind."""
        if self.supervisor.is_running():
            self.family += self.supervisor.children(recursive=True)
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.supervisor.wait(10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts trainers of one run directory."""
    with contextlib.ExitStack() as ends:

        def a_run(*overrides: str) -> Run:
            trainer = Run(tmp_path, *overrides)
            ends.callback(trainer.end)
            return trainer

        yield a_run


@pytest.fixture
def run(start: Callable[[], Run]) -> Run:
    return start()


def test_sigterm_while_it_waits_for_servers_saves_exports_and_exits_0_with_nothing_left(run: Run) -> None:
    run.wait_until_it_waits_for_servers()
    assert len(run.family) == 4
    run.supervisor.send_signal(signal.SIGTERM)
    assert run.supervisor.wait(timeout=60) == 0, run.said()
    assert run.left_behind(within_s=1) == []
    found = Checkpoints(run.config).latest()
    assert found is not None
    path, state = found
    assert (path.name, state.policy_version) == ("step_00000000", 0)
    AutoModelForCausalLM.from_pretrained(run.config.run_directory / "actor")
    assert not list((run.config.run_directory / "checkpoints").glob(".partial-*"))
    assert list(Path(run.config.publish.directory).iterdir()) == []
    (end,) = [event for event in read(run.config.run_directory / EVENTS_FILE) if event["event"] == "end"]
    assert end["reason"] == "the trainer was stopped"
    assert "Traceback" not in run.said()


def test_the_same_command_goes_on_from_there_and_a_foreign_checkpoint_is_refused_by_name(
    start: Callable[[], Run], tmp_path: Path
) -> None:
    for _ in range(2):
        run = start()
        run.wait_until_it_waits_for_servers()
        run.supervisor.send_signal(signal.SIGTERM)
        assert run.supervisor.wait(timeout=60) == 0, run.said()
    assert "going on from" in run.said()
    other = ("--set", "algorithm.critics=1", "--set", f"stream.address=tcp://127.0.0.1:{ports.free_port()}")
    ended = subprocess.run(
        command(tmp_path, *other), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=90
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "made with 2 critics" in ended.stderr
    assert str(a_model()) in ended.stderr


def test_a_last_checkpoint_that_cannot_be_saved_ends_the_trainer_with_1_and_the_reason(run: Run) -> None:
    run.wait_until_it_waits_for_servers()
    (run.config.run_directory / "checkpoints").write_text("in the way")
    run.supervisor.send_signal(signal.SIGTERM)
    assert run.supervisor.wait(timeout=60) == 1, run.said()
    assert "CheckpointError: the last checkpoint could not be saved" in run.said()
    failed = [e for e in read(run.config.run_directory / EVENTS_FILE) if e["event"] == "checkpoint_failed"]
    assert ["File exists" in event["reason"] for event in failed] == [True, True]  # it was tried once more
    AutoModelForCausalLM.from_pretrained(run.config.run_directory / "actor")  # what it had learned is not lost
    assert run.left_behind(within_s=1) == []


def test_sigterm_while_it_starts_exits_0_with_nothing_left(run: Run) -> None:
    run.wait_until("the learner to listen", lambda: "listening for rollout servers" in run.said())
    run.supervisor.send_signal(signal.SIGTERM)
    assert run.supervisor.wait(timeout=START_S) == 0, run.said()
    assert run.left_behind(within_s=1) == []
    assert Checkpoints(run.config).latest() is not None


def test_a_killed_supervisor_leaves_no_child_and_no_weights_behind(run: Run) -> None:
    run.wait_until_it_waits_for_servers()
    run.supervisor.kill()
    assert run.left_behind(within_s=10) == [], run.said()
    assert list(Path(run.config.publish.directory).iterdir()) == []
    found = Checkpoints(run.config).latest()
    assert found is not None  # the learner was asked to stop, and its critics waited for it
    assert "Traceback" not in run.said()


def test_a_killed_critic_that_may_not_be_started_again_ends_the_trainer_with_1_and_its_name(
    start: Callable[..., Run],
) -> None:
    run = start("critic.restarts=0")
    run.wait_until_it_waits_for_servers()
    run.role("critic", "--index", "1").kill()
    assert run.supervisor.wait(timeout=60) == 1, run.said()
    assert run.left_behind(within_s=1) == []
    assert "critic 1 ended with exit code -9; the others are ended too" in run.log.read_text()
    assert "EngineError: a critic has ended" in run.log.read_text()  # the learner ended in order
    assert "was killed" not in run.said()
    assert list(Path(run.config.publish.directory).iterdir()) == []


def statuses(run: Run, expected_code: int) -> dict[str, str]:
    """The condition of each process, as `asyncppo status` says it."""
    asked = [sys.executable, "-m", "asyncppo.cli", "status", str(run.config.run_directory), "--json"]
    said = subprocess.run(asked, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60)
    assert said.returncode == expected_code, said.stdout + said.stderr
    return {each["status"]["role"]: each["condition"] for each in json.loads(said.stdout)["processes"]}


def test_a_killed_or_told_critic_is_started_again_and_the_trainer_still_saves_all_of_them(run: Run) -> None:
    run.wait_until_it_waits_for_servers()
    roles = ["supervisor", "learner", "critic 0", "critic 1"]
    assert statuses(run, 0) == dict.fromkeys(roles, "running")
    run.role("critic", "--index", "1").send_signal(signal.SIGSTOP)
    assert statuses(run, 1)["critic 1"] == "stopped"
    lost = [run.role("critic", "--index", index) for index in "01"]
    lost[1].kill()
    lost[0].terminate()  # as a batch system does that ends every process: none of them may be missing in the checkpoint
    psutil.wait_procs(lost, timeout=20)
    assert statuses(run, 1)["critic 1"] == "dead"
    run.supervisor.send_signal(signal.SIGTERM)
    assert run.supervisor.wait(timeout=START_S) == 0, run.said()
    assert run.left_behind(within_s=1) == []
    assert "critic 1 ended with exit code -9; it is started again in 1 s (1 of 3, critic.restarts)" in run.said()
    assert "critic 0 ended with exit code 1; it is started again" in run.said()
    assert Checkpoints(run.config).latest() is not None
    events = [event for event in read(run.config.run_directory / EVENTS_FILE) if event["event"] == "critic_restarted"]
    assert sorted(event["critic"] for event in events) == [0, 1]
    assert statuses(run, 0) == dict.fromkeys(roles, "ended")


def test_a_critic_that_dies_whenever_it_is_started_ends_the_trainer_with_1_and_its_last_lines(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CURSED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = start("critic.restarts=1")
    assert run.supervisor.wait(timeout=START_S) == 1, run.said()
    said = run.log.read_text()
    assert "critic 1 ended with exit code 7; it is started again in 1 s (1 of 1, critic.restarts)" in said
    assert "critic 1 ended with exit code 7; the others are ended too" in said
    assert "critic-1.log:\nthis machine has a curse on critic 1\n" in said
    log = run.config.run_directory / "logs/critic-1.log"
    assert log.read_text().count("this machine has a curse on critic 1") == 2  # its two lives
    assert run.left_behind(within_s=1) == []
    assert statuses(run, 1)["supervisor"] == "failed"


CURSED = """
import os, sys
words = sys.orig_argv
if "critic" in words and words[words.index("--index") + 1] == "1":
    print("this machine has a curse on critic 1", file=sys.stderr, flush=True)
    os._exit(7)
"""


def test_a_killed_learner_ends_the_trainer_with_1_and_its_critics(run: Run) -> None:
    run.wait_until_it_waits_for_servers()
    run.role("learner").kill()
    assert run.supervisor.wait(timeout=60) == 1, run.said()
    assert run.left_behind(within_s=1) == []
    assert "the learner ended with exit code -9; the others are ended too" in run.log.read_text()
    assert "was killed" not in run.said()


CRITIC = """
import sys
import trainer.__main__ as program
patience_s, orphaned = float(sys.argv.pop(1)), program.orphaned
def impatient(parent, for_s):
    assert for_s == 1800, for_s  # guard.stall_s
    return orphaned(parent, patience_s)
program.orphaned = impatient
program.app(prog_name="critic")
"""


@pytest.mark.parametrize(("patience_s", "leaves"), [(1, True), (1000, False)])
def test_a_critic_without_its_supervisor_waits_a_while_for_the_learner_and_then_leaves(
    tmp_path: Path, patience_s: int, leaves: bool
) -> None:
    a_config(tmp_path)
    socket_file = tmp_path / "critic"
    arguments = ["--config", str(tmp_path / "config.yaml"), "--role", "critic", "--address", f"ipc://{socket_file}"]
    orphan = subprocess.Popen(
        [sys.executable, "-c", CRITIC, str(patience_s), *arguments],
        cwd=REPOSITORY,
        env=environment() | {"ASYNCPPO_SUPERVISED": str(1 << 30)},  # nobody's pid
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if not leaves:
            deadline = time.monotonic() + START_S
            while not socket_file.exists():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            with pytest.raises(subprocess.TimeoutExpired):
                orphan.wait(5)
            orphan.terminate()
        _, said = orphan.communicate(timeout=START_S)
        assert orphan.returncode == 0, said
        assert "Traceback" not in said
    finally:
        orphan.kill()
        orphan.communicate()
