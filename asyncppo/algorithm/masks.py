"""Which tokens drive the policy, and which get the entropy bonus: AsyPPO's two masks, with exact counts.

Both are computed once on the tokens of the *global* batch (all ranks, all micro-batches) and then cut up, so that
they are the same on any number of ranks. How many tokens are left out is ⌊fraction · tokens⌋ as a person computes it:
the fraction is the decimal number it is written as, not its nearest binary one. 0.29 · 100 leaves out 29, where float
arithmetic gives 28.999999999999996 and floor 28.

What ranks the tokens is any signal [T]: the critics' `value_std` (AsyPPO), the policy's entropy (the paper's
comparison) or `random_signal` (the control). Both masks keep their direction whatever the signal: the policy term
loses the lowest, the entropy bonus the highest.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from asyncppo.algorithm._checks import FLOAT, check_choice, check_lengths, check_tensor
from asyncppo.algorithm._draws import draws
from asyncppo.algorithm.advantages import segment_ids

SCOPES = ("batch", "sequence")


def lowest(signal: Tensor, fraction: float) -> Tensor:
    """True for the ⌊fraction · T⌋ tokens of lowest signal; among equals the earlier ones are taken.

    Args:
        signal: [T], any unit; infinities are allowed, NaN is not.
        fraction: in [0, 1), taken as the decimal number that `repr` writes (see the module's docstring).

    Returns:
        bool [T] with exactly ⌊fraction · T⌋ True, also where all signals are equal.

    Raises:
        ValueError: a wrong shape, a fraction outside [0, 1), NaN in the signal.
        TypeError: a signal that is not float32 or float64.
    """
    return _extreme(signal, _whole(signal), fraction, descending=False, spare_equal=False)


def highest(signal: Tensor, fraction: float) -> Tensor:
    """True for the ⌊fraction · T⌋ tokens of highest signal; among equals the earlier ones are taken.

    Arguments, result and errors as for `lowest`.
    """
    return _extreme(signal, _whole(signal), fraction, descending=True, spare_equal=False)


def keep_for_policy(signal: Tensor, fraction: float, lengths: Tensor, scope: str = "batch") -> Tensor:
    """I^A: the tokens whose advantage drives the policy.

        I^A_t = 0 for the ⌊kT⌋ tokens of lowest signal, else 1       k = fraction, scope "batch"
        I^A_t = 0 for the ⌊k|o|⌋ tokens of lowest signal in each response o            scope "sequence"

    Where the critics agree (σ low) or the policy is sure (entropy low), the advantage has little left to teach. Ties
    go to the earlier token. Where all signals of a batch (for scope "sequence": of a response) are *equal*, they say
    nothing, and everything is kept: so the σ of one critic, or of identical ones, gives no mask.

    Args:
        signal: [T], any unit: σ of `value_std` (AsyPPO), the policy's entropy (the paper's comparison), or
            `random_signal` (the control). Infinities are allowed, NaN is not.
        fraction: k in [0, 1), 0.2 in the paper; ⌊ ⌋ is of the exact decimal product.
        lengths: int64 [N], tokens per response, all >= 1, sum T.
        scope: "batch" or "sequence".

    Returns:
        bool [T], True = kept.

    Raises:
        ValueError: shapes that do not fit, a fraction outside [0, 1), NaN in the signal, an unknown scope.
        TypeError: a wrong dtype.

    Paper: AsyPPO, arXiv 2510.01656, advantage masking.
    """
    return ~_extreme(signal, _units(signal, lengths, scope), fraction, descending=False, spare_equal=True)


def keep_for_entropy(signal: Tensor, fraction: float, lengths: Tensor, scope: str = "batch") -> Tensor:
    """I^H: the tokens that get the entropy bonus.

        I^H_t = 0 for the ⌊hT⌋ tokens of highest signal, else 1       h = fraction, scope "batch"
        I^H_t = 0 for the ⌊h|o|⌋ tokens of highest signal in each response o           scope "sequence"

    Where the critics diverge most, exploring more adds noise, not knowledge. Ties, equal signals, arguments, result
    and errors as for `keep_for_policy`.

    Paper: AsyPPO, arXiv 2510.01656, entropy filtering.
    """
    return ~_extreme(signal, _units(signal, lengths, scope), fraction, descending=True, spare_equal=True)


def random_signal(tokens: int, seed: Sequence[int]) -> Tensor:
    """A signal that knows nothing, the masks' control: uniform in [0, 1), independent for every token.

    With it the masks take away as many tokens as with any other signal, chosen at random, so that what a signal is
    worth can be told from what masking does. Two tokens are never equal for practical purposes (53 random bits).

    Args:
        tokens: T >= 0, of the global batch: the signal goes by position in it.
        seed: what the draw depends on and nothing else, at least one integer: (run seed, step) gives every step
            other tokens, and every rank, machine and resumed run the same.

    Returns:
        float64 [T].

    Raises:
        ValueError: tokens below 0, an empty seed.
        TypeError: a seed that is not of integers.
    """
    if tokens < 0:
        raise ValueError(f"tokens: expected at least 0, got {tokens}")
    if len(seed) == 0:
        raise ValueError("seed: expected at least one integer, got none; give the run's seed and the step")
    # The first word keeps these keys apart from the shards', which begin with a number.
    key = "/".join(["random_signal", *(str(operator.index(part)) for part in seed)])
    return torch.from_numpy((draws(key, tokens) >> 11) * 2.0**-53)


def _whole(signal: Tensor) -> Tensor:
    """The whole batch as one unit: [1] holding T (empty where T is 0)."""
    return torch.tensor([signal.numel()] if signal.numel() else [], dtype=torch.int64, device=signal.device)


def _units(signal: Tensor, lengths: Tensor, scope: str) -> Tensor:
    """The lengths of the stretches within which tokens are ranked."""
    check_choice("scope", scope, SCOPES)
    check_lengths(lengths, signal.numel())
    return lengths if scope == "sequence" else _whole(signal)


def _extreme(signal: Tensor, units: Tensor, fraction: float, *, descending: bool, spare_equal: bool) -> Tensor:
    """True for the ⌊fraction · n⌋ lowest (highest) of each unit of n; none of a unit of equals if `spare_equal`."""
    check_tensor("signal", signal, ("T",), FLOAT)
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"fraction: expected a number in [0, 1), got {fraction}")
    if bool(signal.isnan().any()):
        raise ValueError(f"signal: expected no NaN, got {int(signal.isnan().sum())} in {signal.numel()} tokens")

    # Unit after unit, the most extreme token first, among equals the earlier: two stable sorts, the main key last.
    unit = segment_ids(units)
    by_signal = torch.sort(signal, descending=descending, stable=True).indices
    order = by_signal[torch.sort(unit[by_signal], stable=True).indices]

    exact = Fraction(repr(float(fraction)))
    counts = torch.tensor([math.floor(exact * n) for n in units.tolist()], dtype=torch.int64, device=signal.device)
    starts = units.cumsum(0) - units
    if spare_equal:
        counts = counts.where(signal[order[starts]] != signal[order[starts + units - 1]], 0)

    rank = torch.arange(signal.numel(), device=signal.device) - starts[unit]
    chosen = torch.empty_like(signal, dtype=torch.bool)
    chosen[order] = rank < counts[unit]
    return chosen
