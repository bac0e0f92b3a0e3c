# SPDX-License-Identifier: Apache-2.0
"""One pass over a matrix of known eigenvalues: what it finds, and what it spends."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group, wasserstein_distance
from torch import Tensor

from hf_optimizability.linalg.operator import DenseOperator, SymmetricOperator
from hf_optimizability.linalg.spectrum_and_trace import (
    HessianEstimates,
    SpectrumAndTrace,
    TraceMethod,
    estimate_spectrum,
    estimate_trace,
)
from hf_optimizability.serialization import structure


SIZE = 200
EIGENVALUES = np.concatenate([[-12.0, 25.0, 60.0, 100.0], np.linspace(-1, 2, SIZE - 4)])
SEGMENTS = [[slice(0, 50), slice(150, 200)], [slice(50, 150)]]


class Counting(DenseOperator):
    """A dense matrix that counts what it is multiplied with."""

    def __init__(self, matrix: Tensor):
        super().__init__(matrix)
        self.products = 0

    def matmat(self, vectors: Tensor) -> Tensor:
        self.products += vectors.shape[1]
        return super().matmat(vectors)


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    axes = ortho_group.rvs(SIZE, random_state=0)
    return torch.from_numpy(axes * EIGENVALUES @ axes.T)


def made(
    operator: SymmetricOperator,
    *,
    max_hvps: int = 400,
    eigen_tolerance: float = 1e-3,
    trace_tolerance: float = 0.05,
    trace_method: TraceMethod = "hutchinson",
    **options: Any,
) -> SpectrumAndTrace:
    """Half of the products for the spectrum, the rest for the trace."""
    spectrum = estimate_spectrum(operator, tolerance=eigen_tolerance, max_hvps=max_hvps // 2, seed=0, **options)
    trace = estimate_trace(
        operator,
        SEGMENTS,
        tolerance=trace_tolerance,
        max_hvps=max_hvps - spectrum.hvps,
        seed=1,
        method=trace_method,
        deflating_vectors=spectrum.deflating_vectors,
    )
    return SpectrumAndTrace.of(spectrum, trace)


def test_all_is_found_within_its_error(matrix: Tensor):
    found = made(DenseOperator(matrix))
    estimates = found.estimates
    assert estimates.converged
    assert abs(estimates.lambda_max.value - 100) <= estimates.lambda_max.residual <= 0.1
    assert abs(estimates.lambda_min.value + 12) <= estimates.lambda_min.residual <= 0.012
    assert abs(estimates.trace.value - EIGENVALUES.sum()) <= 4 * estimates.trace.std_error
    diagonal = matrix.diagonal()
    for segment, rows in zip(found.segments, SEGMENTS, strict=True):
        assert abs(segment.value - sum(float(diagonal[part].sum()) for part in rows)) <= 4 * segment.std_error
    assert (found.diagonal - diagonal).norm() <= 3 * estimates.trace.std_error
    assert float(found.diagonal.sum()) == pytest.approx(estimates.trace.value, rel=1e-9)
    norm = estimates.density.frobenius_norm
    assert abs(norm.value - math.sqrt((EIGENVALUES**2).sum())) <= 4 * norm.std_error
    mass = estimates.density.negative_mass
    assert mass.low <= (EIGENVALUES < 0).mean() <= mass.high


def test_the_density_is_near_the_exact_spectrum(matrix: Tensor):
    density = made(DenseOperator(matrix)).estimates.density
    assert sum(density.weights) == pytest.approx(1, rel=1e-12)
    assert wasserstein_distance(density.nodes, EIGENVALUES, density.weights) < 0.3
    shuffled = np.roll(density.weights, 1)
    assert wasserstein_distance(density.nodes, EIGENVALUES, shuffled) > 0.6


def test_zeros_that_were_left_out_count_in_the_density(matrix: Tensor):
    density = made(DenseOperator(matrix), left_out=3 * SIZE).estimates.density
    everything = np.concatenate([EIGENVALUES, np.zeros(3 * SIZE)])
    assert wasserstein_distance(density.nodes, everything, density.weights) < 0.08


@pytest.mark.parametrize("max_hvps", [8, 13, 64])
@pytest.mark.parametrize("trace_method", ["hutchinson", "hutch++", "xtrace"])
def test_no_more_is_spent_than_allowed(matrix: Tensor, max_hvps: int, trace_method: TraceMethod):
    operator = Counting(matrix)
    found = made(operator, trace_method=trace_method, max_hvps=max_hvps, eigen_tolerance=1e-12, trace_tolerance=1e-12)
    assert operator.products in (max_hvps, max_hvps - 1)  # XTrace takes pairs
    assert not found.estimates.converged


def test_vectors_that_have_not_converged_deflate_nothing(matrix: Tensor):
    early = estimate_spectrum(DenseOperator(matrix), tolerance=1e-12, max_hvps=5, seed=0)
    assert early.eigenvectors is not None and early.deflating_vectors is None


def test_the_largest_eigenvalues_are_taken_out_of_the_variance(matrix: Tensor):
    """‖A‖_F² is 14,600 with the four large eigenvalues, and 250 without."""
    probes = made(DenseOperator(matrix), trace_tolerance=0.03).estimates.trace.hvps
    assert probes < 2 * (1.5 * 250 + 12**2) / (0.03 * EIGENVALUES.sum()) ** 2 + 8
    assert probes < 0.1 * 2 * (EIGENVALUES**2).sum() / (0.03 * EIGENVALUES.sum()) ** 2


def test_exact_trace_and_power_iteration(matrix: Tensor):
    found = made(DenseOperator(matrix), trace_method="exact", method="power_iteration").estimates
    assert found.trace.value == pytest.approx(EIGENVALUES.sum(), rel=1e-12)
    assert found.lambda_max.value == pytest.approx(100, rel=1e-3)
    assert found.lambda_min is None and found.density is None


def test_several_eigenvalues_at_each_end(matrix: Tensor):
    found = made(DenseOperator(matrix), num_eigenvalues=3, max_hvps=800).estimates
    assert [estimate.value for estimate in found.top] == pytest.approx([100, 60, 25], rel=1e-3)
    assert found.bottom[0].value == pytest.approx(-12, rel=1e-3)


def test_estimates_come_back_from_json(matrix: Tensor):
    estimates = made(DenseOperator(matrix)).estimates
    assert structure(HessianEstimates, json.loads(json.dumps(asdict(estimates)))) == estimates
