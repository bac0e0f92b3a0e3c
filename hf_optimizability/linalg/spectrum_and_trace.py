# SPDX-License-Identifier: Apache-2.0
"""One adaptive pass over a curvature matrix: both ends of its spectrum, its density and its trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
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
class SpectrumAndTrace:
    """What one pass found.

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


def estimate_spectrum_and_trace(
    matrix: Callable[[], SymmetricOperator],
    segments: Segments,
    *,
    eigen_tolerance: float,
    trace_tolerance: float,
    max_hvps: int,
    seed: int,
    trace_matrix: Callable[[], SymmetricOperator] | None = None,
    split_trace: Callable[..., TraceResult] | None = None,
    eigen_method: EigenMethod = "lanczos",
    trace_method: TraceMethod = "hutchinson",
    num_eigenvalues: int = 1,
    left_out: int = 0,
    deflate: bool = True,
) -> SpectrumAndTrace:
    """Estimate both ends of the spectrum, the density and the trace, each to its tolerance.

    A Lanczos run from one random start gives the ends and, as a quadrature, the density, with at most half the budget.
    The trace gets the rest, deflated by the Ritz vectors of the largest eigenvalues.

    Args:
        matrix: Builds the matrix A, of size n. Each stage builds its own and lets it go, so that no two of them hold
            a graph at once.
        segments: Slices of the rows; together they must hold each row once.
        eigen_tolerance: Relative residual of the eigenvalues to stop at.
        trace_tolerance: Relative standard error of the trace to stop at.
        max_hvps: Most products to spend, at least 8; `trace_method="exact"` spends n more.
        seed: Seed of all random vectors.
        trace_matrix: Builds a matrix with the diagonal of A whose trace is cheaper to estimate; by default A itself.
        split_trace: `split_trace(tolerance=, max_hvps=, seed=)` estimates the trace in a way of its own, and takes
            Hutchinson's place; a `ValueError` says that it can't.
        eigen_method: Power iteration finds `lambda_max` alone, and no density.
        trace_method: The estimator.
        num_eigenvalues: How many eigenvalues to find at each end.
        left_out: Eigenvalues known to be 0 that A was shrunk by, for the density.
        deflate: Whether to deflate Hutchinson's probes by the Ritz vectors. The parts' traces are never deflated: pass
            `False` where they must add up to the trace of the whole.

    Example:
        >>> import torch
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> matrix = DenseOperator(torch.diag(torch.tensor([-1.0, 2.0, 5.0])))
        >>> found = estimate_spectrum_and_trace(
        ...     lambda: matrix, [[slice(0, 3)]], eigen_tolerance=0.01, trace_tolerance=0.1, max_hvps=16, seed=0
        ... )
        >>> round(found.estimates.lambda_max.value, 3), round(found.estimates.trace.value, 3)
        (5.0, 6.0)
    """
    spectrum, found, eigenvalues, eigenvectors, extremal = _ends(
        matrix(),
        method=eigen_method,
        number=num_eigenvalues,
        left_out=left_out,
        tolerance=eigen_tolerance,
        max_hvps=max_hvps // 2,
        seed=seed,
    )
    trace = _trace(
        trace_matrix or matrix,
        segments,
        method=trace_method,
        split_trace=split_trace,
        # Of the largest eigenvalues, and only if they are: a wrong direction takes nothing off the variance.
        vectors=eigenvectors if deflate and spectrum.lambda_max.converged else None,
        tolerance=trace_tolerance,
        max_hvps=max_hvps - spectrum.lambda_max.hvps,
        seed=seed + 1,
    )
    estimates = HessianEstimates(trace=trace.total, density=found, **vars(spectrum))
    return SpectrumAndTrace(
        estimates, trace.segments, trace.diagonal, eigenvalues, eigenvectors, trace.batch_traces, extremal
    )


def _ends(
    matrix: SymmetricOperator,
    *,
    method: EigenMethod,
    number: int,
    left_out: int,
    tolerance: float,
    max_hvps: int,
    seed: int,
) -> tuple[Spectrum, Density | None, tuple[Estimate, ...], Tensor | None, tuple[Tensor, ...]]:
    """Return both ends, the density, the largest eigenvalues with their Ritz vectors, and those of both ends."""
    if method == "power_iteration":
        top, vector = leading_eigenpair(matrix, tolerance=tolerance, max_hvps=max_hvps, seed=seed)
        return Spectrum(lambda_max=top), None, (), None, (vector,)
    run = lanczos(matrix, tolerance=tolerance, max_hvps=max_hvps, seed=seed, num_eigenvalues=number)
    found = None
    if len(run.nodes) > 2:  # fewer tell nothing
        found = density(
            run.nodes,
            run.weights,
            run.residuals,
            size=matrix.size,
            zero_rows=left_out,
            hvps=run.hvps,
            tolerance=tolerance,
        )
    largest = run.top(DEFLATED, tolerance=tolerance)
    indices = [-1 - index for index in range(len(largest))]
    vectors = run.ritz_vectors([*indices, 0]).to(matrix.device)  # the basis may be on the CPU
    extremal = (vectors[0], vectors[-1]) if len(run.nodes) > 1 else (vectors[0],)
    return run.spectrum, found, largest, vectors[:-1], extremal


def _trace(
    matrix: Callable[[], SymmetricOperator],
    segments: Segments,
    *,
    method: TraceMethod,
    split_trace: Callable[..., TraceResult] | None,
    vectors: Tensor | None,
    tolerance: float,
    max_hvps: int,
    seed: int,
) -> TraceResult:
    """Return the trace by the chosen method; Hutchinson's in its split form, if there is one, else deflated."""
    if method == "exact":
        return exact_trace(matrix(), segments)
    if method == "xtrace":
        return xtrace(matrix(), segments, tolerance=tolerance, max_hvps=max_hvps, seed=seed)
    if method == "hutch++":
        return hutchplusplus(matrix(), segments, tolerance=tolerance, max_hvps=max_hvps, seed=seed)
    if split_trace is not None:
        with suppress(ValueError):
            return split_trace(tolerance=tolerance, max_hvps=max_hvps, seed=seed)
    operator, deflation = matrix(), None
    if vectors is not None and max_hvps >= len(vectors) + MIN_PROBES:
        deflation = Deflation(vectors, as_rows(operator.matmat(vectors.T)), operator.rows.group)
        max_hvps -= len(vectors)
    return hutchinson(operator, segments, tolerance=tolerance, max_hvps=max_hvps, seed=seed, deflation=deflation)
