"""The plain run: one synchronous run in this one process, many seeds at little cost; what `asyncppo compare` starts.

The learner, targets, losses, critics, feed and records are the real ones. Twins stand for what is heavy:
`SampledIntake` for the stream and its servers (one batched Hugging Face sampler that answers all prompts of a step at
once), `MemoryPublisher` for weights on disk, `LockstepChannel` for the critics' processes, `PlainEngine` for DeepSpeed.
Everything is drawn from (seed, version): the same run twice is the same run.

    python -m trainer.plain --config configs/demo.yaml --seeds 0,1,2 --set run.steps=30

With `--lag K` every batch is drawn by the weights of K versions ago, and says so: off-policy training without a stream.
Grading has no time limit here, which the rollout servers keep: for tasks with short answers.
"""

from __future__ import annotations

import functools
import logging
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from asyncppo.config import Config, dump
from asyncppo.errors import AsyncPPOError, ConfigError, UserError
from asyncppo.logs import set_up_logging
from asyncppo.messages import Group, Message, Stop, ToCritic
from asyncppo.metrics import Journal
from asyncppo.plain import is_finished, plain_config
from asyncppo.rewards import combined, grade, overlong_penalty, step_rewards
from asyncppo.transport.memory import MemoryChannel
from trainer import preflight
from trainer.feed import Feed
from trainer.learner import Learner
from trainer.model.critic import Critic, serve
from trainer.model.critics import Critics
from trainer.model.policy import Policy
from trainer.model.world import World
from trainer.publish.publisher import Publisher
from trainer.stream.buffer import BufferedGroup
from trainer.stream.dynamic_sampling import DynamicSampling
from trainer.stream.intake import Counts, Intake
from trainer.stream.ledger import LedgerState
from trainer.stream.prompts import Prompt, Prompts
from trainer.stream.state import StreamState

log = logging.getLogger("asyncppo.plain")

_MAX_ROWS = 512
"""Responses that are sampled at once."""
_OFFSETS = (1_000_003, 2_000_003)
"""From the seed of the run's order of prompts to those of what replaces dropped groups, and of the warm start."""
_STEP, _REPLACEMENT, _WARM_START, _EVALUATION = range(4)
"""What responses are drawn for; part of the seed."""
_GRADES = 1 << 16
"""Grades that are remembered, by text and answer."""


@dataclass(frozen=True, slots=True)
class Response:
    """What the sampler drew for one row."""

    ids: torch.Tensor  # [t] int64, the end-of-sequence token included
    logprobs: torch.Tensor  # [t] float32, of softmax(logits / temperature)
    truncated: bool


