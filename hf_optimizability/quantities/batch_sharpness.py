# SPDX-License-Identifier: Apache-2.0
"""Batch sharpness: the curvature of a batch's loss along its own gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..curvature.empirical_risk import EmpiricalRisk
from ..curvature.gradient import gradient
from ..curvature.hessian import HessianOperator
from ..linalg.estimate import Estimate
from ..linalg.operator import SymmetricOperator
from ..linalg.statistics import jackknife_variance, student_quantile
from ..linalg.vectors import dot, flatten


Risk = TypeVar("Risk", bound=EmpiricalRisk)

MIN_BATCHES = 3
"""Batches without which there is no spread among delete-one estimates."""


@dataclass(frozen=True)
class BatchSharpness:
    """Curvature that single batches have along their own gradients.

    Attributes:
        sharpness: E[gᵀHg]/E‖g‖².
        preconditioned: E[uᵀP^-½HP^-½u]/E‖u‖², u = P^-½g, as an optimizer with the diagonal P meets it; `None` where
            P = 1.
        items: Items in a batch, the mean.
        batches: How many batches the means are over.
    """

    sharpness: Estimate
    preconditioned: Estimate | None
    items: float
    batches: int

    @property
    def as_stepped(self) -> Estimate:
        """Return the one that the optimizer meets."""
        return self.sharpness if self.preconditioned is None else self.preconditioned

    @property
    def rate(self) -> Estimate | None:
        """Return 2/(batch sharpness), a learning rate; `None` where the curvature is not positive."""
        found = self.as_stepped
        if not 0 < found.value <= found.high or 2 / found.value == math.inf:
            return None
        high = 2 / found.low if found.low > 0 else math.inf
        return Estimate(2 / found.value, 2 / found.high, high, found.method, found.hvps, found.converged)


def batch_sharpness(
    batches: Iterable[Risk],
    *,
    preconditioner: Tensor | None = None,
    hessian: Callable[[Risk], SymmetricOperator] = HessianOperator,
    tolerance: float = 0.1,
) -> BatchSharpness:
    """Estimate `E[gᵀHg] / E‖g‖²` over batches, g and H the gradient and the Hessian of one batch's loss.

    SGD holds it near 2/η, while the largest eigenvalue of the loss over all data stays below (Andreyev & Beneventano
    2024, arXiv 2412.20553, definition 3). With the diagonal P of an optimizer that steps along P⁻¹g it is
    `E[uᵀP^-½HP^-½u] / E‖u‖²`, u = P^-½g. Takes a gradient and a product for each batch, or two with P.

    Args:
        batches: The loss of each batch, of as many examples as one step of the optimizer takes; a loss in several
            parts is that of their mean. Independent draws, as training makes them.
        preconditioner: P, of shape (n,).
        hessian: Makes the Hessian of a batch's loss.
        tolerance: Relative standard error of a converged estimate.

    Returns:
        The ratios, with intervals from the jackknife over the batches.

    Raises:
        ValueError: If there are fewer than 3 batches, or all their gradients are 0.
        FloatingPointError: If a product is not finite.

    Example:
        >>> class Bowl(EmpiricalRisk):
        ...     def __init__(self, centre):
        ...         self.point, self.centre = torch.zeros(2, requires_grad=True), centre
        ...     @property
        ...     def parameters(self):
        ...         return [self.point]
        ...     def losses(self):
        ...         yield (torch.tensor([1.0, 3.0]) * (self.point - self.centre) ** 2).sum(), 1
        >>> batch_sharpness([Bowl(0.5), Bowl(1.0), Bowl(2.0)]).sharpness.value  # g ∝ (1, 3), H = diag(2, 6)
        5.6
    """
    found, items = [], []
    for batch in batches:
        point = gradient(batch)
        vector = flatten(point.tensors)
        steps = [vector] if preconditioner is None else [vector, vector / preconditioner.to(vector)]
        products = hessian(batch).matmat(torch.stack(steps, dim=1)).T
        group = batch.rows.group
        found.append(
            [
                (dot(step, product, group), dot(vector, step, group))
                for step, product in zip(steps, products, strict=True)
            ]
        )
        items.append(point.items)
    if len(found) < MIN_BATCHES:
        raise ValueError(f"Batch sharpness needs at least {MIN_BATCHES} batches, not {len(found)}. Pass more.")
    sharpness, *preconditioned = (
        ratio_of_means(above, below, tolerance=tolerance) for above, below in np.array(found).transpose(1, 2, 0)
    )
    return BatchSharpness(sharpness, next(iter(preconditioned), None), float(np.mean(items)), len(found))


def ratio_of_means(above: NDArray[np.float64], below: NDArray[np.float64], *, tolerance: float) -> Estimate:
    """Return the ratio of the means of two numbers a batch, with its interval from the jackknife over batches.

    A few batches with long gradients may hold most of both sums. So the interval is symmetric on a logarithmic scale,
    where all delete-one ratios are positive, and Student's t has as many degrees of freedom as the deviations' fourth
    moment leaves to their variance. Where single examples weigh hundreds of times as much as others, it holds the
    truth less often than it says.

    Args:
        above: Of shape (batches,).
        below: Of shape (batches,), none below 0.
        tolerance: Relative standard error of a converged estimate.

    Returns:
        The ratio; its interval has no ends where a single batch has all of `below`.

    Raises:
        ValueError: If all of `below` are 0.
    """
    total = float(below.sum())
    if total == 0:
        raise ValueError("The gradients of all batches are 0, so that they have no direction.")
    value = float(above.sum()) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        without = (above.sum() - above) / (total - below)
    if not np.isfinite(without).all():  # one batch has all of the gradient
        return Estimate(value, -math.inf, math.inf, "jackknife", len(above), False)
    error = math.sqrt(jackknife_variance(without))
    quantile = student_quantile(_freedom(above - value * below))
    low, high = value - quantile * error, value + quantile * error
    if (without > 0).all():
        factor = math.exp(min(quantile * math.sqrt(jackknife_variance(np.log(without))), 700.0))
        low, high = value / factor, value * factor
    converged = error <= tolerance * abs(value)
    return Estimate(value, low, high, "jackknife", len(above), converged, error, data_std_error=error)


def _freedom(deviations: NDArray[np.float64]) -> float:
    """Return the degrees of freedom of a variance: 2N/(κ − 1) by its own variance, κ the kurtosis, and below N."""
    squares = deviations**2
    with np.errstate(invalid="ignore"):
        kurtosis = np.nan_to_num((squares**2).mean() / squares.mean() ** 2, nan=1.0)
    return float(min(len(deviations) - 1, 2 * len(deviations) / max(kurtosis - 1, 1e-9)))
