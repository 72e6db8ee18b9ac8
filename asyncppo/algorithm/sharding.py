"""Which critic learns from which response of a group: disjoint, even, and the same wherever and whenever it is asked.

The draw depends on (seed, prompt id, epoch) alone, through random numbers that are fixed for good (`_draws`).
"""

from __future__ import annotations

import numpy as np

from asyncppo.algorithm._draws import draws


def assign_shards(seed: int, prompt_id: str, epoch: int, group_size: int, critics: int) -> tuple[int, ...]:
    """The critic that learns from each response of one group.

        critic of response π(i) = (i + s) mod M,   i = 0..G-1      π a random permutation, s a random shift

    So every response has exactly one critic and the shards' sizes differ by at most one; the shift decides which
    critics get one more. The result is drawn anew for every epoch of a prompt and never changes on reuse or resume.

    Example:
        >>> assign_shards(seed=0, prompt_id="p", epoch=0, group_size=5, critics=2)
        (1, 0, 0, 1, 0)

    Args:
        seed: the run's seed.
        prompt_id: the prompt's id.
        epoch: the pass over the dataset that this group belongs to, from 0.
        group_size: responses G in the group, >= 1.
        critics: M >= 0.

    Returns:
        [G] critic indices in 0..M-1; all -1 where M is 0 (GRPO: nobody learns a value).

    Raises:
        ValueError: group_size below 1, critics or epoch below 0.

    Paper: AsyPPO, arXiv 2510.01656 (prompt-level disjoint data for the critics).
    """
    if group_size < 1:
        raise ValueError(f"group_size: expected at least 1, got {group_size}")
    if critics < 0:
        raise ValueError(f"critics: expected at least 0, got {critics}")
    if epoch < 0:
        raise ValueError(f"epoch: expected at least 0, got {epoch}")
    if critics == 0:
        return (-1,) * group_size

    # Numbers first, so that no two keys share a spelling; 64-bit draws tie about never, and then the sort is stable.
    drawn = draws(f"{seed}/{epoch}/{prompt_id}", group_size + 1)
    permutation = np.argsort(drawn[:group_size], kind="stable")
    shift = int(drawn[group_size] % np.uint64(critics))
    shards = np.empty(group_size, dtype=np.int64)
    shards[permutation] = (np.arange(group_size) + shift) % critics
    return tuple(shards.tolist())