class Sampler:
    """A causal language model that answers many prompts at once, with a KV cache.

    Prompts are padded on the left and read once each, then every prompt's row is repeated; rows that have ended leave
    the batch.
    """

    def __init__(self, config: Config, end: int, device: torch.device) -> None:
        self._sampling = config.sampling
        self._end = end
        self._device = device
        dtype = getattr(torch, config.rollout.dtype)
        self._model = AutoModelForCausalLM.from_pretrained(config.actor.path, dtype=dtype).eval().to(device)

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take the weights of `Policy.weights`."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(weights[name])

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], count: int, seed: Sequence[int]) -> list[list[Response]]:
        """`count` responses to each prompt, drawn from `seed`."""
        step = max(1, _MAX_ROWS // count)
        responses: list[list[Response]] = []
        for start in range(0, len(prompts), step):
            generator = torch.Generator(self._device)
            generator.manual_seed(int(np.random.default_rng([*seed, start]).integers(2**62)))
            rows = self._sample(prompts[start : start + step], count, generator)
            responses += [rows[index : index + count] for index in range(0, len(rows), count)]
        return responses

    def _sample(self, prompts: Sequence[Prompt], count: int, generator: torch.Generator) -> list[Response]:
        limit, rows = self._sampling.max_response_tokens, len(prompts) * count
        drawn = torch.zeros(rows, limit, dtype=torch.int64, device=self._device)
        logprobs = torch.zeros(rows, limit, device=self._device)
        lengths = torch.full((rows,), limit, device=self._device)
        ended = torch.zeros(rows, dtype=torch.bool, device=self._device)
        alive = torch.arange(rows, device=self._device)
        cache = DynamicCache(config=self._model.config)
        logits, mask, positions = self._read(prompts, cache)
        cache.batch_repeat_interleave(count)
        logits, mask, positions = (part.repeat_interleave(count, dim=0) for part in (logits, mask, positions))
        for index in range(limit):
            of_tokens = (logits.float() / self._sampling.temperature).log_softmax(-1)
            token = draw(of_tokens.exp(), generator)
            drawn[alive, index] = token[:, 0]
            logprobs[alive, index] = of_tokens.gather(1, token)[:, 0]
            goes_on = token[:, 0] != self._end
            lengths[alive[~goes_on]], ended[alive[~goes_on]] = index + 1, True
            if index + 1 == limit or not goes_on.any():
                break
            if not goes_on.all():
                left = goes_on.nonzero()[:, 0]
                alive, token, mask, positions = alive[left], token[left], mask[left], positions[left]
                cache.batch_select_indices(left)
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
            positions = positions + 1
            logits = self._model(
                input_ids=token,
                attention_mask=mask[:, None, None, :],  # four dimensions are taken as they are
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        return [
            Response(drawn[row, :length].cpu(), logprobs[row, :length].cpu(), not whole)
            for row, (length, whole) in enumerate(zip(lengths.tolist(), ended.tolist(), strict=True))
        ]

    def _read(self, prompts: Sequence[Prompt], cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The logits after each prompt [P, V], the mask [P, longest], and the last position [P, 1]."""
        longest = max(len(prompt.prompt_ids) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt.prompt_ids) :] = torch.from_numpy(prompt.prompt_ids.astype(np.int64))
            mask[row, longest - len(prompt.prompt_ids) :] = True
        ids, mask = ids.to(self._device), mask.to(self._device)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        logits = self._model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits, mask, positions[:, -1:]


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token of each row, [R, 1] from [R, V], by one uniform number a row (`torch.multinomial` draws V of them)."""
    sums = probabilities.cumsum(1)
    total = sums[:, -1:]
    uniform = torch.rand(total.shape, generator=generator, device=total.device)
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not lead past the last likely token
    return torch.searchsorted(sums, torch.minimum(uniform * total, below), right=True)


class MemoryPublisher:
    """The twin of `Publisher`: versions stay in memory, until no later batch is drawn by them.

    Args:
        lag: batches for version v are drawn by version max(0, v − lag).
    """

    def __init__(self, lag: int = 0) -> None:
        self._lag = lag
        self.versions: dict[int, dict[str, torch.Tensor]] = {}
        self.cpu_of_versions: list[float] = []
        """CPU seconds of this process when each version was published."""

    def publish(self, version: int, weights: dict[str, torch.Tensor], probe_logprobs: torch.Tensor) -> None:
        """Keep a version."""
        self.cpu_of_versions.append(time.process_time())
        kept = {number: held for number, held in self.versions.items() if number >= version - self._lag}
        self.versions = {**kept, version: weights}

    def flush(self) -> None:
        """Nothing waits here."""


class LockstepChannel:
    """A `Channel` to a critic in a thread of this process, which works only while the learner waits for it.

    Two threads that compute in Python at the same time would only fight over one interpreter.
    """

    def __init__(self, inner: MemoryChannel, timeout_s: float) -> None:
        self._inner = inner
        self._timeout_s = timeout_s
        self._answers: list[Any] = []

    @property
    def hint(self) -> str:
        return self._inner.hint

    def send(self, message: Message) -> bool:
        self._inner.send(message)
        if not isinstance(message, Stop):
            self._answers.append(self._inner.receive(self._timeout_s))
        return True

    def receive(self, timeout_s: float) -> Any | None:
        return self._answers.pop(0) if self._answers else self._inner.receive(timeout_s)

    def close(self) -> None:
        self._inner.close()


class SampledIntake:
    """The twin of `Intake` and all rollout servers: a batch is drawn when it is asked for.

    Args:
        config: of the run.
        prompts: the training set.
        sampler: draws the responses.
        publisher: has the versions.
        decode: token ids to the text that is graded.
        lag: batches for version v are drawn by version max(0, v − lag).
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        publisher: MemoryPublisher,
        decode: Callable[[Sequence[int]], str],
        lag: int,
    ) -> None:
        self._config = config
        self._sampler = sampler
        self._publisher = publisher
        self._decode = decode
        self._lag = lag
        self._max_staleness = config.stream.max_staleness
        self._prompts = Prompts(prompts, config.run.seed, config.data.shuffle)
        self._replacements, self._warm_start = (
            enumerate(Prompts(prompts, config.run.seed + offset, shuffle=True).after(0)) for offset in _OFFSETS
        )
        self._grade = functools.lru_cache(maxsize=_GRADES)(functools.partial(grade, combined(config.reward)))
        self._batch = config.stream.prompts_per_batch
        self._dynamic = DynamicSampling(config)
        self._loaded = -1
        self._leases = self._consumed = 0
        self._refused = Counter[str]()  # by reason
        self.tokens = Counter[int]()
        """Response tokens drawn so far, by what for."""
        self.cpu_of_takes: list[float] = []
        """CPU seconds of this process when each batch was asked for."""

    def take(
        self, version: int, should_stop: Callable[[], bool], warm_start: bool = False
    ) -> list[BufferedGroup] | None:
        """B groups for the version that is about to be trained, or for a warm start.

        Step v has the same prompts and the same random numbers in every run of a seed, whatever came before it: what a
        warm start takes, and what dropped groups are replaced by, comes from orders of their own.

        Raises:
            StallError: `stream.drop_equal_rewards`, and no group has a signal.
        """
        self.cpu_of_takes.append(time.process_time())
        first = version * self._batch
        planned = enumerate(self._prompts.after(first), first)
        source, purpose = (self._warm_start, _WARM_START) if warm_start else (planned, _STEP)
        groups: list[BufferedGroup] = []
        while len(groups) < self._batch:
            groups += self._draw(source, self._batch - len(groups), version, purpose)
            if not warm_start:
                source, purpose = self._replacements, _REPLACEMENT
        self._consumed += self._batch
        return groups

    def _draw(
        self, source: Iterator[tuple[int, tuple[int, Prompt]]], count: int, version: int, purpose: int
    ) -> list[BufferedGroup]:
        """So many groups, less those that are not to be trained on."""
        drawn_by = max(0, version - min(self._lag, self._max_staleness))
        numbered = [next(source) for _ in range(count)]
        seed = (self._config.run.seed, version, purpose, numbered[0][0])
        pairs = [pair for _, pair in numbered]
        prompts = [prompt for _, prompt in pairs]
        groups = self._answer(prompts, self._config.sampling.group_size, drawn_by, seed, is_training=True)
        self.tokens[purpose] += sum(int(group.lengths.sum()) for group in groups)
        held = []
        for (epoch, prompt), group in zip(pairs, groups, strict=True):
            refusal = self._dynamic.refusal(group)
            if refusal is None:
                held.append(BufferedGroup(group.lease, group.lease, epoch, prompt, group))
            else:
                self._refused[refusal] += 1
        return held

    def evaluate(self, prompts: Sequence[Prompt], version: int, should_stop: Callable[[], bool]) -> list[Group] | None:
        """A group for each held-out problem, by this very version."""
        seed = (self._config.run.seed, version, _EVALUATION, len(prompts))
        return self._answer(prompts, self._config.eval.samples, version, seed, is_training=False)

    def _answer(
        self, prompts: Sequence[Prompt], count: int, version: int, seed: Sequence[int], *, is_training: bool
    ) -> list[Group]:
        if version != self._loaded:
            self._sampler.load(self._publisher.versions[version])
            self._loaded = version
        started = time.monotonic()
        answers = self._sampler.sample(prompts, count, seed)
        generate_s = time.monotonic() - started
        return [
            self._group(prompt, responses, version, generate_s / len(prompts), is_training)
            for prompt, responses in zip(prompts, answers, strict=True)
        ]

    def _group(
        self, prompt: Prompt, responses: Sequence[Response], version: int, generate_s: float, is_training: bool
    ) -> Group:
        """What a rollout server sends; an evaluation is of the final reward alone."""
        started = time.monotonic()
        ids = [response.ids.numpy().astype(np.int32) for response in responses]
        lengths = np.array([one.size for one in ids], dtype=np.int32)
        texts = [self._decode(one.tolist()) for one in ids]
        grades = [self._grade(text, prompt.answer) for text in texts]
        rewards = np.array([one.reward for one in grades], dtype=np.float32)
        steps = np.empty(0, dtype=np.float32)
        if is_training:
            settings, limit = self._config.reward, self._config.sampling.max_response_tokens
            rewards = rewards + overlong_penalty(lengths, limit, settings.overlong_buffer, settings.overlong_penalty)
        if is_training and any(one.steps for one in grades):
            of_responses = zip(grades, ids, texts, strict=True)
            steps = np.concatenate(
                [step_rewards(one.steps, row, text, self._decode) for one, row, text in of_responses]
            )
        self._leases += 1
        group = Group(
            lease=self._leases,
            response_ids=np.concatenate(ids),
            lengths=lengths,
            behaviour_logprobs=torch.cat([response.logprobs for response in responses]).numpy(),
            span_versions=np.full(len(responses), version, dtype=np.int32),
            span_lengths=lengths,
            span_counts=np.ones(len(responses), dtype=np.int32),
            rewards=rewards,
            step_rewards=steps,
            truncated=np.array([response.truncated for response in responses], dtype=np.uint8),
            reward_errors=np.array([one.error for one in grades], dtype=np.uint8),
            generate_s=generate_s,
            grade_s=time.monotonic() - started,
        )
        group.check(len(responses))
        return group

    def limit_staleness(self, bound: int) -> None:
        """The brake: a lag above this bound is shortened to it."""
        self._max_staleness = bound

    def counts(self) -> Counts:
        """What a stream would count."""
        return Counts(
            servers=1,
            in_flight=0,
            buffered=0,
            admitted=self._consumed + self._refused.total(),
            consumed=self._consumed,
            dropped=dict(self._refused),
            malformed=0,
            swaps=len(self._publisher.cpu_of_versions),
            swap_pause_s=0.0,
            tokens=self.tokens.total(),
            idle_s=0.0,
        )

    def state(self) -> StreamState:
        """For a checkpoint; a plain run is never resumed."""
        return StreamState(LedgerState(next_position=0, unconsumed=[], admitted=0, consumed=0, dropped={}))


def check(config: Config, lag: int) -> None:
    """Refuse what a plain run cannot do.

    Raises:
        UserError: the first such thing.
    """
    if config.algorithm.reuse == "replay":
        raise ConfigError("algorithm.reuse is replay, and a plain run has no buffer: use epochs")
    if config.sampling.top_p < 1 or config.sampling.top_k > 0:
        raise ConfigError("a plain run draws from all tokens: leave sampling.top_p at 1.0 and sampling.top_k at -1")
    if lag > config.stream.max_staleness:
        raise ConfigError(
            f"--lag {lag}: every batch would be {lag} versions old, more than stream.max_staleness "
            f"({config.stream.max_staleness})"
        )
    if config.publish.every > 1:
        raise ConfigError(f"publish.every is {config.publish.every}: a plain run draws from every version, set it to 1")
    combined(config.reward)


def plain_run(config: Config, lag: int = 0) -> int:
    """Train to the end of the run; returns the version reached. The config is from `plain_config`.

    The run directory then has `config.yaml`, `metrics.jsonl` and `events.jsonl` as every run, and no checkpoints.

    Raises:
        UserError: what was given cannot work.
    """
    check(config, lag)
    directory = config.run_directory
    shutil.rmtree(directory, ignore_errors=True)  # an unfinished one is done anew
    data = preflight.load_data(config)
    world = World()
    journal = Journal(directory)
    (directory / "config.yaml").write_bytes(dump(config))
    tokenizer = AutoTokenizer.from_pretrained(config.actor.path)
    publisher = MemoryPublisher(lag)
    sampler = Sampler(config, int(tokenizer.eos_token_id), world.device)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    intake = SampledIntake(config, data.train, sampler, publisher, decode, lag)
    critics = _critics(config, world)
    feed = Feed(
        config,
        world,
        cast(Intake, intake),
        journal,
        data.eval_sets,
        data.tokenizer_directory,
        should_stop=lambda: False,
    )
    try:
        journal.event("start", version=0, resumed=False, lag=lag)
        policy = Policy(config, world)
        reached = Learner(config, world, feed, policy, critics, cast(Publisher, publisher), journal).run(0)
        first = intake.cpu_of_takes[-reached] if reached else 0.0
        journal.event(
            "end",
            version=reached,
            reason="the run is complete",
            tokens=intake.tokens[_STEP] + intake.tokens[_REPLACEMENT],
            warm_start_tokens=intake.tokens[_WARM_START],
            train_cpu_s=publisher.cpu_of_versions[-1] - first,
            warm_start_cpu_s=first - intake.cpu_of_takes[0],
        )
    finally:
        critics.stop("the plain run has ended")
        journal.close()
        for heavy in ("checkpoints", "actor"):
            shutil.rmtree(directory / heavy, ignore_errors=True)
    return reached


def _critics(config: Config, world: World) -> Critics:
    channels = []
    for index in range(config.algorithm.critics):
        ours, theirs = MemoryChannel.pair(ToCritic)
        critic = Critic(config, index, world)
        threading.Thread(target=serve, args=(critic, theirs, index, world), name=f"critic {index}", daemon=True).start()
        channels.append(LockstepChannel(ours, config.critic.timeout_s))
    critics = Critics(config, channels)
    critics.wait_until_ready()
    return critics


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text}: expected whole numbers separated by commas") from None


def main(
    config: Annotated[Path, typer.Option(help="The run's YAML file.")],
    overrides: Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="Override one key; repeatable.")] = [],  # noqa: B006
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas: one run each.")] = "0",
    lag: Annotated[int, typer.Option(min=0, help="The sampler runs the weights of so many versions ago.")] = 0,
    directory: Annotated[Path, typer.Option(help="Runs go to DIRECTORY/<config>/seed-<n>.")] = Path("runs/plain"),
) -> None:
    """Train synchronously in this one process, once for each seed; a finished run is not done again."""
    torch.set_num_threads(1)  # more only fight over the cores: the models are small
    set_up_logging("plain")
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it says with every grading that it has no time limit
    try:
        runs = [plain_config(config, overrides, directory, seed) for seed in _numbers(seeds)]
        whole = [_one_run(run, lag) for run in runs]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0 if all(whole) else 1)


def _one_run(config: Config, lag: int) -> bool:
    """Do a run that is not there yet; False when it fails, which is no reason not to do the next seed's."""
    if is_finished(config, lag):
        log.info("%s is there already", config.run_directory)
        return True
    try:
        plain_run(config, lag)
    except UserError:
        raise
    except AsyncPPOError as error:
        log.error("%s: %s: %s", config.run_directory, type(error).__name__, error)
        return False
    return True


if __name__ == "__main__":
    typer.run(main)
