"""`python -m trainer`: the learner and its critics.

Without a role it is the supervisor, which checks everything and starts the others. With one it is that process.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from asyncppo.config import Config, dump, load
from asyncppo.errors import AsyncPPOError, ConfigError, EngineError, UserError
from asyncppo.lifetime import die_with_parent, orphaned, stop_flag
from asyncppo.logs import set_up_logging
from asyncppo.waits import Watchdog, forget_statuses

log = logging.getLogger("asyncppo.trainer")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="The run's YAML file.")],
    overrides: Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="Override one key; repeatable.")] = [],  # noqa: B006
    resume: Annotated[
        str, typer.Option(help="`auto` goes on from the newest checkpoint, `never` refuses a run that exists.")
    ] = "auto",
    role: Annotated[
        str, typer.Option(help="`all` starts everything; `learner` or `critic` is one process of it.")
    ] = "all",
    index: Annotated[int, typer.Option(min=0, help="Which critic.")] = 0,
    address: Annotated[list[str], typer.Option(help="Where the critics listen, in their order.")] = [],  # noqa: B006
) -> None:
    """Train: listen for rollout servers, learn from their groups, publish every version.

    Ctrl-C, SIGTERM or a closed terminal finishes the step, saves and exits 0; the same command goes on from there.
    Exit codes: 0 done or stopped, 1 failed, 2 something that was given cannot work.
    """
    try:
        code = _run(load(config, overrides), config, overrides, resume, role, index, address)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except AsyncPPOError as error:
        log.error("%s: %s", type(error).__name__, error)
        code = 1
    sys.stdout.flush()
    raise SystemExit(code)


def _run(
    config: Config, path: Path, overrides: list[str], resume: str, role: str, index: int, addresses: list[str]
) -> int:
    if resume not in ("auto", "never"):
        raise ConfigError(f"--resume {resume}: expected auto or never")
    set_up_logging(role if role != "critic" else f"critic {index}")
    should_stop = stop_flag()
    supervisor = int(os.environ.get("ASYNCPPO_SUPERVISED", "0"))
    if supervisor and role != "critic":
        die_with_parent(supervisor)
    arguments = ["--config", str(path), "--resume", resume, *(part for o in overrides for part in ("--set", o))]
    match role:
        case "all":
            return _all(config, arguments, resume, should_stop)
        case "learner":
            from trainer.roles import learner

            signal.signal(signal.SIGUSR1, _give_up)
            return learner(config, addresses or config.critic.addresses, should_stop)
        case "critic":
            from trainer.roles import critic

            given = addresses or config.critic.addresses[index : index + 1]
            if not given:
                raise ConfigError(f"critic {index} has no address: give --address, or critic.addresses in the config")
            # The learner, which is told to stop when the supervisor is gone, still needs its critics in order to finish
            # its step and to save, which may take `guard.stall_s`.
            alone = orphaned(supervisor, config.guard.stall_s) if supervisor else lambda: False
            by_learner = critic(config, index, given[0], lambda: should_stop() or alone())
            if not by_learner and supervisor == os.getppid():
                log.warning("told to end, and not by the learner")
                return 1  # the supervisor starts it again, unless it is what told it
            return 0
        case _:
            raise ConfigError(f"--role {role}: expected all, learner or critic")


def _give_up(*_: object) -> None:
    """The supervisor's word to the learner that a critic is gone: end in order, but save nothing with what is left."""
    raise EngineError("a critic has ended; see the line above and its log")


def _all(config: Config, arguments: list[str], resume: str, should_stop: Callable[[], bool]) -> int:
    from trainer.preflight import check
    from trainer.supervisor import supervise

    directory = config.run_directory
    if resume == "never" and (directory / "metrics.jsonl").exists():
        raise ConfigError(f"{directory} holds a run already, and --resume is never: choose another run.name")
    check(config)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_bytes(dump(config))
    forget_statuses(directory)
    with Watchdog("supervisor", directory, config.guard.stall_s) as watchdog:
        watchdog.code = supervise(config, arguments, should_stop, directory / "logs")
        return watchdog.code


if __name__ == "__main__":
    app(prog_name="python -m trainer")
