"""Several critics as one value estimate, and how far they disagree: what `gae` and the masks start from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asyncppo.algorithm._checks import BOOL, FLOAT, check_choice, check_tensor, check_unit

AGGREGATES = ("mean", "min", "confidence")

ERROR_FLOOR = 1e-8
"""The least mean squared error that `aggregate` believes: a critic that was never wrong is not trusted without end."""


def aggregate(values: Tensor, how: str = "mean", errors: Tensor | None = None) -> Tensor:
    """One value per token from the values of M critics.

        "mean":        V̄_t = (1/M) Σ_m V_m(s_t)        AsyPPO
        "min":         V̄_t = min_m V_m(s_t)            pessimistic, as in clipped double Q-learning
        "confidence":  V̄_t = Σ_m a_m V_m(s_t),         a_m = (1/e_m) / Σ_j (1/e_j)

    The last weighs each critic by its inverse squared error, the least-squares choice for critics whose errors are
    independent. e_m below `ERROR_FLOOR` (1e-8) counts as that. Equal errors give the mean, bit by bit.

    Args:
        values: [M, T], M >= 1, in units of return; V_m(s_t) is critic m's value of the state before token t.
        how: "mean", "min" or "confidence".
        errors: e_m [M], each critic's running mean squared error, >= 0, in squared units of return; see
            `critic_errors` and `running`. Needed by "confidence", not looked at by the others.

    Returns:
        [T], the dtype of `values`. Means are taken in float64, so that identical critics give back their float32
        value.

    Raises:
        ValueError: an unknown `how`, a wrong shape, no critic; for "confidence", errors missing, negative or not
            finite.
        TypeError: values or errors that are not float32 or float64.

    Paper: AsyPPO, arXiv 2510.01656 (mean); TD3, arXiv 1802.09477 (min). The weights are the textbook's inverse
    variances.
    """
    check_choice("how", how, AGGREGATES)
    _check_values(values)
    if how == "min":
        return values.amin(dim=0)
    critics = values.shape[0]
    weights = values.new_ones(critics, dtype=torch.float64)
    if how == "confidence":
        if errors is None:
            raise ValueError('errors: expected [M] for how = "confidence", got None; see critic_errors and running')
        _check_errors("errors", errors, critics)
        floored = errors.double().clamp(min=ERROR_FLOOR)
        weights = floored.min() / floored  # a_m up to their sum, 1 for the best critic: exactly 1 for equal errors
    return ((weights[:, None] * values.double()).sum(dim=0) / weights.sum()).to(values.dtype)


def critic_errors(values: Tensor, returns: Tensor, learned_from: Tensor) -> Tensor:
    """How wrong each critic is where it did not learn: its mean squared error on the other critics' responses.

        e_m = mean over t ∉ D_m of (V_m(s_t) − R_t)²        D_m: the tokens that critic m learned from

    A critic's own shard tells how well it remembers, the others' how well it judges. A critic that learned from every
    token (a single one, or shared data) is measured over all of them.

    Args:
        values: V_m(s_t) [M, T], M >= 1, T >= 1, in units of return.
        returns: R_t [T], in units of return.
        learned_from: bool [M, T], True where critic m learned from token t.

    Returns:
        [M], >= 0, in squared units of return, the dtype of `values`.

    Raises:
        ValueError: shapes that do not fit, no critic, no token.
        TypeError: a wrong dtype.
    """
    _check_values(values)
    critics, tokens = values.shape
    if tokens == 0:
        raise ValueError("values: expected at least one token in [M, T], got T = 0")
    check_tensor("returns", returns, (tokens,), FLOAT)
    check_tensor("learned_from", learned_from, (critics, tokens), BOOL)
    judged = ~learned_from | learned_from.all(dim=1, keepdim=True)
    squared = (values.double() - returns.double()).square()
    return (torch.where(judged, squared, 0.0).sum(dim=1) / judged.sum(dim=1)).to(values.dtype)


def running(previous: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """The exponential average of `critic_errors` over steps.

        e ← decay · e + (1 − decay) · new,      the first: e = new

    Args:
        previous: [M], what the last call gave, or None at the first.
        new: [M], >= 0, this step's.
        decay: in [0, 1]; 0 forgets at once, 0.9 remembers about ten steps.

    Returns:
        [M], the dtype of `new`.

    Raises:
        ValueError: shapes that do not fit, errors that are negative or not finite, decay outside [0, 1].
        TypeError: a wrong dtype.
    """
    _check_errors("new", new, new.numel())
    check_unit("decay", decay)
    if previous is None:
        return new
    _check_errors("previous", previous, new.numel())
    return (decay * previous.double() + (1.0 - decay) * new.double()).to(new.dtype)


def value_std(values: Tensor) -> Tensor:
    """How far M critics disagree about each token: the population standard deviation over critics.

        σ_t = sqrt( (1/M) Σ_m (V_m(s_t) − V̄_t)² )

    For two critics this is |V_1 − V_2| / 2. It is exactly 0 where all critics agree bit by bit (the deviations are
    taken from the first critic, so no rounding of the mean enters), hence 0 everywhere for M = 1; the masks rely on
    that.

    Args:
        values: [M, T], M >= 1, in units of return.

    Returns:
        [T], >= 0, in units of return, the dtype of `values`.

    Raises:
        ValueError: a wrong shape, no critic.
        TypeError: values that are not float32 or float64.

    Paper: AsyPPO, arXiv 2510.01656.
    """
    _check_values(values)
    from_first = values.double() - values[:1].double()
    return from_first.std(dim=0, correction=0).to(values.dtype)


def separation(values: Tensor) -> float:
    """How far apart the critics are, measured against what they tell apart: what the alarm "the critics have collapsed
    into one" looks at.

        separation = mean_t σ_t / std_t V̄_t         σ of `value_std`; V̄ the mean over critics; population stds

    The masks rank tokens by σ, and σ alone has no scale: 0.01 is much where values move by 0.02 from token to token,
    and nothing where they move by 1. Near 0 the critics give the same answer everywhere (shared data, equal starts and
    long training end there): σ is then rounding noise, and the masks choose tokens by noise. Near or above 1 they
    disagree more than their mean varies, so the mean says little. Adding a constant to all values, or scaling them,
    changes nothing.

    Args:
        values: [M, T], in units of return.

    Returns:
        A number >= 0 without unit. NaN where it is not defined: with fewer than two critics, or where the mean value is
        the same for every token (also with fewer than two tokens), so an alarm must ask `separation < limit`, which
        NaN is not.

    Raises:
        ValueError: a wrong shape.
        TypeError: values that are not float32 or float64.
    """
    check_tensor("values", values, ("M", "T"), FLOAT)
    if values.shape[0] < 2 or values.shape[1] < 2:
        return math.nan
    mean = values.double().mean(dim=0)
    if bool(mean.max() == mean.min()):
        return math.nan
    return float(value_std(values).double().mean() / mean.std(correction=0))


def _check_errors(name: str, errors: Tensor, critics: int) -> None:
    check_tensor(name, errors, (critics,), FLOAT)
    if not bool((errors.isfinite() & (errors >= 0.0)).all()):
        raise ValueError(f"{name}: expected finite mean squared errors >= 0, got {errors.tolist()}")


def _check_values(values: Tensor) -> None:
    check_tensor("values", values, ("M", "T"), FLOAT)
    if values.shape[0] == 0:
        raise ValueError("values: expected at least one critic in [M, T], got M = 0")
