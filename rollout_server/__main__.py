"""`python -m rollout_server`: start one rollout server.

In this order, so that what is cheap to find out comes before what is dear: config and model directory, address, reward
function, the grading self-test, Hello to the trainer, and only after its Welcome the engine.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import sys
import uuid
from pathlib import Path
from typing import Annotated

import typer

from asyncppo import config as configuration
from asyncppo.config import Config
from asyncppo.errors import AddressError, AsyncPPOError, ConfigError, ModelError, RefusedError, UserError
from asyncppo.waits import HERE, Watchdog

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def check_model(config: Config, model: str) -> None:
    """Refuse a model that the engine would refuse after a minute.

    Raises:
        ModelError: no directory with config.json and tokenizer.json, and no hub name either.
        ConfigError: prompts and responses are longer than the model's positions.
    """
    directory = Path(model)
    if not directory.is_dir():
        is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not directory.parent.is_dir()
        if is_hub_name:
            return
        raise ModelError(
            f"{model}: there is no such model directory; where has this host the actor's starting model? (--model)"
        )
    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).is_file():
            raise ModelError(f"{model}: expected a Hugging Face model directory, found no {name}")
    try:
        model_config = json.loads((directory / "config.json").read_bytes())
    except ValueError as error:
        raise ModelError(f"{directory / 'config.json'}: is not JSON: {error}") from None
    positions = model_config.get("max_position_embeddings")
    wanted = config.data.max_prompt_tokens + config.sampling.max_response_tokens
    if isinstance(positions, int) and not model_config.get("rope_scaling") and wanted > positions:
        raise ConfigError(
            f"data.max_prompt_tokens + sampling.max_response_tokens is {wanted}, but {model} has "
            f"{positions} positions: lower one of the two"
        )


async def serve(
    config: Config, model: str, trainer: str, name: str, engine_url: str | None, log_directory: Path
) -> None:
    """Check, connect, serve until stopped."""
    from asyncppo import keys
    from asyncppo.transport.zmq import ZmqLink, check_address
    from rollout_server.loop import RolloutServer
    from rollout_server.reward import Grader
    from rollout_server.sglang_engine import SGLangEngine

    log = logging.getLogger("rollout_server")
    if not re.fullmatch(r"tcp://.+:\d+", trainer):
        raise AddressError(f"--trainer {trainer}: expected tcp://host:port")
    check_address(trainer, config.stream.insecure, has_keys=config.stream.keys is not None)
    if not re.fullmatch(r"[\w-][\w.-]{0,99}", name):
        raise ConfigError(f"--name {name}: expected at most 100 letters, digits, and . _ -")
    client_keys = keys.of_rollout_server(config.stream.keys, name)
    engine = SGLangEngine(config, model, log_directory / f"sglang-{name}.log", engine_url)
    grader = Grader(config.reward)
    try:
        await grader.self_test()
    except BaseException:
        grader.close()
        raise
    incarnation = uuid.uuid4().hex
    link = ZmqLink(trainer, f"{name}/{incarnation}".encode(), config.stream.max_message_mb << 20, client_keys)
    server = RolloutServer(config, link, engine, grader, name, model, incarnation)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does with SIGHUP
            loop.add_signal_handler(number, server.stop, signal.Signals(number).name)
    log.info("%s says Hello to %s", name, trainer)
    with Watchdog(f"rollout {name}", config.run_directory, config.guard.stall_s):
        beat = asyncio.create_task(HERE.beat(config.guard.stall_s), name="beat")
        try:
            await server.run()
        finally:
            beat.cancel()
    log.info("%s has ended", name)


@app.command()
def main(
    config_file: Annotated[Path, typer.Option("--config", help="The run's YAML file; both ends take the same one.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Overrides one key; may be repeated.")
    ] = None,
    trainer: Annotated[
        str | None,
        typer.Option(
            metavar="tcp://HOST:PORT", help="Where the trainer listens. Default: stream.address of the config."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What people call this server in logs and the monitor. Default: host-process.")
    ] = None,
    engine_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Attach to an SGLang server that runs already, for this rollout server alone, instead of starting "
            "one. Its API key, if it has one, is taken from ASYNCPPO_ENGINE_KEY.",
        ),
    ] = None,
    log_directory: Annotated[
        Path | None, typer.Option(help="Where SGLang's log goes. Default: logs/ in the run's directory.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where this host has the actor's starting model. Default: actor.path.")
    ] = None,
) -> None:
    """Generate, grade and stream groups of responses to a trainer, and take its new weights while generating.

    Servers join and leave a run at any time; start as many as there are GPUs. End one with Ctrl-C or SIGTERM: what it
    holds is leased to another.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    try:
        import uvloop

        config = configuration.load(config_file, overrides or [])
        chosen = model or config.actor.path
        check_model(config, chosen)
        uvloop.run(
            serve(
                config,
                chosen,
                trainer or config.stream.address,
                name or f"{socket.gethostname()}-{os.getpid()}",
                engine_url,
                log_directory or config.run_directory / "logs",
            )
        )
    except (UserError, RefusedError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except AsyncPPOError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app()
