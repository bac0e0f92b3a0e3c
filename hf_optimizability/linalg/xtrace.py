# SPDX-License-Identifier: Apache-2.0
"""XTrace: the trace from test vectors that each serve as sketch and as probe."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch_traces import BatchTraces
from .operator import SymmetricOperator
from .probe_vectors import PROBE_BLOCK_SIZE, orthonormalize, rademacher_rows
from .statistics import student_quantile
from .trace_result import TraceResult, TraceStatistics, squared_products
from .vectors import Segments, as_rows, gram_matrices, symmetrize


Array = NDArray[np.float64]


def xtrace(
    operator: SymmetricOperator, segments: Segments, *, tolerance: float, max_hvps: int, seed: int
) -> TraceResult:
    """Estimate the trace with every test vector serving as sketch and as probe.

    XTrace (Epperly, Tropp & Webber 2024, arXiv 2301.07825): with Q spanning A Ω for k test vectors Ω, each test vector
    in turn is the probe of what the others' span leaves of A; the trace is the mean of these k leave-one-out values,
    none of which needs a product beyond A Ω and A Q. All of them, by segment too, follow from the Gram matrix of Q,
    A Q and Ω. Grows by `PROBE_BLOCK_SIZE` test vectors until the standard error is below `tolerance` times the trace.

    The paper's error estimate, `√(Σ (tᵢ − t̄)² / (k (k − 1)))`, takes the leave-one-out values tᵢ for independent. They
    are positively correlated unless k is small relative to the effective rank: its 95 % intervals then cover the truth
    in as few as 77 % of runs (eigenvalues 1/i, k = 32, n = 200). Here the standard error is `√(2 f / k)` with f the
    mean of ‖PᵢAPᵢ ωᵢ‖², where Pᵢ removes the others' span, and the interval is Student's t. It covered the truth in 91
    to 100 % of runs: it is too wide where the diagonal outweighs the rest of A.

    Args:
        operator: The matrix.
        segments: Slices of the rows; together they must hold each row once.
        tolerance: Relative standard error to stop at.
        max_hvps: Maximal number of products, at least 4; two for each test vector.
        seed: Seed of the test vectors.

    Returns:
        The trace and the segments' traces; `frobenius_squared` from A Ω; no diagonal. Memory: one n-vector for each
        product, and one byte an entry for each test vector.

    Example:
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> decaying = DenseOperator(torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64) ** -4))
        >>> total = xtrace(decaying, [[slice(0, 100)]], tolerance=1e-3, max_hvps=40, seed=0).total
        >>> total.hvps, abs(total.value - 1.0823232) < 3 * total.std_error
        (24, True)
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []  # Q, A Q and Ω of each round
    gram = np.zeros((len(segments), 0, 0))
    batch_traces = BatchTraces(segments)
    hvps = 0
    while True:
        probes = rademacher_rows(operator, min(PROBE_BLOCK_SIZE, (max_hvps - hvps) // 2), generator)
        products, _ = batch_traces.multiply(operator, probes)
        vectors = orthonormalize(products, rows[0::3], operator.rows.group)
        hvps += len(probes) + len(vectors)
        new = [vectors, as_rows(operator.matmat(vectors.T)) if len(vectors) else vectors, probes.to(torch.int8)]
        rows += new
        border = gram_matrices(rows, new, segments, operator.rows.group)
        gram = np.block([[gram, border[:, : gram.shape[1]]], [border.swapaxes(1, 2)]])
        statistics = _statistics(gram, [len(block) for block in rows], batch_traces)
        quantile = student_quantile(len(statistics.samples) - 1)
        result = statistics.result(quantile=quantile, tolerance=tolerance, method="xtrace", hvps=hvps)
        if result.total.converged or max_hvps - hvps < 2 or len(vectors) < len(probes):
            return result


def _statistics(gram: Array, lengths: list[int], batch_traces: BatchTraces) -> TraceStatistics:
    """Return the statistics of the leave-one-out values, from the Gram matrix of the rounds' Q, A Q and Ω."""
    kinds = np.repeat(np.arange(len(lengths)) % 3, lengths)
    q, z, w = (np.flatnonzero(kinds == kind) for kind in range(3))
    values, squares = _leave_one_out(gram, q, z, w)
    images = gram.sum(0)[np.ix_(z, w)]  # R of A Ω = Q R
    return TraceStatistics(
        samples=values,
        term_variances=squares.mean(axis=0),
        squared_norms=(images**2).sum(axis=0),
        squared_products=squared_products(images.T @ images),
        data_std_errors=batch_traces.std_errors(),
    )


def _leave_one_out(gram: Array, q: NDArray[np.intp], z: NDArray[np.intp], w: NDArray[np.intp]) -> tuple[Array, Array]:
    """Return XTrace's leave-one-out values and the squared norms of their residual products, by segment.

    Without column i, A Ω spans Q up to one direction: Qᵢ Qᵢᵀ = Q M Qᵀ with M = I − s sᵀ and s along column i of R⁻ᵀ,
    where A Ω = Q R. The value is the trace of A − PᵢAPᵢ plus
    ωᵢᵀPᵢAPᵢωᵢ with Pᵢ = I − Q M Qᵀ, a linear function of the Gram matrix of Q, Z = A Q and Ω.

    Args:
        gram: Gram matrix of each segment's rows of Q, Z and Ω.
        q: Indices of Q's columns in it.
        z: Indices of Z's columns.
        w: Indices of Ω's columns.

    Returns:
        Both of shape (k, segments).
    """
    whole = gram.sum(0)
    H, R, W = symmetrize(whole[np.ix_(q, z)]), whole[np.ix_(z, w)], whole[np.ix_(q, w)]
    inverse = np.linalg.pinv(R)
    # If A Ω has dependent columns, most can be dropped without losing a direction.
    needed = np.einsum("ia,ai->i", inverse, R) > 1 - 1e-6
    directions = inverse * needed[:, None] / np.maximum(np.linalg.norm(inverse, axis=1, keepdims=True), 1e-300)
    values, squares = np.zeros((2, len(w), len(gram)))
    for i, s in enumerate(directions):
        M = np.eye(len(q)) - np.outer(s, s)
        inside = M @ W[:, i]  # PᵢAPᵢωᵢ = Q outside − Z inside
        outside = R[:, i] - M @ (R[:, i] - H @ inside)
        form = np.zeros_like(whole)
        form[np.ix_(q, z)] = 2 * M
        form[np.ix_(q, q)] = -M @ H @ M
        form[w[i], q], form[w[i], z] = outside, -inside
        values[i] = np.tensordot(gram, form)
        residual = np.zeros(len(whole))
        residual[q], residual[z] = outside, -inside
        squares[i] = gram @ residual @ residual
    return values, np.maximum(squares, 0)
