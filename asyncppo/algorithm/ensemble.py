"""Several critics as one value estimate, and how far they disagree: what `gae` and the masks start from."""

from __future__ import annotations

from torch import Tensor

from asyncppo.algorithm._checks import FLOAT, check_choice, check_tensor

AGGREGATES = ("mean", "min")


def aggregate(values: Tensor, how: str = "mean") -> Tensor:
    """One value per token from the values of M critics.

        "mean":  V̄_t = (1/M) Σ_m V_m(s_t)        AsyPPO
        "min":   V̄_t = min_m V_m(s_t)            pessimistic, as in clipped double Q-learning

    Args:
        values: [M, T], M >= 1, in units of return; V_m(s_t) is critic m's value of the state before token t.
        how: "mean" or "min".

    Returns:
        [T], the dtype of `values`. The mean is taken in float64, so that identical critics give back their float32
        value.

    Raises:
        ValueError: an unknown `how`, a wrong shape, no critic.
        TypeError: values that are not float32 or float64.

    Paper: AsyPPO, arXiv 2510.01656 (mean); TD3, arXiv 1802.09477 (min).
    """
    check_choice("how", how, AGGREGATES)
    _check_values(values)
    return values.amin(dim=0) if how == "min" else values.double().mean(dim=0).to(values.dtype)


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


def _check_values(values: Tensor) -> None:
    check_tensor("values", values, ("M", "T"), FLOAT)
    if values.shape[0] == 0:
        raise ValueError("values: expected at least one critic in [M, T], got M = 0")
