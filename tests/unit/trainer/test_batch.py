"""A batch, by hand: two groups of two responses, every field with its numbers."""

from __future__ import annotations

from dataclasses import fields, replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncppo.messages import Group
from tests.stream_maker import a_buffered, a_group, a_prompt
from trainer.stream.batch import Batch, pack

pytestmark = pytest.mark.unit


def flags(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


def test_two_groups_packed() -> None:
    first = a_buffered(0, 1, a_prompt(1, tokens=2), a_group(1, [[(4, 2)], [(3, 1), (4, 2)]], rewards=[1, 0]))
    dense = np.array([0, 0.5, -0.25], np.float32)
    group = a_group(2, [[(5, 1)], [(5, 2)]], rewards=[0.5, 0.25], step_rewards=dense, reward_errors=flags(0, 1))
    second = a_buffered(0, 2, a_prompt(2, tokens=1), group)
    batch = pack([first, replace(second, uses=2)], [(0, 1), (1, 0)], version=6)

    expected = {
        "version": 6,
        # prompts 10, 11 and 20; responses 0, 1, … and 100, 101, …
        "input_ids": [10, 11, 0, 1, 10, 11, 100, 101, 102, 20, 0, 20, 100, 101],
        "sequence_lengths": [4, 5, 2, 3],
        "response_lengths": [2, 3, 1, 2],
        "response_ids": [0, 1, 100, 101, 102, 0, 100, 101],
        "behaviour_logprobs": [0, -0.25, -0.5, -0.75, -1, 0, -0.25, -0.5],
        "token_versions": [4, 4, 3, 4, 4, 5, 5, 5],
        "rewards": [1, 0, 0.5, 0.25],
        "step_rewards": [0, 0, 0, 0, 0, 0, 0.5, -0.25],  # the first group has none
        "truncated": [0, 0, 0, 0],
        "reward_errors": [0, 1],
        "group_index": [0, 0, 1, 1],
        "shard": [0, 1, 1, 0],
        "oldest_versions": [3, 5],
        "uses": [0, 2],
        "prompt_ids": ("p1", "p2"),
        "epochs": (0, 0),
    }
    assert list(expected) == [field.name for field in fields(Batch)]
    for name, value in expected.items():
        got = getattr(batch, name)
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == value, name
    assert batch.staleness.tolist() == [3, 1]


def test_dtypes_are_those_of_the_wire() -> None:
    batch = pack([a_buffered(0, 1)], [(0, 0)], version=0)
    dtypes = {
        f.name: getattr(batch, f.name).dtype.name for f in fields(Batch) if hasattr(getattr(batch, f.name), "dtype")
    }
    floats = {"behaviour_logprobs", "rewards", "step_rewards"}
    flags = {"truncated"}
    assert {name for name, dtype in dtypes.items() if dtype == "float32"} == floats
    assert {name for name, dtype in dtypes.items() if dtype == "uint8"} == flags
    assert {dtype for name, dtype in dtypes.items() if name not in floats | flags} == {"int32"}
    assert batch.staleness.dtype == np.int32


def equal(first: Batch, second: Batch) -> bool:
    return all(np.array_equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(Batch))


def without_errors(group: Group) -> Group:
    """The group as it would have come with the graded responses alone."""
    keep = group.reward_errors == 0
    tokens, spans = np.repeat(keep, group.lengths), np.repeat(keep, group.span_counts)
    of_tokens = {name: getattr(group, name)[tokens] for name in ("response_ids", "behaviour_logprobs")}
    of_spans = {name: getattr(group, name)[spans] for name in ("span_versions", "span_lengths")}
    of_responses = ("lengths", "span_counts", "rewards", "truncated", "reward_errors")
    return msgspec.structs.replace(
        group, **of_tokens, **of_spans, **{name: getattr(group, name)[keep] for name in of_responses}
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_batch_whose_errors_are_masked_is_the_batch_without_those_responses(
    data: st.DataObject, sizes: list[int]
) -> None:
    groups = []
    for number, size in enumerate(sizes):
        spans = [data.draw(SPANS) for _ in range(size)]
        errors = flags(*data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size).filter(lambda e: 0 in e)))
        groups.append(a_group(number, spans, truncated=flags(*[n % 2 for n in range(size)]), reward_errors=errors))
    held = [a_buffered(0, n, a_prompt(n, tokens=n + 1), group) for n, group in enumerate(groups)]
    shards = [list(range(size)) for size in sizes]
    masked = pack(held, shards, version=9, mask_errors=True)

    graded = [replace(one, group=without_errors(one.group)) for one in held]
    kept = [
        [n for n, error in zip(row, g.reward_errors, strict=True) if not error]
        for row, g in zip(shards, groups, strict=True)
    ]
    expected = pack(graded, kept, version=9)
    # what came of the group as a whole stays: its oldest token, and how many could not be graded
    assert masked.reward_errors.tolist() == [int(group.reward_errors.sum()) for group in groups]
    whole = pack(held, shards, version=9)
    assert equal(masked, replace(expected, reward_errors=masked.reward_errors, oldest_versions=whole.oldest_versions))
    assert equal(pack(held, shards, version=9, mask_errors=False), whole)
    assert len(whole.rewards) == sum(sizes)


SPANS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)), min_size=1, max_size=3).map(sorted)
GROUPS = st.lists(st.lists(SPANS, min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(groups=GROUPS)
def test_every_response_stands_after_its_prompt_wherever_it_is_in_the_batch(
    groups: list[list[list[tuple[int, int]]]],
) -> None:
    held = [a_buffered(0, n, a_prompt(n, tokens=n + 1), a_group(n, spans)) for n, spans in enumerate(groups)]
    batch = pack(held, [[0] * len(spans) for spans in groups], version=9)
    sequences = np.split(batch.input_ids, np.cumsum(batch.sequence_lengths)[:-1])
    responses = np.split(batch.response_ids, np.cumsum(batch.response_lengths)[:-1])
    assert len(sequences) == len(responses) == len(batch.group_index) == sum(map(len, groups))
    for sequence, response, index in zip(sequences, responses, batch.group_index, strict=True):
        assert np.array_equal(sequence, np.concatenate((held[index].prompt.prompt_ids, response)))
    assert batch.token_versions.size == batch.response_ids.size
    for index, spans in enumerate(groups):
        oldest = min(version for response in spans for version, _ in response)
        assert batch.oldest_versions[index] == oldest
        mine = np.repeat(batch.group_index, batch.response_lengths) == index
        assert batch.token_versions[mine].min() == oldest
