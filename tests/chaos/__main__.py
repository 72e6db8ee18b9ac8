"""`python -m tests.chaos`: break a run in every way there is, for some minutes, and audit what it left."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tests.chaos.cluster import ROOT, Cluster
from tests.chaos.harness import Chaos


def main(
    minutes: Annotated[
        float, typer.Option(help="How long faults are made; the run's start and end come on top.")
    ] = 5.0,
    seed: Annotated[
        int, typer.Option(help="Of the schedule, the run and the network; an odd one trains with replay.")
    ] = 0,
    real: Annotated[bool, typer.Option("--real", help="Rollout server `a` has a real SGLang.")] = False,
    engine: Annotated[str, typer.Option(help="deepspeed or plain")] = "deepspeed",
    directory: Annotated[Path | None, typer.Option(help="Where it happens; kept. Default: temporary.")] = None,
) -> None:
    """Faults are told as they happen; the last line is JSON. Exit code 0: complete, and nothing was found."""
    place = directory or Path(tempfile.mkdtemp(prefix="asyncppo-chaos-"))
    real_python = str(ROOT / ".venvs/rollout/bin/python") if real else None
    chaos = Chaos(
        Cluster(place.resolve(), seed, engine, real_python), 60 * minutes, say=lambda line: print(line, flush=True)
    )
    summary = chaos.run()
    if summary.good and directory is None:
        shutil.rmtree(place)
    else:
        print(f"everything is in {place}", flush=True)
    print(json.dumps(summary.line()), flush=True)
    raise SystemExit(0 if summary.good else 1)


if __name__ == "__main__":
    typer.run(main)
