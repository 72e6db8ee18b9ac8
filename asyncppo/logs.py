"""Logging: one line an event on stderr, with the time and who speaks."""

from __future__ import annotations

import logging
import sys


def set_up_logging(who: str, level: int = logging.INFO) -> None:
    """Send all of AsyncPPO's events to stderr; other libraries only speak up with warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(who))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("asyncppo").setLevel(level)


class _Line(logging.Formatter):
    """`12:34:56 learner: warning: what happened`; information bears no level."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{self.formatTime(record, '%H:%M:%S')} {self._who}: {level}{super().format(record)}"
