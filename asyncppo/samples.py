"""Samples of a run, token by token: what a file of `RUN/samples` holds, and what became of each token, in words.

The trainer keeps one group every `run.inspect_every` steps (trainer/samples.py), `asyncppo inspect` shows it. A file is
one msgpack object, arrays as raw bytes, and holds the settings that the verdicts depend on: reading it needs nothing
of the trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from asyncppo.errors import UserError
from asyncppo.messages import Float32, Int32, UInt8

SAMPLES_DIRECTORY = "samples"
FORMAT = 1
"""Raised whenever a field changes."""
_LOG_RATIO_LIMIT = 20.0
"""As in asyncppo/algorithm/ratios.py, which needs torch."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of section `algorithm` that decide what happens to a token, as they were at this version."""

    critics: int
    aggregation: str
    mask_signal: Literal["value_std", "entropy", "random"]
    mask_fraction: float
    entropy_filter: float
    mask_scope: Literal["batch", "sequence"]
    entropy_coef: float
    proximal: str
    behaviour_mode: Literal["mask", "clamp", "none"]
    behaviour_level: Literal["token", "sequence"]
    behaviour_cap: float
    truncated: Literal["zero", "mask", "bootstrap"]


class Response(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One response of T tokens, valued by M critics."""

    reward: float
    truncated: bool
    shard: int
    """The critic that learns from it; −1 where all do, or none."""
    texts: list[str]  # T, each token decoded alone
    token_ids: Int32  # [T]
    versions: Int32  # [T] the version that drew the token
    behaviour_logprobs: Float32  # [T]
    proximal_logprobs: Float32 | None  # [T]; None without a proximal pass
    values: Float32  # [M T] critic after critic; M may be 0
    value: Float32  # [T] the aggregated value
    value_std: Float32  # [T]
    std_ranks: Float32  # [T] fraction of the batch's tokens whose std is lower
    advantages: Float32  # [T]
    keep_policy: UInt8  # [T] I^A
    keep_entropy: UInt8  # [T] I^H
    entropy: Float32 | None  # [T] nats; None where nobody computed it

    @property
    def policy_mask(self) -> float:
        """Fraction of the tokens without a policy term."""
        return 1.0 - float(self.keep_policy.mean())

    @property
    def entropy_filter(self) -> float:
        """Fraction of the tokens without an entropy bonus."""
        return 1.0 - float(self.keep_entropy.mean())


class Sample(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One group of one step."""

    format: int = FORMAT
    step: int
    policy_version: int
    """The version that was trained; the step published the next one."""
    prompt_id: str
    epoch: int
    prompt: str
    """The prompt's text, chat template and all."""
    staleness: int
    settings: Settings
    responses: list[Response]


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one token."""

    position: int
    token_id: int
    text: str
    version: int
    behaviour_logprob: float
    proximal_logprob: float | None
    behaviour_weight: float | None
    """w, proximal over behaviour, before its cap, of the token or of the whole response; None where the proximal
    log-probs are made during the update and so not known."""
    values: list[float]
    value: float
    value_std: float
    std_rank: float
    advantage: float
    keep_policy: bool
    keep_entropy: bool
    entropy: float | None
    truncated: bool
    """Whether its response is."""


class _Head(msgspec.Struct):
    format: int


def file_of(run_directory: Path, step: int) -> Path:
    """Where the sample of a step is."""
    return run_directory / SAMPLES_DIRECTORY / f"step_{step:08d}.msgpack"


def files_in(run_directory: Path) -> list[Path]:
    """All samples of a run, oldest first."""
    return sorted((run_directory / SAMPLES_DIRECTORY).glob("step_*.msgpack"))


def encode(sample: Sample) -> bytes:
    """A sample as the bytes of its file."""
    return msgspec.msgpack.encode(sample, enc_hook=_bytes_of)


def read(path: Path) -> Sample:
    """The sample in a file.

    Raises:
        UserError: it is of another format, or damaged.
    """
    data = path.read_bytes()
    try:
        head = msgspec.msgpack.decode(data, type=_Head)
        if head.format != FORMAT:
            raise UserError(
                f"{path}: is of format {head.format}, expected {FORMAT}: inspect it with the asyncppo that made the run"
            )
        sample = msgspec.msgpack.decode(data, type=Sample, dec_hook=_array_of)
        for response in sample.responses:
            _check(response, sample.settings.critics)
    except (msgspec.DecodeError, ValueError) as error:
        raise UserError(f"{path}: is damaged, and can be deleted: {error}") from None
    return sample


def tokens_of(response: Response, settings: Settings) -> list[Token]:
    """The tokens of a response, one by one."""
    count = len(response.texts)
    weights = _behaviour_weights(response, settings)
    values = response.values.reshape(settings.critics, count)
    return [
        Token(
            position=t,
            token_id=int(response.token_ids[t]),
            text=response.texts[t],
            version=int(response.versions[t]),
            behaviour_logprob=float(response.behaviour_logprobs[t]),
            proximal_logprob=_at(response.proximal_logprobs, t),
            behaviour_weight=_at(weights, t),
            values=values[:, t].tolist(),
            value=float(response.value[t]),
            value_std=float(response.value_std[t]),
            std_rank=float(response.std_ranks[t]),
            advantage=float(response.advantages[t]),
            keep_policy=bool(response.keep_policy[t]),
            keep_entropy=bool(response.keep_entropy[t]),
            entropy=_at(response.entropy, t),
            truncated=response.truncated,
        )
        for t in range(count)
    ]


def verdict(token: Token, settings: Settings) -> list[str]:
    """Why the token was trained on, or was not: what became of its policy term, then of its entropy bonus if lost.

    What only happens inside the update (PPO's clip, which moves from one optimiser step to the next) is not in it.
    """
    taken, filtered = no_policy_gradient(token, settings), no_entropy_bonus(token, settings)
    if taken:
        words = [f"no policy gradient: {taken}"]
    elif token.advantage == 0:
        words = ["advantage 0: nothing to learn"]
    elif over_cap(token, settings):
        words = [f"trained, {_weight(token, settings)} clamped to {settings.behaviour_cap:g}"]
    else:
        words = ["trained"]
    return [*words, f"no entropy bonus: {filtered}"] if filtered else words


def no_policy_gradient(token: Token, settings: Settings) -> str | None:
    """What took the token out of the policy term; None for one that is in it."""
    if not token.keep_policy:
        return _reason(token, "lowest", settings.mask_fraction, settings)
    if settings.behaviour_mode == "mask" and over_cap(token, settings):
        return f"{_weight(token, settings)} over the cap {settings.behaviour_cap:g}"
    return None


def no_entropy_bonus(token: Token, settings: Settings) -> str | None:
    """What took the token out of the entropy bonus; None for one that is in it, or where there is no bonus."""
    if token.keep_entropy or settings.entropy_coef == 0:
        return None
    return _reason(token, "highest", settings.entropy_filter, settings)


def over_cap(token: Token, settings: Settings) -> bool:
    """Whether the behaviour weight is in use, known, and above its cap."""
    weight = token.behaviour_weight
    return settings.behaviour_mode != "none" and weight is not None and weight > settings.behaviour_cap


def _weight(token: Token, settings: Settings) -> str:
    whose = "behaviour weight" if settings.behaviour_level == "token" else "behaviour weight of the response"
    return f"{whose} {token.behaviour_weight:.3g}"


def _reason(token: Token, end: str, fraction: float, settings: Settings) -> str:
    """What took a token out of a term: its truncated response, or its place in the order of the mask's signal."""
    if token.truncated and settings.truncated == "mask":
        return "truncated response"
    share = f"{100 * fraction:.3g} % of the {'batch' if settings.mask_scope == 'batch' else 'response'}"
    if settings.mask_signal == "random":
        return f"drawn at random, with {share}"
    return f"{'std' if settings.mask_signal == 'value_std' else 'entropy'} among the {end} {share}"


def _behaviour_weights(response: Response, settings: Settings) -> Float32 | None:
    """w of `algorithm.policy_loss` before its cap: [T]; None where the proximal log-probs are not known."""
    proximal = response.behaviour_logprobs if settings.proximal == "behaviour" else response.proximal_logprobs
    if proximal is None:
        return None
    logs = np.clip(proximal - response.behaviour_logprobs, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    if settings.behaviour_level == "sequence":
        whole = np.clip(logs.sum(dtype=np.float64), -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
        logs = np.full_like(logs, whole)
    weights: Float32 = np.exp(logs)
    return weights


def _at(array: Float32 | None, t: int) -> float | None:
    return None if array is None else float(array[t])


def _check(response: Response, critics: int) -> None:
    """Every array has the length that it has to have."""
    tokens = len(response.texts)
    for name in response.__struct_fields__:
        array = getattr(response, name)
        expected = tokens * critics if name == "values" else tokens
        if isinstance(array, np.ndarray) and len(array) != expected:
            raise ValueError(f"{name} has {len(array)} entries, expected {expected}")


def _bytes_of(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    raise NotImplementedError(f"cannot encode {type(value).__name__}")


def _array_of(kind: Any, value: Any) -> Any:
    return np.frombuffer(value, dtype=kind.__args__[1].__args__[0])
