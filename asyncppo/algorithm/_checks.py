"""What every function of this package checks on its first lines, in one wording: expected, got."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT = (torch.float32, torch.float64)
INT = (torch.int64,)
BOOL = (torch.bool,)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless `tensor` has one of `dtypes`, ValueError unless it has `shape` (a str is any size)."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    actual = tuple(tensor.shape)
    fits = len(actual) == len(shape) and all(
        isinstance(want, str) or want == size for want, size in zip(shape, actual, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {list(actual)}")


def check_lengths(lengths: Tensor, tokens: int | None = None) -> None:
    """Raise unless `lengths` is int64 [N] with every entry >= 1 and, where `tokens` is given, with that sum."""
    check_tensor("lengths", lengths, ("N",), INT)
    if lengths.numel() and int(lengths.min()) < 1:
        raise ValueError(f"lengths: expected every response to have at least 1 token, got {int(lengths.min())}")
    if tokens is not None and int(lengths.sum()) != tokens:
        raise ValueError(f"lengths: expected a sum of {tokens}, the number of tokens given, got {int(lengths.sum())}")


def check_unit(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value <= 1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
