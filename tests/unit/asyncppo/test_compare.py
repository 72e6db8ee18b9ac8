"""Comparing methods: statistics by hand, what is run, resuming, failures; on runs that a small script fakes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from asyncppo import compare
from asyncppo.compare import Grid, Job, Plan, run_compare, shares
from asyncppo.config import load
from asyncppo.errors import ConfigError
from asyncppo.plain import plain_config
from asyncppo.report.compare import Method, Run, as_json, markdown, paired, read_run, spread, t_quantile, tables
from asyncppo.report.compare_plots import draw, smoothed
from tests.run_maker import append, row, write_run

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
PAPER = sorted((ROOT / "configs/compare").glob("*.yaml"))

CONFIG = """
run: {{steps: 4}}
data: {{train: train.jsonl}}
actor: {{path: actor, learning_rate: {rate}}}
algorithm: {{critics: {critics}}}
"""

FAKE = """
import argparse, sys
from pathlib import Path
from asyncppo.config import dump
from asyncppo.plain import plain_config
from tests.run_maker import append, row
parser = argparse.ArgumentParser()
for name in ("--config", "--directory", "--seeds", "--lag"):
    parser.add_argument(name)
parser.add_argument("--set", action="append", default=[])
given = parser.parse_args()
for seed in map(int, given.seeds.split(",")):
    config = plain_config(Path(given.config), given.set, Path(given.directory), seed)
    with open(Path(given.config).parent / "started.txt", "a") as file:
        file.write(f"{config.run_directory}\\n")
    if seed == 1 and Path(given.config).stem == "broken":
        sys.exit("seed 1 is broken")
    config.run_directory.mkdir(parents=True)
    (config.run_directory / "config.yaml").write_bytes(dump(config))
    reward = 1000 * config.actor.learning_rate + 0.01 * seed + 0.1 * config.algorithm.critics
    append(config.run_directory / "metrics.jsonl", [row(n, **{"reward/mean": reward}) for n in range(1, 5)])
    end = {"event": "end", "tokens": 100, "train_cpu_s": 8.0}
    append(config.run_directory / "events.jsonl", [{"event": "start", "lag": int(given.lag)}, end])
"""
"""Stands for `python -m trainer.plain`: reward = 1000 · learning rate + seed / 100 + critics / 10; notes its runs."""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Two configs, b with two critics more than a, run by the fake."""

    def command(role: str, arguments: Sequence[str], module: str) -> list[str]:
        assert (role, module) == ("trainer", "trainer.plain")
        return [sys.executable, "-c", FAKE, *arguments]

    monkeypatch.setattr(compare, "command", command)
    monkeypatch.setattr(compare, "stop_flag", lambda: lambda: False)
    monkeypatch.setattr(compare, "_POLL_S", 0.02)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Plan((a_file(tmp_path, "a", 0), a_file(tmp_path, "b", 2)), tmp_path / "out", seeds=3)


def a_file(directory: Path, name: str, critics: int, rate: float = 1e-4) -> Path:
    path = directory / f"{name}.yaml"
    path.write_text(CONFIG.format(critics=critics, rate=rate))
    return path


def a_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def started(plan: Plan) -> list[str]:
    """The run directories that the fake was started for, relative to the comparison's."""
    path = plan.configs[0].parent / "started.txt"
    return [str(Path(line).relative_to(plan.directory)) for line in path.read_text().splitlines()]


def a_method(name: str, rewards: dict[int, float], **more: float) -> Method:
    return Method(name, tuple(Run(seed, (row(1),), {"reward": value, **more}) for seed, value in rewards.items()))


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (31, 2.0395), (60, 2.0003), (120, 1.9799)],
)
def test_the_t_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-5)


def test_a_spread_has_the_samples_standard_deviation() -> None:
    found = spread([1.0, 2.0, 6.0])
    assert found is not None
    assert (found.n, found.mean) == (3, 3.0)
    assert found.sd == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert spread([]) is None
    alone = spread([2.0])
    assert alone is not None
    assert alone.sd is None


def test_differences_are_paired_by_seed() -> None:
    found = paired({0: 1.0, 1: 3.0, 2: 2.0}, {1: 1.0, 0: 0.0, 7: 9.0})  # 1 and 2
    assert found is not None
    assert (found.n, found.mean) == (2, 1.5)
    reach = 12.7062 * 0.5**0.5 / 2**0.5
    assert (found.low, found.high) == (pytest.approx(1.5 - reach), pytest.approx(1.5 + reach))
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_pairing_takes_out_what_seeds_have_in_common() -> None:
    apart = {0: 0.0, 1: 10.0, 2: 20.0}
    found = paired({seed: value + 1 for seed, value in apart.items()}, apart)
    assert found is not None
    assert (found.low, found.high) == (1.0, 1.0)


# --- the table -------------------------------------------------------------------------------------------------------


