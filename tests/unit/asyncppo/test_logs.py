"""Logging: who speaks, how loud, and that other libraries are quiet."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from asyncppo.logs import set_up_logging

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("asyncppo")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was written to stderr, without the times."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return [line.split(" ", 1)[1] for line in captured.err.splitlines()]


def test_a_line_says_who_speaks_and_only_marks_what_is_not_info(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("learner")
    log = logging.getLogger("asyncppo.intake")
    log.info("%s joined", "alice")
    log.warning("dropped")
    log.error("failed")
    log.debug("not shown")
    assert lines(capsys) == ["learner: alice joined", "learner: warning: dropped", "learner: error: failed"]


def test_other_libraries_speak_up_only_with_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("critic 1")
    logging.getLogger("urllib3.connectionpool").info("not shown")
    logging.getLogger("urllib3.connectionpool").warning("shown")
    assert lines(capsys) == ["critic 1: warning: shown"]


def test_a_second_set_up_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("trainer")
    set_up_logging("100% learner", level=logging.DEBUG)
    logging.getLogger("asyncppo").debug("once")
    assert lines(capsys) == ["100% learner: debug: once"]


def test_a_record_is_left_as_it_was_for_other_handlers(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("learner")
    seen: list[str] = []

    class Other(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.levelname)

    logging.getLogger().addHandler(Other())
    logging.getLogger("asyncppo").info("hello")
    assert seen == ["INFO"]
    assert lines(capsys) == ["learner: hello"]
