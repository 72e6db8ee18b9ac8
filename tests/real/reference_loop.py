"""AsyPPO (arXiv 2510.01656) as one plain loop: what a whole asynchronous run at staleness 0 is held to.

It shares no code with the project (tests/real/test_sync_equivalence.py holds that) and goes other ways where it can:
padded [N, R] tensors in place of packed rows, a loop backwards in place of a scan, PyTorch's AdamW in place of
DeepSpeed. Read from `train` downwards it is the algorithm: sample, grade, critics, values, advantages, masks, update.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The run's settings as plain numbers; M is always 2."""

    seed: int
    steps: int
    prompts_per_batch: int
    group_size: int
    max_response_tokens: int
    utd: int
    lam: float
    mask_fraction: float  # k
    entropy_filter: float  # h
    entropy_coef: float  # beta
    token_mean: bool  # or the mean over responses of the mean over their tokens
    minibatches: tuple[int, int]  # of the actor, of each critic
    rates: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 0.2
    cap: float = 5.0


def train(
    actor_path: Path, critic_paths: list[Path], data: Path, n: Numbers, grade: Callable[[str], float]
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Networks [actor, critic 0, critic 1] after all steps, and what was seen at each step."""
    networks = [AutoModelForCausalLM.from_pretrained(actor_path, dtype=torch.float32)]
    for path in critic_paths:
        networks.append(AutoModelForTokenClassification.from_pretrained(path, num_labels=1, dtype=torch.float32))
    actor, critics = networks[0], networks[1:]
    optimizers = [
        torch.optim.AdamW(net.parameters(), lr=rate, betas=n.betas, weight_decay=n.weight_decay if net is actor else 0)
        for net, rate in zip(networks, (n.rates[0], n.rates[1], n.rates[1]), strict=True)
    ]
    tokenizer, stream, seen = AutoTokenizer.from_pretrained(actor_path), prompts(data, n.seed), []
    for version in range(n.steps):
        rows, shard, names = [], [], []
        for _ in range(n.prompts_per_batch):
            row, epoch = next(stream)
            messages = [{"role": "user", "content": row["prompt"]}]
            encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            rows += sample(actor, tokenizer, tuple(encoded["input_ids"]), version, n)
            shard += shards(n.seed, row["id"], epoch, n.group_size)
            names.append(row["id"])
        rewards = [grade(tokenizer.decode(ids, skip_special_tokens=True)) for _, ids, _ in rows]
        b = padded(rows)

        goal = torch.tensor(rewards, dtype=torch.float32)[:, None].expand(b["valid"].shape)  # gamma = 1: R_t = reward
        values = []
        for m, critic in enumerate(critics):  # each on its own shard, before its values are read
            own = np.flatnonzero(np.array(shard) == m)
            for epoch in range(n.utd):
                for part in division(len(own), n.minibatches[1], n.seed, m, version, epoch):
                    here = own[part]
                    error = (outputs(critic, b, here)[..., 0] - goal[here])[b["valid"][here]]
                    step(critic, optimizers[1 + m], error.square().mean() / 2, n.max_grad_norm)
            with torch.no_grad():
                values.append(outputs(critic, b)[..., 0].double())
        advantages = gae(torch.stack(values).mean(0), b["lengths"], rewards, n.lam)
        std = torch.stack(values).std(0, correction=0).float()[b["valid"]].numpy()  # response after response
        keep_policy, keep_entropy = torch.zeros_like(b["valid"]), torch.zeros_like(b["valid"])
        keep_policy[b["valid"]] = without_lowest(std, n.mask_fraction)
        keep_entropy[b["valid"]] = without_lowest(-std, n.entropy_filter)

        with torch.no_grad():
            proximal, _ = log_probs(actor, b)
        for use in range(n.utd):
            for here in division(len(rows), n.minibatches[0], n.seed, version, use):
                logprobs, entropy = log_probs(actor, b, here)
                ratio, advantage = (logprobs - proximal[here]).exp(), advantages[here]
                weight = (proximal[here] - b["behaviour"][here]).exp()
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - n.clip, 1 + n.clip) * advantage)
                objective = torch.where(keep_policy[here] & (weight <= n.cap), weight * surrogate, 0.0)
                objective = objective + n.entropy_coef * torch.where(keep_entropy[here], entropy, 0.0)
                lengths = b["lengths"][here]
                mean = objective.sum() / lengths.sum() if n.token_mean else (objective.sum(1) / lengths).mean()
                step(actor, optimizers[0], -mean, n.max_grad_norm)
        kept = {"advantages": advantages, "keep_policy": keep_policy, "keep_entropy": keep_entropy, "std": std}
        seen.append({"prompts": names, "responses": [ids for _, ids, _ in rows], "rewards": rewards, **kept})
    return networks, seen


def prompts(data: Path, seed: int) -> Iterator[tuple[dict[str, str], int]]:
    """(row, epoch) without end, in a new order each epoch."""
    rows, epoch = [json.loads(line) for line in data.read_text().splitlines()], 0
    while True:
        yield from ((rows[i], epoch) for i in np.random.default_rng([seed, epoch]).permutation(len(rows)))
        epoch += 1


def shards(seed: int, prompt_id: str, epoch: int, size: int) -> list[int]:
    """The critic of each response of a group: every other one of a random permutation, from a random critic on."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{prompt_id}".encode(), digest_size=16).digest()
    drawn = [int(x) for x in np.random.PCG64(int.from_bytes(digest, "little")).random_raw(size + 1)]
    places = sorted(range(size), key=lambda i: drawn[i])
    return [(places.index(i) + drawn[size]) % 2 for i in range(size)]


