# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient of a population, from the pool that was looked at."""

from __future__ import annotations

import math

import numpy as np

from ..curvature.gradient import Gradient, norm_of
from ..linalg.estimate import Estimate
from ..linalg.statistics import NORMAL_QUANTILE, student_quantile
from ..objective.population import Population
from ..quantities.noise_scale import MIN_PARTS
from .results import PopulationMeasurement


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
HARDEST = 10
METHOD = "pool"

MAX_LOG_RATIO = math.log(1e6)
"""Logarithm of an upper end over the value beyond which there is none."""

ROUNDING = 1e-6
"""Error of a mean in float32, relative to what the mean is over."""


def gradient_of_pool(population: Population) -> Gradient:
    """Return loss and gradient of the mean over a pool."""
    return Gradient(population.mean_loss, population.look.items, population.look.gradient)


def about_population(population: Population, slope_std_error: float) -> PopulationMeasurement:
    """Return loss and gradient norm of a population.

    Args:
        population: The pool, and what was drawn from it.
        slope_std_error: Standard error of the slope along the pool's gradient as that of the whole set.
    """
    losses = population.look.losses
    return PopulationMeasurement(
        examples=population.pool.total,
        pool_examples=len(population.pool),
        sampled_examples=len(population.sample.indices),
        certain_examples=len(population.sample.certain),
        loss=mean_loss_of(population),
        grad_norm=gradient_norm(population, slope_std_error),
        loss_quantiles=tuple(np.quantile(losses, QUANTILES).tolist()),
        hardest=tuple(population.pool.indices[np.argsort(-losses)[:HARDEST]].tolist()),
    )


def mean_loss_of(population: Population) -> Estimate:
    """Return the mean loss of the training set: that of the pool, with the error of a random part of it."""
    error, value = population.pool_std_error(population.look.losses), population.mean_loss
    margin = NORMAL_QUANTILE * error + ROUNDING * abs(value)
    return Estimate(value, value - margin, value + margin, METHOD, 0, True, 0.0, data_std_error=error)


def gradient_norm(population: Population, slope_std_error: float) -> Estimate:
    """Return the norm of the training set's gradient, without what a pool that is a part of it adds.

    The square of the pool's gradient G is too large by its variance V, which is known from the spread among batches.
    The error of `‖G‖² − V` is that of twice the slope along G, and of V. Where V is larger, ‖g‖ may be 0, and is at
    most what that error allows.
    """
    look = population.look
    norm, rounding = float(norm_of(look.gradient)), ROUNDING * look.gradient_scale
    square = norm**2 - population.gradient_variance
    error = math.hypot(2 * norm * slope_std_error, population.gradient_variance * look.covariance_error)
    margin = NORMAL_QUANTILE * error
    low, value, high = (math.sqrt(max(end, 0.0)) for end in (square - margin, square, max(square, 0.0) + margin))
    low, high = max(low - rounding, 0.0), high + rounding
    std_error = error / (2 * value) if value else None
    return Estimate(value, low, high, METHOD, 0, low > 0 or high == 0, 0.0, data_std_error=std_error)


def noise_scale_of(population: Population, gradient_norm: Estimate) -> Estimate | None:
    """Return tr Σ/‖g‖² of the training set, in items, from the gradients of the pool's batches; `None` from too few.

    The errors of tr Σ and ‖g‖² add in squares, in logarithms. Where ‖g‖ may be 0, there is no upper end.

    Args:
        population: The pool, which was looked at in random order.
        gradient_norm: ‖g‖ of the training set.
    """
    look = population.look
    batches = len(look.batch_squares)
    if batches < MIN_PARTS:
        return None
    trace, norm = look.trace_covariance, gradient_norm
    margin = student_quantile(batches - 1) * look.covariance_error * trace
    if not trace:
        return Estimate(0.0, 0.0, 0.0, METHOD, 0, True)
    if not norm.value:
        low = max(trace - margin, 0.0) / norm.high**2 if norm.high else math.inf
        return Estimate(math.inf, low, math.inf, METHOD, 0, False)
    down = math.hypot(_log_ratio(trace, trace - margin), 2 * _log_ratio(norm.high, norm.value))
    up = math.hypot(_log_ratio(trace + margin, trace), 2 * _log_ratio(norm.value, norm.low))
    value = trace / norm.value**2
    high = value * math.exp(up) if up < MAX_LOG_RATIO else math.inf
    return Estimate(value, value * math.exp(-down), high, METHOD, 0, high < math.inf)


def _log_ratio(larger: float, smaller: float) -> float:
    return math.log(larger / smaller) if smaller > 0 else math.inf
