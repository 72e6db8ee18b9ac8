"""The command line, and the demo with programs that only pretend."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from asyncppo import __version__, programs
from asyncppo.cli import app
from asyncppo.errors import UserError
from tests.run_maker import write_run

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
DEMO = str(ROOT / "configs" / "demo.yaml")


def ask(*arguments: str) -> str:
    """The output of a command that ends well, run in this process."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "asyncppo.cli", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


# ---- the small commands ----


def test_a_good_config_is_said_to_be_good_in_one_line() -> None:
    assert ask("config", "check", DEMO).count("\n") == 1


def test_a_bad_config_is_one_line_on_stderr_and_exit_code_2(tmp_path: Path) -> None:
    result = command("config", "check", DEMO, "--set", "algorithm.utd=5")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {DEMO}: algorithm.utd: expected `int` <= 4, got 5\n"
    assert command("config", "check", DEMO).returncode == 0
    assert command("config", "check", str(tmp_path / "none.yaml")).returncode == 2


def test_the_whole_config_is_shown_with_what_follows_from_it(tmp_path: Path) -> None:
    shown = ask("config", "show", DEMO, "--set", "run.steps=7")
    assert "# responses_per_batch: 128" in shown
    again = tmp_path / "again.yaml"
    again.write_text(shown)
    assert "7 steps" in ask("config", "check", str(again))


def test_the_documentation_of_the_config_is_printed() -> None:
    assert ask("config", "docs").startswith("# Configuration")


def test_the_version_is_printed() -> None:
    assert ask("version") == f"{__version__}\n"


@pytest.mark.parametrize(
    "name", [["config", "check"], ["config", "show"], ["launch"], ["demo"], ["monitor"], ["report"]]
)
def test_help_teaches_by_example(name: list[str]) -> None:
    assert f"Example: asyncppo {' '.join(name)} " in " ".join(ask(*name, "--help").split())


def test_a_finished_run_can_be_monitored_and_reported(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "demo")
    assert "step 40/40" in command("monitor", str(directory)).stdout
    assert "40 of 40 steps" in ask("report", str(directory))
    assert (directory / "plots" / "overview.png").exists()


def test_a_directory_without_a_run_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for name in ("monitor", "report"):
        result = command(name, str(tmp_path))
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "module",
    ["asyncppo", "asyncppo.config", "asyncppo.messages", "asyncppo.cli", "asyncppo.demo", "asyncppo.report.text"],
)
def test_what_everything_imports_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "sglang", "deepspeed", "transformers", "matplotlib", "math_verify"} & set(loaded)


# ---- starting programs ----


def test_launch_becomes_the_program_in_its_environment(tmp_path: Path) -> None:
    python = pretend(tmp_path, "import sys, os; print(sys.argv[1:], os.environ['OMP_NUM_THREADS'])")
    environment = {"ASYNCPPO_ROLLOUT_PYTHON": python, "OMP_NUM_THREADS": "3"}
    result = command("launch", "rollout", "--", "--config", "x.yaml", "--help", **environment)
    assert result.stdout == "['-m', 'rollout_server', '--config', 'x.yaml', '--help'] 3\n"


def test_launch_knows_two_programs() -> None:
    result = command("launch", "critic")
    assert result.returncode == 2
    assert result.stderr == "error: launch critic: expected trainer or rollout\n"


def test_interpreters_come_from_the_environment_then_from_the_venvs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCPPO_TRAINER_PYTHON", sys.executable)
    assert programs.interpreter("trainer") == sys.executable
    monkeypatch.setenv("ASYNCPPO_TRAINER_PYTHON", str(tmp_path / "none"))
    with pytest.raises(UserError, match="ASYNCPPO_TRAINER_PYTHON"):
        programs.interpreter("trainer")
    monkeypatch.delenv("ASYNCPPO_TRAINER_PYTHON")
    python = tmp_path / "elsewhere" / "trainer" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setenv("ASYNCPPO_VENVS", str(tmp_path / "elsewhere"))
    assert programs.interpreter("trainer") == str(python)
    assert programs.interpreter("rollout") == sys.executable


# ---- the demo ----

