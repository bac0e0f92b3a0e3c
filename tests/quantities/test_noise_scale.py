# SPDX-License-Identifier: Apache-2.0
"""The gradient noise scale on gradients whose noise scale is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from hf_optimizability.curvature.gradient import gradient
from hf_optimizability.objective.objective import Objective
from hf_optimizability.quantities.noise_scale import NoiseScale, noise_from_products, noise_scale
from tests.support import tiny_models


def sums_of_gradients(
    counts: np.ndarray, *, size: int, decay: float, scale: float, rng: np.random.Generator
) -> tuple[np.ndarray, float, float]:
    """Summed gradients of parts, with item noise of variances 1/iᵈᵉᶜᵃʸ; ‖g‖² and tr Σ = scale ‖g‖²."""
    deviations = np.arange(1, size + 1) ** (-decay / 2)
    trace = float((deviations**2).sum())
    signal = rng.normal(size=size) * deviations
    signal *= math.sqrt(trace / scale) / np.linalg.norm(signal)
    noise = rng.normal(size=(len(counts), size)) * deviations
    return counts[:, None] * signal + np.sqrt(counts)[:, None] * noise, trace / scale, trace


def estimated(sums: np.ndarray, counts: np.ndarray) -> NoiseScale:
    return noise_from_products((sums**2).sum(axis=1), sums @ sums.sum(axis=0) / counts.sum(), counts)


def plain(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """‖g‖² and tr Σ as analysis of variance has them."""
    means, mean = sums / counts[:, None], sums.sum(axis=0) / counts.sum()
    trace = (counts * ((means - mean) ** 2).sum(axis=1)).sum() / (len(counts) - 1)
    return np.array([mean @ mean - trace / counts.sum(), trace])


def test_delete_one_values_are_those_of_doing_it_again():
    counts = np.array([3, 1, 4, 1, 5, 9, 2])
    rng = np.random.default_rng(0)
    sums, _, _ = sums_of_gradients(counts, size=20, decay=0.5, scale=3.0, rng=rng)
    found = estimated(sums, counts)
    signal, trace = plain(sums, counts)
    assert found.gradient_squared.value == pytest.approx(signal, rel=1e-12)
    assert found.trace_covariance.value == pytest.approx(trace, rel=1e-12)
    assert found.noise_scale.value == pytest.approx(trace / signal, rel=1e-12)
    assert (found.items, found.parts) == (25, 7)
    rest = np.array([plain(np.delete(sums, part, axis=0), np.delete(counts, part)) for part in range(7)])
    deviations = np.sqrt(6 / 7 * ((rest - rest.mean(axis=0)) ** 2).sum(axis=0))
    assert found.trace_covariance.std_error == pytest.approx(deviations[1], rel=1e-9)
    assert found.trace_covariance.high == pytest.approx(trace + student.ppf(0.975, 6) * deviations[1], rel=1e-9)
    assert deviations[0] / 2 < found.gradient_squared.std_error**2 / deviations[0] < deviations[0]


def test_signal_and_noise_are_unbiased_with_uneven_parts():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, size=12)
    errors = []
    for _ in range(2000):
        sums, signal, trace = sums_of_gradients(counts, size=30, decay=0, scale=100.0, rng=rng)
        found = estimated(sums, counts)
        errors.append([found.gradient_squared.value - signal, found.trace_covariance.value - trace])
    assert (np.abs(np.mean(errors, axis=0)) < 3 * np.std(errors, axis=0) / math.sqrt(len(errors))).all()
    assert (np.std(errors, axis=0) / math.sqrt(len(errors)) < [0.01, 0.2]).all()


@pytest.mark.parametrize("decay", [0, 1], ids="decay {}".format)
@pytest.mark.parametrize("size", [50, pytest.param(1000, marks=pytest.mark.slow)], ids="size {}".format)
@pytest.mark.parametrize("share", [0.3, 1, 3, 10], ids="share {}".format)
def test_intervals_hold_the_truth_as_often_as_they_say(share: float, size: int, decay: float):
    """`share`: the noise scale as a multiple of the number of items."""
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(400):
        counts = rng.integers(1, 5, size=48)
        scale = share * int(counts.sum())
        sums, signal, trace = sums_of_gradients(counts, size=size, decay=decay, scale=scale, rng=rng)
        found = estimated(sums, counts)
        truth = [(found.noise_scale, scale), (found.gradient_squared, signal), (found.trace_covariance, trace)]
        hits.append([estimate.low <= value <= estimate.high for estimate, value in truth])
        assert all(estimate.low <= estimate.value <= estimate.high for estimate, _ in truth)
    rates = np.mean(hits, axis=0)
    assert (rates >= 0.92).all() and (rates <= 0.98).all()


def test_a_gradient_lost_in_its_noise_has_no_upper_end():
    rng = np.random.default_rng(0)
    counts = np.ones(32)
    sums, _, _ = sums_of_gradients(counts, size=100, decay=0, scale=1e6, rng=rng)
    found = estimated(sums, counts).noise_scale
    assert found.high == math.inf and not found.converged and 32 < found.low < 1e6


def test_parts_without_noise():
    counts = np.array([1, 2, 3])
    found = estimated(counts[:, None] * np.array([[3.0, 4.0]]), counts)
    assert found.noise_scale.value == found.noise_scale.high == found.trace_covariance.value == 0
    assert found.gradient_squared.value == pytest.approx(25)


@pytest.mark.parametrize("size", [1, 2])
def test_of_a_model(size: int):
    """Against the gradients of its parts side by side, uneven ones."""
    model = tiny_models.make("gpt2").eval()
    objective = Objective(model, tiny_models.cut(tiny_models.examples("gpt2", 11), size))
    sums, counts = [], []
    for loss, count in objective.losses():
        sums.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, objective.parameters)]).numpy())
        counts.append(count)
    assert len(set(counts)) > 2
    truth = plain(np.array(sums), np.array(counts))
    mean = gradient(objective)
    for found in (noise_scale(objective), noise_scale(objective, mean_gradient=mean.tensors)):
        assert [found.gradient_squared.value, found.trace_covariance.value] == pytest.approx(truth.tolist(), rel=1e-6)
        assert (found.items, found.parts) == (mean.items, len(counts))
    assert all(parameter.grad is None for parameter in objective.parameters)


def test_two_parts_are_too_few():
    with pytest.raises(ValueError, match="at least 3 parts, not 2"):
        noise_from_products(np.ones(2), np.ones(2), np.ones(2))
