"""Makers that the trainer's tests share: a tiny random model, a ragged batch of readable numbers, a config for both."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncppo.config import Config, load
from asyncppo.messages import Learn
from trainer.model.world import World
from trainer.stream.batch import Batch
from trainer.tiny_base.tokens import build_tokenizer, save_tokenizer

torch.set_num_threads(1)  # more only fight over the cores: these tensors are small

VOCABULARY = 384

PROMPTS = (3, 5, 2)
"""Prompt tokens of the default batch's three groups."""
RESPONSES = (4, 1, 7, 3, 2, 6)
"""Response tokens of its six responses, two a group."""

CONFIG = """
run: {{name: test, directory: {directory}/runs, seed: 7, steps: 10}}
data: {{train: {directory}/train.jsonl, max_prompt_tokens: 64}}
eval: {{sets: {{}}}}
sampling: {{group_size: 2, max_response_tokens: 8}}
stream: {{prompts_per_batch: 3, max_staleness: 2, batch_timeout_s: 60}}
algorithm: {{critics: 2, entropy_coef: 0.01}}
actor: {{path: {model}, engine: plain, dtype: float32, learning_rate: 1.0e-4, micro_batch_tokens: 16}}
critic: {{engine: plain, dtype: float32, learning_rate: 1.0e-3, micro_batch_tokens: 16, timeout_s: 30}}
publish: {{directory: {directory}/weights}}
"""


def make_model(directory: Path, *, seed: int = 0, hidden: int = 32, tied: bool = True) -> Path:
    """A random Qwen3 of some 30,000 weights with its tokenizer, as a Hugging Face directory."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # else every distribution is flat, and nothing is told apart
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    save_tokenizer(build_tokenizer(), directory)
    return directory


@functools.cache
def a_model() -> Path:
    """One tiny model for all tests of this process, removed at its end. Nobody may write into it."""
    root = Path(tempfile.mkdtemp(prefix="asyncppo-test-model-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return make_model(root / "model")


@functools.cache
def a_world() -> World:
    """The world of one rank that all tests of this process share."""
    return World()


def a_config(directory: Path, *overrides: str, model: Path | None = None) -> Config:
    """The tests' config, with `a.b=c` overrides; its dataset of four prompts is written too."""
    rows = [{"prompt": f"Compute {number}+1.", "answer": str(number + 1)} for number in range(4)]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = directory / "config.yaml"
    path.write_text(CONFIG.format(directory=directory, model=model or a_model()))
    return load(path, overrides)


def a_batch(
    *,
    prompts: Sequence[int] = PROMPTS,
    responses: Sequence[int] = RESPONSES,
    rewards: Sequence[float] = (1.0, 0.0, 1.0, 0.5, 0.0, 0.0),
    truncated: Sequence[int] = (0, 0, 1, 0, 0, 0),
    shard: Sequence[int] = (0, 1, 1, 0, 0, 1),
    version: int = 4,
) -> Batch:
    """Groups of equal size, one for each prompt. Prompt tokens are 10, 11, …; response n has tokens 100 + 20n + t."""
    count, size = len(responses), len(responses) // len(prompts)
    answers = [np.arange(100 + 20 * n, 100 + 20 * n + length, dtype=np.int32) for n, length in enumerate(responses)]
    questions = [np.arange(10, 10 + prompts[n // size], dtype=np.int32) for n in range(count)]
    tokens = sum(responses)
    return Batch(
        version=version,
        input_ids=np.concatenate([part for pair in zip(questions, answers, strict=True) for part in pair]),
        sequence_lengths=np.array([len(q) + len(a) for q, a in zip(questions, answers, strict=True)], dtype=np.int32),
        response_lengths=np.array(responses, dtype=np.int32),
        response_ids=np.concatenate(answers),
        behaviour_logprobs=(-4.0 - 0.05 * np.arange(tokens)).astype(np.float32),
        token_versions=np.repeat(np.arange(count, dtype=np.int32) % 2 + version - 1, responses),
        rewards=np.array(rewards, dtype=np.float32),
        step_rewards=np.zeros(tokens, dtype=np.float32),
        truncated=np.array(truncated, dtype=np.uint8),
        reward_errors=np.array([0] * (len(prompts) - 1) + [1], dtype=np.int32),
        group_index=np.repeat(np.arange(len(prompts), dtype=np.int32), size),
        shard=np.array(shard, dtype=np.int32),
        oldest_versions=np.array([version - 1] * len(prompts), dtype=np.int32),
        uses=np.zeros(len(prompts), dtype=np.int32),
        prompt_ids=tuple(f"p{index}" for index in range(len(prompts))),
        epochs=(0,) * len(prompts),
    )


def reorder(batch: Batch, order: Sequence[int]) -> Batch:
    """The same responses in another order, response `order[0]` first. Groups are no longer contiguous."""

    def ragged(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        parts = np.split(values, np.cumsum(lengths)[:-1])
        return np.concatenate([parts[index] for index in order])

    chosen = list(order)
    return Batch(
        version=batch.version,
        input_ids=ragged(batch.input_ids, batch.sequence_lengths),
        sequence_lengths=batch.sequence_lengths[chosen],
        response_lengths=batch.response_lengths[chosen],
        response_ids=ragged(batch.response_ids, batch.response_lengths),
        behaviour_logprobs=ragged(batch.behaviour_logprobs, batch.response_lengths),
        token_versions=ragged(batch.token_versions, batch.response_lengths),
        rewards=batch.rewards[chosen],
        step_rewards=ragged(batch.step_rewards, batch.response_lengths),
        truncated=batch.truncated[chosen],
        reward_errors=batch.reward_errors,
        group_index=batch.group_index[chosen],
        shard=batch.shard[chosen],
        oldest_versions=batch.oldest_versions,
        uses=batch.uses,
        prompt_ids=batch.prompt_ids,
        epochs=batch.epochs,
    )


def a_lesson(batch: Batch, returns: Sequence[float] | np.ndarray, shard: Sequence[int], step: int = 0) -> Learn:
    """What the learner sends to a critic: the batch, and 1 for each response that is its own.

    The rewards are those whose undiscounted sums to the end of each response are the [T] returns.
    """
    given = np.asarray(returns, dtype=np.float32)
    after = np.append(given[1:], np.float32(0))
    after[np.cumsum(batch.response_lengths) - 1] = 0
    return Learn(
        step=step,
        input_ids=batch.input_ids,
        sequence_lengths=batch.sequence_lengths,
        response_lengths=batch.response_lengths,
        rewards=given - after,
        shard=np.asarray(shard, dtype=np.uint8),
        group_index=batch.group_index,
    )


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a network's weights."""
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of weights of the same names."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)
