"""What can happen to a run, and the schedule: drawn from a seed, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.chaos.cluster import SERVERS
from tests.chaos.proxy import Weather

KINDS = {
    "kill trainer": "kill -9 of the supervisor, the learner and the critics: the host died",
    "kill supervisor": "kill -9 of it alone",
    "kill learner": "kill -9",
    "kill critic": "kill -9 of one",
    "kill rollout": "kill -9 of one",
    "stop learner": "SIGSTOP, later SIGCONT",
    "stop critic": "the same",
    "stop rollout": "the same, for less or more than a server's death",
    "restart trainer": "SIGTERM; the same command again",
    "restart rollout": "the same",
    "partition": "one server reaches nobody",
    "partition all": "no server reaches the trainer",
    "bad network": "messages of all are lost, repeated, late, and overtake each other",
    "corrupt network": "messages of one server have other bytes",
    "full disk": "nothing fits into the run directory any more",
    "corrupt checkpoint": "the trainer's host dies, and the newest checkpoint with it",
    "calm": "nothing: the run has to get on",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One that will happen."""

    kind: str
    after_s: float
    """Since the last one."""
    server: str
    critic: int
    lasts_s: float
    weather: Weather
    draw: float
    """In [0, 1): decides what else there is to decide."""


def schedule(seed: int) -> Iterator[Fault]:
    """Without end: round after round of every kind once, in another order each."""
    rng = random.Random(seed)
    while True:
        for kind in rng.sample(list(KINDS), len(KINDS)):
            bad = Weather(drop=rng.uniform(0, 0.3), duplicate=rng.uniform(0, 0.3), delay_s=rng.choice((0.0, 0.1, 1.0)))
            corrupt = Weather(corrupt=rng.uniform(0.05, 0.4))
            cut = Weather(cut=True)
            yield Fault(
                kind=kind,
                after_s=rng.uniform(0.5, 3.5),
                server=rng.choice(SERVERS),
                critic=rng.randrange(2),
                lasts_s=rng.uniform(0.5, 6.0),
                weather={"bad network": bad, "corrupt network": corrupt}.get(kind, cut),
                draw=rng.random(),
            )
