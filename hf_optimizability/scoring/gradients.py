# SPDX-License-Identifier: Apache-2.0
"""Scores from a checkpoint's gradients: whether parts of the data agree, and what one step would gain."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..curvature.empirical_risk import EmpiricalRisk
from ..curvature.gradient import batch_gradients
from ..curvature.hessian import ObjectiveOperator
from ..linalg.statistics import jackknife_variance
from ..linalg.vectors import dot, flatten
from .score import Score


MIN_PARTS = 4
"""Fewest parts from which an error can be estimated."""


def gradient_scores(objective: EmpiricalRisk, matrix: ObjectiveOperator) -> tuple[Score, Score | None]:
    """Return gradient alignment and predicted decrease, from two gradients and a product.

    Memory: five vectors as long as the parameters. Leaves `.grad` alone.

    Args:
        objective: The loss, in at least `MIN_PARTS` parts.
        matrix: Its Hessian.

    Returns:
        The alignment, see `mean_cosine`; and what the best step along −g gains, see `decrease_with_error`.

    Raises:
        ValueError: If there are too few parts.
        FloatingPointError: If a part's gradient is 0 or not finite.
    """
    mean, units = torch.zeros(2, matrix.size, dtype=matrix.dtype, device=matrix.device)
    counts: list[float] = []
    for part, count in _part_gradients(objective):
        mean += count * part
        units += _unit(part)
        counts.append(count)
    if len(counts) < MIN_PARTS:
        raise ValueError(f"Gradients need at least {MIN_PARTS} parts to be compared, not {len(counts)}.")
    mean /= sum(counts)
    product, forms, _ = matrix.matmat_per_batch(mean[:, None], [[slice(0, matrix.size)]])
    along = product[:, 0]
    rows = [(dot(part, mean), dot(part, along), dot(_unit(part), units)) for part, _ in _part_gradients(objective)]
    slopes, bends, to_units = np.array(rows).T
    alignment = mean_cosine(to_units, dot(units, units), examples=round(sum(counts)))
    curvature = forms[:, 0, 0]
    return alignment, decrease_with_error(slopes, curvature, bends, counts)


def _part_gradients(objective: EmpiricalRisk) -> Iterator[tuple[Tensor, float]]:
    """Yield each part's mean gradient as one vector, and its number of items."""
    for batch in batch_gradients(objective):
        yield flatten(batch.tensors) / batch.items, batch.items


def _unit(vector: Tensor) -> Tensor:
    """Return the vector scaled to length 1."""
    length = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    if not (0 < length < math.inf):
        raise FloatingPointError(f"A part's gradient has length {length}, so that it has no direction.")
    return vector / length


def mean_cosine(to_sum: ArrayLike, sum_squared: float, *, examples: int) -> Score:
    """Return the mean cosine between the gradients of every two parts.

    1: all parts agree; 0: they are unrelated; below: what helps one harms another. It is a U-statistic, whose standard
    error comes from the jackknife over the parts (Efron and Stein 1981). Fort et al. 2019
    (arXiv 1901.09491, section 2) call it stiffness, for single examples; Sankararaman et al. 2020 (arXiv 1904.06963)
    bound the convergence rate of SGD by it.

    Args:
        to_sum: uᵢ·S for each of N parts, where uᵢ is its gradient at length 1 and S = Σ uᵢ.
        sum_squared: ‖S‖².
        examples: Number of examples of all parts together.

    Example:
        >>> mean_cosine([1.0] * 4, 4.0, examples=4).value  # all at right angles to each other
        0.0
    """
    s = np.asarray(to_sum, dtype=np.float64)
    parts = len(s)
    value = (sum_squared - parts) / (parts * (parts - 1))
    without = (sum_squared - 2 * s + 1 - (parts - 1)) / ((parts - 1) * (parts - 2))
    std_error = math.sqrt(jackknife_variance(without))
    return Score.from_error(value, std_error, freedom=parts - 1, examples=examples)


def decrease_with_error(slopes: ArrayLike, curvatures: ArrayLike, bends: ArrayLike, counts: ArrayLike) -> Score | None:
    """Return the predicted decrease ½‖g‖⁴/gᵀHg with its error (infinitesimal jackknife, Efron 1982, chapter 6).

    A part's weight enters ‖g‖² through g twice, and gᵀHg through g twice and H once: the derivatives of both by it are
    2(gᵢ·g − ‖g‖²) and 2(gᵢ·Hg − gᵀHg) + gᵀHᵢg − gᵀHg.

    Args:
        slopes: gᵢ·g of each part, g the mean gradient over all items.
        curvatures: gᵀHᵢg.
        bends: gᵢ·Hg.
        counts: Items of each part.

    Returns:
        The decrease; `None` where gᵀHg ≤ 0, so that there is no best step.
    """
    a, b, c, w = (np.asarray(array, dtype=np.float64) for array in (slopes, curvatures, bends, counts))
    w = w / w.sum()
    squared, curvature = float(w @ a), float(w @ b)
    if not curvature > 0:
        return None
    value = squared**2 / (2 * curvature)
    moved = value * (4 * (a - squared) / squared - (2 * (c - curvature) + (b - curvature)) / curvature)
    parts = len(w)
    std_error = math.sqrt(float(np.sum((w * moved) ** 2)) * parts / (parts - 1))
    return Score.from_error(value, std_error, freedom=parts - 1, examples=int(np.sum(counts)))
