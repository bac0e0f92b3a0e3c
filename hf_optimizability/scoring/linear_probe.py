# SPDX-License-Identifier: Apache-2.0
"""A linear probe: accuracy of logistic regression on frozen features, on examples it was not fitted to."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from .features import validate_features
from .logme import project_onto_span
from .score import Score


Array = NDArray[np.float64]

FOLDS = 5
"""Number of parts of the examples, each predicted by a fit to the others."""


def linear_probe(features: ArrayLike, labels: ArrayLike, *, penalty: float = 1.0, seed: int = 0) -> Score:
    """Return the cross-validated accuracy of logistic regression (Alain and Bengio 2016, arXiv 1610.01644).

    Features are standardized. The standard error is over the examples, each predicted once; it takes the fits as
    given, of which every two share most of their examples.

    Args:
        features: Inputs of the classification head, of shape (n, d). float64 inside.
        labels: The n classes, whole numbers.
        penalty: λ in `Σ cross-entropy + ½λ‖W‖²`.
        seed: Seed of the folds, which are stratified by class.

    Raises:
        ValueError: If there are fewer than `2 * FOLDS` examples or two classes, or features are not finite.

    Example:
        >>> labels = np.arange(60) % 3
        >>> rng = np.random.default_rng(0)
        >>> linear_probe(np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3)), labels).value
        1.0
    """
    F, y = validate_features(features, labels, minimum=2 * FOLDS)
    F = F - F.mean(axis=0)
    deviation = F.std(axis=0)
    F = project_onto_span(F / np.where(deviation > 1e-12 * max(deviation.max(), 1e-300), deviation, 1.0))
    classes, y = np.unique(y, return_inverse=True)
    fold = stratified_folds(y, seed=seed)
    correct = np.empty(len(y))
    for held_out in range(FOLDS):
        fitted = fold != held_out
        weights, bias = fit(F[fitted], y[fitted], classes=len(classes), penalty=penalty)
        correct[~fitted] = (F[~fitted] @ weights + bias).argmax(axis=1) == y[~fitted]
    accuracy = float(correct.mean())
    std_error = math.sqrt(accuracy * (1 - accuracy) / (len(y) - 1))
    return Score.from_error(accuracy, std_error, freedom=len(y) - 1, examples=len(y))


def stratified_folds(y: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Return the fold of each example: at random, with each class spread evenly."""
    order = np.random.default_rng(seed).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    fold = np.empty(len(y), dtype=np.int64)
    fold[order] = np.arange(len(y)) % FOLDS
    return fold


def fit(F: Array, y: NDArray[np.int64], *, classes: int, penalty: float) -> tuple[Array, Array]:
    """Fit logistic regression by L-BFGS: weights of shape (d, classes), and a bias, which is not penalized."""
    target = np.eye(classes)[y]

    def loss(flat: Array) -> tuple[float, Array]:
        parameters = flat.reshape(-1, classes)
        weights, bias = parameters[:-1], parameters[-1]
        logs = log_softmax(F @ weights + bias, axis=1)
        error = np.exp(logs) - target
        slope = np.vstack([F.T @ error + penalty * weights, error.sum(axis=0)])
        return float(0.5 * penalty * np.sum(weights**2) - np.sum(target * logs)), slope.ravel()

    start = np.zeros((F.shape[1] + 1) * classes)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    parameters = found.x.reshape(-1, classes)
    return parameters[:-1], parameters[-1]
