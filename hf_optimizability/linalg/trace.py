# SPDX-License-Identifier: Apache-2.0
"""The trace of an operator, in all and by segment of its rows, from products with random probe vectors.

`hutchinson` averages vᵀAv. `hutchplusplus` first finds the dominant subspace and treats it exactly, so that only the
rest is averaged. Both state how far the result may be from A's trace, and how far that would move with other data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .communicator import SINGLE_PROCESS, ProcessGroup
from .estimate import Estimate
from .operator import SymmetricOperator
from .statistics import jackknife
from .vectors import as_rows


MIN_PROBES = 8
"""Probes before their spread is trusted to stop: with fewer, the standard error itself is a guess."""

PROBE_BLOCK_SIZE = 4
"""Probes multiplied at once: they share the forward and the first backward pass; more save little and cost memory."""

_CHUNK = 1 << 16  # columns of a float64 copy: of 32 vectors it takes 16 MB, however long they are
_CHUNK_ON_A_GPU = 1 << 21  # which smaller ones would not keep busy

_NORMAL_QUANTILE = 1.959964  # of a two-sided 95 % interval

_PRIOR_PROBES = 12  # probes that the upper bound of a segment's variance weighs as much as, see `trace_result`

Segments = Sequence[Sequence[slice]]


@dataclass(frozen=True)
class TraceResult:
    """A trace, its parts, and what the same products tell besides.

    Attributes:
        total: The trace.
        segments: The trace of the diagonal block of each segment.
        frobenius_squared: `‖A‖_F²`, the sum of the squared eigenvalues; `None` where only the trace was split.
        diagonal: The diagonal, of shape (n,); `None` from `xtrace`. The 2-norm of its error is `total.std_error / √2`.
        parts: What the same probes tell of the parts that the matrix is the mean of; `None` from `xtrace`.
    """

    total: Estimate
    segments: tuple[Estimate, ...]
    frobenius_squared: Estimate | None
    diagonal: Tensor | None = field(default=None, compare=False, repr=False)
    parts: BatchTraces | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Deflation:
    """What a subspace accounts for: A − PAP, where P = I − QᵀQ removes the span of the rows of Q.

    That part is known exactly; probes are needed for PAP only, whose variance is smaller by all that Q holds of A.

    Attributes:
        vectors: Q: orthonormal rows, of shape (k, n). They must not depend on the probes: a Krylov basis grown from a
            probe contains it.
        products: The rows A q, of shape (k, n).
        group: The processes that hold the n columns between them.
    """

    vectors: Tensor
    products: Tensor
    group: ProcessGroup = SINGLE_PROCESS

    def reduce(self, probes: Tensor, products: Tensor) -> Tensor:
        """`PAPv` for rows v, from their products Av; written over `products`."""
        products.addmm_(self.group.all_reduce_(probes @ self.vectors.T), self.products, alpha=-1)
        return products.addmm_(self.group.all_reduce_(products @ self.vectors.T), self.vectors, alpha=-1)

    def extend(self, vectors: Tensor, products: Tensor) -> Deflation:
        """A larger subspace; the new rows must be orthonormal, and orthogonal to those it has."""
        return Deflation(torch.cat([self.vectors, vectors]), torch.cat([self.products, products]), self.group)

    def traces(self, segments: Segments) -> tuple[np.ndarray, float]:
        """The trace of A − PAP by segment, and `‖A − PAP‖_F²`, by which `‖A‖_F²` exceeds `‖PAP‖_F²`.

        The diagonal is `2 Σ q ⊙ Aq − Σ h_ij q_i ⊙ q_j` with H = Q A Qᵀ.
        """
        size, both = len(self.vectors), [self.vectors, self.products]
        gram = gram_matrices(both, both, segments, self.group)
        inner = symmetric(gram[:, :size, size:].sum(0))
        traces = 2 * np.trace(gram[:, :size, size:], axis1=1, axis2=2) - np.tensordot(gram[:, :size, :size], inner)
        return traces, float(2 * np.trace(gram[:, size:, size:].sum(0)) - (inner**2).sum())

    def diagonal(self) -> Tensor:
        """The diagonal of A − PAP, of shape (n,)."""
        gram = gram_matrices([self.vectors], [self.products], group=self.group).sum(0)
        inner = torch.from_numpy(symmetric(gram)).to(self.vectors)
        diagonal = torch.empty_like(self.vectors[0])
        chunk = _chunk(diagonal)
        chunks = (matrix.split(chunk, dim=-1) for matrix in (self.vectors, self.products))
        for place, vectors, products in zip(diagonal.split(chunk), *chunks, strict=True):
            place.copy_(((2 * products - inner @ vectors) * vectors).sum(0))
        return diagonal


def hutchinson(
    operator: SymmetricOperator,
    segments: Segments,
    *,
    tolerance: float,
    max_hvps: int,
    seed: int,
    known: tuple[Tensor, Tensor] | None = None,
    deflation: Deflation | None = None,
) -> TraceResult:
    """Estimates the trace, and the trace of each segment's diagonal block, with standard errors.

    Averages vᵀAv over Rademacher vectors v (Hutchinson 1990). The same products give at no further cost the segments'
    traces `v_sᵀ(Av)_s` (Dong et al., HAWQ-V2, arXiv 1911.03852), the diagonal `v ⊙ Av` (Bekas, Kokiopoulou & Saad
    2007) and `‖A‖_F² = E‖Av‖²`. Stops when the standard error of the whole trace is below `tolerance` times its value.

    The standard error is not the spread of the m samples, which for few samples of a skewed distribution is too small
    too often. vᵀAv has the variance 2(‖A‖_F² − Σ aᵢᵢ²) for a symmetric A, and the n terms of `v ⊙ Av` vary by
    ‖A‖_F² − Σ aᵢᵢ² in all: twice the sum of their sample variances is the same number from n times as much data.

    How far the traces would move with other data, `data_std_error`, is told by the jackknife over the operator's
    parts, whose traces the same products estimate (see `BatchTraces`).

    Args:
        operator: The matrix.
        segments: Slices of the rows; together they must hold each row once.
        tolerance: Relative standard error to stop at.
        max_hvps: Most products to spend; with those already known at least 2.
        seed: Seed of the probes.
        known: Rademacher probes that were multiplied already, as rows of shape (m, n), and their products. They count
            as the first probes, not as products spent. They tell nothing of the parts.
        deflation: A subspace to treat exactly, independent of all probes, those in `known` included.

    Returns:
        The trace and the segments' traces with 95 % intervals, and the rest that the probes tell. Memory: about
        fifteen n-vectors besides the deflation.

    Example:
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> diagonal = DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
        >>> result = hutchinson(diagonal, [[slice(0, 1)], [slice(1, 3)]], tolerance=0.1, max_hvps=8, seed=0)
        >>> result.total.value, [segment.value for segment in result.segments]
        (6.0, [1.0, 5.0])
    """
    tally = HutchinsonAccumulator(operator, segments, deflation)
    if known is not None:
        tally.add(known[0], known[1].clone())
    return average(
        tally, torch.Generator().manual_seed(seed), tolerance=tolerance, max_hvps=max_hvps, method="hutchinson"
    )


def hutchplusplus(
    operator: SymmetricOperator,
    segments: Segments,
    *,
    tolerance: float,
    max_hvps: int,
    seed: int,
    deflation: Deflation | None = None,
) -> TraceResult:
    """Estimates the trace with the dominant subspace treated exactly.

    Hutch++ (Meyer, Musco, Musco & Woodruff 2021, arXiv 2010.09649): Q spans A S for random S, and Hutchinson's probes
    see only what Q leaves of A. How many columns S gets is decided on the way (as in Persson, Cortinovis & Kressner
    2022, arXiv 2109.10659): each block of S first serves as probes of what is left so far, which tells how many probes
    the rest would need; Q grows as long as its last block saved more of them than it cost. So a flat spectrum costs at
    most one block more than with `hutchinson`.

    Args:
        operator: The matrix.
        segments: Slices of the rows; together they must hold each row once.
        tolerance: Relative standard error to stop at.
        max_hvps: Most products to spend, at least 2.
        seed: Seed of the sketch and the probes.
        deflation: A subspace to start from, such as the Ritz vectors of a Lanczos run from other vectors.

    Returns:
        As `hutchinson`. Memory: two n-vectors for each column of S, twice that for a moment while Q grows.

    Example:
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> vector = torch.arange(20.0, dtype=torch.float64)
        >>> rank_one = DenseOperator(torch.outer(vector, vector))
        >>> result = hutchplusplus(rank_one, [[slice(0, 20)]], tolerance=0.01, max_hvps=30, seed=0)
        >>> round(result.total.value, 6), round(result.total.std_error, 6)
        (2470.0, 0.0)
    """
    generator = torch.Generator().manual_seed(seed)
    parts = BatchTraces(segments)
    tally = HutchinsonAccumulator(operator, segments, deflation, parts=parts)
    while max_hvps - tally.hvps >= 2 * PROBE_BLOCK_SIZE + MIN_PROBES:
        remainder = tally.multiply(sign_rows(operator, PROBE_BLOCK_SIZE, generator))
        rest = float(np.mean(np.sum(tally.squares, axis=1)))  # ‖PAP‖_F²
        target = tolerance * abs(tally.mean())
        left = max_hvps - tally.hvps
        probes = min(2 * rest / target**2, left) if target > 0 else left
        if probes <= MIN_PROBES or rest == 0:  # then the sketch stays what it has been so far: the first probes
            break
        vectors = orthonormalize(remainder, [] if deflation is None else [deflation.vectors], operator.rows.group)
        products = as_rows(operator.matmat(vectors.T))
        if deflation is None:
            deflation = Deflation(vectors, products, operator.rows.group)
        else:
            deflation = deflation.extend(vectors, products)
        grown = HutchinsonAccumulator(operator, segments, deflation, parts=parts, hvps=tally.hvps + len(vectors))
        gain = grown.exact_squared - tally.exact_squared
        tally = grown
        if gain * probes <= 2 * PROBE_BLOCK_SIZE * rest:
            break
    return average(tally, generator, tolerance=tolerance, max_hvps=max_hvps, method="hutch++")


def exact_trace(operator: SymmetricOperator, segments: Segments) -> TraceResult:
    """The trace without error, from one product with each unit vector: n products, for small n.

    Args:
        operator: The matrix.
        segments: Slices of the rows; together they must hold each row once.

    Returns:
        The trace, the segments' traces, `‖A‖_F²` and the diagonal, with standard error 0.
    """
    tally = HutchinsonAccumulator(operator, segments)
    for probes in _unit_vectors(operator):
        tally.multiply(probes)
    total, parts = exact_estimates(tally.parts.sums(), tally.parts.items, hvps=operator.size)
    squared = float(np.sum(tally.squares))
    frobenius_squared = replace(total, value=squared, low=squared, high=squared, data_std_error=None)
    known = tally.parts.known(tally.parts.sums())
    return TraceResult(total, parts, frobenius_squared, tally.terms, known)


def exact_estimates(traces: np.ndarray, items: Sequence[int], *, hvps: int) -> tuple[Estimate, tuple[Estimate, ...]]:
    """The trace and the segments' traces from those of the parts, which are known without error.

    Args:
        traces: Of shape (parts, segments).
        items: The number of items in each part.
        hvps: Recorded in the estimates.
    """

    def exactly(column: np.ndarray) -> Estimate:
        value = float(np.average(column, weights=items))
        error = jackknife(column, items) if len(items) > 1 else None
        return Estimate(
            value, value, value, method="exact", hvps=hvps, converged=True, std_error=0.0, data_std_error=error
        )

    return exactly(traces.sum(axis=1)), tuple(map(exactly, traces.T))


class HutchinsonAccumulator:
    """What deflation tells of A − PAP, and what the probes have told of PAP so far.

    Args:
        operator: The matrix A.
        segments: Slices of the rows; together they must hold each row once.
        deflation: What P removes.
        parts: Where the parts' traces are kept; of other probes of A, too.
        hvps: Products spent already.

    Attributes:
        exact: Trace of each segment of A − PAP.
        exact_squared: `‖A − PAP‖_F²`.
        samples: `v_sᵀ(PAPv)_s` of each probe, by segment.
        squares: `‖(PAPv)_s‖²` of each probe, by segment.
        pairs: `((PAPv) · (PAPw))²` of the pairs of probes that were multiplied together.
        terms: Sum of `v ⊙ PAPv` over the probes.
        parts: What the probes have told of the parts' traces.
        hvps: Products spent.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        segments: Segments,
        deflation: Deflation | None = None,
        *,
        parts: BatchTraces | None = None,
        hvps: int = 0,
    ):
        self.operator = operator
        self.parts = BatchTraces(segments) if parts is None else parts
        self.hvps = hvps
        self.exact, self.exact_squared = np.zeros(len(segments)), 0.0
        if deflation is not None:
            self.exact, self.exact_squared = deflation.traces(segments)
        self.samples: list[np.ndarray] = []
        self.squares: list[np.ndarray] = []
        self.pairs: list[float] = []
        self.terms = torch.zeros(len(operator.rows), dtype=operator.dtype, device=operator.device)
        self._segments = segments
        self._deflation = deflation

    def multiply(self, probes: Tensor) -> Tensor:
        """Spends products on new probes and counts them in; returns the rows PAPv."""
        self.hvps += len(probes)
        products, samples = self.parts.multiply(self.operator, probes)
        return self.add(probes, products, samples)

    def add(self, probes: Tensor, products: Tensor, samples: np.ndarray | None = None) -> Tensor:
        """Counts in probes and their products with A, which are overwritten by those with PAP.

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
        self.squares += list(np.diagonal(squares, axis1=1, axis2=2).T)
        self.pairs += squared_pairs(squares.sum(0))
        for probe, product in zip(probes, products, strict=True):
            self.terms.addcmul_(probe, product)
        return products

    def mean(self) -> float:
        """The trace of A as it stands."""
        return float(self.exact.sum() + np.mean(self.samples, axis=0).sum())

    def result(self, *, tolerance: float, method: str) -> TraceResult:
        """Estimates as they stand, but for the diagonal."""
        number = len(self.samples)
        # Over the probes, the sample variances of the terms of each segment add up to
        # (m Σ ‖PAPv‖² − ‖Σ v ⊙ PAPv‖²) / (m (m − 1)), since v ⊙ v = 1.
        terms = [self.terms[None]]
        squared_sums = gram_matrices(terms, terms, self._segments, self.operator.rows.group)[:, 0, 0]
        spreads = (number * np.sum(self.squares, axis=0) - squared_sums) / (number * (number - 1))
        return trace_result(
            self.exact + self.samples,
            np.maximum(spreads, 0),
            self.exact_squared + np.sum(self.squares, axis=1),
            self.pairs,
            quantile=_NORMAL_QUANTILE,
            tolerance=tolerance,
            method=method,
            hvps=self.hvps,
            data_std_errors=self.parts.std_errors(),
        )

    def diagonal(self) -> Tensor:
        """The diagonal of A as it stands; ends the tally."""
        diagonal = self.terms.div_(len(self.samples))
        return diagonal if self._deflation is None else diagonal.add_(self._deflation.diagonal())


class BatchTraces:
    """The traces of the parts that an operator is the mean of, as its probes tell them on the way.

    The jackknife over the parts tells how far the mean would move with other data. Here, part p deviates from the
    mean by the average over probes of `v_sᵀ((A_p − A)v)_s`. The noise of that average is in the deviation's square;
    its variance is known from the spread over the probes, and is taken off: probes and data are told apart. What is
    left may come out at 0 where that noise is far larger. Probes see the parts as they are, without deflation.

    Args:
        segments: Slices of the rows; together they must hold each row once.
        exact: Of shape (parts, segments): traces to add to those of the parts, known without error.

    Attributes:
        items: The number of items in each part.
    """

    def __init__(self, segments: Segments, exact: np.ndarray | None = None):
        self.items: list[int] = []
        self._segments = segments
        self._exact = 0.0 if exact is None else exact
        self._forms: list[np.ndarray] = []  # vᵀA_p v of each product, of shape (parts, segments)

    def multiply(self, operator: SymmetricOperator, probes: Tensor) -> tuple[Tensor, np.ndarray]:
        """The rows Av for rows v, whose entries are ±1 or 0, and `v_sᵀ(Av)_s`, of shape (k, segments)."""
        products, forms, self.items = operator.matmat_per_batch(probes.T, self._segments)
        self._forms += list(forms.swapaxes(0, 1))
        return products.T, np.average(forms, axis=0, weights=self.items)

    def sums(self) -> np.ndarray:
        """Sum of `v_sᵀ(A_p v)_s` over the probes, of shape (parts, segments)."""
        return np.sum(self._forms, axis=0)

    def known(self, traces: np.ndarray) -> BatchTraces:
        """The same parts with traces that are known without error, of shape (parts, segments)."""
        known = BatchTraces(self._segments, traces)
        known.items = self.items
        return known

    def mean_of(self, places: Sequence[int], *, tolerance: float, method: str, hvps: int) -> tuple[Estimate, ...]:
        """Trace of the mean of some parts, weighted by items; then that of each segment.

        The same probes tell of all parts, so that such means add up to that of all. Errors are from the spread over
        the probes, with Student's t.

        Args:
            places: Which parts.
            tolerance: Relative standard error of a converged estimate.
            method: Recorded in the estimates.
            hvps: Recorded in the estimates.
        """
        items = [self.items[place] for place in places]
        if not self._forms:
            total, segments = exact_estimates(np.asarray(self._exact)[places], items, hvps=hvps)
            return (total, *segments)
        chosen = BatchTraces(self._segments, None if isinstance(self._exact, float) else self._exact[places])
        chosen.items, chosen._forms = items, [forms[places] for forms in self._forms]
        samples = np.average(chosen._exact + np.array(chosen._forms), axis=1, weights=items)
        samples = np.concatenate([samples.sum(axis=1, keepdims=True), samples], axis=1)
        over_data = chosen.std_errors()
        errors = samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
        margins = student_quantile(len(samples)) * errors
        return tuple(
            Estimate(
                value, value - margin, value + margin, method, hvps, error <= tolerance * abs(value), error, None, data
            )
            for value, margin, error, data in zip(
                samples.mean(axis=0).tolist(),
                margins.tolist(),
                errors.tolist(),
                [None] * len(errors) if over_data is None else over_data.tolist(),
                strict=True,
            )
        )

    def std_errors(self) -> np.ndarray | None:
        """Standard errors over the data: of the whole trace, then of each segment's; `None` from one part or probe."""
        if len(self.items) < 2 or len(self._forms) < 2:
            return None
        forms = self._exact + np.array(self._forms)
        forms = np.concatenate([forms.sum(axis=2, keepdims=True), forms], axis=2)
        deviations = forms - np.average(forms, axis=1, weights=self.items, keepdims=True)
        weights = np.array(self.items) / (sum(self.items) - np.array(self.items))  # the jackknife's
        noise = weights @ deviations.var(axis=0, ddof=1) / len(forms) / len(weights)
        spread = [jackknife(column, self.items) ** 2 for column in deviations.mean(axis=0).T]
        return np.sqrt(np.maximum(spread - noise, 0))


