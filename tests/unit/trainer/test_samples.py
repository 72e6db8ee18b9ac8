"""Samples, as the trainer keeps them: which group, what of it, how many files; and verdicts that the loss agrees with.

Three groups of two responses with 4, 1, 7, 3, 2 and 6 tokens; the default rewards differ within each but the last.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncppo import algorithm
from asyncppo.algorithm.ratios import LOG_RATIO_LIMIT
from asyncppo.samples import _LOG_RATIO_LIMIT, Sample, file_of, files_in, read, tokens_of, verdict
from tests.model_maker import a_batch, a_config, a_model
from trainer.model.policy import objective
from trainer.samples import KEPT_FILES, Samples
from trainer.stream.batch import Batch
from trainer.targets import TargetBuilder, Targets

pytestmark = pytest.mark.unit

TOKENS = 23


def some_values(critics: int = 2, tokens: int = TOKENS) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).uniform(size=(critics, tokens)).astype(np.float32))


def keep(
    directory: Path,
    *overrides: str,
    batch: Batch | None = None,
    values: torch.Tensor | None = None,
    proximal: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
) -> tuple[Sample, Targets]:
    """What a config keeps of a batch, read again; and the targets that it was made of."""
    config = a_config(directory, *overrides)
    batch = a_batch() if batch is None else batch
    values = some_values(config.algorithm.critics) if values is None else values
    targets = TargetBuilder(config).build(batch, values, entropy)
    Samples(config, a_model()).keep(batch, targets, values, proximal, entropy)
    return read(file_of(config.run_directory, batch.version + 1)), targets


# ---- which group ----


@pytest.mark.parametrize(
    ("rewards", "prompt_id"),
    [
        ((1, 0, 1, 0, 1, 0), "p0"),
        ((1, 1, 0, 0, 0, 1), "p2"),
        ((0, 0, 1, 0, 1, 0), "p1"),
        ((1, 1, 0, 0, 1, 1), "p0"),
    ],
)
def test_the_first_group_with_right_and_wrong_answers_is_kept_or_else_the_first(
    tmp_path: Path, rewards: tuple[float, ...], prompt_id: str
) -> None:
    sample, _ = keep(tmp_path, batch=a_batch(rewards=rewards))
    assert sample.prompt_id == prompt_id
    start = 2 * int(prompt_id[1:])
    assert [response.reward for response in sample.responses] == list(rewards[start : start + 2])


# ---- what of it ----


def test_every_token_has_the_numbers_of_its_place_in_the_batch(tmp_path: Path) -> None:
    batch = a_batch(rewards=(0, 0, 1, 0, 0, 0))  # p1: responses 2 and 3, tokens 5 to 11 and 12 to 14
    values, proximal, entropy = some_values(), -torch.arange(TOKENS) / 8.0, torch.arange(TOKENS) / 4.0
    sample, targets = keep(tmp_path, batch=batch, values=values, proximal=proximal, entropy=entropy)
    assert (sample.step, sample.policy_version, sample.staleness, sample.epoch) == (5, 4, 1, 0)
    assert [(r.reward, r.truncated, r.shard, len(r.texts)) for r in sample.responses] == [
        (1.0, True, 1, 7),
        (0.0, False, 0, 3),
    ]
    for response, own in zip(sample.responses, (slice(5, 12), slice(12, 15)), strict=True):
        assert response.token_ids.tolist() == batch.response_ids[own].tolist()
        assert response.versions.tolist() == batch.token_versions[own].tolist()
        assert response.behaviour_logprobs.tolist() == batch.behaviour_logprobs[own].tolist()
        assert response.proximal_logprobs is not None
        assert response.proximal_logprobs.tolist() == proximal[own].tolist()
        assert response.entropy is not None
        assert response.entropy.tolist() == entropy[own].tolist()
        assert response.value.tolist() == targets.value[own].tolist()
        assert response.value_std.tolist() == targets.value_std[own].tolist()
        assert response.advantages.tolist() == targets.advantages[own].tolist()
        assert response.keep_policy.tolist() == targets.keep_policy[own].tolist()
        assert response.keep_entropy.tolist() == targets.keep_entropy[own].tolist()
        by_token = [token.values for token in tokens_of(response, sample.settings)]
        assert by_token == values[:, own].T.tolist()


def test_the_rank_of_a_std_is_among_the_whole_batch(tmp_path: Path) -> None:
    half_distance = torch.arange(TOKENS).float()
    sample, targets = keep(tmp_path, values=torch.stack((half_distance, -half_distance)))
    assert targets.value_std[:5].tolist() == [0, 1, 2, 3, 4]
    ranks = [rank for response in sample.responses for rank in response.std_ranks.tolist()]
    assert ranks == pytest.approx([0, 1 / 23, 2 / 23, 3 / 23, 4 / 23])
    equal, _ = keep(tmp_path, values=torch.ones(2, TOKENS))
    assert {rank for response in equal.responses for rank in response.std_ranks.tolist()} == {0.0}


def test_texts_are_those_of_the_tokens_one_by_one(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(a_model())
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Compute 1+1."}], add_generation_prompt=True, return_dict=False
    )
    answer = [*tokenizer.encode("a→\n\\boxed{2}", add_special_tokens=False), tokenizer.eos_token_id, 383]
    batch = a_batch(prompts=[len(prompt)], responses=[len(answer), 1], rewards=(1, 0), truncated=(0, 0), shard=(0, 1))
    ids = np.array([*prompt, *answer, *prompt, answer[0]], np.int32)
    batch = replace(batch, input_ids=ids, response_ids=np.array([*answer, answer[0]], np.int32))
    sample, _ = keep(tmp_path, batch=batch, values=some_values(tokens=len(answer) + 1))
    assert sample.prompt == "<|im_start|>user\nCompute 1+1.<|im_end|>\n<|im_start|>assistant\n"
    whole, letter = sample.responses
    assert letter.texts == ["a"]
    # → is three bytes, hence three tokens; 383 is a row of the embedding that the tokenizer has no entry for
    assert whole.texts == ["a", "\ufffd", "\ufffd", "\ufffd", "\n", "\\boxed{", "2", "}", "<|im_end|>", ""]


def test_without_critics_and_without_a_proximal_pass_there_is_what_there_is(tmp_path: Path) -> None:
    sample, _ = keep(tmp_path, "algorithm.critics=0", "algorithm.proximal=behaviour", values=torch.zeros((0, 0)))
    response = sample.responses[0]
    assert (response.values.size, response.proximal_logprobs, response.entropy) == (0, None, None)
    assert [token.values for token in tokens_of(response, sample.settings)] == [[]] * 4


def test_scheduled_fractions_are_kept_as_they_were_at_this_version(tmp_path: Path) -> None:
    sample, _ = keep(tmp_path, "algorithm.mask_fraction=[[0, 0.0], [8, 0.5]]", "algorithm.entropy_filter=0.3")
    assert (sample.settings.mask_fraction, sample.settings.entropy_filter) == (0.25, 0.3)  # version 4


# ---- files ----


def test_only_the_newest_files_are_kept_and_each_is_whole(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    samples, values = Samples(config, a_model()), some_values()
    targets = TargetBuilder(config).build(a_batch(), values, None)
    for version in range(KEPT_FILES + 2):
        samples.keep(a_batch(version=version), targets, values, None)
    steps = [read(path).step for path in files_in(config.run_directory)]
    assert steps == list(range(3, KEPT_FILES + 3))
    assert len(list((config.run_directory / "samples").iterdir())) == KEPT_FILES  # nothing half-written is left


def test_a_step_that_is_done_again_replaces_its_sample(tmp_path: Path) -> None:
    keep(tmp_path, batch=a_batch(rewards=(1, 0, 1, 0, 1, 0)))
    sample, _ = keep(tmp_path, batch=a_batch(rewards=(1, 1, 1, 0, 1, 0)))
    assert sample.prompt_id == "p1"


# ---- the verdict and the loss ----


@pytest.mark.parametrize("mode", ["mask", "clamp", "none"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("truncated", ["zero", "mask"])
@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_a_token_has_a_gradient_exactly_where_the_verdict_says_so(
    tmp_path: Path, mode: str, level: str, truncated: str, coefficient: float
) -> None:
    settings = {
        "behaviour_mode": mode,
        "behaviour_level": level,
        "truncated": truncated,
        "entropy_coef": coefficient,
        "behaviour_cap": 2.0,
    }
    overrides = [f"algorithm.{key}={value!r}" for key, value in settings.items()]  # quoted: YAML's off is false
    config = a_config(tmp_path, *overrides)
    batch = a_batch(rewards=(1, 0.5, 0, 0, 0, 0), truncated=(1, 0, 0, 0, 0, 0), responses=(8, 9, 1, 1, 2, 2))
    rng = np.random.default_rng(1)
    shift = rng.choice([0, 0.5, 1.5, -1.0], size=TOKENS).astype(np.float32)
    proximal = torch.from_numpy(batch.behaviour_logprobs + shift)
    values = some_values()
    sample, targets = keep(tmp_path, *overrides, batch=batch, values=values, proximal=proximal)

    lengths = torch.from_numpy(batch.response_lengths).long()
    logprobs, entropy = proximal.clone().requires_grad_(), torch.ones(TOKENS).requires_grad_()
    loss, _ = algorithm.policy_loss(
        logprobs,
        proximal,
        torch.from_numpy(batch.behaviour_logprobs),
        targets.advantages,
        entropy,
        targets.keep_policy,
        targets.keep_entropy,
        algorithm.token_weights(lengths, "token-mean"),
        lengths=lengths,
        objective=objective(config.algorithm),
    )
    (loss + 0 * (logprobs.sum() + entropy.sum())).backward()
    assert logprobs.grad is not None
    assert entropy.grad is not None

    tokens = [token for response in sample.responses for token in tokens_of(response, sample.settings)]
    verdicts = [verdict(token, sample.settings) for token in tokens]
    trained = [words[0].startswith("trained") for words in verdicts]
    assert trained == (logprobs.grad[:17] != 0).tolist()
    if coefficient:
        assert [len(words) == 1 for words in verdicts] == (entropy.grad[:17] != 0).tolist()
    else:
        assert {len(words) for words in verdicts} == {1}
    for token, gradient in zip(tokens, logprobs.grad.tolist(), strict=False):
        weight: Any = token.behaviour_weight
        if gradient and mode != "none":
            assert min(weight, 2.0) * token.advantage / TOKENS == pytest.approx(-gradient, rel=1e-5)


def test_reader_and_loss_limit_log_ratios_alike() -> None:
    assert _LOG_RATIO_LIMIT == LOG_RATIO_LIMIT
