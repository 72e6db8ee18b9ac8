"""Prompts: what a dataset may look like, what is said when it does not, and the order of the run."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncppo.config import DataConfig
from asyncppo.errors import DataError
from tests.stream_maker import some_prompts
from trainer.stream.prompts import Prompts, load_prompts, read_rows

pytestmark = pytest.mark.unit

ROWS: list[dict[str, Any]] = [
    {"prompt": "one", "answer": "1", "name": "a"},
    {"prompt": "two", "answer": "2", "name": "b"},
]


def tokenize(messages: list[dict[str, str]]) -> list[int]:
    """One token for each letter."""
    return [ord(letter) for message in messages for letter in f"{message['role'][0]}:{message['content']}"]


def text_of(prompt_ids: np.ndarray) -> str:
    return "".join(map(chr, prompt_ids))


def a_file(directory: Path, rows: list[Any], name: str = "train.jsonl") -> str:
    path = directory / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source: str, limit: int | None = None, **data: Any) -> Any:
    return load_prompts(source, DataConfig(train=source, **data), tokenize, limit)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_row_becomes_a_prompt_with_its_number_as_the_id(tmp_path: Path) -> None:
    first, second = load(a_file(tmp_path, ROWS))
    assert (first.prompt_id, text_of(first.prompt_ids), first.answer) == ("0", "u:one", "1")
    assert (second.prompt_id, text_of(second.prompt_ids), second.answer) == ("1", "u:two", "2")
    assert first.prompt_ids.dtype == np.int32


def test_other_columns_can_be_named(tmp_path: Path) -> None:
    source = a_file(tmp_path, [{"q": "six", "gold": 6, "key": 17}])
    (prompt,) = load(source, prompt_column="q", answer_column="gold", id_column="key")
    assert (prompt.prompt_id, text_of(prompt.prompt_ids), prompt.answer) == ("17", "u:six", "6")


def test_the_template_goes_around_a_text_once(tmp_path: Path) -> None:
    source = a_file(tmp_path, [{"prompt": "what is {prompt}?", "answer": "1"}])
    (prompt,) = load(source, template="Q: {prompt} A:")
    assert text_of(prompt.prompt_ids) == "u:Q: what is {prompt}? A:"


def test_chat_messages_are_taken_as_they_are(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?", "name": "left out"}]
    (prompt,) = load(a_file(tmp_path, [{"prompt": messages, "answer": "4"}]), template="not {prompt} here")
    assert text_of(prompt.prompt_ids) == "s:be briefu:2+2?"


@pytest.mark.parametrize("messages", [["hello"], [{"role": "user"}], [{"content": "2+2?"}], [7]])
def test_chat_messages_without_role_or_content_are_a_data_error(tmp_path: Path, messages: list[Any]) -> None:
    rows = [*ROWS, {"prompt": messages, "answer": "4"}]
    with pytest.raises(DataError, match=r"row 2.*role.*content"):
        load(a_file(tmp_path, rows))


def test_zero_is_an_answer(tmp_path: Path) -> None:
    assert load(a_file(tmp_path, [{"prompt": "1-1", "answer": 0}]))[0].answer == "0"


def test_blank_lines_and_dos_line_ends_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "1"}\r\n\r\n  \n{"prompt": "b\xe2\x80\xa8c", "answer": "2"}')
    assert [text_of(prompt.prompt_ids) for prompt in load(str(path))] == ["u:a", "u:b\u2028c"]


def test_too_long_prompts_are_left_out_and_ids_stay_row_numbers(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * length, "answer": "1"} for length in (3, 9, 4)]
    prompts = load(a_file(tmp_path, rows), max_prompt_tokens=6)
    assert [prompt.prompt_id for prompt in prompts] == ["0", "2"]


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    assert [prompt.prompt_id for prompt in load(a_file(tmp_path, ROWS * 3), limit=3)] == ["0", "1", "2"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.parquet"])
def test_a_missing_file_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    with pytest.raises(DataError, match=rf"{name}: there is no such dataset file"):
        load(str(tmp_path / name))


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.jsonl: the dataset is empty"):
        load(str(tmp_path / "train.jsonl"))


@pytest.mark.parametrize(
    "line", [b"{", b"not json", b'{"prompt": "a"} {"prompt": "b"}', b"[1]", b"7", b'{"a": "\xff"}']
)
def test_a_line_that_is_no_json_object_is_refused(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "a", "answer": "1"}\n' + line)
    with pytest.raises(DataError, match="expected one JSON object a line"):
        load(str(tmp_path / "train.jsonl"))


@pytest.mark.parametrize("column", ["prompt", "answer"])
@pytest.mark.parametrize("nothing", [None, "", "absent"])
def test_a_row_without_a_column_is_named_with_the_columns_it_has(
    tmp_path: Path, column: str, nothing: str | None
) -> None:
    broken: dict[str, Any] = ROWS[1] | {column: nothing}
    if nothing == "absent":
        del broken[column]
    with pytest.raises(DataError, match=rf"row 1 has no '{column}'; its columns are .*name"):
        load(a_file(tmp_path, [ROWS[0], broken]))


def test_an_id_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 0 has no 'uuid'.*data\.id_column"):
        load(a_file(tmp_path, ROWS), id_column="uuid")


def test_the_same_id_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the id 'a' is there twice \(data\.id_column\)"):
        load(a_file(tmp_path, [*ROWS, ROWS[0]]), id_column="name")


def test_the_same_id_twice_is_refused_also_when_the_first_was_too_long(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 99, "answer": "1", "name": "a"}, {"prompt": "y", "answer": "2", "name": "a"}]
    with pytest.raises(DataError, match="is there twice"):
        load(a_file(tmp_path, rows), id_column="name", max_prompt_tokens=9)


def test_only_too_long_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 2 prompts are longer than 3 tokens"):
        load(a_file(tmp_path, ROWS), max_prompt_tokens=3)


def test_without_the_data_extra_the_way_to_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'asyncppo\[data\]'"):
        read_rows("someone/some-dataset", "train")


def test_parquet_files_and_hub_datasets_are_read_with_the_datasets_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, data_files: str | None = None, split: str = "") -> list[dict[str, Any]]:
        asked.append((name, data_files, split))
        if name == "someone/private":
            raise PermissionError("401")
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    file = tmp_path / "train.parquet"
    file.touch()
    assert read_rows(str(file), "test") == ROWS
    assert read_rows("someone/some-dataset", "test") == ROWS
    assert asked == [("parquet", str(file), "train"), ("someone/some-dataset", None, "test")]
    with pytest.raises(DataError, match=r"someone/private \(split test\): cannot be loaded: 401"):
        read_rows("someone/private", "test")


# --- the order -------------------------------------------------------------------------------------------------------


def ids(prompts: Prompts, count: int, position: int = 0) -> list[tuple[int, str]]:
    return [(epoch, prompt.prompt_id) for epoch, prompt in islice(prompts.after(position), count)]


def test_without_shuffling_the_order_is_that_of_the_file() -> None:
    assert ids(some_prompts(3), 7) == [(0, "p0"), (0, "p1"), (0, "p2"), (1, "p0"), (1, "p1"), (1, "p2"), (2, "p0")]


def test_an_epoch_holds_every_prompt_once_and_epochs_differ() -> None:
    order = ids(some_prompts(20, shuffle=True), 60)
    epochs = [[name for epoch, name in order if epoch == wanted] for wanted in range(3)]
    assert all(sorted(epoch) == sorted(f"p{n}" for n in range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_seed_always_gives_the_same_order_and_another_seed_another() -> None:
    def order(seed: int) -> list[tuple[int, str]]:
        return ids(some_prompts(20, seed=seed, shuffle=True), 60)

    assert order(1) == order(1)
    assert order(1) != order(2)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 9), seed=st.integers(0, 99), position=st.integers(0, 40), shuffle=st.booleans())
def test_from_any_position_on_it_is_the_tail_of_the_whole(count: int, seed: int, position: int, shuffle: bool) -> None:
    prompts = some_prompts(count, seed=seed, shuffle=shuffle)
    assert ids(prompts, 20, position) == ids(prompts, position + 20)[position:]


def test_a_prompt_cannot_be_changed() -> None:
    (prompt,) = (prompt for _, prompt in islice(some_prompts(1).after(0), 1))
    with pytest.raises(AttributeError):
        prompt.answer = "other"
    assert isinstance(prompt, msgspec.Struct)