def average(
    tally: HutchinsonAccumulator, generator: torch.Generator, *, tolerance: float, max_hvps: int, method: str
) -> TraceResult:
    """Multiplies probes until the trace's standard error is small enough or the budget is spent."""
    while True:
        if len(tally.samples) >= MIN_PROBES or tally.hvps >= max_hvps:
            result = tally.result(tolerance=tolerance, method=method)
            if result.total.converged or tally.hvps >= max_hvps:
                return replace(result, diagonal=tally.diagonal(), parts=tally.parts)
        tally.multiply(sign_rows(tally.operator, min(PROBE_BLOCK_SIZE, max_hvps - tally.hvps), generator))


def trace_result(
    samples: np.ndarray,
    spreads: np.ndarray,
    squares: np.ndarray,
    pairs: Sequence[float],
    *,
    quantile: float,
    tolerance: float,
    method: str,
    hvps: int,
    data_std_errors: np.ndarray | None,
) -> TraceResult:
    """Estimates from samples and the sizes of their variances.

    Args:
        samples: Samples of each segment's trace, of shape (m, segments).
        spreads: V of each segment, the sum of the variances of its terms. The whole sample's variance is 2 V. That of
            a segment lies between V (its rows couple to other segments only) and 2 V (to themselves only); its sample
            variance, noisy from few probes, is pulled towards the upper end.
        squares: Samples of `‖A‖_F²`, of shape (m,).
        pairs: Samples of `‖A²‖_F²`, half the largest variance that the samples of `‖A‖_F²` can have.
        quantile: Of the intervals of the traces, in standard errors.
        tolerance: Relative standard error of a converged estimate.
        method: Recorded in the estimates.
        hvps: Recorded in the estimates.
        data_std_errors: From `BatchTraces`.
    """
    number = len(samples)
    over_data = [None] * (1 + len(spreads)) if data_std_errors is None else data_std_errors.tolist()

    def estimate(value: float, variance: float, data_std_error: float | None) -> Estimate:
        std_error = math.sqrt(variance / number)
        margin = quantile * std_error
        return Estimate(
            value,
            value - margin,
            value + margin,
            method,
            hvps,
            converged=std_error <= tolerance * abs(value),
            std_error=std_error,
            data_std_error=data_std_error,
        )

    total = estimate(float(samples.sum(1).mean()), float(2 * spreads.sum()), over_data[0])
    observed = (number - 1) * samples.var(axis=0, ddof=1)
    variances = (observed + _PRIOR_PROBES * 2 * spreads) / (number - 1 + _PRIOR_PROBES)
    variances = np.clip(variances, spreads, 2 * spreads)
    segments = tuple(map(estimate, samples.mean(axis=0).tolist(), variances.tolist(), over_data[1:]))

    # ‖A‖_F² is positive and its samples are skewed: its interval is one of its logarithm.
    value = float(squares.mean())
    std_error = math.sqrt(max(float(squares.var(ddof=1)), 2 * float(np.mean(pairs)) if pairs else 0.0) / number)
    factor = math.exp(student_quantile(number) * std_error / value) if value > 0 else 1.0
    frobenius_squared = Estimate(
        value, value / factor, value * factor, method, hvps, std_error <= tolerance * value, std_error
    )
    return TraceResult(total, segments, frobenius_squared)


