"""Samples: what became of a token, in words; the files; and how `asyncppo inspect` shows them."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from rich.console import Console
from typer.testing import CliRunner

from asyncppo.cli import app
from asyncppo.errors import UserError
from asyncppo.report.inspect import Quantity, details, listing, response_of, samples_in, show_listing, show_response
from asyncppo.samples import (
    FORMAT,
    Response,
    Sample,
    Settings,
    Token,
    encode,
    file_of,
    files_in,
    read,
    tokens_of,
    verdict,
)

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]

SETTINGS = Settings(
    critics=2,
    aggregation="mean",
    mask_signal="value_std",
    mask_fraction=0.2,
    entropy_filter=0.3,
    mask_scope="batch",
    entropy_coef=0.01,
    proximal="recompute",
    behaviour_mode="mask",
    behaviour_level="token",
    behaviour_cap=5.0,
    truncated="zero",
)

TOKEN = Token(
    position=0,
    token_id=7,
    text="7",
    version=3,
    behaviour_logprob=-1.0,
    proximal_logprob=-1.0,
    behaviour_weight=1.0,
    values=[0.25, 0.75],
    value=0.5,
    value_std=0.25,
    std_rank=0.5,
    advantage=0.5,
    keep_policy=True,
    keep_entropy=True,
    entropy=None,
    truncated=False,
)

TEXTS = ["So", " 3", "\n", "\ufffd", "\x1b[31m", "[red]", "", "<|im_end|>"]


def a_response(**changes: Any) -> Response:
    """Eight tokens: the second is out of the policy term, the last of the entropy bonus, the third over the cap."""
    fields: dict[str, Any] = {
        "reward": 1.0,
        "truncated": False,
        "shard": 1,
        "texts": TEXTS,
        "token_ids": np.arange(20, 28, dtype=np.int32),
        "versions": np.array([3, 3, 3, 3, 4, 4, 4, 4], np.int32),
        "behaviour_logprobs": np.full(8, -3.0, np.float32),
        "proximal_logprobs": np.array([-3, -3, -1, -3, -3, -4, -3, -3], np.float32),
        "values": np.array([0.25] * 8 + [0.75] * 8, np.float32),
        "value": np.full(8, 0.5, np.float32),
        "value_std": np.arange(8, dtype=np.float32) / 8,
        "std_ranks": np.arange(8, dtype=np.float32) / 8,
        "advantages": np.array([0.5, 0.25, 0.5, 0.5, -0.25, -0.5, 0, 0.5], np.float32),
        "keep_policy": np.array([1, 0, 1, 1, 1, 1, 1, 1], np.uint8),
        "keep_entropy": np.array([1, 1, 1, 1, 1, 1, 1, 0], np.uint8),
        "entropy": None,
    }
    return Response(**(fields | changes))


def a_sample(step: int = 40, settings: Settings = SETTINGS, **changes: Any) -> Sample:
    return Sample(
        step=step,
        policy_version=step - 1,
        prompt_id="p17",
        epoch=2,
        prompt="<|im_start|>user\nCompute 1+2.",
        staleness=2,
        settings=settings,
        responses=[a_response(**changes), a_response(reward=0.0, **changes)],
    )


def write(directory: Path, *samples: Sample) -> Path:
    for sample in samples:
        path = file_of(directory, sample.step)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(encode(sample))
    return directory


def shown(sample: Sample, by: Quantity = "advantage", width: int = 80, **terminal: Any) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, **terminal)
    show_response(sample, 0, by, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


COLOURS = {"force_terminal": True, "color_system": "truecolor", "no_color": False}


# ---- the verdict ----

LOW, HIGH = {"keep_policy": False}, {"keep_entropy": False}


@pytest.mark.parametrize(
    ("token", "settings", "words"),
    [
        ({}, {}, ["trained"]),
        ({"advantage": -0.01}, {}, ["trained"]),
        ({"advantage": 0.0}, {}, ["advantage 0: nothing to learn"]),
        (LOW, {}, ["no policy gradient: std among the lowest 20 % of the batch"]),
        (LOW | {"advantage": 0.0}, {}, ["no policy gradient: std among the lowest 20 % of the batch"]),
        (LOW, {"mask_fraction": 0.125}, ["no policy gradient: std among the lowest 12.5 % of the batch"]),
        (LOW, {"mask_scope": "sequence"}, ["no policy gradient: std among the lowest 20 % of the response"]),
        (LOW, {"mask_signal": "entropy"}, ["no policy gradient: entropy among the lowest 20 % of the batch"]),
        (LOW, {"mask_signal": "random"}, ["no policy gradient: drawn at random, with 20 % of the batch"]),
        (HIGH, {}, ["trained", "no entropy bonus: std among the highest 30 % of the batch"]),
        (
            HIGH,
            {"mask_signal": "entropy"},
            ["trained", "no entropy bonus: entropy among the highest 30 % of the batch"],
        ),
        (HIGH, {"entropy_coef": 0.0}, ["trained"]),
        (
            LOW | HIGH | {"truncated": True},
            {"truncated": "mask"},
            ["no policy gradient: truncated response", "no entropy bonus: truncated response"],
        ),
        ({"truncated": True}, {"truncated": "zero"}, ["trained"]),
        (
            LOW | {"truncated": True},
            {"truncated": "bootstrap"},
            ["no policy gradient: std among the lowest 20 % of the batch"],
        ),
        ({"behaviour_weight": 7.1}, {}, ["no policy gradient: behaviour weight 7.1 over the cap 5"]),
        ({"behaviour_weight": 5.0}, {}, ["trained"]),
        (
            {"behaviour_weight": 7.1} | HIGH,
            {},
            [
                "no policy gradient: behaviour weight 7.1 over the cap 5",
                "no entropy bonus: std among the highest 30 % of the batch",
            ],
        ),
        (
            {"behaviour_weight": 7.1},
            {"behaviour_level": "sequence", "behaviour_cap": 2.5},
            ["no policy gradient: behaviour weight of the response 7.1 over the cap 2.5"],
        ),
        ({"behaviour_weight": 7.1}, {"behaviour_mode": "clamp"}, ["trained, behaviour weight 7.1 clamped to 5"]),
        (
            {"behaviour_weight": 7.1, "advantage": 0.0},
            {"behaviour_mode": "clamp"},
            ["advantage 0: nothing to learn"],
        ),
        ({"behaviour_weight": 7.1}, {"behaviour_mode": "none"}, ["trained"]),
        ({"behaviour_weight": None}, {"proximal": "interpolate"}, ["trained"]),
    ],
)
def test_the_verdict_says_what_became_of_a_token(
    token: dict[str, Any], settings: dict[str, Any], words: list[str]
) -> None:
    assert verdict(replace(TOKEN, **token), replace(SETTINGS, **settings)) == words


# ---- a response, token by token ----


def test_tokens_have_the_numbers_of_their_place() -> None:
    token = tokens_of(a_response(values=np.arange(16, dtype=np.float32)), SETTINGS)[5]
    assert (token.position, token.token_id, token.text, token.version) == (5, 25, "[red]", 4)
    assert token.values == [5.0, 13.0]  # critic after critic
    assert (token.behaviour_logprob, token.proximal_logprob, token.advantage) == (-3.0, -4.0, -0.5)
    assert token.behaviour_weight == pytest.approx(math.exp(-1))
    assert (token.keep_policy, token.keep_entropy, token.entropy) == (True, True, None)


def test_the_behaviour_weight_of_a_response_is_the_product_over_its_tokens() -> None:
    weights = [t.behaviour_weight for t in tokens_of(a_response(), replace(SETTINGS, behaviour_level="sequence"))]
    assert weights == pytest.approx([math.e] * 8)  # log-ratios 2 and −1


@pytest.mark.parametrize(("proximal", "weight"), [("behaviour", 1.0), ("interpolate", None)])
def test_without_a_proximal_pass_the_weight_is_1_or_not_known(proximal: str, weight: float | None) -> None:
    tokens = tokens_of(a_response(proximal_logprobs=None), replace(SETTINGS, proximal=proximal))
    assert {token.behaviour_weight for token in tokens} == {weight}
    assert {token.proximal_logprob for token in tokens} == {None}


# ---- files ----


def test_a_sample_survives_its_file(tmp_path: Path) -> None:
    sample = a_sample(entropy=np.ones(8, np.float32))
    again = read(files_in(write(tmp_path, sample))[0])
    assert (again.settings, again.prompt, again.staleness) == (SETTINGS, sample.prompt, 2)
    for name in Response.__struct_fields__:
        np.testing.assert_array_equal(getattr(again.responses[0], name), getattr(sample.responses[0], name))
    assert read(files_in(write(tmp_path, a_sample(proximal_logprobs=None)))[0]).responses[0].proximal_logprobs is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-3], "is damaged"),
        (lambda data: b"", "is damaged"),
        (lambda data: encode(a_sample(advantages=np.zeros(7, np.float32))), "advantages has 7 entries, expected 8"),
        (lambda data: encode(a_sample(values=np.zeros(8, np.float32))), "values has 8 entries, expected 16"),
        (lambda data: encode(replace(a_sample(), format=FORMAT + 1)), f"format {FORMAT + 1}, expected {FORMAT}"),
        (lambda data: msgspec.msgpack.encode({"format": FORMAT + 1, "other": 1}), "the asyncppo that made the run"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, change: Any, message: str) -> None:
    path = files_in(write(tmp_path, a_sample()))[0]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_sample_that_is_not_there_says_which_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no samples"):
        samples_in(tmp_path)
    write(tmp_path, a_sample(10), a_sample(20))
    for sample_id, message in (
        ("30/0", "steps 10, 20"),
        ("20/2", "of step 20 are 0 to 1"),
        ("20", "expected STEP/RESPONSE"),
        ("a/b", "expected STEP/RESPONSE"),
        ("20/-1", "expected STEP/RESPONSE"),
    ):
        with pytest.raises(UserError, match=message):
            response_of(tmp_path, sample_id)
    sample, index = response_of(tmp_path, "20/1")
    assert (sample.step, index) == (20, 1)


# ---- for people ----


def test_the_listing_has_every_response_with_its_shares_in_80_columns(tmp_path: Path) -> None:
    write(tmp_path, a_sample(20), replace(a_sample(10, truncated=True), prompt_id="an-id-that-goes-on-and-on-" * 3))
    console = Console(file=io.StringIO(), width=80, highlight=False)
    show_listing(samples_in(tmp_path), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[0] for line in lines[1:5]] == ["10/0", "10/1", "20/0", "20/1"]
    assert lines[1].split()[1:] == ["an-id-that-go…", "1.00", "8", "(cut)", "2", "12", "%", "12", "%"]
    assert max(map(len, lines)) <= 80


def test_without_colours_marks_tell_what_took_a_token_and_words_why() -> None:
    output = shown(a_sample())
    assert "\x1b" not in output
    assert "So⟦ 3↵\n⟧�" in output  # neighbours of one fate share their marks
    assert "<26>⟨<|im_end|>⟩" in output  # an id that the tokenizer lacks
    assert "colours, so --by" in output
    rows = output.splitlines()
    second = next(index for index, row in enumerate(rows) if row.startswith("1 ·3"))
    assert rows[second + 1].strip() == "no policy gradient: std among the lowest 20 % of the batch"
    assert rows[second + 3].strip() == "no policy gradient: behaviour weight 7.39 over the cap 5"
    assert rows[-1].strip() == "trained; no entropy bonus: std among the highest 30 % of the batch"


def test_all_numbers_of_a_token_stand_in_its_row() -> None:
    row = next(
        line for line in shown(a_sample(entropy=np.full(8, 1.5, np.float32))).splitlines() if "[red]" in line[:9]
    )
    assert row.split() == [
        "5",
        "[red]",
        "4",
        "-3.00",
        "-4.00",
        "0.37",
        "1.50",
        "0.25",
        "0.75",
        "0.50",
        "0.625",
        "62",
        "-0.50",
    ]


@pytest.mark.parametrize("critics", [0, 1, 2, 4, 9])
def test_the_output_fits_80_columns_and_shows_only_what_there_is(critics: int) -> None:
    values = np.tile(np.float32(0.25), 8 * critics)
    output = shown(a_sample(settings=replace(SETTINGS, critics=critics), values=values))
    lines = [line.rstrip() for line in output.splitlines()]
    assert max(map(len, lines)) <= 80
    heading = next(line for line in lines if line.startswith("#")).split()
    assert ("std" in heading, "pct" in heading) == (critics > 1, critics > 1)
    assert sum(name.startswith("V") for name in heading) == (critics if critics < 9 else 0)
    if critics == 9:
        assert f"V {' '.join(['0.25'] * 9)}" in output
        assert "no policy gradient: std among the lowest 20 % of the batch" in " ".join(output.split())


def test_a_wide_terminal_has_the_verdict_beside_the_numbers() -> None:
    lines = shown(a_sample(), width=160).splitlines()
    assert re.match(r"1 ·3 .*\+0.25  no policy gradient: std among", next(line for line in lines if "·3" in line))
    assert len([line for line in lines if re.match(r"\d ", line)]) == 8


def test_with_colours_the_masks_are_styles_and_the_advantage_is_a_colour() -> None:
    output = shown(a_sample(), **COLOURS)
    assert "⟦" not in output
    assert "\x1b[38;2;0;170;0mSo\x1b[0m" in output  # the largest advantage: full green
    assert "\x1b[2;9;38;2;70;155;70m 3\x1b[0m" in output  # half of it, dim and struck out
    assert "\x1b[4;38;2;0;170;0m<|im_end|>\x1b[0m" in output  # underlined
    assert "\x1b[38;2;225;40;40m[red]\x1b[0m" in output  # as negative: full red
    assert "\x1b[38;2;140;140;140m<26>\x1b[0m" in output  # 0: grey


@pytest.mark.parametrize(
    ("by", "colours"),
    [
        ("std", {"So": (140, 140, 140), "<26>": (65, 118, 226)}),
        ("mask", {"So": (0, 170, 0), " 3": (225, 40, 40), "<26>": (140, 140, 140), "<|im_end|>": (190, 140, 0)}),
        ("ratio", {"So": (140, 140, 140), "[red]": (183, 90, 90)}),
        ("value", {"So": (225, 40, 40), "<|im_end|>": (0, 170, 0)}),
    ],
)
def test_the_colour_is_of_the_quantity_asked_for(by: Quantity, colours: dict[str, tuple[int, ...]]) -> None:
    output = shown(a_sample(value=np.arange(8, dtype=np.float32)), by, **COLOURS)
    for text, colour in colours.items():
        assert f"38;2;{';'.join(map(str, colour))}m{text}\x1b" in output


@pytest.mark.parametrize(
    ("by", "settings"),
    [("std", {"critics": 1}), ("value", {"critics": 0}), ("ratio", {"proximal": "interpolate"})],
)
def test_a_quantity_that_the_run_lacks_is_refused(by: Quantity, settings: dict[str, Any]) -> None:
    changed = replace(SETTINGS, **settings)
    values = np.zeros(8 * changed.critics, np.float32)
    with pytest.raises(UserError, match=f"--by {by}: "):
        shown(a_sample(settings=changed, values=values, proximal_logprobs=None), by)


def test_no_color_gives_marks_on_a_terminal_too() -> None:
    output = shown(a_sample(), **(COLOURS | {"no_color": True}))
    assert "So⟦ 3↵" in output
    assert "38;2" not in output


@pytest.mark.parametrize("terminal", [{}, COLOURS])
def test_what_a_model_writes_never_controls_the_terminal(terminal: dict[str, Any]) -> None:
    sample = replace(a_sample(), prompt="\x1b[2J\u202eprompt", prompt_id="\x07")
    output = shown(sample, **terminal)
    assert "\x1b[31m" not in output
    assert "\\x1b[31m" in output  # spelt out
    assert "\x1b[2J" not in output
    assert "\\x1b[2J\\u202eprompt" in output
    assert "\x07" not in output


# ---- for programs ----


def test_the_json_of_a_response_has_every_token_with_its_verdict() -> None:
    whole = json.loads(msgspec.json.encode(details(a_sample(), 0)))
    assert (whole["sample"], whole["reward"], whole["length"], whole["settings"]["critics"]) == ("40/0", 1.0, 8, 2)
    assert [token["text"] for token in whole["tokens"]] == TEXTS
    assert whole["tokens"][1]["verdict"] == ["no policy gradient: std among the lowest 20 % of the batch"]
    assert set(Token.__struct_fields__) < set(whole["tokens"][0])


def test_the_json_of_the_listing_is_an_entry_for_each_response() -> None:
    entries = listing([a_sample(10), a_sample(20)])
    assert [entry["sample"] for entry in entries] == ["10/0", "10/1", "20/0", "20/1"]
    assert entries[0]["policy_mask"] == entries[0]["entropy_filter"] == pytest.approx(1 / 8)
    assert "tokens" not in entries[0]


# ---- the command ----


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asyncppo.cli", "inspect", *arguments],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "COLUMNS"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_lists_and_shows_and_is_the_same_json_at_any_width(tmp_path: Path) -> None:
    directory = str(write(tmp_path, a_sample()))
    assert "40/1" in command(directory).stdout
    assert "So⟦ 3↵" in command(directory, "--sample", "40/0").stdout
    narrow, wide = (command(directory, "--sample", "40/0", "--json", COLUMNS=width).stdout for width in ("40", "200"))
    assert narrow == wide
    assert narrow.count("\n") == 1
    assert json.loads(narrow)["sample"] == "40/0"
    assert len(json.loads(CliRunner().invoke(app, ["inspect", directory, "--json"]).output)) == 2


def test_what_is_not_there_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for arguments in ((), ("--sample", "1/0")):
        result = command(str(tmp_path), *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_the_help_teaches_by_example() -> None:
    output = CliRunner().invoke(app, ["inspect", "--help"]).output
    assert "Example: asyncppo inspect runs/demo --sample" in " ".join(output.split())


def test_the_reader_loads_nothing_heavy() -> None:
    code = "import sys, asyncppo.report.inspect; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "tokenizers", "matplotlib"} & set(loaded)