def test_a_run_is_measured_by_its_steps_and_its_last_evaluation(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", steps=6, before=0.25, after=0.75)
    append(directory / "events.jsonl", [{"event": "end", "tokens": 1234, "train_cpu_s": 12.0}])
    found = read_run(directory, 3).measures
    assert found["reward"] == pytest.approx(0.225)  # 0.20 … 0.25
    assert found["reward_last"] == pytest.approx(0.245)  # the last two
    assert found["eval/6-op"] == 0.75
    assert found["ev_first"] == pytest.approx(0.11)  # 0.105, 0.11, 0.115
    assert found["ev_second"] == pytest.approx(0.125)
    assert found["entropy"] == pytest.approx(0.88)  # steps 2 to 6: 0.9 − 0.005 · step
    assert (found["tokens"], found["cpu_s"]) == (1234, 2.0)
    assert found["correlation"] == pytest.approx(0.8)


def test_one_batch_of_equal_rewards_does_not_decide_the_explained_variance(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", steps=6)
    append(directory / "metrics.jsonl", [row(7, **{"value/explained_variance_fresh": -65.0})])
    assert read_run(directory, 0).measures["ev_second"] > 0


def test_a_star_marks_intervals_without_zero() -> None:
    base = a_method("base", {0: 0.1, 1: 0.2, 2: 0.3})
    better = a_method("better", {0: 0.3, 1: 0.4001, 2: 0.4999})
    unclear = a_method("unclear", {0: 0.9, 1: 0.1, 2: 0.3})
    differences = {line[0]: line for line in tables([base, better, unclear], "base")[-1][2]}
    assert "base" not in differences
    assert differences["better"][2].startswith("+0.200 [")
    assert differences["better"][2].endswith(" *")
    assert not differences["unclear"][2].endswith("*")


def test_the_baseline_may_be_any_method() -> None:
    methods = [a_method("a", {0: 0.1}), a_method("b", {0: 0.3})]
    out = json.loads(as_json(methods, "b", []))
    assert out["methods"]["a"]["measures"]["reward"]["difference"]["mean"] == pytest.approx(-0.2)
    assert "Difference to b" in markdown(methods, "b", [])


def test_a_method_without_runs_is_in_the_table_with_dashes() -> None:
    lines = tables([a_method("a", {0: 0.1}), Method("b", ())], "a")[0][2]
    assert lines[1][:3] == ["b", "0", "–"]


def test_the_picture_is_drawn_without_critics_and_with_runs_of_unequal_length(tmp_path: Path) -> None:
    long, short = ([row(n) for n in range(1, steps)] for steps in (20, 12))
    no_critics = [{"step": n, "reward/mean": 0.5, "policy/entropy": 1.0, "value/std_mean": 0.0} for n in range(1, 9)]
    methods = [
        Method("a", (Run(0, tuple(long), {}), Run(1, tuple(short), {}))),
        Method("b", (Run(0, tuple(no_critics), {}),)),
    ]
    assert draw(methods, tmp_path / "figure.png").stat().st_size > 10_000


def test_smoothing_passes_over_gaps_and_outliers() -> None:
    curve = smoothed([1.0, None, 1.0, 1.0, -65.0, 1.0, 1.0])
    assert curve is not None
    assert curve.tolist() == [1.0] * 7
    assert smoothed([None, None, None]) is None


# --- the runs --------------------------------------------------------------------------------------------------------


def test_all_runs_are_done_once_and_again_only_what_is_missing(plan: Plan) -> None:
    assert run_compare(plan, a_console()) == 0
    assert sorted(started(plan)) == [f"{name}/seed-{seed}" for name in "ab" for seed in range(3)]
    measures = json.loads((plan.directory / "table.json").read_text())["methods"]["b"]["measures"]
    assert measures["reward"]["by_seed"] == pytest.approx({"0": 0.3, "1": 0.31, "2": 0.32})
    assert measures["reward"]["difference"]["mean"] == pytest.approx(0.2)
    assert measures["cpu_s"]["spread"]["mean"] == 2.0
    assert {path.name for path in plan.directory.iterdir()} == {"a", "b", "table.md", "table.json", "figure.png"}
    (plan.directory / "b/seed-1/events.jsonl").unlink()
    (plan.directory / "b/seed-1/config.yaml").rename(plan.directory / "b/seed-1/other.yaml")
    for path in sorted((plan.directory / "b/seed-1").iterdir()):
        path.unlink()
    (plan.directory / "b/seed-1").rmdir()
    assert run_compare(plan, a_console()) == 0
    assert started(plan)[6:] == ["b/seed-1"]


def test_a_failed_run_costs_only_itself_and_is_named(plan: Plan, tmp_path: Path) -> None:
    broken = Plan((plan.configs[0], a_file(tmp_path, "broken", 1)), plan.directory, seeds=2, jobs=4)
    console = a_console()
    assert run_compare(broken, console) == 1
    assert "FAILED RUNS, not in the table: broken, seeds 1." in (plan.directory / "table.md").read_text()
    assert isinstance(console.file, io.StringIO)
    assert "seed 1 is broken" in console.file.getvalue()
    methods = json.loads((plan.directory / "table.json").read_text())["methods"]
    assert methods["broken"]["measures"]["reward"]["by_seed"].keys() == {"0"}
    assert methods["a"]["measures"]["reward"]["spread"]["n"] == 2


def test_the_grid_takes_the_best_value_for_each_method_on_seeds_of_its_own(plan: Plan, tmp_path: Path) -> None:
    grid = Grid.parse("actor.learning_rate=2e-4,5e-4,1e-4")
    tuned = Plan(plan.configs, plan.directory, seeds=1, grid=grid, tune_seeds=2)
    assert {job.seed for job in tuned.tunings()} == {100, 101}
    assert not any(job.config.eval.at_start or job.config.eval.at_end for job in tuned.tunings())
    assert run_compare(tuned, a_console()) == 0
    assert sum(line.startswith("tuning/") for line in started(plan)) == 12
    assert load(plan.directory / "b/seed-0/config.yaml").actor.learning_rate == 5e-4
    table = (plan.directory / "table.md").read_text()
    assert "- b: 2e-4: 1.405, 5e-4: 1.705, 1e-4: 1.305; taken 5e-4\n" in table.replace("\n\n", "\n") + "\n"
    assert "edge" not in table


def test_a_choice_at_the_edge_of_the_grid_is_pointed_out(plan: Plan) -> None:
    grid = Grid.parse("actor.learning_rate=1e-4,2e-4")
    assert run_compare(Plan(plan.configs, plan.directory, seeds=1, grid=grid, tune_seeds=1), a_console()) == 0
    assert "taken 2e-4 (at the edge of the grid)" in (plan.directory / "table.md").read_text()


def test_unequal_budgets_are_said(plan: Plan, tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_text("base: a.yaml\nsampling: {group_size: 64}\n")
    assert run_compare(Plan((plan.configs[0], large), plan.directory, seeds=1), a_console()) == 0
    assert "NOT EQUAL BUDGETS: large 4 × 4096" in (plan.directory / "table.md").read_text()


def test_a_stop_leaves_the_table_of_what_is_there(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_compare(Plan(plan.configs, plan.directory, seeds=1), a_console()) == 0
    monkeypatch.setattr(compare, "stop_flag", lambda: lambda: True)
    assert run_compare(plan, a_console()) == compare.STOPPED
    assert len(started(plan)) == 2


def test_seeds_share_a_process_only_where_all_stay_busy(tmp_path: Path) -> None:
    paths = [a_file(tmp_path, name, 0) for name in "abc"]
    jobs = [Job(path, (), tmp_path, seed, 0) for seed in range(5) for path in paths]
    few, many = shares(jobs, 2), shares(jobs, 6)
    assert [[job.seed for job in share.jobs] for share in few] == [[0, 1, 2, 3, 4]] * 3
    assert [[job.seed for job in share.jobs] for share in many] == [[0, 2, 4], [1, 3]] * 3
    assert sorted(job.seed for share in many for job in share.jobs) == sorted(job.seed for job in jobs)


@pytest.mark.parametrize("grid", ["actor.learning_rate", "actor.learning_rate=1e-3", "=1,2"])
def test_a_grid_needs_a_key_and_two_values(grid: str) -> None:
    with pytest.raises(ConfigError, match="--grid"):
        Grid.parse(grid)


def test_what_cannot_be_compared_is_refused_before_anything_starts(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    twice = (*plan.configs, a_file(tmp_path / "more", "a", 1))
    with pytest.raises(ConfigError, match="two configs are called a"):
        run_compare(Plan(twice, plan.directory), a_console())
    with pytest.raises(ConfigError, match="--baseline c"):
        run_compare(Plan(plan.configs, plan.directory, baseline="c"), a_console())
    with pytest.raises(ConfigError, match="learning_rat"):
        run_compare(Plan(plan.configs, plan.directory, overrides=("actor.learning_rat=1",)), a_console())
    assert not plan.directory.exists()


# --- the paper's configs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_configs_are_good_and_have_one_budget(path: Path) -> None:
    config = plain_config(path, [], Path("runs"), 0)
    base = load(ROOT / "configs/chains.yaml")
    assert (config.run.steps, config.responses_per_batch) == (base.run.steps, base.responses_per_batch)
    assert path.read_text().startswith("# ")


def test_the_papers_configs_differ_from_each_other() -> None:
    assert len(PAPER) >= 22
    found = {
        repr(plain_config(path, [f"run.name={path.stem}"], Path("runs"), 0)).replace(path.stem, "") for path in PAPER
    }
    assert len(found) == len(PAPER)
