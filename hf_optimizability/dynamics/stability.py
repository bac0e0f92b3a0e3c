# SPDX-License-Identifier: Apache-2.0
"""How steadily a loss or metric improves: an `evaluate` measurement that needs nothing but the logged values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest


MIN_POINTS_FOR_SPIKES = 16
"""With fewer points the scatter is too uncertain to call one of them a spike."""

SPIKE_SIGMAS = 6
"""Robust standard deviations by which a spike stands out from its neighbours."""

NOTES = {
    "few_points": "Too few points: {points}; a comparison needs 2.",
    "few_for_spikes": "Too few points to tell spikes from scatter: {points}; that needs {needed}.",
}
"""What the note says where a value is missing."""

DESCRIPTION = """
Stability: share and size of the set-backs of a loss or metric between consecutive logged values, and number of spikes.
"""

CITATION = """
@article{wilson1927probable,
  title = {Probable Inference, the Law of Succession, and Statistical Inference},
  author = {Wilson, Edwin B.},
  journal = {Journal of the American Statistical Association},
  volume = {22},
  number = {158},
  pages = {209--212},
  year = {1927}
}
"""

INPUTS_DESCRIPTION = """
Args:
    step (list of float): Optimizer steps at which the values were logged, in any order.
    value (list of float): The loss or metric at these steps; NaN, infinite and None are counted and left out.
    greater_is_better (bool): False for a loss, True for a metric such as accuracy. Defaults to False.

Returns:
    dict: setbacks of comparisons, setback_share with setback_share_low and _high (95 % confidence interval);
    mean_setback and largest_setback, as shares of the range of the values; spikes; points; non_finite; and note, which
    says why a value is None.
"""

VALUES = (
    "setback_share", "setback_share_low", "setback_share_high", "mean_setback", "largest_setback", "spikes",
)  # fmt: skip
"""Results that are `None` where the values don't give them."""


class Stability(evaluate.Measurement):
    """Set-backs and spikes of a loss or metric.

    A set-back is a change for the worse from one logged value to the next. `setback_share` is their share of all
    comparisons, with the interval of Wilson (1927); a share of ½ is what noise around a standstill gives.
    `mean_setback` and `largest_setback` are sizes of set-backs relative to the range of the values.

    A spike is a set-back to a value that is worse than the median of the three values before and the three after it
    by more than 6 robust standard deviations of such differences (1.4826 times the median absolute deviation or, where
    that is 0, 1.2533 times the mean one; Iglewicz and Hoaglin 1993). The first and last three values are not judged.

    Example:
        >>> result = Stability().compute(step=[1, 2, 3, 4, 5], value=[3.0, 2.0, 2.5, 1.0, 1.0])
        >>> result["setbacks"], result["comparisons"], result["largest_setback"]
        (1, 4, 0.25)
    """

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"step": datasets.Value("float64"), "value": datasets.Value("float64")}),
        )

    def _compute(
        self, *, step: Sequence[float], value: Sequence[float | None], greater_is_better: bool = False
    ) -> dict[str, Any]:
        return count_setbacks(step, value, greater_is_better=greater_is_better)


def count_setbacks(
    step: Sequence[float], value: Sequence[float | None], *, greater_is_better: bool = False
) -> dict[str, Any]:
    """Compute what `Stability().compute` returns, without its detour through a file.

    Args:
        step: Optimizer steps at which the values were logged, in any order.
        value: The loss or metric at these steps; NaN, infinite and `None` are counted and left out.
        greater_is_better: `False` for a loss, `True` for a metric such as accuracy.

    Returns:
        The values that `Stability` describes, and a note that says why one is `None`.

    Example:
        >>> count_setbacks([1], [0.5])["note"]
        'Too few points: 1; a comparison needs 2.'
    """
    logged = np.asarray(value, dtype=float)[np.argsort(np.asarray(step, dtype=float), kind="stable")]
    values = logged[np.isfinite(logged)] * (-1 if greater_is_better else 1)  # from here on, up is worse
    points, comparisons = len(values), max(len(values) - 1, 0)
    counts = {"points": points, "non_finite": len(logged) - points, "comparisons": comparisons}
    result: dict[str, Any] = {"setbacks": 0, **counts, **dict.fromkeys(VALUES), "note": ""}
    if points < 2:
        return {**result, "note": NOTES["few_points"].format(points=points)}

    changes = np.diff(values)
    setbacks = changes[changes > 0]
    share = binomtest(len(setbacks), comparisons).proportion_ci(method="wilson")
    result |= {"setbacks": len(setbacks), "setback_share": len(setbacks) / comparisons}
    result |= {"setback_share_low": float(share.low), "setback_share_high": float(share.high)}
    sizes = setbacks / np.ptp(values) if len(setbacks) else np.zeros(1)
    result |= {"mean_setback": float(sizes.mean()), "largest_setback": float(sizes.max())}
    if points < MIN_POINTS_FOR_SPIKES:
        return {**result, "note": NOTES["few_for_spikes"].format(points=points, needed=MIN_POINTS_FOR_SPIKES)}
    return {**result, "spikes": _count_spikes(values)}


def _count_spikes(values: NDArray[np.float64]) -> int:
    """Count upward spikes."""
    windows = np.lib.stride_tricks.sliding_window_view(values, 7)
    excess = windows[:, 3] - np.median(windows[:, [0, 1, 2, 4, 5, 6]], axis=1)
    deviations = np.abs(excess - np.median(excess))
    sigma = 1.4826 * np.median(deviations) or 1.2533 * np.mean(deviations)
    # The sigma of values that are equal up to rounding is itself a rounding error.
    threshold = max(SPIKE_SIGMAS * sigma, 1e-9 * np.ptp(values))
    return int(np.sum((excess > threshold) & (windows[:, 3] > windows[:, 2])))
