"""`asyncppo inspect`: the samples that a run kept, and one response token by token: what took which gradient away."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncppo.errors import UserError
from asyncppo.monitor.words import number, plural, share
from asyncppo.samples import (
    Response,
    Sample,
    Settings,
    Token,
    file_of,
    files_in,
    no_entropy_bonus,
    no_policy_gradient,
    read,
    tokens_of,
    verdict,
)

Quantity = Literal["advantage", "value", "std", "mask", "ratio"]

_GREY, _GREEN, _RED, _BLUE, _YELLOW = (140, 140, 140), (0, 170, 0), (225, 40, 40), (40, 110, 255), (190, 140, 0)
_MEANING: dict[Quantity, str] = {
    "advantage": "green: advantage above 0, red: below, the stronger the larger",
    "value": "green: the response's highest values, red: its lowest",
    "std": "blue: std high among the batch's tokens, grey: low",
    "mask": "green: trained, red: no policy gradient, yellow: no entropy bonus only, grey: advantage 0",
    "ratio": "green: behaviour weight w above 1, red: below, the stronger the further",
}
_TAKEN_STYLE, _FILTERED_STYLE = "dim strike", "underline"
_TAKEN, _FILTERED = "⟦⟧", "⟨⟩"
"""Marks in place of the styles, where there are no colours."""
_AGGREGATED = {"mean": "mean", "min": "min", "confidence": "conf"}
_TOKEN_WIDTH = 10
_INDENT = 8


# ---- what is there ----


def samples_in(run_directory: Path) -> list[Sample]:
    """Every sample of a run, oldest first.

    Raises:
        UserError: there is none, or one that cannot be read.
    """
    files = files_in(run_directory)
    if not files:
        raise UserError(
            f"{run_directory} holds no samples: name a run directory, runs/NAME, of a run that has done "
            "`run.inspect_every` steps"
        )
    return [read(path) for path in files]


def response_of(run_directory: Path, sample_id: str) -> tuple[Sample, int]:
    """The sample and the response that `STEP/RESPONSE` names.

    Raises:
        UserError: there is no such sample, and which there are.
    """
    step, slash, index = sample_id.partition("/")
    if not (slash and step.isdecimal() and index.isdecimal()):
        raise UserError(f"--sample {sample_id}: expected STEP/RESPONSE as `asyncppo inspect {run_directory}` lists it")
    path = file_of(run_directory, int(step))
    if not path.is_file():
        there = [str(int(file.stem.removeprefix("step_"))) for file in files_in(run_directory)]
        raise UserError(f"--sample {sample_id}: {run_directory} has samples of the steps {', '.join(there) or 'none'}")
    sample = read(path)
    if int(index) >= len(sample.responses):
        raise UserError(f"--sample {sample_id}: the responses of step {step} are 0 to {len(sample.responses) - 1}")
    return sample, int(index)


# ---- for programs ----


def listing(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One entry for each response of the samples."""
    return [_facts(sample, index) for sample in samples for index in range(len(sample.responses))]


def details(sample: Sample, index: int) -> dict[str, Any]:
    """All about one response: its entry in the listing, prompt, settings, and its tokens with their verdicts."""
    return {
        **_facts(sample, index),
        "prompt": sample.prompt,
        "settings": msgspec.to_builtins(sample.settings),
        "tokens": [
            {**msgspec.structs.asdict(token), "verdict": verdict(token, sample.settings)}
            for token in tokens_of(sample.responses[index], sample.settings)
        ],
    }


def _facts(sample: Sample, index: int) -> dict[str, Any]:
    response = sample.responses[index]
    return {
        "sample": f"{sample.step}/{index}",
        "step": sample.step,
        "policy_version": sample.policy_version,
        "prompt_id": sample.prompt_id,
        "epoch": sample.epoch,
        "response": index,
        "reward": response.reward,
        "length": len(response.texts),
        "truncated": response.truncated,
        "shard": response.shard,
        "staleness": sample.staleness,
        "policy_mask": response.policy_mask,
        "entropy_filter": response.entropy_filter,
    }


# ---- for people ----


