# SPDX-License-Identifier: Apache-2.0
"""Results of the estimators: a value with its error, its cost and whether it converged."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..number_format import format_interval
from ..serialization import LowerBound
from .statistics import NORMAL_QUANTILE, student_quantile


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
            & Van Loan, Matrix Computations, section 8.1); `None` for other quantities. Convergence is relative to the
            eigenvalue itself, not to ‖H‖; otherwise any vector would pass for an eigenvalue near 0. The error of
            products by differences is added.
        data_std_error: Standard error over the data, without that over the probe vectors: how far the value would
            move with another probe set of the same size. `None` where it is unknown.

    Example:
        >>> Estimate(value=3.0, low=2.5, high=3.5, method="lanczos", hvps=8, converged=True, residual=0.5).error
        0.5
        >>> print(Estimate(value=13012.0, low=11030.0, high=15980.0, method="lanczos", hvps=8, converged=True))
        13,000 (11,000 to 16,000)
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

    def __str__(self) -> str:
        """Return the value with its interval, to the digits that the interval carries."""
        return format_interval(self.value, self.low, self.high)

    @property
    def error(self) -> float:
        """The standard error, or the residual bound of an eigenvalue: a part of the interval."""
        error = self.std_error if self.residual is None else self.residual
        return math.nan if error is None else error

    @classmethod
    def from_std_error(
        cls,
        value: float,
        std_error: float,
        *,
        quantile: float = NORMAL_QUANTILE,
        tolerance: float,
        method: str,
        hvps: int,
        data_std_error: float | None = None,
    ) -> Estimate:
        """Return an estimate with a symmetric interval; it has converged if the relative error is small enough.

        Args:
            value: The estimate.
            std_error: Its standard error.
            quantile: Half the width of the interval, in standard errors.
            tolerance: Relative standard error of a converged estimate.
            method: See the class.
            hvps: See the class.
            data_std_error: See the class.
        """
        margin, converged = quantile * std_error, std_error <= tolerance * abs(value)
        return cls(
            value, value - margin, value + margin, method, hvps, converged, std_error, data_std_error=data_std_error
        )

    def with_arithmetic_error(self, error: float, *, tolerance: float) -> Estimate:
        """Return a stochastic estimate from products that are themselves off, so that it may be off by this as well.

        Args:
            error: A standard error, independent of that over the probe vectors.
            tolerance: Relative standard error of a converged estimate.

        Example:
            >>> exact = Estimate(5.0, 5.0, 5.0, "exact", 3, True, std_error=0.0)
            >>> exact.with_arithmetic_error(1.0, tolerance=0.1)  # doctest: +ELLIPSIS
            Estimate(value=5.0, low=3.04..., high=6.95..., method='exact', hvps=3, converged=False, std_error=1.0, ...)
        """
        added = NORMAL_QUANTILE * error
        std_error = math.hypot(self.std_error or 0.0, error)
        return replace(
            self,
            low=self.value - math.hypot(self.value - self.low, added),
            high=self.value + math.hypot(self.high - self.value, added),
            std_error=std_error,
            converged=std_error <= tolerance * abs(self.value),
        )

    def with_data_error(self, error: float, *, freedom: float, tolerance: float) -> Estimate:
        """Return the estimate with one interval for both errors, over the probes and over the data.

        Args:
            error: Standard error over the data.
            freedom: Its degrees of freedom, taken for both errors: that over few probes is not known well, either.
            tolerance: Relative standard error of a converged estimate.

        Example:
            >>> Estimate(5.0, 5.0, 5.0, "exact", 3, True, std_error=0.0).with_data_error(1.0, freedom=4, tolerance=0.1)
            ... # doctest: +ELLIPSIS
            Estimate(value=5.0, low=2.22..., high=7.77..., method='exact', hvps=3, converged=False, std_error=0.0, ...)
        """
        if error == math.inf:
            return replace(self, low=-math.inf, high=math.inf, data_std_error=None, converged=False)
        total = math.hypot(self.std_error or 0.0, error)
        margin = student_quantile(freedom) * total if error else NORMAL_QUANTILE * total
        return replace(
            self,
            low=self.value - max(margin, self.value - self.low),
            high=self.value + max(margin, self.high - self.value),
            data_std_error=error,
            converged=total <= tolerance * abs(self.value),
        )

    def with_product_error(self, relative: float, *, tolerance: float) -> Estimate:
        """Return an eigenvalue whose residual bound includes the error of its product, relative to its norm.

        Args:
            relative: The error of a product, relative to its norm.
            tolerance: Relative residual of a converged eigenvalue.

        Example:
            >>> Estimate(10.0, 10.0, 10.0, "lanczos", 8, True, residual=0.0).with_product_error(0.1, tolerance=0.01)
            ... # doctest: +ELLIPSIS
            Estimate(value=10.0, low=9.0, high=11.0, method='lanczos', hvps=8, converged=False, ..., residual=1.0, ...)
        """
        added = relative * abs(self.value)
        residual = (self.residual or 0.0) + added
        return replace(
            self,
            low=self.low - added,
            high=self.high + added,
            residual=residual,
            converged=self.converged and residual <= tolerance * abs(self.value),
        )

    @classmethod
    def from_relative_error(
        cls,
        value: float,
        std_error: float,
        *,
        quantile: float = NORMAL_QUANTILE,
        tolerance: float,
        method: str,
        hvps: int,
    ) -> Estimate:
        """Return an estimate of a positive quantity, whose interval is symmetric on a logarithmic scale.

        Arguments as for `from_std_error`.
        """
        margin = quantile * std_error / value if value > 0 else 0.0
        factor = math.exp(min(margin, 700.0))  # beyond, the exponential overflows
        return cls(value, value / factor, value * factor, method, hvps, std_error <= tolerance * value, std_error)


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Extreme eigenvalues of a matrix, and its spectrum as a quadrature.

    Attributes:
        lambda_max: Largest algebraic eigenvalue.
        lambda_min: Smallest algebraic eigenvalue; `None` from power iteration, which finds only the largest.
        top: The requested number of largest eigenvalues, `lambda_max` first.
        bottom: The smallest ones, `lambda_min` first.
        ritz_values: All Ritz values of the Lanczos run, ascending. The outermost approximate eigenvalues.
        ritz_weights: Gauss quadrature weight of each Ritz value: its share of the spectrum. They sum to 1.
    """

    lambda_max: Estimate
    lambda_min: Estimate | None = None
    top: tuple[Estimate, ...] = ()
    bottom: tuple[Estimate, ...] = ()
    ritz_values: tuple[float, ...] = ()
    ritz_weights: tuple[float, ...] = ()
