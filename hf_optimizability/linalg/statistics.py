# SPDX-License-Identifier: Apache-2.0
"""Standard errors of means and by the jackknife, and quantiles for 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]

NORMAL_QUANTILE = 1.959964
"""Quantile of the normal distribution for a two-sided 95 % interval."""


def student_quantile(freedom: float) -> float:
    """Return the quantile of Student's t distribution for a two-sided 95 % interval.

    Args:
        freedom: Degrees of freedom; infinity gives the normal distribution.

    Example:
        >>> round(student_quantile(9), 3), student_quantile(math.inf)
        (2.262, 1.959964)
    """
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975)) if freedom < math.inf else NORMAL_QUANTILE


def standard_error(samples: Array) -> Array:
    """Return the standard error of the mean of independent samples, over the first axis.

    Example:
        >>> float(standard_error(np.array([1.0, 2.0, 3.0, 4.0])))
        0.6454972243679028
    """
    errors: Array = samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
    return errors


def jackknife(values: Sequence[float] | Array, weights: Sequence[float] | Array) -> float:
    """Return the standard error of the weighted mean `Σ wᵢ xᵢ / Σ wᵢ` over independent draws of data.

    Leaves out one draw at a time; they may differ in size (Busing, Meijer & van der Leeden 1999, "Delete-m jackknife
    for unequal m"). For a weighted mean that is `√(Σ wᵢ / (W − wᵢ) · (xᵢ − x̄)² / g)` with `W = Σ wᵢ`.

    A 95 % interval takes Student's t with g − 1 degrees of freedom. That holds from about ten draws on; from four, the
    standard error is itself known to ±40 % only, and t (3.18 instead of 1.96) covers it if the values are not skewed.

    Where the values are averages over probe vectors, such as `vᵀ H_b v`, their probe noise is part of the spread: the
    standard error is then too large rather than too small.

    Args:
        values: The value of each of the g draws.
        weights: The number of items in each, above 0.

    Returns:
        The standard error, in the unit of the values; NaN for a single draw.

    Raises:
        ValueError: If the numbers of values and weights differ, or a weight is not above 0.

    Example:
        >>> jackknife([1.0, 2.0, 3.0, 4.0], [5, 5, 5, 5])  # equal sizes: the standard error of a mean
        0.6454972243679028
    """
    x, w = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if x.shape != w.shape or not np.all(w > 0):
        raise ValueError(f"{len(x)} values need as many weights, all above 0; the weights are {w.tolist()}.")
    if len(x) == 1:
        return math.nan
    mean = np.average(x, weights=w)
    return math.sqrt(np.mean(w / (w.sum() - w) * (x - mean) ** 2))


def jackknife_variance(leave_one_out: Array) -> float:
    """Return the variance of an estimate from its values with one draw left out (Efron & Stein 1981)."""
    return float((len(leave_one_out) - 1) * np.mean((leave_one_out - leave_one_out.mean()) ** 2))


def jackknife_covariance(leave_one_out: Array, weights: Array) -> Array:
    """Return the covariance of estimates from their values with one draw left out, where draws differ in size.

    The delete-m jackknife of Busing, Meijer & van der Leeden 1999; for a weighted mean, its diagonal is the square of
    `jackknife`.

    Args:
        leave_one_out: The estimates without each of the g draws, of shape (g, estimates).
        weights: The number of items in each draw.

    Returns:
        Of shape (estimates, estimates).
    """
    draws = len(weights)
    ratio = weights.sum() / weights
    centre = (1 - 1 / ratio) @ leave_one_out / (draws - 1) if draws > 1 else 0.0
    deviations = leave_one_out - centre
    covariance: Array = (deviations.T * (ratio - 1)) @ deviations / draws
    return covariance
