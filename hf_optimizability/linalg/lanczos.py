# SPDX-License-Identifier: Apache-2.0
"""Eigenvalues at both ends of the spectrum, and its Gauss quadrature, by the Lanczos process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..device_memory import free_memory
from .estimate import Estimate, Spectrum
from .krylov import KrylovDecomposition
from .operator import SymmetricOperator
from .probe_vectors import normal_rows, start_rows
from .row_partition import RowPartition
from .vectors import as_rows, scatter


Array = NDArray[np.float64]

SMALL_MATRIX = 32
"""Rows up to which a matrix is taken whole, if the budget allows it: along few vectors a start is short too often."""

SMALL_BLOCK = 8
"""Rows up to which a block is taken whole: fewer products than larger ones of the same model spend."""


@dataclass(frozen=True, eq=False)
class LanczosRun:
    """What a Lanczos run found, and the basis it found it in; the basis stays in memory as long as the run.

    Attributes:
        spectrum: Both ends with residual bounds, and the quadrature averaged over the starts.
        nodes: Nodes of the quadratures, of shape (m,), ascending: the Ritz values; those of the first cycle, where the
            run restarted.
        residuals: `‖Aq − θq‖` of the Ritz pair of each of `nodes`, of shape (m,), up to rounding.
        weights: One quadrature per random start v, of shape (starts, m): `vᵀf(A)v / n ≈ weights @ f(nodes)`, exact
            for polynomials of a degree below twice the number of steps.
        hvps: Products spent.
    """

    spectrum: Spectrum
    nodes: Array = field(repr=False)
    residuals: Array = field(repr=False)
    weights: Array = field(repr=False)
    hvps: int
    _krylov: KrylovDecomposition = field(repr=False)

    @property
    def lambda_max(self) -> Estimate:
        """Largest algebraic eigenvalue."""
        return self.spectrum.lambda_max

    @property
    def lambda_min(self) -> Estimate:
        """Smallest algebraic eigenvalue."""
        return self.spectrum.bottom[0]

    def top(self, number: int, *, tolerance: float) -> tuple[Estimate, ...]:
        """Return the largest eigenvalues, the largest first: up to `number`, whether so many were asked for or not.

        Args:
            number: How many.
            tolerance: Relative residual below which one has converged.
        """
        return self._krylov.eigenvalues(1, tolerance, number, self.hvps)

    def ritz_vectors(self, indices: Sequence[int]) -> Tensor:
        """Return orthonormal approximate eigenvectors, as rows, on the device of the basis.

        Args:
            indices: Which, counted from the smallest Ritz value: `[-1, 0]` for λ_max and λ_min.
        """
        return self._krylov.combine(self._krylov.vectors[:, indices].T)

    def ritz_products(self, indices: Sequence[int]) -> Tensor:
        """Return `A q` for each of `ritz_vectors(indices)`, as rows, without a further product."""
        return self._krylov.multiply(self._krylov.vectors[:, indices].T)

    def probes(self) -> tuple[Tensor, Tensor]:
        """Return the starts v, of norm √n, and `A v`, both as rows, without a further product.

        Raises:
            ValueError: If the run restarted, which overwrites them.
        """
        if self._krylov.restarted:
            raise ValueError("The run restarted, and its starts are gone. Raise `max_basis`.")
        starts = self._krylov.starts * math.sqrt(self._krylov.basis.size)
        return self._krylov.combine(starts), self._krylov.multiply(starts)


def lanczos(
    operator: SymmetricOperator,
    *,
    tolerance: float,
    max_hvps: int,
    seed: int,
    num_eigenvalues: int = 1,
    starts: int = 1,
    max_basis: int | None = None,
    basis_device: torch.device | None = None,
) -> LanczosRun:
    """Estimate the eigenvalues at both ends of the spectrum of a symmetric operator, and its quadrature.

    Block Lanczos (Golub & Van Loan, Matrix Computations, section 10.3) from random starts that are multiplied
    together, with a basis orthogonal to the square root of the precision (Simon 1984) and the projected matrix in
    float64. An end of the spectrum has converged when

    - the residual `‖Aq − θq‖` of each wanted Ritz value θ there is at most `tolerance · |θ|`, and
    - an eigenvalue 20 % further out would have shown: given what was seen, its eigenvector would have to be ten times
      shorter than is typical along every start.

    A matrix of at most `SMALL_MATRIX` rows is taken whole, if `max_hvps` allows it. Where the starts reach only an
    invariant subspace (random signs may be orthogonal to an eigenvector), one more start is taken, orthogonal to it.

    A Ritz value never lies outside the spectrum: `lambda_max` is approached from below, `lambda_min` from above. One
    start sees a multiple eigenvalue once, k starts up to k times.

    Args:
        operator: The matrix, of size n. Its `matmat` must return a new tensor, which is overwritten.
        tolerance: Relative residual to stop at.
        max_hvps: Most products to spend, at least `starts`. Memory: one n-vector for each, unless `max_basis` is less.
        seed: Seed of the starts.
        num_eigenvalues: How many to find at each end.
        starts: Random starts. One finds the ends with the fewest products (of fine-tuned MiniLM-L6 and MobileNetV2
            with 19 and 20, two starts with 30 and 24, four with 48 and 40); more give the density and the trace an
            error bar, and products in lockstep are cheaper.
        max_basis: Most vectors to keep; beyond, the run restarts from the Ritz vectors at both ends (thick restart, Wu
            & Simon 2000), which costs further products. By default as many as half of the free memory holds.
        basis_device: Where to keep the basis and do the vector arithmetic; by default the operator's device, or the
            CPU where half of that device's free memory does not hold `max_basis` or `max_hvps` vectors.

    Returns:
        The run.

    Raises:
        ValueError: If `max_hvps` or `max_basis` leaves no room.

    Example:
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> matrix = torch.diag(torch.tensor([-1.0, 2.0, 5.0]))
        >>> run = lanczos(DenseOperator(matrix), tolerance=1e-3, max_hvps=3, seed=0)
        >>> round(run.lambda_max.value, 4), round(run.lambda_min.value, 4)
        (5.0, -1.0)
        >>> run.ritz_vectors([-1]).abs().round(decimals=3)
        tensor([[0., 0., 1.]])
    """
    if max_hvps < starts:
        raise ValueError(f"`max_hvps` is {max_hvps}; the first step alone takes {starts} products, one per start.")
    if max_basis is not None and max_basis < 2 * (num_eigenvalues + starts):
        raise ValueError(
            f"`max_basis` is {max_basis}; a restart needs at least {2 * (num_eigenvalues + starts)}: "
            "twice the eigenvalues at each end, and twice the starts."
        )
    device = basis_device or _roomy_device(operator, max_basis or max_hvps)
    max_basis = max_basis or max(_vectors_that_fit(operator, device), 2 * (num_eigenvalues + starts))
    first = start_rows(operator, starts, seed=seed, device=device)
    krylov = KrylovDecomposition(first, operator.rows)
    small = operator.size <= min(max_hvps, SMALL_MATRIX)
    hvps = 0
    while True:
        block = krylov.extend()
        hvps += len(block)
        krylov.absorb(as_rows(operator.matmat(block.T.to(operator.device))).to(device))
        if krylov.may_start_anew and hvps < max_hvps:
            krylov.start_anew(normal_rows(operator, 1, seed=seed + 1, device=device).div_(math.sqrt(operator.size)))
        done = krylov.exhausted or (not small and krylov.converged(tolerance, num_eigenvalues))
        if done or hvps + krylov.width > max_hvps:
            break
        if len(krylov.basis) + krylov.width > max_basis:
            krylov.restart(keep=max(2 * num_eigenvalues, (max_basis - krylov.width) // 2))
    return _run(krylov, tolerance, num_eigenvalues, hvps)


def lanczos_by_segment(
    operator: SymmetricOperator, segments: Sequence[Sequence[slice]], *, tolerance: float, max_hvps: int, seed: int
) -> tuple[LanczosRun, ...]:
    """Estimate both ends of the spectrum of each diagonal block of an operator, all from the same products.

    One Lanczos process per block. Their vectors are concatenated into one of length n, so that a product serves all of
    them; a block that is done gets zeros. (Zhang et al. 2024, arXiv 2402.16788, do so with the blocks of a network's
    Hessian.)

    Args:
        operator: The matrix, of size n, whose entries between different segments are zero.
        segments: Slices of the rows of each block; no row in two of them.
        tolerance: Relative residual to stop at, as for `lanczos`.
        max_hvps: Most products to spend. Memory: one n-vector for each.
        seed: Seed of the start vector.

    Returns:
        The run of each block; the number of products in them is that of the whole.

    Example:
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> blocks = torch.block_diag(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[7.0]]))
        >>> segments = [[slice(0, 2)], [slice(2, 3)]]
        >>> both = lanczos_by_segment(DenseOperator(blocks), segments, tolerance=1e-3, max_hvps=9, seed=0)
        >>> [(round(block.lambda_min.value, 4), round(block.lambda_max.value, 4)) for block in both]
        [(-1.0, 1.0), (7.0, 7.0)]
    """
    generator = torch.Generator().manual_seed(seed)
    # Not signs: in a small block these are orthogonal to an eigenvector too often.
    start = torch.randn(1, operator.size, generator=generator, dtype=operator.dtype).to(operator.device)
    starts = [functional.normalize(_gather(start, segment)) for segment in segments]
    processes = [KrylovDecomposition(start, RowPartition.whole(start.shape[1])) for start in starts]
    vector = torch.empty(operator.size, dtype=operator.dtype, device=operator.device)
    active = dict(enumerate(processes))
    hvps = 0
    while active and hvps < max_hvps:
        vector.zero_()
        for index, process in active.items():
            scatter(process.extend(), segments[index], vector)
        product = operator.matvec(vector)[None]
        hvps += 1
        for index, process in list(active.items()):
            process.absorb(_gather(product, segments[index]))
            small = len(starts[index][0]) <= SMALL_BLOCK
            if process.exhausted or (not small and process.converged(tolerance, 1)):
                del active[index]
    return tuple(_run(process, tolerance, 1, hvps) for process in processes)


def _run(krylov: KrylovDecomposition, tolerance: float, number: int, hvps: int) -> LanczosRun:
    nodes, residuals, weights = krylov.first_cycle()
    top = krylov.eigenvalues(1, tolerance, number, hvps)
    bottom = krylov.eigenvalues(-1, tolerance, number, hvps)
    spectrum = Spectrum(
        lambda_max=top[0],
        lambda_min=bottom[0],
        top=top,
        bottom=bottom,
        ritz_values=tuple(nodes.tolist()),
        ritz_weights=tuple(weights.mean(axis=0).tolist()),
    )
    return LanczosRun(spectrum, nodes, residuals, weights, hvps, krylov)


def _roomy_device(operator: SymmetricOperator, vectors: int) -> torch.device:
    """Return the operator's device if so many vectors fit there, else the CPU."""
    fit = _vectors_that_fit(operator, operator.device) >= vectors
    return operator.device if fit else torch.device("cpu")


def _vectors_that_fit(operator: SymmetricOperator, device: torch.device) -> int:
    """Return how many of the operator's vectors fit into half of a device's free memory."""
    fit = free_memory(device) // 2 // (max(len(operator.rows), 1) * operator.dtype.itemsize)
    # Every rank must take the same branch.
    return min(operator.rows.group.all_gather_interleaved(operator.group.all_gather_interleaved([fit])))


def _gather(row: Tensor, segment: Sequence[slice]) -> Tensor:
    return torch.cat([row[:, part] for part in segment], dim=1)
