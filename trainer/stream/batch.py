"""Batch: the groups of one trainer step, packed without padding into numpy arrays; every field with its shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from asyncppo.messages import Float32, Group, Int32, UInt8
from trainer.stream.buffer import BufferedGroup


@dataclass(frozen=True, slots=True)
class Batch:
    """N responses of B groups: L tokens with their prompts, T response tokens. Response-major everywhere.

    Token t of a response is predicted from the position before it, so the first response token is predicted from the
    last prompt token: `predict[t]` is that position in `input_ids`, for log-probs and values alike.
    """

    version: int
    """The version that this batch is about to train."""
    input_ids: Int32  # [L] prompt and response of each sequence, one after the other
    sequence_lengths: Int32  # [N] sum L
    response_lengths: Int32  # [N] sum T
    response_ids: Int32  # [T]
    behaviour_logprobs: Float32  # [T]
    token_versions: Int32  # [T] the engine's weight version of each token
    rewards: Float32  # [N] of the whole response
    step_rewards: Float32  # [T] process rewards of tokens that complete a step, 0 elsewhere
    truncated: UInt8  # [N]
    reward_errors: Int32  # [B] responses whose grading failed; masked ones (`reward.on_error`) are none of the N
    group_index: Int32  # [N] 0..B-1
    shard: Int32  # [N] the critic that learns from the response; -1 where all do, or none
    oldest_versions: Int32  # [B]
    uses: Int32  # [B] how often each group was in a batch before
    prompt_ids: tuple[str, ...]  # B
    epochs: tuple[int, ...]  # B

    def learned_by(self, critic: int, shards: str) -> NDArray[np.bool_]:
        """[N]: whether a critic learns from each response (`algorithm.shards`)."""
        part = {"disjoint": critic, "half": 0}.get(shards)
        return np.ones(len(self.shard), dtype=np.bool_) if part is None else self.shard == part

    @property
    def staleness(self) -> Int32:
        """[B] versions, of each group."""
        return (self.version - self.oldest_versions).astype(np.int32)


def pack(
    groups: Sequence[BufferedGroup], shards: Sequence[Sequence[int]], version: int, *, mask_errors: bool = False
) -> Batch:
    """One Batch from groups.

    Args:
        groups: B groups.
        shards: for each group, the critic of each response.
        version: the version about to be trained.
        mask_errors: leave out the responses whose grading failed (`reward.on_error: mask`). They are in no loss, no
            group's statistics, no shard, no denominator and no mean, because they are not in the batch.
    """
    sequences: list[Int32] = []
    for held in groups:
        ends = np.cumsum(held.group.lengths)[:-1]
        sequences += [np.concatenate((held.prompt.prompt_ids, ids)) for ids in np.split(held.group.response_ids, ends)]
    sizes = [len(held.group.lengths) for held in groups]
    whole = [held.group for held in groups]
    batch = Batch(
        version=version,
        input_ids=np.concatenate(sequences).astype(np.int32, copy=False),
        sequence_lengths=np.array([len(sequence) for sequence in sequences], dtype=np.int32),
        response_lengths=np.concatenate([group.lengths for group in whole]),
        response_ids=np.concatenate([group.response_ids for group in whole]),
        behaviour_logprobs=np.concatenate([group.behaviour_logprobs for group in whole]),
        token_versions=np.concatenate([np.repeat(group.span_versions, group.span_lengths) for group in whole]),
        rewards=np.concatenate([group.rewards for group in whole]),
        step_rewards=np.concatenate([_step_rewards(group) for group in whole]),
        truncated=np.concatenate([group.truncated for group in whole]),
        reward_errors=np.array([group.reward_errors.sum() for group in whole], dtype=np.int32),
        group_index=np.repeat(np.arange(len(groups), dtype=np.int32), sizes),
        shard=np.concatenate([np.asarray(shard, dtype=np.int32) for shard in shards]),
        oldest_versions=np.array([held.oldest_version for held in groups], dtype=np.int32),
        uses=np.array([held.uses for held in groups], dtype=np.int32),
        prompt_ids=tuple(held.prompt.prompt_id for held in groups),
        epochs=tuple(held.epoch for held in groups),
    )
    graded = np.concatenate([group.reward_errors for group in whole]) == 0
    return _only(batch, graded) if mask_errors and not graded.all() else batch


def _only(batch: Batch, which: NDArray[np.bool_]) -> Batch:
    """The batch of these of its N responses."""
    tokens = np.repeat(which, batch.response_lengths)
    return replace(
        batch,
        input_ids=batch.input_ids[np.repeat(which, batch.sequence_lengths)],
        **{name: getattr(batch, name)[tokens] for name in _OF_TOKENS},
        **{name: getattr(batch, name)[which] for name in _OF_RESPONSES},
    )


_OF_TOKENS = ("response_ids", "behaviour_logprobs", "token_versions", "step_rewards")
_OF_RESPONSES = ("sequence_lengths", "response_lengths", "rewards", "truncated", "group_index", "shard")


def _step_rewards(group: Group) -> Float32:
    return group.step_rewards if group.step_rewards.size else np.zeros_like(group.behaviour_logprobs)
