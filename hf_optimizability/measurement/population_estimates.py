# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient of a population, from its pool and the sample drawn from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..curvature.gradient import Gradient, batch_gradients, gradient
from ..linalg.estimate import Estimate
from ..linalg.statistics import NORMAL_QUANTILE, student_quantile
from ..linalg.vectors import dot
from ..objective.objective import Objective
from ..objective.population import Population
from .design import Design
from .results import PopulationMeasurement


Array = NDArray[np.float64]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
HARDEST = 10
METHOD = "sample"

ROUNDING = 1e-6
"""Relative error of a mean of losses in float32."""


def about_population(objective: Objective, point: Gradient) -> PopulationMeasurement:
    """Return loss and gradient norm of the population that an objective is a sample of.

    Takes a gradient of the sample.
    """
    population = objective.population
    assert population is not None
    order = np.argsort(-population.losses)[:HARDEST]
    return PopulationMeasurement(
        examples=population.pool.total,
        pool_examples=len(population.pool),
        sampled_examples=len(population.sample.indices),
        certain_examples=len(population.sample.certain),
        loss=mean_loss_of(population),
        grad_norm=gradient_norm(objective, population, point),
        loss_quantiles=tuple(np.quantile(population.losses, QUANTILES).tolist()),
        hardest=tuple(population.pool.indices[order].tolist()),
    )


def mean_loss_of(population: Population) -> Estimate:
    """Return the mean loss of the training set: that of the pool, with the error of a random part of it."""
    error = population.pool_std_error(population.losses)
    value = population.mean_loss
    margin = NORMAL_QUANTILE * error + ROUNDING * abs(value)
    return Estimate(value, value - margin, value + margin, METHOD, 0, True, 0.0, data_std_error=error)


def gradient_norm(objective: Objective, population: Population, point: Gradient) -> Estimate:
    """Return the norm of a population's gradient, without what the draw adds to it.

    The square of the sample's gradient G is too large by its variance, `V = b² f Σ‖r_g − r̄‖²/(n(n − 1))` over the n
    groups: r_g their mean gradients, r̄ the mean of those, b the share of what is not certain, f the correction for
    draws without replacement. The error of `‖G‖² − V` is that of its slope along G, and that of V itself.
    """
    design = Design.of(objective)
    whole = _dot(point.tensors, point.tensors)
    drawn = [batch for batch in objective.local_batches if batch.drawn is not None and not batch.drawn.certain]
    if len(drawn) < 2:
        norm = math.sqrt(whole)
        return Estimate(norm, norm, norm, METHOD, 0, True, 0.0, data_std_error=0.0)
    share = sum(batch.drawn.share for batch in drawn if batch.drawn is not None) / float(design.shares.sum())
    group_means = objective.over(drawn)
    centre = gradient(group_means).tensors
    found = [
        (
            _dot(batch.tensors, batch.tensors) / batch.items**2,
            _dot(batch.tensors, centre) / batch.items,
            _dot(batch.tensors, point.tensors) / batch.items,
        )
        for batch in batch_gradients(group_means)
    ]
    squares, to_centre, along = np.array(found).T
    part = len(population.pool) / population.pool.total
    groups, scale = len(drawn), share**2 * (1 - part * (1 - design.correction))
    middle = _dot(centre, centre)
    variance = scale * float((squares - 2 * to_centre + middle).mean()) / (groups - 1)
    square = whole - variance
    slope = 4 * scale * float(((along - along.mean()) ** 2).mean()) / (groups - 1)
    error = math.sqrt(slope + 2 * variance**2 / (groups - 1))
    margin = student_quantile(groups - 1) * error
    low, value, high = (math.sqrt(max(end, 0.0)) for end in (square - margin, square, square + margin))
    std_error = error / (2 * value) if value else None
    return Estimate(value, low, high, METHOD, 0, low > 0, 0.0, data_std_error=std_error)


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return math.fsum(dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(first, second, strict=True))
