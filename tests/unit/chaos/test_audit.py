"""Claims about the chaos audit: it finds nothing in a run that is whole, and each violation in one that was altered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncppo import checkpoints
from asyncppo.checkpoints import FORMAT, Manifest, write_manifest
from asyncppo.config import Config, from_tree
from tests.chaos.audit import Findings, audit
from tests.chaos.faults import KINDS, schedule
from tests.stream_maker import a_prompt
from trainer.stream.prompts import Prompts

pytestmark = pytest.mark.unit

STEPS, BATCH, BOUND, SEED = 4, 2, 1, 5
DATA = [a_prompt(number) for number in range(3)]
Files = dict[str, Any]
"""`ledger` and `metrics`, lists of lines, and `state`, the ledger's part of the last checkpoint."""


def a_config(directory: Path) -> Config:
    return from_tree(
        {
            "run": {"name": "r", "directory": str(directory), "steps": STEPS, "seed": SEED},
            "data": {"train": "none"},
            "actor": {"path": "none"},
            "stream": {"prompts_per_batch": BATCH, "max_staleness": BOUND},
            "algorithm": {"reuse": "replay", "utd": 2},
        }
    )


def a_run() -> Files:
    """Eleven prompts were begun. Position 2 was given up, 8 waits, 9 is buffered, 10 is buffered and was used once.

    Position 1 was dropped once and leased again; positions 0 and 10 were used, 0 twice.
    """
    sequence = Prompts(DATA, SEED, shuffle=True)
    keys = []
    for position in range(11):
        epoch, prompt = sequence.at(position)
        keys.append([epoch, prompt.prompt_id])
    batches = [[(0, 1), (1, 1)], [(3, 1), (0, 2)], [(4, 1), (5, 1)], [(7, 1), (10, 1)]]
    ledger: list[dict[str, Any]] = [
        {"version": version, "groups": [[*keys[position], use] for position, use in batch]}
        for version, batch in enumerate(batches)
    ]
    ledger.insert(0, drop(keys[1], again=True))
    ledger.insert(3, drop(keys[2], again=False))
    ledger.append(drop(keys[6], again=False, reason="no signal"))
    metrics = [
        {"policy_version": version, "staleness/max": 1, "staleness/histogram": [1, 1]} for version in range(STEPS)
    ]
    state = {
        "next_position": 11,
        "unconsumed": [8],
        "buffered": [{"position": 9, "uses": 0}, {"position": 10, "uses": 1}],
    }
    return {"ledger": ledger, "metrics": metrics, "state": state, "keys": keys}


def drop(key: list[Any], *, again: bool, reason: str = "not completed") -> dict[str, Any]:
    return {"dropped": reason, "again": again, "lease": 7, "epoch": key[0], "prompt_id": key[1]}


def audited(directory: Path, files: Files) -> Findings:
    config = a_config(directory)
    run = config.run_directory
    place = run / "checkpoints" / f"{checkpoints.STEP}{STEPS:08d}"
    place.mkdir(parents=True)
    for name in ("ledger", "metrics"):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in files[name]))
    (place / checkpoints.STATE).write_text(json.dumps({"ledger": files["state"]}))
    write_manifest(
        place,
        Manifest(
            format=FORMAT, policy_version=STEPS, run="r", time=0.0, actor_path="", critic_paths=[], parts=[], files={}
        ),
    )
    if files.get("torn"):
        (place / checkpoints.STATE).write_text("{}")
    return audit(config, DATA)


def test_a_whole_run_has_nothing_to_find(tmp_path: Path) -> None:
    found = audited(tmp_path, a_run())
    assert found.good, found.problems
    assert (found.groups, found.given_up, found.dropped) == (8, 2, {"not completed": 2, "no signal": 1})


def batch(files: Files, version: int) -> list[list[Any]]:
    groups: list[list[Any]] = next(line for line in files["ledger"] if line.get("version") == version)["groups"]
    return groups


def use_of_another(files: Files) -> None:
    batch(files, 2)[0] = [*files["keys"][3], 2]  # which position 3 may have; 4 has gone


def a_second_use_comes_first(files: Files) -> None:
    batch(files, 0)[0][2], batch(files, 1)[1][2] = 2, 1


def over_the_bound(files: Files) -> None:
    files["metrics"][2] |= {"staleness/max": 2, "staleness/histogram": [0, 1, 1]}


VIOLATIONS: dict[str, tuple[Callable[[Files], Any], tuple[int, int, int]]] = {
    # (what is done to the files, (lost, duplicated, over_bound))
    "a use twice": (lambda files: batch(files, 1)[1].__setitem__(2, 1), (0, 1, 0)),
    "a prompt that vanished": (use_of_another, (1, 0, 0)),
    "a first use that is missing": (lambda files: batch(files, 3)[1].__setitem__(2, 2), (1, 0, 0)),
    "uses in the wrong order": (a_second_use_comes_first, (1, 0, 0)),
    "more uses than utd": (lambda files: batch(files, 2).__setitem__(0, [*files["keys"][0], 3]), (1, 1, 0)),
    "a prompt that no longer waits": (lambda files: files["state"]["unconsumed"].clear(), (1, 0, 0)),
    "a prompt that waits and was consumed": (lambda files: files["state"]["unconsumed"].append(3), (0, 1, 0)),
    "a prompt that waits twice": (lambda files: files["state"]["unconsumed"].append(8), (0, 1, 0)),
    "a buffered prompt that was dropped": (lambda files: files["state"]["buffered"].pop(0), (1, 0, 0)),
    "given up and consumed": (lambda files: files["ledger"][0].update(again=False), (0, 1, 0)),
    "a drop for good that nobody wrote": (lambda files: files["ledger"].pop(3), (1, 0, 0)),
    "a batch over the bound": (over_the_bound, (0, 0, 1)),
    "a maximum over the bound": (lambda files: files["metrics"][0].update({"staleness/max": 2}), (0, 0, 1)),
    "a version twice in the metrics": (lambda files: files["metrics"].append(files["metrics"][-1]), (0, 0, 0)),
    "a version that is missing": (lambda files: files["metrics"].pop(1), (0, 0, 0)),
    "versions out of order": (lambda files: files["metrics"].reverse(), (0, 0, 0)),
    "a prompt that was never begun": (lambda files: files["state"].update(next_position=10), (0, 0, 0)),
    "a last checkpoint that is torn": (lambda files: files.update(torn=True), (0, 0, 0)),
    "a batch twice in the ledger": (lambda files: files["ledger"].append(files["ledger"][-2]), (0, 2, 0)),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_each_violation_is_found(tmp_path: Path, name: str) -> None:
    alter, expected = VIOLATIONS[name]
    files = a_run()
    alter(files)
    found = audited(tmp_path, files)
    assert (found.lost, found.duplicated, found.over_bound) == expected, found.problems
    assert found.problems
    assert not found.good


def test_a_schedule_repeats_itself_and_soon_has_every_kind_of_fault() -> None:
    first, again, other = schedule(3), schedule(3), schedule(4)
    faults = [next(first) for _ in range(len(KINDS))]
    assert faults == [next(again) for _ in range(len(KINDS))]
    assert faults != [next(other) for _ in range(len(KINDS))]
    assert {fault.kind for fault in faults} == set(KINDS)
