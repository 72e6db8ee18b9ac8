"""Shards: disjoint, covering, even, and the same for ever."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncppo.algorithm import assign_shards

pytestmark = pytest.mark.unit


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(-(2**63), 2**63),
    prompt_id=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    epoch=st.integers(0, 1000),
    group_size=st.integers(1, 40),
    critics=st.integers(1, 6),
)
def test_every_response_has_one_critic_and_shards_are_even(
    seed: int, prompt_id: str, epoch: int, group_size: int, critics: int
) -> None:
    shards = assign_shards(seed, prompt_id, epoch, group_size, critics)
    assert len(shards) == group_size
    sizes = [shards.count(m) for m in range(critics)]
    assert sum(sizes) == group_size  # no index outside 0..M-1
    assert max(sizes) - min(sizes) <= 1
    assert shards == assign_shards(seed, prompt_id, epoch, group_size, critics)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), group_size=st.integers(1, 32), key=st.tuples(st.integers(), st.text("ab/0", max_size=4)))
def test_the_shards_are_disjoint_covering_and_even_for_every_number_of_critics_up_to_the_group(
    data: st.DataObject, group_size: int, key: tuple[int, str]
) -> None:
    epoch = data.draw(st.integers(0, 5))
    for critics in range(1, group_size + 1):
        shards = assign_shards(*key, epoch, group_size, critics)
        of_critic = [{i for i, m in enumerate(shards) if m == critic} for critic in range(critics)]
        assert set().union(*of_critic) == set(range(group_size))  # covering
        assert sum(map(len, of_critic)) == group_size  # disjoint
        assert {len(shard) for shard in of_critic} <= {group_size // critics, -(-group_size // critics)}  # even


@settings(deadline=None, max_examples=50)
@given(
    groups=st.lists(st.tuples(st.sampled_from("pqr"), st.integers(0, 2)), min_size=1, max_size=20),
    other=st.randoms(use_true_random=False),
)
def test_no_other_call_changes_a_draw(groups: list[tuple[str, int]], other: Random) -> None:
    # reuse asks again, a resume asks for some only, two ranks ask in different orders: all get the same
    asked = {group: assign_shards(3, *group, 8, 2) for group in groups}
    again = groups[:]
    other.shuffle(again)
    np.random.seed(other.getrandbits(32))
    assert all(assign_shards(3, *group, 8, 2) == asked[group] for group in again)


def test_asking_leaves_the_global_generator_alone() -> None:
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    assign_shards(0, "p", 0, 8, 2)
    assert np.random.random() == expected


def test_the_draw_is_pinned() -> None:
    # If one of these changes, a resumed run would train critics on each other's responses.
    assert assign_shards(0, "p", 0, 5, 2) == (1, 0, 0, 1, 0)
    assert assign_shards(7, "gsm8k/12", 3, 8, 2) == (1, 0, 1, 1, 0, 0, 1, 0)
    assert assign_shards(7, "gsm8k/12", 4, 8, 3) == (2, 1, 1, 0, 2, 0, 1, 2)
    assert assign_shards(7, "gsm8k/12", 4, 7, 3) == (0, 2, 2, 1, 0, 1, 2)


def test_the_draw_is_the_same_in_another_process_with_another_hash_seed() -> None:
    code = "from asyncppo.algorithm import assign_shards; print(assign_shards(7, 'gsm8k/12', 3, 8, 2))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "(1, 0, 1, 1, 0, 0, 1, 0)"


def test_seed_prompt_and_epoch_each_change_the_draw() -> None:
    base = assign_shards(0, "prompt", 0, 32, 2)
    assert assign_shards(1, "prompt", 0, 32, 2) != base
    assert assign_shards(0, "prompt ", 0, 32, 2) != base
    assert assign_shards(0, "prompt", 1, 32, 2) != base


def test_keys_that_would_run_together_are_kept_apart() -> None:
    assert assign_shards(1, "2", 1, 64, 2) != assign_shards(11, "2", 1, 64, 2)
    assert assign_shards(1, "1/x", 2, 64, 2) != assign_shards(1, "x", 21, 64, 2)


def test_each_response_goes_to_each_critic_equally_often() -> None:
    draws = [assign_shards(0, f"p{i}", 0, 6, 3) for i in range(1500)]
    for response in range(6):
        counts = Counter(shards[response] for shards in draws)
        # 500 expected, standard deviation sqrt(1500 · 1/3 · 2/3) = 18
        assert all(abs(counts[m] - 500) < 5 * 18 for m in range(3)), counts


def test_which_critic_gets_one_more_varies() -> None:
    larger = Counter(Counter(assign_shards(0, f"p{i}", 0, 5, 2)).most_common(1)[0][0] for i in range(1000))
    # 500 expected, standard deviation 16
    assert abs(larger[0] - 500) < 5 * 16


def test_no_critic_gives_minus_one_and_one_critic_takes_all() -> None:
    assert assign_shards(0, "p", 0, 4, 0) == (-1, -1, -1, -1)
    assert assign_shards(0, "p", 0, 4, 1) == (0, 0, 0, 0)


def test_more_critics_than_responses_leaves_some_without() -> None:
    shards = assign_shards(0, "p", 0, 2, 5)
    assert len(set(shards)) == 2


def test_results_are_plain_ints() -> None:
    assert all(type(m) is int for m in assign_shards(0, "p", 0, 4, 2))


def test_wrong_arguments_say_what_was_expected_and_what_came() -> None:
    with pytest.raises(ValueError, match=r"group_size: expected at least 1, got 0"):
        assign_shards(0, "p", 0, 0, 2)
    with pytest.raises(ValueError, match=r"critics: expected at least 0, got -1"):
        assign_shards(0, "p", 0, 4, -1)
    with pytest.raises(ValueError, match=r"epoch: expected at least 0, got -1"):
        assign_shards(0, "p", -1, 4, 2)