def orthonormalize(rows: Tensor, bases: Sequence[Tensor], group: ProcessGroup = SINGLE_PROCESS) -> Tensor:
    """Orthonormal rows that span what `rows` add to the span of `bases`, whose rows are orthonormal.

    Twice: removes the bases, then whitens by the eigenvectors of the Gram matrix (Stathopoulos & Wu 2002), which needs
    no more than two passes over the rows and leaves out what is zero to rounding.
    """
    smallest = max(10 * torch.finfo(rows.dtype).eps, 1e-7)
    for _ in range(2):
        largest = group.all_reduce_(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()).max().sqrt()
        for basis in bases:
            rows = torch.addmm(rows, group.all_reduce_(rows @ basis.T), basis, alpha=-1)
        values, vectors = np.linalg.eigh(gram_matrices([rows], [rows], group=group).sum(0))
        keep = values > (smallest * float(largest)) ** 2
        if not keep.any():
            return rows[:0]
        rows = torch.from_numpy((vectors[:, keep] / np.sqrt(values[keep])).T).to(rows) @ rows
    return rows


def gram_matrices(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    segments: Segments = ((slice(None),),),
    group: ProcessGroup = SINGLE_PROCESS,
) -> np.ndarray:
    """X_s Y_sᵀ in float64 for the columns of each segment s, where X and Y are blocks of rows on one another."""
    grams, chunk = [], _chunk(x[0])
    for segment in segments:
        gram = torch.zeros(sum(map(len, x)), sum(map(len, y)), dtype=torch.float64, device=x[0].device)
        for part in segment:
            start, stop, _ = part.indices(x[0].shape[1])
            for first in range(start, stop, chunk):
                columns = slice(first, min(first + chunk, stop))
                left = torch.cat([rows[:, columns].double() for rows in x])
                right = left if y is x else torch.cat([rows[:, columns].double() for rows in y])
                gram.addmm_(left, right.T)
        grams.append(gram)
    return group.all_reduce_(torch.stack(grams)).cpu().numpy()


