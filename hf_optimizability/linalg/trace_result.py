# SPDX-License-Identifier: Apache-2.0
"""From the statistics of a trace estimator to its result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .batch_traces import BatchTraces
from .estimate import Estimate
from .statistics import student_quantile


Array = NDArray[np.float64]

_PRIOR_PROBES = 12  # weight, in probes, of the upper bound of a segment's variance; see `TraceStatistics`


@dataclass(frozen=True)
class TraceResult:
    """A trace, those of its segments, and what else the same products give.

    Attributes:
        total: The trace.
        segments: The trace of the diagonal block of each segment.
        frobenius_squared: `‖A‖_F²`, the sum of the squared eigenvalues; `None` where only the trace was split.
        diagonal: The diagonal, of shape (n,); `None` from `xtrace`. The 2-norm of its error is `total.std_error / √2`.
        batch_traces: The traces of the batches whose mean the matrix is; `None` from `xtrace`.
    """

    total: Estimate
    segments: tuple[Estimate, ...]
    frobenius_squared: Estimate | None
    diagonal: Tensor | None = field(default=None, compare=False, repr=False)
    batch_traces: BatchTraces | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceStatistics:
    """Sufficient statistics of a trace and its error, from m probes.

    Attributes:
        samples: Samples of each segment's trace, of shape (m, segments).
        term_variances: V of each segment, the sum of the variances of its terms. The whole sample's variance is 2 V.
            That of a segment lies between V (its rows couple to other segments only) and 2 V (to themselves only); its
            sample variance, noisy from few probes, is pulled towards the upper end.
        squared_norms: Samples of `‖A‖_F²`, of shape (m,).
        squared_products: Samples of `‖A²‖_F²`, half the largest variance that the samples of `‖A‖_F²` can have.
        data_std_errors: From `BatchTraces`.
    """

    samples: Array
    term_variances: Array
    squared_norms: Array
    squared_products: Sequence[float]
    data_std_errors: Array | None

    def result(self, *, quantile: float, tolerance: float, method: str, hvps: int) -> TraceResult:
        """Return the estimates.

        Args:
            quantile: Of the intervals of the traces, in standard errors.
            tolerance: Relative standard error of a converged estimate.
            method: Recorded in the estimates.
            hvps: Recorded in the estimates.
        """
        number, spreads = len(self.samples), self.term_variances
        data_errors = self.data_std_errors
        over_data = [None] * (1 + len(spreads)) if data_errors is None else data_errors.tolist()

        def estimate(value: float, variance: float, data_std_error: float | None) -> Estimate:
            return Estimate.from_std_error(
                value,
                math.sqrt(variance / number),
                quantile=quantile,
                tolerance=tolerance,
                method=method,
                hvps=hvps,
                data_std_error=data_std_error,
            )

        total = estimate(float(self.samples.sum(1).mean()), float(2 * spreads.sum()), over_data[0])
        observed = (number - 1) * self.samples.var(axis=0, ddof=1)
        variances = (observed + _PRIOR_PROBES * 2 * spreads) / (number - 1 + _PRIOR_PROBES)
        variances = np.clip(variances, spreads, 2 * spreads)
        segments = tuple(map(estimate, self.samples.mean(axis=0).tolist(), variances.tolist(), over_data[1:]))
        return TraceResult(total, segments, self._frobenius_squared(tolerance=tolerance, method=method, hvps=hvps))

    def _frobenius_squared(self, *, tolerance: float, method: str, hvps: int) -> Estimate:
        """Estimate ‖A‖_F². It is positive and its samples are skewed: the interval is one of its logarithm."""
        number = len(self.squared_norms)
        bound = 2 * float(np.mean(self.squared_products)) if len(self.squared_products) else 0.0
        variance = max(float(self.squared_norms.var(ddof=1)), bound)
        return Estimate.from_relative_error(
            float(self.squared_norms.mean()),
            math.sqrt(variance / number),
            quantile=student_quantile(number - 1),
            tolerance=tolerance,
            method=method,
            hvps=hvps,
        )


def squared_products(gram: Array) -> list[float]:
    """Return the squared dot products of all pairs of vectors, from their Gram matrix."""
    return list(gram[np.triu_indices(len(gram), 1)] ** 2)
