"""Packing: which sequences go into which forward pass, on which rank; and the tensors of one such pass. No padding."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from asyncppo.messages import Int32

Indices = NDArray[np.int64]


def plan(sequence_lengths: Int32, which: Indices, *, budget: int, ranks: int) -> list[list[Indices]]:
    """Divide sequences into micro-batches of about equal size, the same number for every rank.

    Args:
        sequence_lengths: [N] tokens of each sequence of the batch.
        which: the sequences to divide, as indices into it.
        budget: tokens of a micro-batch at most; a longer sequence goes alone.
        ranks: data-parallel ranks.

    Returns:
        `plan[i][rank]`: the sequences of the rank's i-th micro-batch. Every rank has the same number of micro-batches,
        because the collectives of ZeRO-2 and 3 are counted; some may be empty.
    """
    order = which[np.argsort(-sequence_lengths[which], kind="stable")]
    total = int(np.minimum(sequence_lengths[which], budget).sum())  # a longer sequence fills one micro-batch
    rounds = max(1, -(-total // (budget * ranks)))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * ranks)]
        loads = [(0, index) for index in range(len(bins))]
        fits = True
        for sequence in order.tolist():
            load, index = heapq.heappop(loads)
            load += int(sequence_lengths[sequence])
            fits = fits and (load <= budget or not bins[index])
            bins[index].append(sequence)
            heapq.heappush(loads, (load, index))
        if fits:
            break
        rounds += 1
    micro = [np.array(sorted(sequences), dtype=np.int64) for sequences in bins]
    return [micro[start : start + ranks] for start in range(0, len(micro), ranks)]


def minibatches(count: int, parts: int, rng: np.random.Generator) -> list[Indices]:
    """A random division of 0..count-1 into `parts` sets whose sizes differ by at most one; empty ones are left out."""
    return [np.sort(part) for part in np.array_split(rng.permutation(count), parts) if len(part)]


@dataclass(frozen=True, slots=True)
class Packed:
    """The tensors of one forward pass: n sequences, l tokens, t response tokens."""

    input_ids: torch.Tensor  # [1, l] int64
    position_ids: torch.Tensor  # [1, l] int64, restarting at each sequence
    boundaries: torch.Tensor  # [n + 1] int32 on the CPU: where sequences start, and l
    predict: torch.Tensor  # [t] int64: the position from which each response token is predicted
    labels: torch.Tensor  # [t] int64: the response tokens
    tokens: torch.Tensor  # [t] int64 on the CPU: where these response tokens are among the batch's T


def gather(
    input_ids: Int32,
    sequence_lengths: Int32,
    response_lengths: Int32,
    which: Sequence[int] | Indices,
    device: torch.device,
) -> Packed:
    """The tensors for these sequences of a batch; for none, one dummy token whose results are nobody's.

    Args:
        input_ids: [L] the batch's tokens.
        sequence_lengths: [N] prompt and response of each sequence.
        response_lengths: [N].
        which: the sequences.
        device: where the tensors go.
    """
    chosen = np.asarray(which, dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(sequence_lengths, dtype=np.int64)))
    response_starts = np.concatenate(([0], np.cumsum(response_lengths, dtype=np.int64)))
    lengths = sequence_lengths[chosen].astype(np.int64)
    responses = response_lengths[chosen].astype(np.int64)
    if not len(chosen):
        zero = torch.zeros((1, 1), dtype=torch.int64, device=device)
        none = torch.zeros(0, dtype=torch.int64)
        return Packed(zero, zero, torch.tensor([0, 1], dtype=torch.int32), none.to(device), none.to(device), none)
    boundaries = np.concatenate(([0], np.cumsum(lengths)))
    positions = _ranges(np.zeros_like(lengths), lengths)
    tokens = input_ids[_ranges(starts[chosen], lengths)].astype(np.int64)
    predict = _ranges(boundaries[1:] - responses - 1, responses)
    return Packed(
        input_ids=torch.from_numpy(tokens)[None].to(device),
        position_ids=torch.from_numpy(positions)[None].to(device),
        boundaries=torch.from_numpy(boundaries.astype(np.int32)),
        predict=torch.from_numpy(predict).to(device),
        labels=torch.from_numpy(tokens[predict + 1]).to(device),
        tokens=torch.from_numpy(_ranges(response_starts[chosen], responses)),
    )


def _ranges(starts: Indices, lengths: Indices) -> Indices:
    """starts[0]..starts[0]+lengths[0]-1, starts[1].., one after the other."""
    offsets = np.repeat(starts - np.concatenate(([0], np.cumsum(lengths)[:-1])), lengths)
    return offsets + np.arange(int(lengths.sum()), dtype=np.int64)