def show_listing(samples: Sequence[Sample], console: Console) -> None:
    """A table of the kept responses."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("sample", no_wrap=True)
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", max_width=14)
    for name in ("reward", "tokens", "staleness", "policy mask", "entropy filter"):
        table.add_column(name, justify="right")
    for facts in listing(samples):
        table.add_row(
            facts["sample"],
            Text(_plain(facts["prompt_id"])),
            number(facts["reward"]),
            f"{facts['length']}{' (cut)' if facts['truncated'] else ''}",
            str(facts["staleness"]),
            share(facts["policy_mask"]),
            share(facts["entropy_filter"]),
        )
    console.print(table)
    console.print("\nOne of them token by token: --sample STEP/RESPONSE, as in the first column")


def show_response(sample: Sample, index: int, by: Quantity, console: Console) -> None:
    """One response: its text, coloured or (without colours) marked, a legend, and the table of its tokens.

    Raises:
        UserError: this run has no such quantity to colour by.
    """
    response, settings = sample.responses[index], sample.settings
    tokens = tokens_of(response, settings)
    colours = _colours(tokens, settings, by)
    coloured = console.color_system is not None and not console.no_color
    console.print(Text(f"sample {sample.step}/{index}", style="bold"))
    console.print(_summary(sample, response))
    console.print(Text("\nprompt", style="bold"))
    console.print(Text(_plain(sample.prompt, keep="\n").strip("\n")))
    console.print(Text("\nresponse", style="bold"))
    console.print(_coloured(tokens, settings, colours) if coloured else _marked(tokens, settings))
    console.print()
    for line in _legend(settings, by if coloured else None):
        console.print(line)
    console.print()
    for line in _rows(tokens, settings, console.width):
        console.print(line, soft_wrap=True)


def _summary(sample: Sample, response: Response) -> Text:
    learner = f", critic {response.shard} learns from it" if response.shard >= 0 else ""
    bonus = f", the entropy filter {share(response.entropy_filter)}" if sample.settings.entropy_coef else ""
    return Text(
        f"prompt {_plain(sample.prompt_id)} (epoch {sample.epoch}), {plural(len(sample.responses), 'response')}, at "
        f"version {sample.policy_version}: reward {number(response.reward)}, {plural(len(response.texts), 'token')}"
        f"{' (truncated)' if response.truncated else ''}, staleness {sample.staleness}{learner}; "
        f"the policy mask took {share(response.policy_mask)} of the tokens{bonus}"
    )


def _legend(settings: Settings, by: Quantity | None) -> Iterator[Text]:
    """What colours, styles or marks mean, and the columns; `by` is None without colours."""
    bonus = settings.entropy_coef > 0
    if by is None:
        entropy = f"   {_FILTERED[0]}…{_FILTERED[1]} no entropy bonus" if bonus else ""
        yield Text(f"{_TAKEN[0]}…{_TAKEN[1]} no policy gradient{entropy}   (no colours, so --by shows nothing)")
    else:
        parts: list[str | tuple[str, str]] = [("dim and struck out", _TAKEN_STYLE), " no policy gradient"]
        if bonus:
            parts += ["   ", ("underlined", _FILTERED_STYLE), " no entropy bonus"]
        yield Text.assemble(*parts)
        yield Text(_MEANING[by])
    words = ["ver: version that drew the token", "behav, prox: its log-prob under the behaviour and proximal policy"]
    words += ["w: behaviour weight, proximal over behaviour"]
    if settings.critics:
        words += ["V: value of each critic"]
    if settings.critics > 1:
        words += [f"{_AGGREGATED[settings.aggregation]}: the value that counts"]
        words += ["std: of the critics, pct: its percentile in the batch"]
    yield Text("; ".join([*words, "adv: advantage"]))
    yield Text("a token without a word about it was trained; ↵ is a new line, � a part of a character")


# ---- the text of the response ----


def _coloured(tokens: Sequence[Token], settings: Settings, colours: Sequence[str]) -> Text:
    text = Text()
    for token, colour in zip(tokens, colours, strict=True):
        text.append(_shown(token).replace("↵", "↵\n"), f"{_style(token, settings)} {colour}".strip())
    return text


def _marked(tokens: Sequence[Token], settings: Settings) -> Text:
    """Neighbours of one fate between one pair of marks."""

    def fate(token: Token) -> tuple[bool, bool]:
        return bool(no_policy_gradient(token, settings)), bool(no_entropy_bonus(token, settings))

    text = ""
    for (taken, filtered), run in groupby(tokens, key=fate):
        inner = "".join(map(_shown, run)).replace("↵", "↵\n")
        inner = f"{_FILTERED[0]}{inner}{_FILTERED[1]}" if filtered else inner
        text += f"{_TAKEN[0]}{inner}{_TAKEN[1]}" if taken else inner
    return Text(text)


def _style(token: Token, settings: Settings) -> str:
    taken = _TAKEN_STYLE if no_policy_gradient(token, settings) else ""
    return f"{taken} {_FILTERED_STYLE if no_entropy_bonus(token, settings) else ''}".strip()


def _shown(token: Token) -> str:
    return _plain(token.text) or f"<{token.token_id}>"


def _plain(text: str, keep: str = "") -> str:
    """Text that a terminal takes as text: what would control it is spelt out, a new line as `↵`."""

    def safe(character: str) -> str:
        if character in keep or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            return character
        return "↵" if character == "\n" else character.encode("unicode_escape").decode()

    return "".join(map(safe, text))


# ---- colours ----


def _colours(tokens: Sequence[Token], settings: Settings, by: Quantity) -> list[str]:
    """The colour of each token, `rgb(…)`."""
    match by:
        case "mask":
            return [_rgb(_fate_colour(token, settings), 1.0) for token in tokens]
        case "std":
            _need(settings.critics > 1, by, f"a std needs two critics, this run has {settings.critics}")
            return [_rgb(_BLUE, token.std_rank) for token in tokens]
        case "value":
            _need(settings.critics > 0, by, "this run has no critics")
            values = [token.value for token in tokens]
            middle = (min(values) + max(values)) / 2
            return _diverging([value - middle for value in values])
        case "ratio":
            weights = [token.behaviour_weight for token in tokens if token.behaviour_weight is not None]
            _need(bool(weights), by, f"with algorithm.proximal {settings.proximal} it is known during the update only")
            return _diverging([math.log(weight) for weight in weights])
        case "advantage":
            return _diverging([token.advantage for token in tokens])


def _need(there: bool, by: Quantity, why: str) -> None:
    if not there:
        raise UserError(f"--by {by}: {why}; expected one of the others: {', '.join(_MEANING)}")


def _fate_colour(token: Token, settings: Settings) -> tuple[int, int, int]:
    if no_policy_gradient(token, settings):
        return _RED
    if no_entropy_bonus(token, settings):
        return _YELLOW
    return _GREEN if token.advantage else _GREY


def _diverging(numbers: Sequence[float]) -> list[str]:
    """Green above 0, red below, grey at 0; full where a number is the largest of them, either way."""
    most = max(map(abs, numbers)) or 1.0
    return [_rgb(_GREEN if number > 0 else _RED, abs(number) / most) for number in numbers]


def _rgb(colour: tuple[int, int, int], strength: float) -> str:
    mixed = (round(grey + strength * (full - grey)) for grey, full in zip(_GREY, colour, strict=True))
    return f"rgb({','.join(map(str, mixed))})"


# ---- the table ----


def _rows(tokens: Sequence[Token], settings: Settings, width: int) -> Iterator[Text]:
    """Heading, and for each token its numbers; the verdict beside them where every line has room, else below.

    If even the numbers lack the room, the critics' values move down to the verdict.
    """
    verdicts = [verdict(token, settings) for token in tokens]
    remarks = ["" if words == ["trained"] else "; ".join(words) for words in verdicts]
    columns = _columns(tokens, settings, each_critic=settings.critics > 0)
    if _width(columns) > width and settings.critics > 1:
        columns = _columns(tokens, settings, each_critic=False)
        values = [" ".join(f"{value:.2f}" for value in token.values) for token in tokens]
        remarks = ["; ".join(filter(None, (f"V {own}", words))) for own, words in zip(values, remarks, strict=True)]
    beside = _width(columns) + 2 + max(map(len, remarks)) <= width
    widths = {name: _column_width(name, cells) for name, cells in columns.items()}
    yield Text(" ".join(_padded(name, widths[name], name) for name in columns), "bold")
    for index, (token, remark) in enumerate(zip(tokens, remarks, strict=True)):
        line = Text(" ").join(
            Text.assemble((cells[index], _style(token, settings)), " " * (widths[name] - cell_len(cells[index])))
            if name == "token"
            else Text(_padded(cells[index], widths[name], name))
            for name, cells in columns.items()
        )
        yield line.append(f"  {remark}") if remark and beside else line
        if not beside:
            yield from (Text(" " * _INDENT + part) for part in textwrap.wrap(remark, max(_INDENT, width - _INDENT)))


def _columns(tokens: Sequence[Token], settings: Settings, *, each_critic: bool) -> dict[str, list[str]]:
    """The cells of every column that this run has something for."""
    columns = {
        "#": [str(token.position) for token in tokens],
        "token": [_cropped(_shown(token)) for token in tokens],
        "ver": [str(token.version) for token in tokens],
        "behav": [_fixed(token.behaviour_logprob) for token in tokens],
        "prox": [_fixed(token.proximal_logprob) for token in tokens],
        "w": [_fixed(token.behaviour_weight) for token in tokens],
        "H": [_fixed(token.entropy) for token in tokens],
    }
    for name, known in (
        ("prox", tokens[0].proximal_logprob),
        ("w", tokens[0].behaviour_weight),
        ("H", tokens[0].entropy),
    ):
        if known is None:
            del columns[name]
    if each_critic:
        for critic in range(settings.critics):
            columns[f"V{critic}"] = [_fixed(token.values[critic]) for token in tokens]
    if settings.critics > 1:
        columns[_AGGREGATED[settings.aggregation]] = [_fixed(token.value) for token in tokens]
        columns["std"] = [f"{token.value_std:.3f}" for token in tokens]
        columns["pct"] = [str(math.floor(100 * token.std_rank)) for token in tokens]
    columns["adv"] = [f"{token.advantage:+.2f}" for token in tokens]
    return columns


def _column_width(name: str, cells: Sequence[str]) -> int:
    return max(map(cell_len, (name, *cells)))


def _width(columns: dict[str, list[str]]) -> int:
    return sum(_column_width(name, cells) for name, cells in columns.items()) + len(columns) - 1


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _padded(cell: str, size: int, name: str) -> str:
    """In the width of its column: texts at the left, numbers at the right."""
    space = " " * (size - cell_len(cell))
    return cell + space if name == "token" else space + cell


def _cropped(text: str) -> str:
    """A token in the width of its column, with spaces at its ends shown as `·`."""
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    whole = "·" * before + inner + "·" * (len(text) - before - len(inner))
    return whole if cell_len(whole) <= _TOKEN_WIDTH else f"{set_cell_size(whole, _TOKEN_WIDTH - 1).rstrip()}…"
