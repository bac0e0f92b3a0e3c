# SPDX-License-Identifier: Apache-2.0
"""Both ends of the spectrum, the density and the trace of a curvature matrix, each to its tolerance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from .batch_traces import BatchTraces
from .deflation import Deflation
from .density import Density, density
from .estimate import Estimate, Spectrum
from .lanczos import lanczos
from .operator import SymmetricOperator
from .power_iteration import leading_eigenpair
from .trace import MIN_PROBES, exact_trace, hutchinson, hutchplusplus
from .trace_result import TraceResult
from .vectors import Segments, as_rows
from .xtrace import xtrace


EigenMethod = Literal["lanczos", "power_iteration"]
DEFLATED = 4
"""Ritz vectors that the trace treats exactly; as many as are multiplied at once."""

TraceMethod = Literal["hutchinson", "hutch++", "xtrace", "exact"]


@dataclass(frozen=True, kw_only=True)
class HessianEstimates(Spectrum):
    """Curvature of one objective at one point.

    Attributes:
        trace: Sum of the eigenvalues.
        density: How the eigenvalues are distributed; `None` from power iteration.
    """

    trace: Estimate
    density: Density | None = None

    @property
    def converged(self) -> bool:
        """Whether trace and eigenvalues reached their tolerances."""
        ends = [self.lambda_max] if self.lambda_min is None else [self.lambda_max, self.lambda_min]
        return self.trace.converged and all(end.converged for end in ends)


@dataclass(frozen=True)
class SpectrumEstimate:
    """What `estimate_spectrum` found.

    Attributes:
        spectrum: Extreme eigenvalues.
        density: How the eigenvalues are distributed; `None` from power iteration.
        eigenvalues: The largest, whether so many were asked for or not; none from power iteration.
        eigenvectors: Approximate ones of `eigenvalues`, as rows; `None` from power iteration.
        extremal: Approximate eigenvectors of λ_max and, unless from power iteration, of λ_min.
    """

    spectrum: Spectrum
    density: Density | None
    eigenvalues: tuple[Estimate, ...]
    eigenvectors: Tensor | None = field(compare=False, repr=False)
    extremal: tuple[Tensor, ...] = field(compare=False, repr=False)

    @property
    def hvps(self) -> int:
        """Products spent."""
        return self.spectrum.lambda_max.hvps

    @property
    def deflating_vectors(self) -> Tensor | None:
        """Ritz vectors of the largest eigenvalues, once λ_max has converged: wrong ones do not lower the variance."""
        return self.eigenvectors if self.spectrum.lambda_max.converged else None


def estimate_spectrum(
    operator: SymmetricOperator,
    *,
    tolerance: float,
    max_hvps: int,
    seed: int,
    method: EigenMethod = "lanczos",
    num_eigenvalues: int = 1,
    left_out: int = 0,
) -> SpectrumEstimate:
    """Estimate both ends of the spectrum and, as a quadrature, the density, from one random start.

    Args:
        operator: The matrix A, of size n.
        tolerance: Relative residual of the eigenvalues to stop at.
        max_hvps: Most products to spend.
        seed: Seed of the start.
        method: Power iteration finds `lambda_max` alone, and no density.
        num_eigenvalues: How many eigenvalues to find at each end.
        left_out: Eigenvalues known to be 0 that A was shrunk by, for the density.

    Example:
        >>> import torch
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> matrix = DenseOperator(torch.diag(torch.tensor([-1.0, 2.0, 5.0])))
        >>> found = estimate_spectrum(matrix, tolerance=0.01, max_hvps=8, seed=0)
        >>> round(found.spectrum.lambda_max.value, 3), round(found.spectrum.lambda_min.value, 3)
        (5.0, -1.0)
    """
    if method == "power_iteration":
        top, vector = leading_eigenpair(operator, tolerance=tolerance, max_hvps=max_hvps, seed=seed)
        return SpectrumEstimate(Spectrum(lambda_max=top), None, (), None, (vector,))
    run = lanczos(operator, tolerance=tolerance, max_hvps=max_hvps, seed=seed, num_eigenvalues=num_eigenvalues)
    found = None
    if len(run.nodes) > 2:  # fewer tell nothing
        found = density(
            run.nodes,
            run.weights,
            run.residuals,
            size=operator.size,
            zero_rows=left_out,
            hvps=run.hvps,
            tolerance=tolerance,
        )
    largest = run.top(DEFLATED, tolerance=tolerance)
    indices = [-1 - index for index in range(len(largest))]
    vectors = run.ritz_vectors([*indices, 0]).to(operator.device)  # the basis may be on the CPU
    extremal = (vectors[0], vectors[-1]) if len(run.nodes) > 1 else (vectors[0],)
    return SpectrumEstimate(run.spectrum, found, largest, vectors[:-1], extremal)


def estimate_trace(
    operator: SymmetricOperator,
    segments: Segments,
    *,
    tolerance: float,
    max_hvps: int,
    seed: int,
    method: TraceMethod = "hutchinson",
    deflating_vectors: Tensor | None = None,
) -> TraceResult:
    """Estimate the trace, and those of the segments' diagonal blocks.

    Args:
        operator: The matrix, of size n.
        segments: Slices of the rows; together they must hold each row once.
        tolerance: Relative standard error of the trace to stop at.
        max_hvps: Most products to spend; `"exact"` spends n.
        seed: Seed of the probes; another one than that of the deflating vectors.
        method: The estimator.
        deflating_vectors: Orthonormal approximate eigenvectors, as rows, that Hutchinson's probes are deflated by
            where the budget allows it. The batches' traces are never deflated: pass none where they must add up to the
            trace of the whole.

    Example:
        >>> import torch
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> matrix = DenseOperator(torch.diag(torch.tensor([-1.0, 2.0, 5.0])))
        >>> round(estimate_trace(matrix, [[slice(0, 3)]], tolerance=0.1, max_hvps=8, seed=1).total.value, 3)
        6.0
    """
    if method == "exact":
        return exact_trace(operator, segments)
    if method == "xtrace":
        return xtrace(operator, segments, tolerance=tolerance, max_hvps=max_hvps, seed=seed)
    if method == "hutch++":
        return hutchplusplus(operator, segments, tolerance=tolerance, max_hvps=max_hvps, seed=seed)
    deflation = None
    if deflating_vectors is not None and max_hvps >= len(deflating_vectors) + MIN_PROBES:
        products = as_rows(operator.matmat(deflating_vectors.T))
        deflation = Deflation(deflating_vectors, products, operator.rows.group)
        max_hvps -= len(deflating_vectors)
    return hutchinson(operator, segments, tolerance=tolerance, max_hvps=max_hvps, seed=seed, deflation=deflation)


@dataclass(frozen=True)
class SpectrumAndTrace:
    """The spectrum and the trace of one matrix.

    Attributes:
        estimates: The whole matrix.
        segments: The trace of each segment's diagonal block.
        diagonal: The diagonal, of shape (n,); `None` from XTrace. The 2-norm of its error is `trace.std_error / √2`.
        eigenvalues: The largest, whether so many were asked for or not; none from power iteration.
        eigenvectors: Approximate ones of `eigenvalues`, as rows; `None` from power iteration.
        parts: What the trace's probes say about the parts whose mean is the matrix; `None` from XTrace.
        extremal: Approximate eigenvectors of λ_max and, unless from power iteration, of λ_min.
    """

    estimates: HessianEstimates
    segments: tuple[Estimate, ...]
    diagonal: Tensor | None = field(compare=False, repr=False)
    eigenvalues: tuple[Estimate, ...] = ()
    eigenvectors: Tensor | None = field(default=None, compare=False, repr=False)
    parts: BatchTraces | None = field(default=None, compare=False, repr=False)
    extremal: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)

    def with_product_error(
        self, relative: float, rows: Sequence[float], *, eigen_tolerance: float, trace_tolerance: float
    ) -> SpectrumAndTrace:
        """Return the same with errors that include that of the products, `‖δ‖ = relative · ‖Av‖` of each.

        A sample vᵀAv is off by `relative · ‖A‖_F` where δ has a random direction, and by `relative · tr A`, in all
        samples alike, where it has that of Av. Of a segment the first is in proportion to the root of its rows.

        Args:
            relative: The error of a product, relative to its norm.
            rows: The number of rows of each segment, on all ranks.
            eigen_tolerance: Relative residual of a converged eigenvalue.
            trace_tolerance: Relative standard error of a converged trace.
        """
        found = self.estimates
        pairs = zip(found.ritz_values, found.ritz_weights, strict=True)
        squared = sum(rows) * math.fsum(weight * value**2 for value, weight in pairs) or found.lambda_max.value**2

        def widened(trace: Estimate, share: float) -> Estimate:
            error = relative * math.hypot(trace.value, math.sqrt(share * squared))
            return trace.with_arithmetic_error(error, tolerance=trace_tolerance)

        def ends(estimates: Iterable[Estimate]) -> tuple[Estimate, ...]:
            return tuple(end.with_product_error(relative, tolerance=eigen_tolerance) for end in estimates)

        shares = [number / sum(rows) for number in rows]
        return replace(
            self,
            estimates=replace(
                found,
                lambda_max=found.lambda_max.with_product_error(relative, tolerance=eigen_tolerance),
                lambda_min=found.lambda_min
                and found.lambda_min.with_product_error(relative, tolerance=eigen_tolerance),
                top=ends(found.top),
                bottom=ends(found.bottom),
                trace=widened(found.trace, 1.0),
            ),
            segments=tuple(map(widened, self.segments, shares)),
        )

    @classmethod
    def of(cls, found: SpectrumEstimate, trace: TraceResult) -> SpectrumAndTrace:
        """Return both as one result."""
        spectrum = found.spectrum
        estimates = HessianEstimates(
            lambda_max=spectrum.lambda_max,
            lambda_min=spectrum.lambda_min,
            top=spectrum.top,
            bottom=spectrum.bottom,
            ritz_values=spectrum.ritz_values,
            ritz_weights=spectrum.ritz_weights,
            trace=trace.total,
            density=found.density,
        )
        return cls(
            estimates,
            trace.segments,
            trace.diagonal,
            found.eigenvalues,
            found.eigenvectors,
            trace.batch_traces,
            found.extremal,
        )
