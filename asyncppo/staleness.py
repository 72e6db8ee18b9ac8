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

**Replay** (`algorithm.reuse: replay`). A group of r uses left that is due at d can still be used at the versions v, …,
d, once at each, because a batch holds distinct groups. So what it demands is

    min(r, d − v + 1) uses by its due version d                                                       (2)

and in (1) `due(d)` counts these uses in the place of groups. With `utd` = 1 every group demands one use: all as above.

- *Admission* asks for (1) with the new prompt, which demands min(utd, d − v + 1). One leased at v, and trained on at
  once, demands u = min(utd, η + 1). A step supplies B uses, so about B / u prompts are leased a step, and the other
  groups of a batch come back from the buffer: the reuse does happen. One leased at v for the batch at v + 1 has η
  versions left.
- *Taking a batch*: B distinct groups, the earliest due first, then those of fewest uses. Where all have arrived, (1) at
  v becomes (1) at v + 1: if B or more groups are due by d, the batch is of such, and their demand falls by B at least;
  if fewer are, all are in the batch, and each demands d − v at most after it, at most (d − v)·B in sum.
- *First uses are mandatory, further ones are not.* Each group never used counts in (1) for one or more, so (1) on the
  demands implies (1) on the first uses, and the waiting and the guard above are judged on those alone, one a group. If
  the first uses that stay behind would break (1) because used groups are due earlier, those never used go first. The
  further uses lapse when the group has grown too old: (1) does not promise them all, since it does not know that two
  uses of one group need two batches, and since slow groups, once overtaken, have fewer versions left for theirs. With
  servers that answer at once and `stream.ready_batches` = 1 they are all made.
- *No deadlock.* Let n < B groups be there for a batch and none in flight. By each d < v + η they demand at most
  n·(d − v + 1) ≤ B·(d − v + 1); by v + η at most n·u, and (n + 1)·u ≤ B·(η + 1). So (1) holds with one more prompt of
  version v, and admission grants it.
- *The end of the run.* Nothing is trained after the last version L, so every group is due at L at the latest. With
  `utd` = 1 and C = (v − v₀)·B this is C + F < (L + 1 − v₀)·B: as many prompts as the run needs. The proof above holds
  with min(v + η, L) in the place of v + η.
- *The brake* may lower the bound of admission to η' < η for a while. In its sums a group never used is then due at
  max(o + η', v), and a used one at o + η', where it lapses. The guard stays at η.

Worked example: B = 2, η = 1, v = v₀ = 0. Admission grants 4 leases, all due at version 1: due(1) = 4 ≤ 2·2, a fifth
would break it. Three groups arrive, the fourth is slow. The batch at v = 0 takes two; left are one buffered and one in
flight, due at 1: due(1) = 2 ≤ (1 − 1 + 1)·2, so nothing waits. At v = 1 servers have swapped; two new leases are due at
2. If both overtake the slow group, the batch at v = 1 may not hold them both: the slow one and the buffered one would
remain, due(1) = 2 > 0 at v = 2. So it takes the buffered group and waits for the slow one.

Worked example of replay: B = 2, η = 2, utd = 2. At v = 0 each prompt demands 2 uses by version 2, and there are
(2 − 0 + 1)·2 = 6: a, b, c are leased, a fourth would make 8. The batch is a, b. At v = 1 they demand 1 + 1 + 2 = 4 =
(2 − 1 + 1)·2 by version 2; a new prompt is due at 3, and 4 + 2 ≤ 3·2: d is leased, no fifth. Those due at 2 come before
d, and c has the fewest uses: the batch is c, a, and a has had its two. At v = 2 b and c demand one use each by version
2, d two by version 3, and a new one, e, two by version 4: 2 ≤ 2, 4 ≤ 4, 6 ≤ 6. The batch is b, c. From here on one
prompt is leased a step, B / utd. At v = 3 only version 3 is left to d, so it demands 1; the batch is d, e, and the
second use of d lapses.
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
        due: due version to number of unconsumed groups, or of uses that are demanded.
        version: the version about to be trained.
        batch: groups of a batch.
    """
    total = 0
    for deadline in sorted(due):
        total += due[deadline]
        if total > max(0, deadline - version + 1) * batch:
            return False
    return True


def demands(groups: Mapping[tuple[int, int], int], *, version: int) -> Counter[int]:
    """Due version to the uses that are demanded by it: (2), of the groups that a batch may still hold.

    Args:
        groups: (due version, uses left) to number of groups.
        version: the version about to be trained.
    """
    uses: Counter[int] = Counter()
    for (deadline, left), count in groups.items():
        if deadline >= version:
            uses[deadline] += count * min(left, deadline - version + 1)
    return uses


def may_admit(
    due: Mapping[int, int], *, oldest_version: int, max_staleness: int, version: int, batch: int, utd: int = 1
) -> bool:
    """Whether one more prompt may be leased to a server that serves `oldest_version`.

    Args:
        due: due version to number of uses that are demanded (`demands`); with one use a group, of unconsumed groups.
        oldest_version: what the server serves.
        max_staleness: the bound for this prompt.
        version: the version about to be trained.
        batch: groups of a batch.
        utd: uses of a group at most.
    """
    deadline = oldest_version + max_staleness
    with_it = _possible(due, version)
    with_it[deadline] += max(1, min(utd, deadline - version + 1))
    return in_time(with_it, version=version, batch=batch)


def may_take(due: Mapping[int, int], taken: Iterable[int], *, version: int, batch: int) -> bool:
    """Whether the groups that stay behind can still be used in time when those due at `taken` are in this batch.

    Args:
        due: due version to number of groups that were never used.
        taken: due versions of those among them that the batch holds.
        version: the version about to be trained.
        batch: groups of a batch.
    """
    left = _possible(due, version)
    left.subtract(taken)
    return in_time(left, version=version + 1, batch=batch)


def _possible(due: Mapping[int, int], version: int) -> Counter[int]:
    """Without those that no batch may hold any more: nothing waits for them."""
    return Counter({deadline: count for deadline, count in due.items() if deadline >= version})
