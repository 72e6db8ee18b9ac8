"""Everything that can be refused before anything expensive starts: models, tokenizers, datasets, addresses, GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from asyncppo import keys
from asyncppo.config import Config
from asyncppo.errors import ConfigError, ModelError
from asyncppo.fingerprints import model_fingerprint, tokenizer_fingerprint
from asyncppo.messages import Int32
from asyncppo.transport.zmq import ZmqHub, check_address
from trainer.model.networks import check_causal_lm, check_critic, files_of
from trainer.publish import broadcast
from trainer.stream.intake import Identity
from trainer.stream.prompts import Prompt, Tokenize, load_prompts

_PROBE = 64
"""Tokens that the engines are probed with."""


@dataclass(frozen=True)
class Data:
    """The prompts of a run, tokenised."""

    train: list[Prompt]
    eval_sets: dict[str, list[Prompt]]
    tokenizer_directory: Path


def check(config: Config) -> Data:
    """Refuse what cannot work.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    check_stream_address(config)
    check_publishing(config)
    check_devices(config)
    check_models(config)
    return load_data(config)


def check_stream_address(config: Config) -> None:
    """The address is one we may listen on, and it is free.

    Raises:
        AddressError: not loopback without keys or being asked for, or taken.
        ConfigError: keys are missing.
    """
    stream = config.stream
    check_address(stream.address, stream.insecure, has_keys=stream.keys is not None)
    keys.of_trainer(stream.keys)
    if stream.keys and any(address.startswith("tcp://") for address in config.critic.addresses):
        keys.to_critic(stream.keys)
    ZmqHub(stream.address).close()


def check_publishing(config: Config) -> None:
    """Where weights are broadcast, the servers are told an address of this host.

    Raises:
        ConfigError: it is none, or `publish.address` has to say which.
    """
    if config.publish_transport[0] == "broadcast":
        broadcast.address(config)


def check_devices(config: Config) -> None:
    """There are as many GPUs as processes, where there are GPUs at all.

    Raises:
        ConfigError: too few.
    """
    wanted = config.actor.processes + config.algorithm.critics * config.critic.processes
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if have and not (config.actor.devices or config.critic.devices) and wanted > have:
        raise ConfigError(
            f"the actor and the critics are {wanted} processes, one for each GPU, but there are {have} GPUs: lower "
            "actor.processes or critic.processes, or name the GPUs to share (actor.devices, critic.devices)"
        )


def check_models(config: Config) -> None:
    """The actor and the reference are causal language models, the critics can be made from theirs, all read the same
    tokens.

    Raises:
        ModelError: missing, of another kind, or with another tokenizer.
    """
    check_causal_lm(config.actor.path)
    reference = config.algorithm.reference
    if config.algorithm.kl_coef > 0 and reference:
        _check_tokens(config, "reference", reference, check_causal_lm(reference))
    for path in dict.fromkeys(config.critic_paths):
        _check_tokens(config, "critic", path, check_critic(path))


def _check_tokens(config: Config, role: str, path: str, model: Any) -> None:
    """The model reads the actor's tokens, all of them."""
    if path == config.actor.path:
        return
    ours, theirs = _tokenizer(config.actor.path).get_vocab(), _tokenizer(path).get_vocab()
    if ours != theirs:
        word = next(word for word in sorted({*ours, *theirs}) if ours.get(word) != theirs.get(word))
        raise ModelError(
            f"{path}: the {role}'s tokenizer differs from that of the actor {config.actor.path} (first at "
            f"{word!r}: {theirs.get(word)} and {ours.get(word)}): a {role} must read the actor's tokens"
        )
    embeddings = _embeddings(model)
    if embeddings < len(ours):
        raise ModelError(f"{path}: has {embeddings} embeddings for {len(ours)} tokens")


def load_data(config: Config) -> Data:
    """Read and tokenise all prompts.

    Raises:
        DataError: a dataset that is missing or empty, or lacks a column.
    """
    tokenizer = _tokenizer(config.actor.path)

    def tokenize(messages: list[dict[str, str]]) -> list[int]:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(encoded["input_ids"])

    return Data(
        train=load_prompts(config.data.train, config.data, tokenize),
        eval_sets=_eval_sets(config, tokenize),
        tokenizer_directory=files_of(config.actor.path),
    )


def probe_ids(config: Config, prompts: Sequence[Prompt]) -> Int32:
    """[P] tokens that the engines are probed with after a swap: the first prompts', one after the other; none with
    `publish.probe` off."""
    if not config.publish.probe:
        return np.zeros(0, np.int32)
    return np.concatenate([prompt.prompt_ids for prompt in prompts[:_PROBE]])[:_PROBE].astype(np.int32)


def identity(config: Config) -> Identity:
    """What rollout servers have to have in common with this trainer."""
    models = [check_causal_lm(config.actor.path), *map(check_critic, dict.fromkeys(config.critic_paths))]
    return Identity(
        agreement=config.agreement_hash(),
        model=model_fingerprint(config.actor.path),
        tokenizer=tokenizer_fingerprint(config.actor.path),
        vocabulary=min(map(_embeddings, models)),
    )


def _embeddings(model: Any) -> int:
    return int(model.get_text_config().vocab_size)


def _eval_sets(config: Config, tokenize: Tokenize) -> dict[str, list[Prompt]]:
    return {
        name: load_prompts(source, config.data, tokenize, config.eval.limit)
        for name, source in config.eval.sets.items()
    }


def _tokenizer(path: str):  # type: ignore[no-untyped-def]  # transformers has no types
    tokenizer_fingerprint(path)  # refuses a directory without a tokenizer, for which transformers makes an empty one
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{path}: its tokenizer cannot be loaded: {first}") from None
    if not tokenizer.chat_template:
        raise ModelError(f"{path}: its tokenizer has no chat template")
    return tokenizer