def _chunk(tensor: Tensor) -> int:
    return _CHUNK if tensor.device.type == "cpu" else _CHUNK_ON_A_GPU


def symmetric(matrix: np.ndarray) -> np.ndarray:
    """What rounding left of a matrix that should be symmetric."""
    return (matrix + matrix.T) / 2


def squared_pairs(gram: np.ndarray) -> list[float]:
    """Squares of the entries above the diagonal."""
    return list(gram[np.triu_indices(len(gram), 1)] ** 2)


def student_quantile(number: int) -> float:
    """Of a two-sided 95 % interval from the spread of `number` samples."""
    from scipy.special import stdtrit

    return float(stdtrit(number - 1, 0.975))


def sign_rows(operator: SymmetricOperator, number: int, generator: torch.Generator) -> Tensor:
    """Rademacher vectors as rows."""
    probes = torch.empty(number, len(operator.rows), dtype=operator.dtype, device=operator.device)
    for probe in probes:
        probe.copy_(operator.rows.rademacher(generator=generator, dtype=operator.dtype, device=operator.device))
    return probes


def _unit_vectors(operator: SymmetricOperator) -> Iterator[Tensor]:
    """All unit vectors as the rows of matrices of at most `PROBE_BLOCK_SIZE` rows."""
    for first in range(0, operator.size, PROBE_BLOCK_SIZE):
        indices = range(first, min(first + PROBE_BLOCK_SIZE, operator.size))
        yield torch.stack([operator.rows.unit(i, dtype=operator.dtype, device=operator.device) for i in indices])
