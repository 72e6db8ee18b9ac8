"""The plain twin of a run: staleness 0, in-process transport, scripted engine, plain PyTorch, one process.

The same intake, ledger, buffer, targets, losses and rollout loop as the real thing, each heavy part replaced by its
twin: `MemoryHub` for ZeroMQ, `ScriptedEngine` (a Hugging Face model that samples from a seed) for SGLang, `PlainEngine`
for DeepSpeed, threads for processes. Slow, but deterministic: the reference that the asynchronous run is compared with
(tests/real/test_plain_twin.py), and the place to put a breakpoint.

    .venvs/trainer/bin/python scripts/plain_run.py --config configs/demo.yaml --set run.steps=5
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncppo.config import Config, load
from asyncppo.errors import EngineError
from asyncppo.logs import set_up_logging
from asyncppo.messages import ToCritic
from asyncppo.metrics import Journal
from asyncppo.transport.base import Link
from asyncppo.transport.memory import MemoryChannel, MemoryHub
from rollout_server.engine import Broadcast, ScriptedEngine
from rollout_server.loop import RolloutServer
from rollout_server.reward import Grader
from trainer import preflight
from trainer.feed import Feed
from trainer.learner import Learner
from trainer.model.critic import Critic, serve
from trainer.model.critics import Critics
from trainer.model.policy import Policy
from trainer.model.world import World
from trainer.publish.disk import Disk
from trainer.publish.publisher import Publisher
from trainer.stream.intake import Intake
from trainer.stream.prompts import Prompts

TWINS = (
    "stream.max_staleness=0",
    "actor.engine=plain",
    "critic.engine=plain",
    "actor.processes=1",
    "critic.processes=1",
    "publish.transport=disk",
)
"""What makes a config plain."""


class SeededSampler:
    """A script for `ScriptedEngine`: samples with transformers, seeded by (prompt, version): it repeats itself."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._tokenizer = AutoTokenizer.from_pretrained(config.actor.path)
        self._model = AutoModelForCausalLM.from_pretrained(config.actor.path, dtype=torch.float32).eval()
        self._made: dict[tuple[tuple[int, ...], int], list[list[tuple[int, float]]]] = {}

    def load(self, weights: Path | Broadcast, _: int) -> None:
        """Take a published version."""
        if isinstance(weights, Broadcast):
            raise EngineError("the plain twin has its weights from disk: set publish.transport to disk")
        self._model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
        self._made.clear()

    @torch.no_grad()
    def score(self, ids: tuple[int, ...], _: int) -> list[float]:
        """Log-probs of ids[1:], for the probe of a published version."""
        logprobs = self._model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        chosen: list[float] = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        return chosen

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text, as SGLang gives it."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def __call__(self, prompt_ids: tuple[int, ...], index: int, version: int) -> list[tuple[int, float]]:
        key = (prompt_ids, version)
        if key not in self._made:
            self._made[key] = self._sample(prompt_ids, version)
        return self._made[key][index]

    @torch.no_grad()
    def _sample(self, prompt_ids: tuple[int, ...], version: int) -> list[list[tuple[int, float]]]:
        """As many responses as anybody asks for, with log-probs of softmax(logits / temperature)."""
        sampling = self._config.sampling
        seed = hashlib.blake2b(repr((self._config.run.seed, prompt_ids, version)).encode(), digest_size=7).digest()
        rows = max(sampling.group_size, self._config.eval.samples)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(seed))
            out = self._model.generate(
                torch.tensor([prompt_ids]).expand(rows, -1),
                attention_mask=torch.ones(rows, len(prompt_ids), dtype=torch.int64),
                do_sample=True,
                temperature=sampling.temperature,
                top_p=1.0,
                top_k=0,
                max_new_tokens=sampling.max_response_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
                output_logits=True,
                return_dict_in_generate=True,
            )
        ids = out.sequences[:, len(prompt_ids) :]
        logprobs = (torch.stack(out.logits, dim=1).float() / sampling.temperature).log_softmax(-1)
        chosen = logprobs.gather(-1, ids[..., None])[..., 0]
        ends = [(row == self._tokenizer.eos_token_id).nonzero()[:1].flatten().tolist() for row in ids]
        return [
            list(zip(row.tolist(), values.tolist(), strict=True))[: end[0] + 1 if end else None]
            for row, values, end in zip(ids, chosen, ends, strict=True)
        ]


def rollout(config: Config, make_link: Callable[[], Link]) -> threading.Thread:
    """A rollout server in a thread, with a scripted engine. `make_link` is called in the thread's event loop."""
    sampler = SeededSampler(config)

    async def live() -> None:
        engine = ScriptedEngine(sampler, sampler.decode, on_load=sampler.load, scores=sampler.score)
        link = make_link()
        grader = Grader(config.reward)
        await grader.self_test()
        await RolloutServer(config, link, engine, grader, "plain", config.actor.path).run()

    thread = threading.Thread(target=lambda: asyncio.run(live()), name="rollout", daemon=True)
    thread.start()
    return thread


def plain_run(config: Config) -> int:
    """Train to the end of the run; returns the version reached. The config has to have `TWINS` applied."""
    data = preflight.load_data(config)
    world = World()
    journal = Journal(config.run_directory)
    hub = MemoryHub()
    intake = Intake(
        config,
        hub,
        Prompts(data.train, config.run.seed, config.data.shuffle),
        preflight.identity(config),
        journal,
    )
    channels = []
    for index in range(config.algorithm.critics):
        ours, theirs = MemoryChannel.pair(ToCritic)
        critic = Critic(config, index, world)
        threading.Thread(target=serve, args=(critic, theirs, index, world), name=f"critic {index}", daemon=True).start()
        channels.append(ours)
    critics = Critics(config, channels)
    critics.wait_until_ready()
    intake.start()
    server = rollout(config, lambda: hub.link(b"plain"))
    policy = Policy(config, world)
    feed = Feed(config, world, intake, journal, data.eval_sets, data.tokenizer_directory, lambda: False)
    disk = Disk(config, data.tokenizer_directory)
    probe_ids = preflight.probe_ids(config, data.train)
    publisher = Publisher(
        config, disk, policy.network.hf, feed.announce, feed.oldest_wanted_version, probe_ids, journal
    )
    try:
        return Learner(config, world, feed, policy, critics, publisher, journal, probe_ids=probe_ids).run(0)
    finally:
        critics.stop("the plain run has ended")
        publisher.close()
        intake.close("the plain run has ended")
        server.join(timeout=30)
        disk.close()
        journal.close()


def main(
    config: Annotated[Path, typer.Option(help="The run's YAML file.")],
    overrides: Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="Override one key.")] = [],  # noqa: B006
) -> None:
    """Train with every heavy part replaced by its twin, in this one process."""
    set_up_logging("plain")
    plain_run(load(config, [*overrides, *TWINS]))


if __name__ == "__main__":
    typer.run(main)
