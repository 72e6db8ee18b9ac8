"""Claims about `asyncppo checkpoint ls` and `verify`: what they say of whole, damaged and older checkpoints."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncppo.checkpoints import FORMAT, Manifest, in_run, kept, problems, write_manifest
from asyncppo.cli import app
from asyncppo.config import dump, from_tree
from asyncppo.report.checkpoints import age

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]


def a_checkpoint(run: Path, version: int, name: str = "") -> Path:
    path = run / "checkpoints" / (name or f"step_{version:08d}")
    for part in ("actor", "critic_0"):
        (path / part).mkdir(parents=True)
        (path / part / "state").write_bytes(b"x" * 1_000_000)
    manifest = Manifest(
        format=FORMAT,
        policy_version=version,
        run="run",
        time=time.time() - 3 * 3600,
        actor_path="actor",
        critic_paths=["critic"],
        parts=["actor", "critic_0"],
        files={},
    )
    write_manifest(path, manifest)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints 20, 30 and 40, of a run that keeps the newest and every twentieth."""
    tree = {"run": {"keep_checkpoints": 1, "keep_every": 20}, "data": {"train": "x"}, "actor": {"path": "x"}}
    for version in (20, 30, 40):
        a_checkpoint(tmp_path, version)
    (tmp_path / "config.yaml").write_bytes(dump(from_tree(tree)))
    return tmp_path


def ask(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["checkpoint", *map(str, arguments)])
    return result.exit_code, result.output


def line_of(output: str, word: str) -> str:
    (line,) = [line for line in output.splitlines() if word in line]
    return " ".join(line.split())


def test_ls_says_version_age_size_state_and_why_each_is_kept(run: Path) -> None:
    code, output = ask("ls", run)
    assert code == 0
    assert line_of(output, "step_00000020") == "step_00000020 20 3.0 h 2.0 MB whole multiple of 20"
    assert line_of(output, "step_00000030") == "step_00000030 30 3.0 h 2.0 MB whole"
    assert line_of(output, "step_00000040") == "step_00000040 40 3.0 h 2.0 MB whole multiple of 20"


def test_ls_says_what_is_damaged_and_what_is_of_an_earlier_version(run: Path) -> None:
    os.truncate(run / "checkpoints/step_00000040/critic_0/state", 10)
    a_checkpoint(run, 25, "damaged-step_00000025")
    old = run / "checkpoints" / "step_00000010"
    old.mkdir()
    (old / "trainer.json").write_text('{"policy_version": 10}')
    output = ask("ls", run)[1]
    assert "DAMAGED: critic_0/state has 10 bytes instead of 1000000" in line_of(output, "step_00000040")
    assert "DAMAGED: of an earlier version of asyncppo" in line_of(output, "step_00000010")
    assert "newest 1" in line_of(output, "step_00000030")  # the newest that is whole
    names = [path.name for path in in_run(run)]
    assert names == [
        "step_00000010",
        "step_00000020",
        "damaged-step_00000025",
        "step_00000030",
        "step_00000040",
    ]


def test_verify_finds_the_one_bit_that_is_another_and_exits_with_1(run: Path) -> None:
    code, output = ask("verify", run)
    assert (code, output.count(": whole")) == (0, 3)
    path = run / "checkpoints/step_00000030/actor/state"
    data = bytearray(path.read_bytes())
    data[777] ^= 4
    path.write_bytes(data)
    code, output = ask("verify", run)
    assert (code, output.count(": whole")) == (1, 2)
    assert "step_00000030: DAMAGED\n    actor/state differs from its checksum" in output
    assert ask("verify", run / "checkpoints/step_00000030")[0] == 1
    assert ask("verify", run / "checkpoints/step_00000040")[0] == 0
    assert "step_00000030" in ask("ls", run)[1]  # nothing was renamed


def test_all_that_is_wrong_is_said_not_only_the_first_thing(run: Path) -> None:
    path = run / "checkpoints/step_00000030"
    (path / "actor/state").unlink()
    os.truncate(path / "critic_0/state", 5)
    assert problems(path) == ["actor/state is missing", "critic_0/state has 5 bytes instead of 1000000"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls", "nowhere"),
        ("verify", "nowhere"),
        ("verify", "."),
        ("export", "nowhere", "--to", "out"),
        ("export", "run/checkpoints/step_00000020", "--to", "run"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(run: Path, arguments: tuple[str, ...]) -> None:
    (run / "run").symlink_to(run)
    command = [sys.executable, "-m", "asyncppo.cli", "checkpoint", *arguments]
    (run / "empty").mkdir()
    ended = subprocess.run(
        command,
        cwd=run / "empty" if "." in arguments else run,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1


def test_retention_keeps_the_newest_and_the_multiples() -> None:
    assert kept([], 2, 10) == {}
    assert kept([0, 5, 10, 15, 20, 25], 2, 10).keys() == {10, 20, 25}
    assert kept([0, 5, 10, 15, 20, 25], 2, 0).keys() == {20, 25}


def test_ages_are_readable() -> None:
    ages = [age(seconds) for seconds in (-1, 40, 720, 3 * 3600, 4 * 86400)]
    assert ages == ["0 s", "40 s", "12 min", "3.0 h", "4.0 days"]
