"""`asyncppo`: the command over all programs. A command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from asyncppo import __version__
from asyncppo.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="AsyncPPO: asynchronous off-policy PPO for LLM reasoning, with AsyPPO's mini-critics.\n\n"
    "New here? `scripts/demo.sh` makes everything it needs and trains a small model in a few minutes.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
config_app = typer.Typer(help="Look at a config before anything is started.", no_args_is_help=True)
app.add_typer(config_app, name="config")
checkpoint_app = typer.Typer(
    help="Look at a run's checkpoints, check them, and take a model out of one.", no_args_is_help=True
)
app.add_typer(checkpoint_app, name="checkpoint")
bench_app = typer.Typer(help="Measure a part of the system with real engines, on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

ConfigFile = Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file, such as configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key; may be repeated.")
]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory, such as runs/demo.")]


def main() -> None:
    """The `asyncppo` command; what was given and cannot work is one line on stderr, and exit code 2."""
    try:
        app(prog_name="asyncppo")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@config_app.command("check", epilog="Example: `asyncppo config check configs/demo.yaml --set algorithm.utd=2`")
def config_check(file: ConfigFile, overrides: Overrides = None) -> None:
    """Say whether a config is good: exit code 0, or 2 and one line that says what is wrong and where."""
    from asyncppo import config

    loaded = config.load(file, overrides or [])
    groups, size = loaded.stream.prompts_per_batch, loaded.sampling.group_size
    print(f"{file}: good: {loaded.run.steps} steps of {groups} groups of {size} responses")


@config_app.command("show", epilog="Example: `asyncppo config show configs/demo.yaml --set stream.max_staleness=2`")
def config_show(file: ConfigFile, overrides: Overrides = None) -> None:
    """Print the whole config with every default, and the numbers that follow from it."""
    from asyncppo import config

    loaded = config.load(file, overrides or [])
    print(config.dump(loaded).decode(), end="")
    print("\n# what follows from it")
    for name, number in loaded.derived().items():
        print(f"# {name}: {number}")


@config_app.command("docs", epilog="Example: `asyncppo config docs > docs/configuration.md`")
def config_docs() -> None:
    """Print the documentation of every key, in Markdown."""
    from asyncppo import config

    print(config.documentation())


@checkpoint_app.command("ls", epilog="Example: `asyncppo checkpoint ls runs/demo`")
def checkpoint_ls(run_directory: RunDirectory) -> None:
    """List a run's checkpoints: version, age, size, whole or damaged, and why retention keeps it.

    A run keeps the newest `run.keep_checkpoints`, and multiples of `run.keep_every` for good. `damaged-…` is what a
    resume found not to be whole and put aside; remove it when nobody wants to look at it any more.
    """
    from asyncppo.report.checkpoints import show

    show(run_directory, _console())


@checkpoint_app.command("verify", epilog="Example: `asyncppo checkpoint verify runs/demo`")
def checkpoint_verify(
    place: Annotated[Path, typer.Argument(metavar="RUN_DIR|CHECKPOINT", help="All checkpoints of a run, or one.")],
) -> None:
    """Read every file and compare it with the checksum in the manifest. Changes nothing.

    Exit codes: 0 all are whole, 1 one is not (it says which files), 2 there is no checkpoint.
    """
    from asyncppo.report.checkpoints import verify

    raise typer.Exit(verify(place, _console()))


@checkpoint_app.command(
    "export", epilog="Example: `asyncppo checkpoint export runs/demo/checkpoints/step_00000040 --to models/demo-40`"
)
def checkpoint_export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A directory that `ls` names.")],
    to: Annotated[Path, typer.Option(help="The directory to make.")],
    critic: Annotated[
        int | None, typer.Option(min=0, metavar="M", help="Critic M, with its scalar head. Default: the actor.")
    ] = None,
) -> None:
    """Write the actor, or a critic, as an ordinary Hugging Face directory: for transformers, SGLang, `critic.path`.

    The checkpoint is verified first, and left as it is. Runs in the trainer's environment, on the CPU.
    """
    from asyncppo import programs
    from asyncppo.report.checkpoints import check_export

    check_export(checkpoint, to)
    which = [] if critic is None else ["--critic", str(critic)]
    arguments = [str(checkpoint), "--to", str(to), *which]
    argv = programs.command("trainer", arguments, module="trainer.export_checkpoint")
    sys.stdout.flush()
    os.execve(argv[0], argv, programs.environment())


@bench_app.command("swap", epilog="Example: `asyncppo bench swap --sizes 10M --requests 16 --swaps 20`")
def bench_swap(
    sizes: Annotated[
        str, typer.Option(help="Random Qwen3 models (0.1M, 10M, 100M, 0.6B, 1.7B, 4B), or model directories.")
    ] = "0.1M,10M,100M",
    transports: Annotated[str, typer.Option(help="How the weights travel.")] = "disk,broadcast",
    requests: Annotated[str, typer.Option(help="Responses in flight at each server.")] = "1,16,64",
    swaps: Annotated[int, typer.Option(min=3, help="Versions of each row, one after the other.")] = 10,
    servers: Annotated[int, typer.Option(min=1, help="Rollout servers, each with an SGLang.")] = 1,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a response, at most.")] = 256,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the engines' weights.")] = "float32",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Of the engines.")] = "auto",
    check: Annotated[
        int, typer.Option(min=0, help="Responses of each row whose log-probs a Hugging Face forward is compared with.")
    ] = 64,
    publish_directory: Annotated[str, typer.Option(help="Where versions are written.")] = "/dev/shm",
    directory: Annotated[
        Path | None, typer.Option(help="Keep models, configs and logs here. Default: they are removed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON in place of the table.")] = False,
) -> None:
    """Hot swaps under load: publish version after version to real rollout servers, and time every phase.

    For each model its servers are started once; for each transport and load a trainer that learns nothing publishes.
    Generation stands still for pause + load + resume, which is held to 2 × bytes / bandwidth + 50 ms: the bandwidth of
    the page cache (disk) or the loopback (broadcast), measured beside it. Log-probs are compared with those of Hugging
    Face under the version that each token names; `wrong` is what the version before would give.

    Exit codes: 0 measured, 1 something failed, 2 what was given cannot work.
    """
    from asyncppo import programs

    options = {
        "--rollout": programs.interpreter("rollout"),
        "--sizes": sizes,
        "--transports": transports,
        "--requests": requests,
        "--swaps": swaps,
        "--servers": servers,
        "--tokens": tokens,
        "--dtype": dtype,
        "--device": device,
        "--check": check,
        "--publish-directory": publish_directory,
        **({"--directory": directory} if directory else {}),
    }
    arguments = [str(part) for option in options.items() for part in option] + ["--json"] * as_json
    argv = programs.command("trainer", arguments, module="trainer.bench")
    sys.stdout.flush()
    os.execve(argv[0], argv, programs.environment())


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: `asyncppo launch trainer -- --config configs/demo.yaml`",
)
def launch(
    context: typer.Context,
    role: Annotated[str, typer.Argument(metavar="trainer|rollout", help="Which program.")],
) -> None:
    """Become the trainer or a rollout server, in the environment that it needs.

    The interpreter is `ASYNCPPO_TRAINER_PYTHON` or `ASYNCPPO_ROLLOUT_PYTHON` if set, else that of
    `.venvs/trainer` or `.venvs/rollout`, else this one. What follows `--` goes to the program; `-- --help` shows what
    it takes.
    """
    from asyncppo import programs

    if role not in programs.MODULES:
        raise UserError(f"launch {role}: expected trainer or rollout")
    argv = programs.command("trainer" if role == "trainer" else "rollout", context.args)
    sys.stdout.flush()
    os.execve(argv[0], argv, programs.environment())


@app.command(epilog="Example: `asyncppo demo --config configs/demo.yaml --set run.steps=20`")
def demo(
    config: Annotated[Path, typer.Option(help="The run's YAML file.")] = Path("configs/demo.yaml"),
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run. Default: run.name of the config, numbered when it is taken.")
    ] = None,
) -> None:
    """Train with one rollout server on this machine, from start to report, and say whether the model learned.

    Makes the tiny base models if they are missing, starts the trainer and a rollout server, shows them live, evaluates
    before and after, and prints the report; the last line is JSON. Ctrl-C ends everything in order.

    Exit codes: 0 the model learned, 1 it did not or a program failed, 2 what was given cannot work, 130 stopped.
    """
    from asyncppo.demo import run_demo

    raise typer.Exit(run_demo(config, overrides or [], name, _console()))


@app.command(
    epilog="Example: `asyncppo compare configs/compare/grpo.yaml configs/compare/asyppo.yaml --seeds 5 --name paper`"
)
def compare(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="One YAML file for each method.")],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method: seeds 0, 1, …")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, of one thread each.")] = 2,
    name: Annotated[str, typer.Option(help="The comparison is in runs/compare/NAME.")] = "compare",
    lag: Annotated[int, typer.Option(min=0, help="Every batch is drawn by the weights of so many versions ago.")] = 0,
    grid: Annotated[
        str | None,
        typer.Option(metavar="A.B=X,Y", help="Tune one key for each method first, by mean training reward."),
    ] = None,
    tune_seeds: Annotated[int, typer.Option(min=1, help="Seeds of each of the grid's values: 100, 101, …")] = 2,
    baseline: Annotated[
        str | None, typer.Option(metavar="STEM", help="The config to compare with. Default: the first.")
    ] = None,
) -> None:
    """Run several methods under equal budgets of samples, and write one table and one picture.

    Every run is synchronous, in one process, without SGLang. The table has mean ± sd over seeds, and differences to the
    first config, paired by seed, with 95 % confidence intervals. Ctrl-C stops; the same command goes on.

    Exit codes: 0 done, 1 a run failed (the table is of the others), 2 what was given cannot work, 130 stopped.
    """
    from asyncppo.compare import Grid, Plan, run_compare

    plan = Plan(
        configs=tuple(configs),
        directory=Path("runs/compare") / name,
        overrides=tuple(overrides or []),
        seeds=seeds,
        jobs=jobs,
        lag=lag,
        grid=Grid.parse(grid) if grid else None,
        tune_seeds=tune_seeds,
        baseline=baseline,
    )
    raise typer.Exit(run_compare(plan, _console()))


@app.command(epilog="Example: `asyncppo monitor runs/demo`")
def monitor(run_directory: RunDirectory) -> None:
    """Show a run live, from its files: until it ends, or until Ctrl-C, which leaves the run alone."""
    from asyncppo.lifetime import stop_flag
    from asyncppo.monitor.live import watch

    watch(run_directory, _console(), stop_flag())


@app.command(epilog="Example: `asyncppo status runs/demo`")
def status(
    run_directory: RunDirectory,
    as_json: Annotated[bool, typer.Option("--json", help="Everything in one line of JSON, for programs.")] = False,
    with_stacks: Annotated[
        bool, typer.Option("--stacks", help="Also all threads' stacks of the processes on this host.")
    ] = False,
) -> None:
    """Say what each process of a run does and waits for, since when, and whether it lives.

    Exit codes: 0 all is well or has ended well, 1 something is dead or stalled, 2 there is no such run.
    """
    from msgspec import json

    from asyncppo import status as processes

    found = processes.processes_in(run_directory)
    if as_json:
        print(json.encode({"well": processes.is_well(found), "processes": found}).decode())
    else:
        processes.show(run_directory, found, _console())
    if with_stacks:
        print(processes.stacks(run_directory, found))
    raise typer.Exit(0 if processes.is_well(found) else 1)


@app.command(epilog="Example: `asyncppo report runs/demo`")
def report(
    run_directory: RunDirectory,
    plots: Annotated[bool, typer.Option(help="Draw the pictures, in RUN_DIR/plots.")] = True,
) -> None:
    """Print what a run did, learned and cost, and draw its pictures. Works on runs that go on or were killed, too."""
    from asyncppo.report.summary import summarize
    from asyncppo.report.text import draw_plots, show

    summary = summarize(run_directory)
    console = _console()
    show(summary, draw_plots(summary, console) if plots else [], console)


@app.command(epilog="Example: `asyncppo inspect runs/demo --sample 40/3 --by std`")
def inspect(
    run_directory: RunDirectory,
    sample: Annotated[
        str | None, typer.Option(metavar="STEP/RESPONSE", help="Show this one, token by token. Default: list them all.")
    ] = None,
    by: Annotated[
        Literal["advantage", "value", "std", "mask", "ratio"], typer.Option(help="What colours the tokens.")
    ] = "advantage",
    as_json: Annotated[bool, typer.Option("--json", help="Everything in one line of JSON, for programs.")] = False,
) -> None:
    """Say why a token got no gradient: the responses that a run kept, and what became of each of their tokens.

    A run keeps one group every `run.inspect_every` steps. A token can lose its policy term to the mask, to the cap of
    the behaviour weight or with its truncated response, and its entropy bonus to the filter.
    """
    from msgspec import json

    from asyncppo.report import inspect as kept

    if sample is None:
        samples = kept.samples_in(run_directory)
        if as_json:
            print(json.encode(kept.listing(samples)).decode())
        else:
            kept.show_listing(samples, _console())
        return
    chosen, index = kept.response_of(run_directory, sample)
    if as_json:
        print(json.encode(kept.details(chosen, index)).decode())
    else:
        kept.show_response(chosen, index, by, _console())


@app.command(epilog="Example: `asyncppo keys ~/keys --server gpu1 --server gpu2`")
def keys(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the keys are, or will be.")],
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A key for the rollout server of this --name; may be repeated."),
    ] = None,
) -> None:
    """Make keys for runs over several hosts: everything on TCP is then encrypted, and only known keys are let in.

    Without --server all rollout servers share one key. Keys that are there stay as they are, so servers can be added
    later, while a run goes on, too. Give both ends `stream.keys: DIR`. Secrets are never printed.
    """
    from asyncppo import keys

    made = keys.make(directory, server or [])
    for path in made:
        print(f"made {path}")
    print(
        f"{directory}: {'nothing was missing' if not made else 'done'}. The trainer's host needs trainer.key_secret, "
        "critics.key and servers/*.key;\na rollout server's trainer.key and servers/NAME.key_secret (or pool's); a "
        "critic's trainer.key and critics.key_secret."
    )


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


if __name__ == "__main__":
    main()
