"""How good a model is."""

import json
import random
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from asyncppo import chains_task
from trainer.tiny_base.tokens import encode_documents


@dataclass(frozen=True)
class Score:
    """Shares of held-out problems: solved by one sample (the mean over all), by one of four samples, and greedily."""

    sampled_pass_at_1: float
    sampled_pass_at_4: float
    greedy: float


@torch.no_grad()
def evaluate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, file: Path, problems: int, tokens: int, seed: int
) -> Score:
    """Answer the first `problems` of `file`, in at most `tokens` tokens: four samples each, and one greedily."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:problems]]
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": row["prompt"]}] for row in rows],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    torch.manual_seed(seed)

    def solved(samples: int, **how: Any) -> torch.Tensor:
        """Which responses are right, [problem, sample]."""
        ids = model.generate(**prompts, max_new_tokens=tokens, num_return_sequences=samples, **how)
        texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [row["answer"] for row in rows for _ in range(samples)]
        right = [boxed(text) == answer for text, answer in zip(texts, answers, strict=True)]
        return torch.tensor(right, dtype=torch.float).view(len(rows), samples)

    sampled = solved(4, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return Score(
        sampled_pass_at_1=round(sampled.mean().item(), 4),
        sampled_pass_at_4=round(sampled.amax(dim=1).mean().item(), 4),
        greedy=round(solved(1, do_sample=False).mean().item(), 4),
    )


def boxed(text: str) -> str | None:
    """What the last `\\boxed{}` of a text holds."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return found[-1] if found else None


@dataclass(frozen=True)
class Marking:
    """How well a model that was trained on graded transcripts tells, at every token, whether there was a slip.

    The transcripts are plain, so no earlier mark can be copied: this is what a critic would see.
    """

    accuracy: float
    """The share of response tokens after which the likelier of the two marks is the right one."""
    after_a_slip: float
    """The same, of the tokens after a slip alone."""
    before_a_slip: float
    """The same, of the tokens before one."""


@torch.no_grad()
def evaluate_marks(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, ops: int, problems: int, seed: int
) -> Marking:
    """Let the model mark every token of corpus solutions of `problems` held-out problems."""
    pairs = list(islice(chains_task.draw_solutions(random.Random(f"marks {seed}"), [ops], "eval"), problems))
    documents = encode_documents(tokenizer, [(chains_task.prompt_text(problem), text) for problem, text in pairs])
    good, bad = tokenizer.convert_tokens_to_ids(list(chains_task.MARKS))
    right: dict[bool, list[bool]] = {False: [], True: []}
    for document, (problem, text) in zip(documents, pairs, strict=True):
        slip = chains_task.slip_token(problem, text)
        hidden = model.model(torch.tensor([document.prompt + document.response[:-1]]), use_cache=False)
        logits = model.lm_head(hidden.last_hidden_state[0, len(document.prompt) :])
        for index, says_bad in enumerate((logits[:, bad] > logits[:, good]).tolist()):
            slipped = slip is not None and index >= slip
            right[slipped].append(says_bad == slipped)
    return Marking(
        accuracy=_share(right[False] + right[True]),
        after_a_slip=_share(right[True]),
        before_a_slip=_share(right[False]),
    )


def _share(values: list[bool]) -> float:
    return round(sum(values) / len(values), 4)
