"""Logging: one line an event on stderr, with the time and who speaks."""

from __future__ import annotations

import logging
import sys


def set_up_logging(who: str, level: int = logging.INFO) -> None:
    """Send all of AsyncPPO's events to stderr; other libraries only speak up with warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}: %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(_quiet_info)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("asyncppo").setLevel(level)


def _quiet_info(record: logging.LogRecord) -> bool:
    record.levelname = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}:"
    return True
