"""The live view: what it reads, what it makes of it, and how it looks in 80 columns and without a terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from asyncppo.errors import UserError
from asyncppo.monitor.follow import HISTORY, Run, Tail
from asyncppo.monitor.live import PLAIN_EVERY_S, PlainView, open_view, panel, step_line, watch, who_waits
from asyncppo.monitor.words import bar, duration, number, share, sparkline
from tests.run_maker import START, append, evaluation, events, row, swap, write_config, write_run

pytestmark = pytest.mark.unit


def followed(directory: Path) -> Run:
    run = Run(directory)
    run.refresh()
    return run


def rendered(run: Run, now: float, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(panel(run, now, ["the trainer: a line of its log"]))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def plain(run: Run) -> tuple[PlainView, io.StringIO]:
    output = io.StringIO()
    return PlainView(Console(file=output, width=80)), output


# ---- following ----


def test_each_line_is_read_once_and_a_half_written_one_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert list(tail.read()) == []
    path.write_text('{"step":1}\n{"st')
    assert list(tail.read()) == [{"step": 1}]
    assert list(tail.read()) == []
    with path.open("a") as file:
        file.write('ep":2}\n')
    assert list(tail.read()) == [{"step": 2}]


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"step":{"step":3}\n7\n{"step":4}\n')
    assert list(Tail(path).read()) == [{"step": 1}, {"step": 4}]


def test_a_run_is_followed_while_it_grows(tmp_path: Path) -> None:
    write_config(tmp_path, 40)
    run = followed(tmp_path)
    assert (run.step, run.steps, run.refresh()) == (0, 40, False)
    append(tmp_path / "metrics.jsonl", [row(1), row(2)])
    assert run.refresh()
    assert run.step == 2
    append(tmp_path / "events.jsonl", [swap(1, START), swap(2, START)])
    assert run.refresh()
    assert run.swaps == 2


def test_a_long_run_is_remembered_by_its_newest_steps(tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", [row(step) for step in range(1, HISTORY + 101)])
    run = followed(tmp_path)
    assert len(run.rows) == HISTORY
    assert run.step == HISTORY + 100


def test_steps_that_are_done_again_after_a_resume_replace_the_first_ones(tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", [row(step) for step in (1, 2, 3, 4)])
    append(tmp_path / "metrics.jsonl", [row(3, **{"reward/mean": 0.9})])
    run = followed(tmp_path)
    assert [line["step"] for line in run.rows] == [1, 2, 3]
    assert run.history("reward/mean") == pytest.approx([0.2, 0.21, 0.9])


@pytest.mark.parametrize(
    ("seen", "steps", "text"),
    [
        (1, 0, "the trainer is loading its models"),
        (2, 0, "waiting for a rollout server to join"),
        (3, 0, "SGLang is starting"),
        (4, 0, "version 0 answers the held-out problems of 6-op"),
        (5, 0, "version 0 answers the held-out problems of 8-op"),
        (6, 0, "the first batch of groups is being generated"),
        (6, 1, "training"),
        (8, 2, "version 2 answers the held-out problems of 6-op"),
        (9, 2, "version 2 answers the held-out problems of 8-op"),
        (10, 2, "the trainer saves and exports the actor"),
        (11, 2, "the run is complete"),
    ],
)
def test_the_view_knows_what_the_run_is_doing(tmp_path: Path, seen: int, steps: int, text: str) -> None:
    write_config(tmp_path, 2)
    append(tmp_path / "events.jsonl", events(2)[:seen])
    append(tmp_path / "metrics.jsonl", [row(step) for step in range(1, steps + 1)])
    assert followed(tmp_path).phase().text == text


def test_waiting_is_counted_from_when_it_began(tmp_path: Path) -> None:
    write_config(tmp_path, 2)
    append(tmp_path / "events.jsonl", events(2)[:3])
    assert followed(tmp_path).phase().since == START + 20


def test_who_waits_for_whom_is_said_in_words(tmp_path: Path) -> None:
    run = followed(write_run(tmp_path / "demo"))
    said = "the trainer waits for the rollout servers 35 % of the time; rollout servers idle 5.0 %"
    assert who_waits(run) == said


def test_the_time_left_follows_from_the_pace_of_the_last_steps(tmp_path: Path) -> None:
    write_config(tmp_path, 40)
    append(tmp_path / "metrics.jsonl", [row(step) for step in range(1, 11)])
    assert followed(tmp_path).seconds_left() == pytest.approx(60.0)  # 30 steps of 2 s


# ---- looks ----


def test_the_panel_fits_80_columns_and_shows_what_matters(tmp_path: Path) -> None:
    write_config(tmp_path / "demo", 40)
    append(tmp_path / "demo/events.jsonl", events(40)[:10])
    append(tmp_path / "demo/metrics.jsonl", [row(step) for step in range(1, 24)])
    run = followed(tmp_path / "demo")
    lines = rendered(run, row(23)["time"] + 1)
    assert max(map(len, lines)) <= 80
    text = " ".join(line.strip("│ ") for line in lines)
    for part in (
        "step 23/40",
        "34 s left",
        "0.420",
        "6-op 25.0%",
        "0–3 of 4  mean 1.2",
        "p10 0.0100  p50 0.0300  p90 0.0800",
        "explained variance 0.22",
        "correlation of the critics 0.80",
        "entropy 0.785",
        "KL 0.00200",
        "clipped 3.0 %",
        "log-prob gap 2.0e-6",
        "1 server  16 in flight  4 buffered  0 dropped",
        "last pause 0.20 s",
        "The trainer waits for the rollout servers 35 % of the time",
    ):
        assert part in text
    assert "█" in text


def test_the_panel_of_a_run_without_critics_leaves_them_out(tmp_path: Path) -> None:
    bare = {key: number for key, number in row(1).items() if not key.startswith(("value/", "critic/"))}
    append(tmp_path / "metrics.jsonl", [bare])
    text = "\n".join(rendered(followed(tmp_path), START))
    assert "step 1/?" in text
    assert "critic" not in text


def test_metrics_that_are_missing_or_null_are_shown_as_a_dash(tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", [{"step": 1, "time": START, "reward/mean": None}])
    run = followed(tmp_path)
    assert "–" in "\n".join(rendered(run, START))
    assert "reward –" in step_line(run)


def test_while_something_starts_the_panel_says_what_and_for_how_long(tmp_path: Path) -> None:
    append(tmp_path / "events.jsonl", events(2)[:3])
    text = "\n".join(rendered(followed(tmp_path), START + 32))
    assert "SGLang is starting … 12 s" in text
    assert "the trainer: a line of its log" in text


def test_a_run_that_fell_silent_is_said_to_be(tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", [row(1)])
    assert "No news for 5:00" in "\n".join(rendered(followed(tmp_path), row(1)["time"] + 300))


def test_wide_staleness_bounds_become_a_small_picture(tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", [row(1, **{"staleness/histogram": [1] * 33})])
    lines = rendered(followed(tmp_path), START)
    assert max(map(len, lines)) <= 80


def test_without_a_terminal_there_are_no_control_characters(tmp_path: Path) -> None:
    run = followed(write_run(tmp_path / "demo"))
    view, output = plain(run)
    view.show(run, START)
    view.close()
    text = output.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert "step 40/40  reward 0.590" in text
    assert "held-out 6-op: pass@1 75.0% at version 40" in text
    assert text.splitlines()[-1].startswith("step 40/40")


def test_without_a_terminal_steps_are_shown_every_few_seconds(tmp_path: Path) -> None:
    write_config(tmp_path, 40)
    run = followed(tmp_path)
    view, output = plain(run)
    for step in range(1, 9):
        append(tmp_path / "metrics.jsonl", [row(step)])
        run.refresh()
        view.show(run, START + step)
    shown = [line.split()[1] for line in output.getvalue().splitlines() if line.startswith("step ")]
    assert PLAIN_EVERY_S == 3
    assert shown == ["1/40", "4/40", "7/40"]


def test_without_a_terminal_a_wait_is_repeated_with_its_length(tmp_path: Path) -> None:
    append(tmp_path / "events.jsonl", events(2)[:3])
    run = followed(tmp_path)
    view, output = plain(run)
    for second in range(0, 40):
        view.show(run, START + 20 + second)
    waits = [line for line in output.getvalue().splitlines() if "SGLang" in line]
    assert waits == ["SGLang is starting", "SGLang is starting … 15 s", "SGLang is starting … 30 s"]


def test_the_view_suits_where_the_output_goes() -> None:
    assert type(open_view(Console(file=io.StringIO()))).__name__ == "PlainView"
    view = open_view(Console(file=io.StringIO(), force_terminal=True))
    assert type(view).__name__ == "TerminalView"
    view.close()


def test_watching_a_finished_run_shows_its_last_state_and_returns(tmp_path: Path) -> None:
    output = io.StringIO()
    watch(write_run(tmp_path / "demo"), Console(file=output, width=80), lambda: False)
    assert "the run is complete" in output.getvalue()


def test_watching_ends_when_the_watcher_leaves(tmp_path: Path) -> None:
    append(tmp_path / "events.jsonl", [evaluation("6-op", 0, 0.5, START)])
    watch(tmp_path, Console(file=io.StringIO()), lambda: True)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name a run directory"):
        watch(tmp_path, Console(file=io.StringIO()), lambda: True)


# ---- words ----


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.214, "0.21 s"), (3.21, "3.2 s"), (42.4, "42 s"), (245, "4:05"), (7390, "2:03:10"), (-1, "0.00 s")],
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (0.0312, "0.0312"), (12.34, "12.3"), (1234.5, "1234"), (2e-6, "2.0e-6")],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_shares_are_percentages() -> None:
    assert [share(x) for x in (None, 0.0, 0.031, 0.35, 1.0)] == ["–", "0 %", "3.1 %", "35 %", "100 %"]


def test_sparklines_go_from_the_least_to_the_most() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(1000)), width=24)) == 24


def test_bars_show_a_sliver_of_anything_above_nothing() -> None:
    assert bar(1.0, 4) == "████"
    assert bar(0.5, 3) == "█▌"
    assert bar(1e-6, 4) == "▏"
    assert bar(0.0, 4) == ""
