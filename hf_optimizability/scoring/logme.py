# SPDX-License-Identifier: Apache-2.0
"""LogME: how likely the labels are under a Bayesian linear model of frozen features."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import svd
from scipy.optimize import minimize_scalar

from ..linalg.statistics import jackknife_variance
from .features import validate_features
from .score import Score


Array = NDArray[np.float64]

GROUPS = 10
"""Parts of the examples, each left out once for the standard error."""

MIN_EXAMPLES = 2 * GROUPS
"""Fewest examples for a score."""

_DECADES = np.arange(-12, 13, 0.5)
"""Grid on which the ratio of prior to noise precision is first searched, in powers of 10 of the mean σ."""


def logme(features: ArrayLike, labels: ArrayLike, *, seed: int = 0) -> Score:
    """Return the logarithm of the maximum evidence, per example and class (You et al. 2021, arXiv 2102.11005).

    Of each class, y (1 for its examples, 0 for the others) is modelled as Fw plus noise, with w ~ N(0, I/α) and noise
    ~ N(0, I/β). LogME is log p(y | F), at the α and β that make it largest, divided by the number of examples and
    averaged over the classes. The paper reaches that maximum by a fixed point in α and β; here β has a closed form
    for each α/β, and α/β is searched over 24 decades.

    The standard error is a delete-a-group jackknife over the examples, in `GROUPS` groups.

    Args:
        features: F, of shape (n, d): the inputs of the classification head. float64 inside.
        labels: The n classes, whole numbers.
        seed: Seed of the groups.

    Raises:
        ValueError: If there are fewer than `MIN_EXAMPLES` examples or two classes, or features are not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = np.arange(60) % 2
        >>> noise = rng.normal(size=(60, 3))
        >>> informative = noise + labels[:, None]
        >>> logme(informative, labels).low > logme(noise, labels).high
        True
    """
    F, y = validate_features(features, labels, minimum=MIN_EXAMPLES)
    F = project_onto_span(F)
    targets = (y[:, None] == np.unique(y)).astype(float)
    group = np.random.default_rng(seed).permutation(len(F)) % GROUPS
    value = mean_log_evidence(F, targets)
    without = np.array([mean_log_evidence(F[group != left], targets[group != left]) for left in range(GROUPS)])
    std_error = math.sqrt(jackknife_variance(without))
    return Score.from_error(value, std_error, freedom=GROUPS - 1, examples=len(F))


def mean_log_evidence(F: Array, targets: Array) -> float:
    """Return the largest log evidence of each column of targets, per example, averaged over the columns.

    With the singular values s of F, σ = s², t = α/β and z = Uᵀy, the y are N(0, (I + FFᵀ/t)/β): the best β for a t is
    n/q with q = Σ z²t/(t + σ) + ‖y‖² − ‖z‖², and the evidence there −½ Σ log(1 + σ/t) − ½n (log(2πq/n) + 1).

    Columns that are all 0 (a class that was left out with a group) are not counted.
    """
    U, s, _ = svd(F, full_matrices=False)
    targets = targets[:, targets.any(axis=0)]
    z = (U.T @ targets) ** 2
    residual = np.maximum((targets**2).sum(axis=0) - z.sum(axis=0), 0.0)
    return float(np.mean([_largest(s**2, *column, len(F)) for column in zip(z.T, residual, strict=True)])) / len(F)


def _largest(sigma: Array, z: Array, residual: float, n: int) -> float:
    """Return the largest log evidence of one column, from σ, z² and ‖y‖² − ‖z‖²."""
    scale = sigma.mean() or 1.0

    def log_evidence(decade: float) -> float:
        t = scale * 10**decade
        q = max(float(z @ (t / (t + sigma))) + residual, np.finfo(float).tiny)
        return -0.5 * (float(np.log1p(sigma / t).sum()) + n * (math.log(2 * math.pi * q / n) + 1))

    near = max(_DECADES, key=log_evidence)
    best = minimize_scalar(lambda decade: -log_evidence(decade), bounds=(near - 0.5, near + 0.5), method="bounded")
    return max(-float(best.fun), log_evidence(near))


def project_onto_span(F: Array) -> Array:
    """Return the features in min(n, d) coordinates of their own span, which keeps all dot products."""
    if F.shape[1] <= F.shape[0]:
        return F
    U, s, _ = svd(F, full_matrices=False)
    return U * s
