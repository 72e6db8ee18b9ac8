"""The children of a process: who is ended, and who is not ours to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from asyncppo.programs import Programs

pytestmark = pytest.mark.unit

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_a_child_that_was_there_before_outlives_the_block() -> None:
    before = subprocess.Popen(SLEEP)
    try:
        with Programs() as programs:
            ours = programs.start("sleeper", SLEEP)
        assert ours.code is not None
        assert before.poll() is None
    finally:
        before.kill()
        before.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="orphans come back to us on Linux only")
def test_a_grandchild_whose_parent_died_is_ended_with_the_block(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    parent = f"import subprocess; open({str(pid)!r}, 'w').write(str(subprocess.Popen({SLEEP!r}).pid))"
    with Programs() as programs:
        programs.start("parent", [sys.executable, "-c", parent]).process.wait()
        orphan = psutil.Process(int(pid.read_text()))
        assert orphan.is_running()
    assert not orphan.is_running()