@torch.no_grad()
def sample(actor: Any, tokenizer: Any, prompt: tuple[int, ...], version: int, n: Numbers) -> list[Any]:
    """(prompt ids, response ids, their log-probs) of each response; the draw is seeded by run, prompt and version."""
    digest = hashlib.blake2b(repr((n.seed, prompt, version)).encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest))
    ids = torch.tensor([prompt] * n.group_size)
    drawing = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": n.max_response_tokens}
    pads = {"attention_mask": torch.ones_like(ids), "pad_token_id": tokenizer.pad_token_id}
    out = actor.generate(ids, **drawing, **pads, output_logits=True, return_dict_in_generate=True)
    logprobs, rows = torch.stack(out.logits, 1).log_softmax(-1), []
    for response, its in zip(out.sequences[:, len(prompt) :].tolist(), logprobs, strict=True):
        end = response.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in response else len(response)
        rows.append((prompt, response[:end], its[range(end), response[:end]]))
    return rows


def padded(rows: list[Any]) -> dict[str, torch.Tensor]:
    """All sequences padded on the right to [N, L], what is of response tokens to [N, R]."""
    wholes = [torch.tensor([*prompt, *ids]) for prompt, ids, _ in rows]
    answers = [torch.tensor(ids) for _, ids, _ in rows]
    input_ids, response_ids, behaviour, attention, valid = (
        torch.nn.utils.rnn.pad_sequence(x, batch_first=True)
        for x in (wholes, answers, [x for *_, x in rows], *([torch.ones_like(y) for y in x] for x in (wholes, answers)))
    )
    first = torch.tensor([len(prompt) - 1 for prompt, *_ in rows])  # the position that predicts the first token
    before = (first[:, None] + torch.arange(valid.shape[1])).clamp(max=input_ids.shape[1] - 1)
    both = {"input_ids": input_ids, "attention": attention, "before": before, "response_ids": response_ids}
    return both | {"behaviour": behaviour, "valid": valid.bool(), "lengths": valid.sum(1)}


def outputs(network: Any, b: dict[str, torch.Tensor], here: Any = slice(None)) -> torch.Tensor:
    """What a network says before each response token: [N, R, vocabulary or 1]."""
    logits: torch.Tensor = network(
        input_ids=b["input_ids"][here], attention_mask=b["attention"][here], use_cache=False
    ).logits
    return logits.gather(1, b["before"][here][..., None].expand(-1, -1, logits.shape[-1]))


def log_probs(actor: Any, b: dict[str, torch.Tensor], here: Any = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the response tokens and entropies before them, [N, R]."""
    logprobs = outputs(actor, b, here).log_softmax(-1)
    return logprobs.gather(2, b["response_ids"][here][..., None])[..., 0], -(logprobs.exp() * logprobs).sum(-1)


def gae(values: torch.Tensor, lengths: torch.Tensor, rewards: list[float], lam: float) -> torch.Tensor:
    """A_t = δ_t + λ A_{t+1},  δ_t = V_{t+1} − V_t, at the last token r − V_t: [N, R]."""
    advantages = torch.zeros_like(values)
    for i, length in enumerate(lengths.tolist()):
        following, after = 0.0, rewards[i]
        for t in reversed(range(length)):
            following = float(after - values[i, t]) + lam * following
            advantages[i, t], after = following, float(values[i, t])
    return advantages.float()


def without_lowest(signal: Any, fraction: float) -> torch.Tensor:
    """False for the ⌊fraction · T⌋ lowest, of equals the earlier."""
    kept = torch.ones(len(signal), dtype=torch.bool)
    kept[np.argsort(signal, kind="stable")[: math.floor(Fraction(str(fraction)) * len(signal))].copy()] = False
    return kept


def division(count: int, parts: int, *seed: int) -> list[Any]:
    """0..count-1 in random minibatches."""
    return [
        np.sort(part) for part in np.array_split(np.random.default_rng(seed).permutation(count), parts) if len(part)
    ]


def step(network: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor, max_norm: float) -> None:
    """One optimiser step with the gradient clipped."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    optimizer.step()