PRETENDER = """
import os, signal, subprocess, sys, time
from pathlib import Path

sys.path.insert(0, {root!r})
from tests.run_maker import append, write_run

module, arguments = sys.argv[2], sys.argv[3:]
mode = os.environ.get("PRETEND", "learn")
settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
here = Path(os.environ["PRETEND_IN"])
(here / f"{{module}}.arguments").write_text(" ".join(arguments))
orphan = subprocess.Popen(["sleep", "600"], start_new_session=True)
(here / f"{{module}}.pids").write_text(f"{{os.getpid()}} {{orphan.pid}}")
done = []
if mode != "deaf":
    signal.signal(signal.SIGTERM, lambda *_: done.append("stopped"))
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if module == "trainer.tiny_base":
    print("the pretender makes a base", flush=True)
    for name in ("actor", "critic", "data"):
        (Path(arguments[1]) / name).mkdir(parents=True)
    for name in ("train", "eval"):
        (Path(arguments[1]) / "data" / f"{{name}}.jsonl").touch()
elif module == "trainer":
    if mode == "fail":
        print("\\n".join(f"trainer line {{number}}" for number in range(50)), flush=True)
        sys.exit(3)
    while mode in ("wait", "deaf", "server fails") and not done:
        time.sleep(0.02)
    if not done:
        after = 0.3 if mode == "no learning" else 0.75
        write_run(Path(settings["run.directory"]) / settings["run.name"], after=after)
    else:
        (here / "saved").touch()
else:
    if mode == "server fails":
        sys.exit("the server's last words")
    if mode in ("wait", "deaf"):
        while not done:
            time.sleep(0.02)
    else:
        time.sleep(1.0)
"""


def pretend(directory: Path, code: str) -> str:
    """An executable that takes an interpreter's arguments and runs this code instead."""
    script = directory / "pretender.py"
    script.write_text(code)
    executable = directory / "python"
    executable.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    executable.chmod(0o755)
    return str(executable)


class Demo:
    """`asyncppo demo` in a process of its own, with pretenders for programs."""

    def __init__(self, directory: Path, mode: str, *arguments: str, task: str = "tiny") -> None:
        self.directory = directory
        python = pretend(directory, PRETENDER.format(root=str(ROOT)))
        base = directory / "artifacts" / task
        config = directory / "demo.yaml"
        config.write_text(
            f"run: {{name: demo, steps: 40, directory: {directory / 'runs'}}}\n"
            f"data: {{train: {base}/data/train.jsonl}}\n"
            f"eval: {{sets: {{6-op: {base}/data/eval.jsonl}}}}\n"
            f"actor: {{path: {base}/actor}}\ncritic: {{path: {base}/critic}}\n"
        )
        environment = os.environ | {
            "ASYNCPPO_TRAINER_PYTHON": python,
            "ASYNCPPO_ROLLOUT_PYTHON": python,
            "PRETEND": mode,
            "PRETEND_IN": str(directory),
        }
        settings = ["--set", f"run.directory={directory / 'runs'}", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "asyncppo.cli", "demo", "--config", str(config), *settings],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, *names: str) -> None:
        """Until the pretenders have left these files."""
        deadline = time.monotonic() + 30
        while not all((self.directory / name).exists() for name in names):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)

    def result(self) -> tuple[int, str]:
        """Exit code and output; nothing that it started is left."""
        output, _ = self.process.communicate(timeout=60)
        for path in self.directory.glob("*.pids"):
            for pid in map(int, path.read_text().split()):
                assert not psutil.pid_exists(pid), f"{path.name} left {pid} behind"
        return self.process.returncode, output


def test_a_demo_that_learns_ends_with_its_verdict_and_code_0(tmp_path: Path) -> None:
    code, output = Demo(tmp_path, "learn").result()
    assert code == 0, output
    assert "the pretender makes a base" in output
    assert "the model learned" in output
    found = json.loads(output.splitlines()[-1])
    assert list(found) == [
        "pass_at_1_before",
        "pass_at_1_after",
        "steps",
        "groups",
        "dropped",
        "max_staleness_seen",
        "swaps",
        "train_wall_s",
    ]
    assert (found["pass_at_1_before"], found["pass_at_1_after"], found["steps"]) == (0.25, 0.75, 40)
    assert "launched" in (tmp_path / "runs/demo/events.jsonl").read_text().splitlines()[0]
    assert (tmp_path / "runs/demo/plots/overview.png").exists()


