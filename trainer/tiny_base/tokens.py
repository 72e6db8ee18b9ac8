"""The tokenizer, and the pretraining text as token ids."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from asyncppo import tiny_task

# ---- the tokenizer ----

PADDED_VOCABULARY = 384
"""Rows of the embedding. A tokenizer has about 345 entries; engines like a multiple of 64."""

PADDING, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML, without a default system message."""

PIECES = r"\\boxed\{|[A-Za-z. ]+|[0-9]|[^A-Za-z. 0-9]"
"""Text is cut into `\\boxed{`, runs of letters, dots and spaces, single digits, and other single characters."""


TINY_PROMPT = tiny_task.prompt_text(tiny_task.make_problem(random.Random(0), ops=2))


def build_tokenizer(prompt: str = TINY_PROMPT) -> PreTrainedTokenizerFast:
    """A byte-level BPE: 256 bytes, 3 special tokens and the merges (84 and 86) that make words of `prompt` whole.

    Digits are always single tokens and the fixed words of the prompt are few. As every byte has an entry, any text
    survives encoding and decoding.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PADDED_VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PADDING, TURN_START, TURN_END],
        show_progress=False,
    )
    bpe.train_from_iterator(["user", "assistant", prompt] * 2 + ["system", "You are a helpful assistant."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PADDING,
        eos_token=TURN_END,
        padding_side="left",
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save so that transformers 4 loads it too: version 5 writes a class name that only version 5 knows."""
    tokenizer.save_pretrained(directory)
    config_file = directory / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_file.write_text(json.dumps(config, indent=2) + "\n")


# ---- the text as token ids ----


@dataclass(frozen=True)
class Document:
    """One pretraining document. The loss is on the response only, its end-of-turn token included."""

    prompt: list[int]
    response: list[int]


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]]) -> list[Document]:
    """Token ids of (prompt, solution) pairs, exactly as the chat template gives them."""
    before, after = _around_the_prompt(tokenizer)
    backend = tokenizer.backend_tokenizer
    prompts = backend.encode_batch_fast([before + prompt + after for prompt, _ in texts])
    responses = backend.encode_batch_fast([solution + TURN_END for _, solution in texts])
    return [Document(prompt.ids, response.ids) for prompt, response in zip(prompts, responses, strict=True)]


def _around_the_prompt(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """What the chat template writes before and after a prompt: rendering it 70,000 times would take a minute."""
    messages = [{"role": "user", "content": "@prompt@"}]
    rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    before, after = rendered.split("@prompt@")
    return before, after


def make_batches(documents: Sequence[Document], size: int, rng: random.Random) -> Iterator[tuple[torch.Tensor, ...]]:
    """(ids, labels) of `size` documents at a time, [B, T], padded on the right; labels are -100 outside the response.

    Batches hold prompts of about the same length, to save padding. Never sort by *response* length: the styles would
    fall into batches of their own.
    """
    window = 64 * size
    for start in range(0, len(documents), window):
        near = sorted(documents[start : start + window], key=lambda document: len(document.prompt))
        batches = [near[i : i + size] for i in range(0, len(near), size)]
        rng.shuffle(batches)
        for batch in batches:
            longest = max(len(document.prompt) + len(document.response) for document in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            labels = torch.full_like(ids, -100)
            for row, document in enumerate(batch):
                start_of_response = len(document.prompt)
                end = start_of_response + len(document.response)
                ids[row, :end] = torch.tensor(document.prompt + document.response)
                labels[row, start_of_response:end] = ids[row, start_of_response:end]
            yield ids, labels
