# SPDX-License-Identifier: Apache-2.0
"""How far a mean over the probe set would move with other data: the jackknife over its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def jackknife(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray) -> float:
    """Standard error of the weighted mean `Σ wᵢ xᵢ / Σ wᵢ`, each part standing for the data it could be made of.

    Leaves out one part at a time; parts may differ in size (Busing, Meijer & van der Leeden 1999, "Delete-m jackknife
    for unequal m"). For a weighted mean that is `√(Σ wᵢ / (W − wᵢ) · (xᵢ − x̄)² / g)` with `W = Σ wᵢ`: no
    mean is computed anew.

    A 95 % interval takes Student's t with g − 1 degrees of freedom. That holds from about ten parts on; from four, the
    standard error is itself known to ±40 % only, and t (3.18 instead of 1.96) covers it if the values are not skewed.

    Where the values are averages over probe vectors, such as `vᵀ H_b v`, their probe noise is part of the spread: the
    standard error is then too large rather than too small.

    Args:
        values: The value of each of the g parts.
        weights: The number of items in each, above 0.

    Returns:
        The standard error, in the unit of the values; NaN from one part, which says nothing of others.

    Raises:
        ValueError: If the numbers of values and weights differ, or a weight is not above 0.

    Example:
        >>> jackknife([1.0, 2.0, 3.0, 4.0], [5, 5, 5, 5])  # equal parts: the standard error of a mean
        0.6454972243679028
    """
    x, w = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if x.shape != w.shape or not np.all(w > 0):
        raise ValueError(f"{len(x)} values need as many weights, all above 0; the weights are {w.tolist()}.")
    if len(x) == 1:
        return math.nan
    mean = np.average(x, weights=w)
    return math.sqrt(np.mean(w / (w.sum() - w) * (x - mean) ** 2))
