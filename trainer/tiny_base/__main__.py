"""`python -m trainer.tiny_base`: see the package's own words."""

from pathlib import Path
from typing import Annotated

import typer
from transformers.utils.logging import disable_progress_bar

from asyncppo.errors import UserError
from trainer.tiny_base.base import make_base


def main(
    out: Annotated[Path, typer.Option(help="Where the base goes: actor/, critic/, data/ and base.json.")],
    task: Annotated[str, typer.Option(help="The embedded task: tiny or chains.")] = "tiny",
    size: Annotated[str, typer.Option(help="small; for chains also large, for a GPU: an untried guess.")] = "small",
    seed: Annotated[int, typer.Option(help="Decides the weights, the text and the data sets.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few dozen steps: real files, models that know nothing.")] = False,
) -> None:
    """Train the tiny base models and write the data sets of an embedded task."""
    disable_progress_bar()
    try:
        make_base(out, task=task, size=size, seed=seed, quick=quick)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
