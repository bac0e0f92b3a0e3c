# SPDX-License-Identifier: Apache-2.0
"""What an estimator returns: a value, its error, what it cost and whether it converged."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..serialization import LowerBound


@dataclass(frozen=True)
class Estimate:
    """One estimated number with its error bar.

    Attributes:
        value: The estimate.
        low: Lower end of the error bar: of the 95 % confidence interval for a stochastic estimate, of the residual
            bound for an eigenvalue.
        high: Upper end of the error bar.
        method: How it was estimated, for example `"lanczos"` or `"hutchinson"`.
        hvps: Hessian-vector products spent on it. Estimates that share products each state the full number.
        converged: Whether the requested tolerance was reached.
        std_error: Standard error over the probe vectors; `None` where the estimate is not an average.
        residual: `‖Hq − θq‖` of an eigenvalue estimate θ: some eigenvalue lies within this distance of `value` (Golub
            & Van Loan, Matrix Computations, section 8.1); `None` for other quantities. Converged is a residual that is
            small beside the eigenvalue itself: beside the largest one, any random vector would do for an end near 0.
        data_std_error: Standard error over the data, apart from that over the probe vectors: how far the value would
            move with another probe set of the same size. `None` where it is not known.

    Example:
        >>> Estimate(value=3.0, low=2.5, high=3.5, method="lanczos", hvps=8, converged=True, residual=0.5).error
        0.5
    """

    value: float
    low: LowerBound
    high: float
    method: str
    hvps: int
    converged: bool
    std_error: float | None = None
    residual: float | None = None
    data_std_error: float | None = None

    @property
    def error(self) -> float:
        """The number to print behind ±: the standard error, or the residual bound of an eigenvalue."""
        error = self.std_error if self.residual is None else self.residual
        return math.nan if error is None else error


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """What is known of a matrix's eigenvalues.

    Attributes:
        lambda_max: Largest algebraic eigenvalue.
        lambda_min: Smallest algebraic eigenvalue; `None` from power iteration, which finds one end only.
        top: The largest eigenvalues that were asked for, `lambda_max` first.
        bottom: The smallest ones, `lambda_min` first.
        ritz_values: All Ritz values of the Lanczos run, ascending. Those at both ends approximate eigenvalues.
        ritz_weights: Gauss quadrature weight of each Ritz value: the share of the spectrum it stands for. Sum to 1.
    """

    lambda_max: Estimate
    lambda_min: Estimate | None = None
    top: tuple[Estimate, ...] = ()
    bottom: tuple[Estimate, ...] = ()
    ritz_values: tuple[float, ...] = ()
    ritz_weights: tuple[float, ...] = ()
