"""A batch, by hand: two groups of two responses, every field with its numbers."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stream_maker import a_buffered, a_group, a_prompt
from trainer.stream.batch import Batch, pack

pytestmark = pytest.mark.unit


def test_two_groups_packed() -> None:
    first = a_buffered(0, 1, a_prompt(1, tokens=2), a_group(1, [[(4, 2)], [(3, 1), (4, 2)]], rewards=[1, 0]))
    dense = np.array([0, 0.5, -0.25], np.float32)
    group = a_group(2, [[(5, 1)], [(5, 2)]], rewards=[0.5, 0.25], step_rewards=dense)
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
        "reward_errors": [0, 0, 0, 0],
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
    flags = {"truncated", "reward_errors"}
    assert {name for name, dtype in dtypes.items() if dtype == "float32"} == floats
    assert {name for name, dtype in dtypes.items() if dtype == "uint8"} == flags
    assert {dtype for name, dtype in dtypes.items() if name not in floats | flags} == {"int32"}
    assert batch.staleness.dtype == np.int32


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
