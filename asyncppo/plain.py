"""A plain run: its config, its place and its end, as `python -m trainer.plain` and `asyncppo compare` both see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asyncppo.config import Config, dump, load
from asyncppo.metrics import EVENTS_FILE, read

TWINS = (
    "actor.engine=plain",
    "critic.engine=plain",
    "actor.processes=1",
    "critic.processes=1",
    "run.save_every=0",
    "run.inspect_every=0",
)
"""What makes a config plain."""


def plain_config(path: Path, overrides: Sequence[str], directory: Path, seed: int) -> Config:
    """The config of one plain run, whose run directory is `directory`/<name of the file>/seed-<seed>.

    Raises:
        ConfigError: as `load`.
    """
    place = (f"run.directory={directory / path.stem}", f"run.name=seed-{seed}", f"run.seed={seed}")
    return load(path, [*overrides, *TWINS, *place])


def is_finished(config: Config, lag: int) -> bool:
    """Whether this very run, by its resolved config and its lag, is complete in its directory."""
    path = config.run_directory / "config.yaml"
    if not path.is_file() or path.read_bytes() != dump(config):
        return False
    found = {event["event"]: event for event in read(config.run_directory / EVENTS_FILE)}
    return "end" in found and found.get("start", {}).get("lag") == lag
