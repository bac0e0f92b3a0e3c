# SPDX-License-Identifier: Apache-2.0
"""The jackknife over parts of the data, against its definition and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from hf_optimizability.linalg.statistics import (
    jackknife,
    jackknife_covariance,
    jackknife_variance,
    standard_error,
)


def test_equal_parts_give_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).normal(size=12)
    assert jackknife(values, np.full(12, 7)) == pytest.approx(scipy.stats.sem(values), rel=1e-12)


def test_unequal_parts_by_leaving_each_out():
    """The general formula of Busing et al., with the means without a part computed anew."""
    rng = np.random.default_rng(1)
    values, weights = rng.normal(size=9), rng.integers(1, 30, size=9).astype(float)
    mean = np.average(values, weights=weights)
    without = np.array([np.average(np.delete(values, i), weights=np.delete(weights, i)) for i in range(9)])
    h = weights.sum() / weights
    estimate = 9 * mean - np.sum((1 - 1 / h) * without)
    variance = np.mean((h * mean - (h - 1) * without - estimate) ** 2 / (h - 1))
    assert jackknife(values, weights) == pytest.approx(math.sqrt(variance), rel=1e-12)


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("parts", [4, 10, 16])
def test_intervals_hold_the_truth_as_often_as_they_say(parts: int, unequal: bool):
    """Means of skewed items (χ² with 3 degrees of freedom, mean 3) in batches, Student's t."""
    rng = np.random.default_rng(parts)
    held = 0
    for _ in range(1000):
        counts = rng.integers(8, 25, size=parts) if unequal else np.full(parts, 16)
        means = [rng.chisquare(3, size=count).mean() for count in counts]
        margin = scipy.stats.t.ppf(0.975, parts - 1) * jackknife(means, counts)
        held += abs(np.average(means, weights=counts) - 3) <= margin
    assert 920 <= held <= 980


def test_one_part_tells_nothing_of_others():
    assert math.isnan(jackknife([1.0], [4]))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -2.0]])
def test_bad_weights(weights: list[float]):
    with pytest.raises(ValueError, match="as many weights, all above 0"):
        jackknife([1.0, 2.0], weights)


def test_the_standard_error_of_means_is_scipys():
    samples = np.random.default_rng(0).normal(size=(9, 3))
    assert standard_error(samples) == pytest.approx(scipy.stats.sem(samples), rel=1e-12)


def test_variance_and_covariance_from_leave_one_out_values_of_a_mean():
    samples = np.random.default_rng(0).normal(size=(9, 2))
    without = (samples.sum(axis=0) - samples) / 8
    expected = np.cov(samples.T) / 9
    assert jackknife_variance(without[:, 0]) == pytest.approx(expected[0, 0], rel=1e-12)
    assert jackknife_covariance(without, np.full(9, 4)) == pytest.approx(expected, rel=1e-12)


def test_draws_of_unequal_size_have_the_covariance_of_the_weighted_mean():
    values, weights = np.random.default_rng(0).normal(size=6), np.array([1, 5, 2, 2, 7, 3])
    without = ((weights * values).sum() - weights * values) / (weights.sum() - weights)
    assert jackknife_covariance(without[:, None], weights)[0, 0] == pytest.approx(jackknife(values, weights) ** 2)
