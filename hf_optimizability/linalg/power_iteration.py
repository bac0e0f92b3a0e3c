# SPDX-License-Identifier: Apache-2.0
"""The largest eigenvalue by power iteration."""

from __future__ import annotations

from torch import Tensor

from .estimate import Estimate
from .operator import SymmetricOperator
from .probe_vectors import start_rows
from .vectors import dot, norm


def power_iteration(operator: SymmetricOperator, *, tolerance: float, max_hvps: int, seed: int) -> Estimate:
    """Estimate the largest *algebraic* eigenvalue of a symmetric operator.

    Power iteration (Golub & Van Loan, Matrix Computations, section 8.2) finds the eigenvalue μ of largest magnitude.
    If that is negative, a second run on A − μI, whose eigenvalues are at least 0, finds the largest one. The value is
    the Rayleigh quotient; the residual ‖Av − θv‖ costs no further product. Needs memory for one vector, where Lanczos
    needs one for each step, and many more products.

    Args:
        operator: The matrix.
        tolerance: Stop when the residual is below this share of the eigenvalue.
        max_hvps: Maximal number of products, over both runs.
        seed: Seed of the start vector.

    Returns:
        The eigenvalue with its residual bound.

    Example:
        >>> import torch
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> matrix = torch.diag(torch.tensor([-9.0, 1.0, 4.0]))
        >>> round(power_iteration(DenseOperator(matrix), tolerance=1e-3, max_hvps=100, seed=0).value, 2)
        4.0
    """
    return leading_eigenpair(operator, tolerance=tolerance, max_hvps=max_hvps, seed=seed)[0]


def leading_eigenpair(
    operator: SymmetricOperator, *, tolerance: float, max_hvps: int, seed: int
) -> tuple[Estimate, Tensor]:
    """Return the estimate of `power_iteration` and the approximate eigenvector, of norm 1."""
    value, residual, hvps, vector = _dominant(operator, shift=0.0, tolerance=tolerance, max_hvps=max_hvps, seed=seed)
    if value < 0 and hvps < max_hvps:
        value, residual, more, vector = _dominant(
            operator, shift=value, tolerance=tolerance, max_hvps=max_hvps - hvps, seed=seed
        )
        hvps += more
    estimate = Estimate(
        value=value,
        low=value - residual,
        high=value + residual,
        method="power_iteration",
        hvps=hvps,
        converged=residual <= tolerance * abs(value),
        residual=residual,
    )
    return estimate, vector


def _dominant(
    operator: SymmetricOperator, *, shift: float, tolerance: float, max_hvps: int, seed: int
) -> tuple[float, float, int, Tensor]:
    """Return the eigenvalue of A farthest from `shift`, its residual, the products spent and its eigenvector."""
    group = operator.rows.group
    vector = start_rows(operator, 1, seed=seed, device=operator.device)[0]
    hvps = 0
    while True:
        product = operator.matvec(vector)
        hvps += 1
        value = dot(vector, product, group)
        residual = norm(product - value * vector, group)
        if residual <= tolerance * abs(value) or hvps == max_hvps:
            return value, residual, hvps, vector
        product = product - shift * vector
        vector = product / norm(product, group)
