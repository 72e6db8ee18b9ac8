"""Staleness: how old a group may be, may one more prompt be leased, may this batch be taken.

`staleness` of a group = the version about to be trained − the oldest version of any token in it. The bound is
`max_staleness` (η), a batch is B groups, the version about to be trained is v, and each batch trained makes version
v + 1. So a group whose oldest token is of version o must be consumed by the batch that is trained at version o + η at
the latest: its *due version*.

**The one rule.** Let due(d) be how many unconsumed groups (in flight or buffered) are due at version d or earlier.
They can all be consumed in time if and only if, for every d ≥ v,

    due(d) ≤ (d − v + 1) · B                                                                          (1)

because the batches at v, v+1, …, d hold (d − v + 1)·B groups, and taking the earliest due first never wastes a place.

- *Admission*: a prompt is leased only if (1) still holds with it, due at o + η where o is the version that the server
  serves. When all servers serve v, every unconsumed group is due at v + η or earlier, and with C = (v − v₀)·B consumed
  and F unconsumed, (1) at d = v + η is C + F < (v + η + 1 − v₀)·B: AReaL's formula (arXiv 2505.24298, eq. 3).
- *Taking a batch*: the earliest due first among those that have arrived; but if the groups that stay behind would then
  break (1) at v + 1, the trainer waits for the slow ones that are due instead. So a slow prompt is never overtaken
  until it is too old, nothing is dropped in a steady run, and answers that take long are not lost for being long.
- *The guard*: whatever became too old all the same (a lease that expired, an engine that fell back to a version older
  than the lease's) is dropped whole and its prompt leased again. A batch never holds a group of staleness > η. Such
  groups may break (1) beyond repair: those due before v, which can be in no batch any more, are left out of the sums,
  and the trainer waits only for a group in flight that is due before one that it would take.

Worked example: B = 2, η = 1, v = v₀ = 0. Admission grants 4 leases, all due at version 1: due(1) = 4 ≤ 2·2, a fifth
would break it. Three groups arrive, the fourth is slow. The batch at v = 0 takes two; left are one buffered and one in
flight, due at 1: due(1) = 2 ≤ (1 − 1 + 1)·2, so nothing waits. At v = 1 servers have swapped; two new leases are due at
2. If both overtake the slow group, the batch at v = 1 may not hold them both: the slow one and the buffered one would
remain, due(1) = 2 > 0 at v = 2. So it takes the buffered group and waits for the slow one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping


def staleness(version: int, oldest_version: int) -> int:
    """Versions between the policy about to be trained and the oldest token."""
    return version - oldest_version


def in_time(due: Mapping[int, int], *, version: int, batch: int) -> bool:
    """Whether all groups can be consumed by the version that each is due at: rule (1).

    Args:
        due: due version to number of unconsumed groups.
        version: the version about to be trained.
        batch: groups of a batch.
    """
    total = 0
    for deadline in sorted(due):
        total += due[deadline]
        if total > max(0, deadline - version + 1) * batch:
            return False
    return True


def may_admit(due: Mapping[int, int], *, oldest_version: int, max_staleness: int, version: int, batch: int) -> bool:
    """Whether one more prompt may be leased to a server that serves `oldest_version`."""
    with_it = _possible(due, version)
    with_it[oldest_version + max_staleness] += 1
    return in_time(with_it, version=version, batch=batch)


def may_take(due: Mapping[int, int], taken: Iterable[int], *, version: int, batch: int) -> bool:
    """Whether the groups that stay behind can still be consumed in time when those due at `taken` are this batch."""
    left = _possible(due, version)
    left.subtract(taken)
    return in_time(left, version=version + 1, batch=batch)


def _possible(due: Mapping[int, int], version: int) -> Counter[int]:
    """Without those that no batch may hold any more: nothing waits for them."""
    return Counter({deadline: count for deadline, count in due.items() if deadline >= version})
