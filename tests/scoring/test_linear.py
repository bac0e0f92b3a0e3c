# SPDX-License-Identifier: Apache-2.0
"""LogME against a dense marginal likelihood, the linear probe against scikit-learn; their errors against new data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression

from hf_optimizability.scoring.linear_probe import FOLDS, fit, linear_probe, stratified_folds
from hf_optimizability.scoring.logme import logme


def made(n: int, d: int, *, classes: int = 3, seed: int = 0, strength: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Features that tell the classes as far as `strength` says, with columns of very different scales."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    return (rng.normal(size=(n, d)) + strength * centres[labels]) * np.logspace(-1, 1, d), labels


def dense_log_evidence(F: np.ndarray, y: np.ndarray) -> float:
    """The largest log N(y; 0, I/β + FFᵀ/α) over α and β, from several starts."""

    def loss(logs: np.ndarray) -> float:
        covariance = np.eye(len(F)) * np.exp(-logs[1]) + F @ F.T * np.exp(-logs[0])
        return -float(multivariate_normal.logpdf(y, np.zeros(len(F)), covariance))

    starts = [(a, b) for a in (-2.0, 4.0) for b in (0.0, 3.0)]
    return -min(minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-6}).fun for start in starts)


@pytest.mark.parametrize(("n", "d", "strength"), [(40, 5, 1.0), (30, 60, 0.5), (40, 5, 0.0)])
def test_logme_is_the_largest_marginal_likelihood(n: int, d: int, strength: float):
    F, y = made(n, d, strength=strength)
    expected = np.mean([dense_log_evidence(F, (y == label).astype(float)) for label in range(3)]) / n
    assert logme(F, y).value == pytest.approx(expected, abs=1e-5)


def test_the_same_of_turned_features_and_of_named_otherwise_classes():
    F, y = made(50, 80)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(80, 80)))[0]
    assert logme(F @ turn, 7 - 2 * y).value == pytest.approx(logme(F, y).value, rel=1e-8)


@pytest.mark.parametrize("score", [logme, linear_probe])
def test_its_error_is_how_far_new_examples_move_it(score):
    found = [score(*made(120, 6, classes=2, seed=seed, strength=0.5)) for seed in range(60)]
    spread = np.std([one.value for one in found], ddof=1)
    assert np.sqrt(np.mean([one.std_error**2 for one in found])) == pytest.approx(spread, rel=0.35)
    middle = np.mean([one.value for one in found])
    assert np.mean([one.low < middle < one.high for one in found]) > 0.88


@pytest.mark.parametrize("d", [5, 90])
def test_the_probe_is_logistic_regression(d: int):
    F, y = made(60, d)
    scaled = (F - F.mean(axis=0)) / F.std(axis=0)
    fold = stratified_folds(y, seed=0)
    assert max(np.ptp([np.sum((fold == f) & (y == label)) for f in range(FOLDS)]) for label in range(3)) <= 1
    correct = np.empty(len(y))
    for held_out in range(FOLDS):
        inside = fold != held_out
        reference = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(scaled[inside], y[inside])
        correct[~inside] = reference.predict(scaled[~inside]) == y[~inside]
        weights, bias = fit(scaled[inside], y[inside], classes=3, penalty=1.0)
        logits = scaled @ weights + bias
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert shares == pytest.approx(reference.predict_proba(scaled), abs=2e-3)
    assert linear_probe(F, y).value == pytest.approx(correct.mean(), abs=1e-12)


def test_what_tells_more_scores_higher():
    weak, strong = (made(200, 6, strength=strength) for strength in (0.1, 1.0))
    for score in (logme, linear_probe):
        assert score(*strong).low > score(*weak).high


@pytest.mark.parametrize("score", [logme, linear_probe])
def test_features_that_do_not_vary_score_as_nothing(score):
    """No division by 0, whatever the features are."""
    y = np.arange(40) % 2
    assert np.isfinite(score(np.zeros((40, 3)), y).value)
    assert score(np.ones((40, 3)), y).value <= score(np.eye(2)[y], y).value


@pytest.mark.parametrize("score", [logme, linear_probe])
@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.zeros((40, 2)), np.zeros(40, int), "1 classes are too few"),
        (np.zeros((6, 2)), np.arange(6) % 2, "6 examples"),
        (np.full((40, 2), np.nan), np.arange(40) % 2, "not finite"),
        (np.zeros((40, 2)), np.arange(39) % 2, r"shape \(40, 2\) and labels \(39,\)"),
        (np.zeros((40, 2)), np.linspace(0, 1, 40), "whole numbers"),
    ],
)
def test_what_cant_be_scored_is_told(score, features, labels, message):
    with pytest.raises(ValueError, match=message):
        score(features, labels)
