"""The audit: what a complete run's files say of its promises. It reads files alone, and believes none of the counts.

    ledger.jsonl      every batch with its groups, every drop      lost, duplicated
    checkpoints/      the last one: what was waiting at the end    lost
    metrics.jsonl     every version's staleness                    over_bound, versions

The sequence of prompts is made anew from the dataset and the seed: position p of the run is an (epoch, prompt id).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from asyncppo import checkpoints
from asyncppo.config import Config
from asyncppo.metrics import LEDGER_FILE, METRICS_FILE, read
from trainer import preflight
from trainer.stream.prompts import Prompt, Prompts

Key = tuple[int, str]
"""(epoch, prompt id)."""


@dataclass
class Findings:
    """What is wrong; all zero, empty and true for a run that kept its promises."""

    groups: int = 0
    """Uses of groups in batches."""
    lost: int = 0
    """Prompts before the last that was begun which were neither consumed nor given up, and do not wait."""
    duplicated: int = 0
    """(epoch, prompt id, use) that are there twice, or prompts that are in two places."""
    over_bound: int = 0
    """Groups in batches that were staler than `stream.max_staleness`."""
    dropped: Counter[str] = field(default_factory=Counter)
    given_up: int = 0
    problems: list[str] = field(default_factory=list)
    """In words: all of the above, and whatever else does not fit together."""

    @property
    def good(self) -> bool:
        """Whether nothing was found."""
        return not (self.lost or self.duplicated or self.over_bound or self.problems)


def audit(config: Config, prompts: Sequence[Prompt] | None = None) -> Findings:
    """Look at a run that is complete.

    Args:
        config: of the run, with the steps that it reached.
        prompts: its dataset; read anew without.
    """
    found = Findings()
    lines = list(read(config.run_directory / LEDGER_FILE))
    _audit_metrics(config, list(read(config.run_directory / METRICS_FILE)), found)
    used = _audit_batches(config, lines, found)
    state = _last_state(config, found)
    if state is not None:
        sequence = Prompts(
            prompts if prompts is not None else preflight.load_data(config).train,
            config.run.seed,
            config.data.shuffle,
        )
        _audit_prompts(config, lines, used, state, sequence, found)
    return found


def _audit_metrics(config: Config, rows: list[dict[str, Any]], found: Findings) -> None:
    versions = [row["policy_version"] for row in rows]
    if versions != list(range(config.run.steps)):
        counts = Counter(versions)
        twice = [version for version, count in counts.items() if count > 1][:5]
        missing = [version for version in range(config.run.steps) if version not in counts][:5]
        found.problems.append(
            f"{METRICS_FILE}: expected versions 0 to {config.run.steps - 1} once each and in order; "
            f"{len(versions)} lines, twice {twice}, missing {missing}"
        )
    bound = config.stream.max_staleness
    for row in rows:
        histogram = row["staleness/histogram"]
        over = sum(histogram[bound + 1 :])
        if row["staleness/max"] > bound and not over:
            over = 1
        if over:
            found.over_bound += over
            found.problems.append(f"version {row['policy_version']}: {over} groups staler than {bound}: {histogram}")
        if sum(histogram) != config.stream.prompts_per_batch:
            found.problems.append(f"version {row['policy_version']}: a batch of {sum(histogram)} groups")


def _audit_batches(config: Config, lines: list[dict[str, Any]], found: Findings) -> dict[Key, list[int]]:
    batches = [line for line in lines if "groups" in line and not line.get("warm_start")]
    versions = [line["version"] for line in batches]
    if versions != list(range(config.run.steps)):
        found.problems.append(
            f"{LEDGER_FILE}: expected a batch for each of versions 0 to {config.run.steps - 1}, in order; "
            f"{len(versions)} lines, of them {len(set(versions))} different"
        )
    used: dict[Key, list[int]] = {}
    for line in lines:
        if "groups" not in line:
            continue
        if len(line["groups"]) != config.stream.prompts_per_batch:
            found.problems.append(f"version {line['version']}: the ledger has {len(line['groups'])} groups")
        for epoch, prompt_id, use in line["groups"]:
            found.groups += 1
            used.setdefault((epoch, prompt_id), []).append(use)
    most = config.algorithm.utd if config.algorithm.reuse == "replay" else 1
    for key, uses in used.items():
        again = len(uses) - len(set(uses))
        if again:
            found.duplicated += again
            found.problems.append(f"prompt {key}: uses {uses}")
        elif uses != list(range(1, len(uses) + 1)):
            found.lost += 1
            found.problems.append(f"prompt {key}: uses {uses}, expected 1, 2, … in order")
        elif len(uses) > most:
            found.duplicated += len(uses) - most
            found.problems.append(f"prompt {key}: {len(uses)} uses, at most {most} are allowed")
    return used


def _last_state(config: Config, found: Findings) -> dict[str, Any] | None:
    """The ledger's part of the checkpoint that the complete run ended with."""
    path = config.run_directory / "checkpoints" / f"{checkpoints.STEP}{config.run.steps:08d}"
    wrong = checkpoints.problems(path)
    if wrong:
        found.problems.append(f"the last checkpoint, {path.name}: {'; '.join(wrong)}")
        return None
    state: dict[str, Any] = msgspec.json.decode((path / checkpoints.STATE).read_bytes())["ledger"]
    return state


def _audit_prompts(
    config: Config,
    lines: list[dict[str, Any]],
    used: dict[Key, list[int]],
    state: dict[str, Any],
    sequence: Prompts,
    found: Findings,
) -> None:
    begun: dict[Key, int] = {}
    for position in range(state["next_position"]):
        epoch, prompt = sequence.at(position)
        begun[epoch, prompt.prompt_id] = position
    waiting = Counter(state["unconsumed"])
    buffered = Counter(held["position"] for held in state["buffered"])
    unused = Counter(held["position"] for held in state["buffered"] if not held["uses"])
    done: Counter[Key] = Counter()
    for line in lines:
        if "dropped" in line:
            found.dropped[line["dropped"]] += 1
            done[line["epoch"], line["prompt_id"]] += not line["again"]
    found.given_up = done.total()
    for key in set(used) - set(begun):
        found.problems.append(f"prompt {key} was trained on, and the checkpoint says that it was never begun")
    for key, position in begun.items():
        # a used group that is buffered still has uses left: it is in one place
        places = (key in used) + done[key] + waiting[position] + unused[position]
        if places == 0:
            found.lost += 1
            found.problems.append(f"prompt {key}, position {position}: neither consumed nor given up, and not waiting")
        elif places > 1:
            found.duplicated += places - 1
            found.problems.append(
                f"prompt {key}, position {position}: {len(used.get(key, []))} uses, given up {done[key]} times, "
                f"waiting {waiting[position]} times, buffered {buffered[position]} times"
            )