@pytest.mark.parametrize(("task", "makes"), [("tiny", True), ("chains", True), ("mine", False)])
def test_the_demo_makes_the_base_of_an_embedded_task_and_of_no_other(tmp_path: Path, task: str, makes: bool) -> None:
    code, output = Demo(tmp_path, "learn", task=task).result()
    assert code == 0, output
    made = tmp_path / "trainer.tiny_base.arguments"
    assert made.exists() == makes
    if makes:
        assert made.read_text() == f"--out {tmp_path}/artifacts/{task} --task {task}"


def test_both_programs_get_one_config_and_the_server_the_trainers_address(tmp_path: Path) -> None:
    Demo(tmp_path, "learn", "--set", "run.steps=40").result()
    trainer = (tmp_path / "trainer.arguments").read_text().split()
    server = (tmp_path / "rollout_server.arguments").read_text().split()
    assert server[: len(trainer)] == trainer
    address = next(word for word in trainer if word.startswith("stream.address=")).partition("=")[2]
    assert server[server.index("--trainer") + 1] == address
    assert address.startswith("tcp://127.0.0.1:")
    assert "run.steps=40" in trainer


def test_a_second_demo_takes_a_fresh_name_and_reuses_the_base(tmp_path: Path) -> None:
    Demo(tmp_path, "learn").result()
    (tmp_path / "trainer.tiny_base.arguments").unlink()
    code, output = Demo(tmp_path, "learn").result()
    assert code == 0, output
    assert (tmp_path / "runs/demo-2/metrics.jsonl").exists()
    assert not (tmp_path / "trainer.tiny_base.arguments").exists()


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    code, output = Demo(tmp_path, "learn", "--name", "mine").result()
    assert code == 2
    assert "exists already" in output


def test_a_demo_that_does_not_learn_says_so_and_ends_with_1(tmp_path: Path) -> None:
    code, output = Demo(tmp_path, "no learning").result()
    assert code == 1
    assert "not met: learning: pass@1 of 6-op went from 0.250 to 0.300" in output
    assert json.loads(output.splitlines()[-1])["pass_at_1_after"] == 0.3


def test_a_trainer_that_fails_is_shown_by_the_end_of_its_log(tmp_path: Path) -> None:
    code, output = Demo(tmp_path, "fail").result()
    assert code == 1
    assert "the trainer ended with exit code 3" in output
    assert "trainer line 30\n" in output
    assert "trainer line 29\n" not in output
    assert "trainer line 49\n" in output


def test_a_server_that_fails_ends_the_trainer_too(tmp_path: Path) -> None:
    code, output = Demo(tmp_path, "server fails").result()
    assert code == 1
    assert "the rollout server ended with exit code 1" in output
    assert "the server's last words" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both_in_order(tmp_path: Path, number: signal.Signals) -> None:
    demo = Demo(tmp_path, "wait")
    demo.wait_for("trainer.pids", "rollout_server.pids")
    demo.process.send_signal(number)
    code, output = demo.result()
    assert code == 130
    assert "stopping the trainer and the rollout server" in output
    assert "nothing is left running" in output
    assert (tmp_path / "saved").exists()


def test_a_second_signal_ends_programs_that_do_not_listen(tmp_path: Path) -> None:
    demo = Demo(tmp_path, "deaf")
    demo.wait_for("trainer.pids", "rollout_server.pids")
    demo.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    demo.process.send_signal(signal.SIGINT)
    code, output = demo.result()
    assert code == 130
    assert "the trainer had to be ended by force" in output


def test_programs_end_when_the_demo_is_killed(tmp_path: Path) -> None:
    demo = Demo(tmp_path, "wait")
    demo.wait_for("trainer.pids", "rollout_server.pids")
    demo.process.kill()
    demo.process.wait(timeout=30)
    children = [int((tmp_path / f"{name}.pids").read_text().split()[0]) for name in ("trainer", "rollout_server")]
    deadline = time.monotonic() + 60
    while any(map(psutil.pid_exists, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in children if psutil.pid_exists(pid)]
    for path in tmp_path.glob("*.pids"):  # what the pretenders left on purpose has nobody now who could end it
        os.kill(int(path.read_text().split()[1]), signal.SIGKILL)
    demo.process.communicate(timeout=30)
    assert not left
