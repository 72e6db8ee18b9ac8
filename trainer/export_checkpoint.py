"""`python -m trainer.export_checkpoint`: the actor or a critic of a checkpoint as an ordinary Hugging Face directory.

What `asyncppo checkpoint export` starts: it needs torch, which the command line does not have everywhere.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from asyncppo import checkpoints, config
from asyncppo.errors import AsyncPPOError, CheckpointError, ConfigError
from trainer.model.export import export
from trainer.model.networks import PolicyNet, ValueNet, files_of
from trainer.model.states import SavedState

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, such as runs/demo/checkpoints/step_00000040.")],
    to: Annotated[Path, typer.Option(help="Directory to make.")],
    critic: Annotated[int | None, typer.Option(min=0, help="This critic instead of the actor.")] = None,
) -> None:
    """Write the actor, or a critic, of a checkpoint as a Hugging Face directory."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        export_checkpoint(checkpoint, to, critic)
    except AsyncPPOError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(to)


def export_checkpoint(checkpoint: Path, to: Path, critic: int | None = None) -> None:
    """Write the weights of a whole checkpoint, in the dtype that the run trains with, with config and tokenizer.

    Raises:
        CheckpointError: it is damaged, or has no such critic.
        ConfigError: there is something at `to`.
        ModelError: the model that the run began with is not there any more; its config and tokenizer are needed.
    """
    if to.exists():
        raise ConfigError(f"{to} exists: choose another directory")
    part = "actor" if critic is None else f"critic_{critic}"
    wrong = checkpoints.problems(checkpoint)
    if wrong:
        raise CheckpointError(f"{checkpoint} is not whole: {'; '.join(wrong)}")
    parts = checkpoints.read_manifest(checkpoint).parts
    if part not in parts:
        raise CheckpointError(f"{checkpoint} has no {part}: it has {', '.join(parts)}")
    settings = config.load(checkpoint / checkpoints.CONFIG)
    network: PolicyNet | ValueNet
    if critic is None:
        path, network = settings.actor.path, PolicyNet(settings.actor.path, settings.actor)
    else:
        of_critic = settings.critic_of(critic)
        path, network = str(of_critic.path), ValueNet(str(of_critic.path), of_critic, seed=0)
    saved = SavedState(checkpoint / part)
    parameters = dict(network.named_parameters())
    weights: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name, values in progress.track(saved.weights(), total=len(saved.shapes), description=f"reading {part}"):
            if name not in parameters or parameters[name].shape != values.shape:
                raise CheckpointError(f"{checkpoint}: has {name} of shape {tuple(values.shape)}, and {path} has not")
            weights[name.removeprefix("hf.")] = values.to(parameters[name].dtype)
    partial = to.with_name(f".partial-{to.name}-{os.getpid()}")
    with torch.no_grad():
        export(network.hf, weights, partial, files_of(path))
    os.replace(partial, to)


if __name__ == "__main__":
    app(prog_name="python -m trainer.export_checkpoint")
