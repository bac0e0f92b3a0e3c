# SPDX-License-Identifier: Apache-2.0
"""The trace of an operator, as a whole and by segment of its rows, from products with random probe vectors.

`hutchinson` averages vᵀAv. `hutchplusplus` first finds the dominant subspace and treats it exactly, so that only the
remainder is averaged. Both state how far the result may be from A's trace, and how far it would move with other data.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch_traces import BatchTraces, exact_estimates
from .deflation import Deflation
from .operator import SymmetricOperator
from .probe_vectors import PROBE_BLOCK_SIZE, orthonormalize, rademacher_rows, unit_rows
from .statistics import NORMAL_QUANTILE
from .trace_result import TraceResult, TraceStatistics, squared_products
from .vectors import Segments, as_rows, gram_matrices


Array = NDArray[np.float64]

MIN_PROBES = 8
"""Probes before their spread may end the sampling: with fewer, the standard error itself is a guess."""


def hutchinson(
    operator: SymmetricOperator,
    segments: Segments,
    *,
    tolerance: float,
    max_hvps: int,
    seed: int,
    deflation: Deflation | None = None,
) -> TraceResult:
    """Estimate the trace, and the trace of each segment's diagonal block, with standard errors.

    Averages vᵀAv over Rademacher vectors v (Hutchinson 1990). The same products give at no further cost the segments'
    traces `v_sᵀ(Av)_s` (Dong et al., HAWQ-V2, arXiv 1911.03852), the diagonal `v ⊙ Av` (Bekas, Kokiopoulou & Saad
    2007) and `‖A‖_F² = E‖Av‖²`. Stops when the standard error of the whole trace is below `tolerance` times its value.

    The standard error is not the spread of the m samples, which for few samples of a skewed distribution is too small
    too often. vᵀAv has the variance 2(‖A‖_F² − Σ aᵢᵢ²) for a symmetric A, and the n terms of `v ⊙ Av` have variances
    that sum to ‖A‖_F² − Σ aᵢᵢ²: twice the sum of their sample variances is the same number from n times as much data.

    `data_std_error`, how far the traces would move with other data, is the jackknife over the operator's batches,
    whose traces the same products estimate (see `BatchTraces`).

    Args:
        operator: The matrix.
        segments: Slices of the rows; together they must hold each row once.
        tolerance: Relative standard error to stop at.
        max_hvps: Maximal number of products, at least 2.
        seed: Seed of the probes.
        deflation: A subspace to treat exactly, independent of all probes.

    Returns:
        The trace and the segments' traces with 95 % intervals, and the probes' other estimates. Memory: about fifteen
        n-vectors besides the deflation.

    Example:
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> diagonal = DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
        >>> result = hutchinson(diagonal, [[slice(0, 1)], [slice(1, 3)]], tolerance=0.1, max_hvps=8, seed=0)
        >>> result.total.value, [segment.value for segment in result.segments]
        (6.0, [1.0, 5.0])
    """
    accumulator = HutchinsonAccumulator(operator, segments, deflation)
    generator = torch.Generator().manual_seed(seed)
    return accumulator.run(generator, tolerance=tolerance, max_hvps=max_hvps, method="hutchinson")


def hutchplusplus(
    operator: SymmetricOperator,
    segments: Segments,
    *,
    tolerance: float,
    max_hvps: int,
    seed: int,
    deflation: Deflation | None = None,
) -> TraceResult:
    """Estimate the trace with the dominant subspace treated exactly.

    Hutch++ (Meyer, Musco, Musco & Woodruff 2021, arXiv 2010.09649): Q spans A S for random S, and Hutchinson's probes
    see only what Q leaves of A. The number of columns of S is adaptive (as in Persson, Cortinovis & Kressner 2022,
    arXiv 2109.10659): each block of S first serves as probes of the present remainder, which says how many probes that
    would need; Q grows as long as its last block saved more of them than it cost. So a flat spectrum costs at most one
    block more than with `hutchinson`.

    Args:
        operator: The matrix.
        segments: Slices of the rows; together they must hold each row once.
        tolerance: Relative standard error to stop at.
        max_hvps: Maximal number of products, at least 2.
        seed: Seed of the sketch and the probes.
        deflation: A subspace to start from, such as the Ritz vectors of a Lanczos run from other vectors.

    Returns:
        As `hutchinson`. Memory: two n-vectors for each column of S, temporarily twice that while Q grows.

    Example:
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> vector = torch.arange(20.0, dtype=torch.float64)
        >>> rank_one = DenseOperator(torch.outer(vector, vector))
        >>> result = hutchplusplus(rank_one, [[slice(0, 20)]], tolerance=0.01, max_hvps=30, seed=0)
        >>> round(result.total.value, 6), round(result.total.std_error, 6)
        (2470.0, 0.0)
    """
    generator = torch.Generator().manual_seed(seed)
    batch_traces = BatchTraces(segments)
    accumulator = HutchinsonAccumulator(operator, segments, deflation, batch_traces=batch_traces)
    while max_hvps - accumulator.hvps >= 2 * PROBE_BLOCK_SIZE + MIN_PROBES:
        sketch = accumulator.multiply(rademacher_rows(operator, PROBE_BLOCK_SIZE, generator))
        remainder = float(np.mean(np.sum(accumulator.squared_norms, axis=1)))  # ‖PAP‖_F²
        target = tolerance * abs(accumulator.mean())
        available = max_hvps - accumulator.hvps
        probes = min(2 * remainder / target**2, available) if target > 0 else available
        if probes <= MIN_PROBES or remainder == 0:  # this block of the sketch stays a block of probes
            break
        vectors = orthonormalize(sketch, [] if deflation is None else [deflation.vectors], operator.rows.group)
        products = as_rows(operator.matmat(vectors.T))
        if deflation is None:
            deflation = Deflation(vectors, products, operator.rows.group)
        else:
            deflation = deflation.extend(vectors, products)
        extended = HutchinsonAccumulator(
            operator, segments, deflation, batch_traces=batch_traces, hvps=accumulator.hvps + len(vectors)
        )
        gain = extended.deflated_squared - accumulator.deflated_squared
        accumulator = extended
        if gain * probes <= 2 * PROBE_BLOCK_SIZE * remainder:
            break
    return accumulator.run(generator, tolerance=tolerance, max_hvps=max_hvps, method="hutch++")


def exact_trace(operator: SymmetricOperator, segments: Segments) -> TraceResult:
    """Compute the trace from one product with each unit vector: n products, for small n.

    Args:
        operator: The matrix.
        segments: Slices of the rows; together they must hold each row once.

    Returns:
        The trace, the segments' traces, `‖A‖_F²` and the diagonal, with standard error 0.
    """
    accumulator = HutchinsonAccumulator(operator, segments)
    for vectors in unit_rows(operator):
        accumulator.multiply(vectors)
    batch_traces = accumulator.batch_traces
    total, by_segment = exact_estimates(batch_traces.sums(), batch_traces.items, hvps=operator.size)
    squared = float(np.sum(accumulator.squared_norms))
    frobenius_squared = replace(total, value=squared, low=squared, high=squared, data_std_error=None)
    return TraceResult(total, by_segment, frobenius_squared, accumulator.diagonal_sum, batch_traces.of_unit_vectors())


class HutchinsonAccumulator:
    """Running statistics of probes of PAP, in addition to the exact part A − PAP.

    Args:
        operator: The matrix A.
        segments: Slices of the rows; together they must hold each row once.
        deflation: The subspace that P removes.
        exact_traces: Traces of the segments to add, of shape (segments,); without deflation.
        batch_traces: Where to record the batches' traces; of other probes of A, too.
        hvps: Products already spent.

    Attributes:
        exact_traces: Trace of each segment of A − PAP.
        deflated_squared: `‖A − PAP‖_F²`.
        samples: `v_sᵀ(PAPv)_s` of each probe, by segment.
        squared_norms: `‖(PAPv)_s‖²` of each probe, by segment.
        squared_products: `((PAPv) · (PAPw))²` of the pairs of probes that were multiplied together.
        diagonal_sum: Sum of `v ⊙ PAPv` over the probes.
        batch_traces: The batches' traces.
        hvps: Products spent.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        segments: Segments,
        deflation: Deflation | None = None,
        *,
        exact_traces: Array | None = None,
        batch_traces: BatchTraces | None = None,
        hvps: int = 0,
    ):
        self.operator = operator
        self.batch_traces = BatchTraces(segments) if batch_traces is None else batch_traces
        self.hvps = hvps
        self.exact_traces = np.zeros(len(segments)) if exact_traces is None else exact_traces
        self.deflated_squared = 0.0
        if deflation is not None:
            self.exact_traces, self.deflated_squared = deflation.traces(segments)
        self.samples: list[Array] = []
        self.squared_norms: list[Array] = []
        self.squared_products: list[float] = []
        self.diagonal_sum = torch.zeros(len(operator.rows), dtype=operator.dtype, device=operator.device)
        self._segments = segments
        self._deflation = deflation

    def run(self, generator: torch.Generator, *, tolerance: float, max_hvps: int, method: str) -> TraceResult:
        """Multiply probes until the trace's standard error is small enough or the budget is spent."""
        while True:
            if len(self.samples) >= MIN_PROBES or self.hvps >= max_hvps:
                result = self.result(tolerance=tolerance, method=method)
                if result.total.converged or self.hvps >= max_hvps:
                    return replace(result, diagonal=self._diagonal(), batch_traces=self.batch_traces)
            self.multiply(rademacher_rows(self.operator, min(PROBE_BLOCK_SIZE, max_hvps - self.hvps), generator))

    def multiply(self, probes: Tensor) -> Tensor:
        """Spend products on new probes and add them; return the rows PAPv."""
        self.hvps += len(probes)
        products, samples = self.batch_traces.multiply(self.operator, probes)
        return self.add(probes, products, samples)

    def add(self, probes: Tensor, products: Tensor, samples: Array | None = None) -> Tensor:
        """Add probes and their products with A, which are overwritten by those with PAP.

        Args:
            probes: Rows v.
            products: Rows Av.
            samples: `v_sᵀ(Av)_s`, of shape (k, segments), if known.
        """
        segments, group = self._segments, self.operator.rows.group
        if self._deflation is not None:
            products, samples = self._deflation.reduce(probes, products), None
        if samples is None:
            samples = np.diagonal(gram_matrices([products], [probes], segments, group), axis1=1, axis2=2).T
        squares = gram_matrices([products], [products], segments, group)
        self.samples += list(samples)
        self.squared_norms += list(np.diagonal(squares, axis1=1, axis2=2).T)
        self.squared_products += squared_products(squares.sum(0))
        for probe, product in zip(probes, products, strict=True):
            self.diagonal_sum.addcmul_(probe, product)
        return products

    def mean(self) -> float:
        """Return the present estimate of the trace of A."""
        return float(self.exact_traces.sum() + np.mean(self.samples, axis=0).sum())

    def result(self, *, tolerance: float, method: str) -> TraceResult:
        """Return the present estimates, without the diagonal."""
        number = len(self.samples)
        # Over the probes, the sample variances of the terms of each segment add up to
        # (m Σ ‖PAPv‖² − ‖Σ v ⊙ PAPv‖²) / (m (m − 1)), since v ⊙ v = 1.
        terms = [self.diagonal_sum[None]]
        squared_sums = gram_matrices(terms, terms, self._segments, self.operator.rows.group)[:, 0, 0]
        variances = (number * np.sum(self.squared_norms, axis=0) - squared_sums) / (number * (number - 1))
        statistics = TraceStatistics(
            samples=self.exact_traces + self.samples,
            term_variances=np.maximum(variances, 0),
            squared_norms=self.deflated_squared + np.sum(self.squared_norms, axis=1),
            squared_products=self.squared_products,
            data_std_errors=self.batch_traces.std_errors(),
        )
        return statistics.result(quantile=NORMAL_QUANTILE, tolerance=tolerance, method=method, hvps=self.hvps)

    def _diagonal(self) -> Tensor:
        """Return the present diagonal of A, in place of `diagonal_sum`."""
        diagonal = self.diagonal_sum.div_(len(self.samples))
        return diagonal if self._deflation is None else diagonal.add_(self._deflation.diagonal())
