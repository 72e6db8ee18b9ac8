"""`python -m trainer.bench`: what `asyncppo bench swap` starts, in the trainer's environment."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, cast

import msgspec
import torch
import typer
from rich.console import Console
from rich.table import Table

from asyncppo.errors import AsyncPPOError, ConfigError, UserError
from asyncppo.logs import set_up_logging
from trainer.bench.swap import Plan, Row, Transport, bench

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    rollout: Annotated[str, typer.Option()],
    sizes: Annotated[str, typer.Option()] = ",".join(Plan.sizes),
    transports: Annotated[str, typer.Option()] = ",".join(Plan.transports),
    requests: Annotated[str, typer.Option()] = ",".join(map(str, Plan.requests)),
    swaps: Annotated[int, typer.Option(min=3)] = Plan.swaps,
    servers: Annotated[int, typer.Option(min=1)] = Plan.servers,
    tokens: Annotated[int, typer.Option(min=2)] = Plan.tokens,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option()] = Plan.dtype,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = Plan.device,
    check: Annotated[int, typer.Option(min=0)] = Plan.check,
    publish_directory: Annotated[str, typer.Option()] = Plan.publish_directory,
    directory: Annotated[Path | None, typer.Option()] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Swap weights under load, and say what each phase took: see `asyncppo bench swap --help`."""
    torch.set_num_threads(1)  # the engines want the cores
    set_up_logging("bench")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the servers on the way out
    try:
        with tempfile.TemporaryDirectory(prefix="asyncppo-bench-") as temporary:
            plan = Plan(
                rollout_python=rollout,
                directory=directory or Path(temporary),
                sizes=_words(sizes),
                transports=_transports(transports),
                requests=_numbers(requests),
                swaps=swaps,
                servers=servers,
                tokens=tokens,
                dtype=dtype,
                device=device,
                publish_directory=publish_directory,
                check=check,
            )
            rows = bench(plan)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except AsyncPPOError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if as_json:
        print(msgspec.json.encode([asdict(row) for row in rows]).decode())
    else:
        show(rows)


def show(rows: Sequence[Row]) -> None:
    """The table; times in milliseconds, medians with the largest in brackets."""
    table = Table(title="Hot swaps under load: ms, median (largest)")
    heads = ("model", "MB", "transport", "in flight", "swaps", "publish", "prepare", "pause", "load", "resume")
    for head in (*heads, "stands still", "limit", "", "served", "probe gap", "log-prob gap", "wrong", "lost"):
        table.add_column(head, justify="left" if head in ("model", "transport") else "right")
    for row in rows:
        spreads = (row.publish_s, row.prepare_s, row.pause_s, row.load_s, row.resume_s, row.still_s)
        times = [f"{1e3 * spread.median:.0f} ({1e3 * spread.largest:.0f})" for spread in (*spreads, row.served_s)]
        table.add_row(
            row.size,
            f"{row.bytes / 1e6:.1f}",
            row.transport,
            f"{row.servers} × {row.requests}",
            str(row.swaps),
            *times[:-1],
            f"{1e3 * row.limit_s:.0f}",
            "✓" if row.in_reach else "✗",
            times[-1],
            f"{row.probe_gap:.1e}",
            f"{row.gaps.largest:.1e}",
            f"{row.gaps.wrong:.1e}",
            str(row.lost_groups),
        )
    Console(width=220).print(table)


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _transports(text: str) -> list[Transport]:
    names = _words(text)
    if not names or set(names) - {"disk", "broadcast"}:
        raise ConfigError(f"--transports {text}: expected disk, broadcast, or both separated by a comma")
    return cast(list[Transport], names)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in _words(text)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--requests {text}: expected whole numbers from 1 up, separated by commas")
    return numbers


if __name__ == "__main__":
    app(prog_name="asyncppo bench swap")
