# SPDX-License-Identifier: Apache-2.0
"""Both ends of the spectrum by the Lanczos process."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .estimates import Estimate, Spectrum
from .operators import SymmetricOperator
from .vectors import dot, norm, rademacher


def lanczos(operator: SymmetricOperator, *, tolerance: float, max_hvps: int, seed: int) -> Spectrum:
    """Estimates the largest and the smallest eigenvalue of a symmetric operator.

    The Lanczos process with full reorthogonalization (Golub & Van Loan, Matrix Computations, section 10.3), from a
    Rademacher start, tridiagonal matrix in float64. Stops as soon as the residual at each end is below `tolerance`
    times the Ritz value there. A Ritz value never lies outside the spectrum: `lambda_max` is approached from below,
    `lambda_min` from above.

    Args:
        operator: The matrix, of size n.
        tolerance: Relative residual to stop at.
        max_hvps: Most products to spend. Memory: one n-vector for each.
        seed: Seed of the start vector.

    Returns:
        Both ends with residual bounds, and all Ritz values.

    Example:
        >>> from hf_optimizability.curvature.operators import DenseOperator
        >>> matrix = torch.diag(torch.tensor([-1.0, 2.0, 5.0]))
        >>> run = lanczos(DenseOperator(matrix), tolerance=1e-3, max_hvps=3, seed=0)
        >>> round(run.lambda_max.value, 4), round(run.lambda_min.value, 4)
        (5.0, -1.0)
    """
    generator = torch.Generator().manual_seed(seed)
    start = rademacher(operator.size, generator=generator, dtype=operator.dtype, device=operator.device)
    vector = start / math.sqrt(operator.size)
    basis = _Basis(operator)
    alphas: list[float] = []
    betas: list[float] = []
    while True:
        basis.append(vector)
        product = operator.matvec(vector)
        alphas.append(dot(vector, product))
        remainder = basis.orthogonalize(product)
        betas.append(norm(remainder))
        values, vectors = _tridiagonal_eigh(alphas, betas[:-1])
        scale = float(np.abs(values).max())
        rounding = len(alphas) * torch.finfo(operator.dtype).eps * scale
        residuals = betas[-1] * np.abs(vectors[-1]) + rounding
        converged = [residuals[end] <= max(tolerance * abs(values[end]), 2 * rounding) for end in (0, -1)]
        # A remainder of rounding size means that the Krylov space holds all that the start vector can reach.
        if all(converged) or len(alphas) == min(max_hvps, operator.size) or betas[-1] <= rounding:
            break
        vector = remainder / betas[-1]

    def eigenvalue(index: int) -> Estimate:
        value, residual = float(values[index]), float(residuals[index])
        return Estimate(
            value=value,
            low=value - residual,
            high=value + residual,
            method="lanczos",
            hvps=len(alphas),
            converged=bool(converged[index]),
            residual=residual,
        )

    return Spectrum(
        lambda_max=eigenvalue(-1),
        lambda_min=eigenvalue(0),
        ritz_values=tuple(values.tolist()),
        ritz_weights=tuple((vectors[0] ** 2).tolist()),
    )


def _tridiagonal_eigh(diagonal: list[float], off_diagonal: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (ascending) and eigenvectors of a symmetric tridiagonal matrix, in float64."""
    from scipy.linalg import eigh_tridiagonal

    return eigh_tridiagonal(np.array(diagonal), np.array(off_diagonal))


class _Basis:
    """Orthonormal vectors, stored in slabs so that it grows without being copied and multiplies at gemv speed."""

    _SLAB = 8

    def __init__(self, operator: SymmetricOperator):
        self._operator = operator
        self._slabs: list[Tensor] = []
        self._size = 0

    def append(self, vector: Tensor) -> None:
        if self._size % self._SLAB == 0:
            operator = self._operator
            self._slabs.append(torch.empty(self._SLAB, operator.size, dtype=operator.dtype, device=operator.device))
        self._slabs[-1][self._size % self._SLAB] = vector
        self._size += 1

    def orthogonalize(self, vector: Tensor) -> Tensor:
        """What is left of `vector` orthogonal to the basis; Gram-Schmidt twice is enough (Parlett, section 6.9)."""
        for _ in range(2):
            for number, slab in enumerate(self._slabs):
                rows = slab[: self._size - number * self._SLAB]
                vector = vector - rows.T @ (rows @ vector)
        return vector
