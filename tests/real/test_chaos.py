"""A minute of chaos with real processes; `scripts/chaos.sh --minutes 5 --seed S` is the same for longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.cluster import Cluster
from tests.chaos.harness import Chaos

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]


def test_nothing_is_lost_repeated_or_too_stale_whatever_dies(tmp_path: Path) -> None:
    said: list[str] = []
    summary = Chaos(Cluster(tmp_path, seed=2, engine="plain"), seconds=40, say=said.append).run()
    story = "\n".join([*said, str(summary.line())])
    assert summary.completed, story
    assert summary.findings.problems == [], story
    assert (summary.stalls_unexplained, summary.deaths_unexplained, summary.left_behind) == (0, 0, []), story
    assert summary.good
    assert summary.kills, "a minute of faults, and nothing was killed"
    assert summary.findings.groups >= 4 * summary.steps > 0
