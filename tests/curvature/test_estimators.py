# SPDX-License-Identifier: Apache-2.0
"""Estimators on matrices whose spectrum is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from hf_optimizability.curvature.lanczos import lanczos
from hf_optimizability.curvature.operators import DenseOperator, SymmetricOperator
from hf_optimizability.curvature.power_iteration import power_iteration
from hf_optimizability.curvature.trace import LOCKSTEP, exact_trace, hutchinson


def matrix(eigenvalues: np.ndarray, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with the given eigenvalues and random eigenvectors."""
    size = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    return torch.from_numpy((basis * eigenvalues) @ basis.T).to(dtype)


class DiagonalOperator(SymmetricOperator):
    """A large matrix of known eigenvalues."""

    def __init__(self, eigenvalues: np.ndarray):
        self._diagonal = torch.from_numpy(eigenvalues)
        self.size, self.dtype, self.device = len(eigenvalues), torch.float64, torch.device("cpu")

    def matmat(self, vectors: Tensor) -> Tensor:
        return self._diagonal[:, None] * vectors


def network_like(size: int = 300) -> np.ndarray:
    """A few outliers at both ends and a bulk near zero, as Hessians of networks have them."""
    return np.sort(np.concatenate([[-6.0, -2.0, 9.0, 5.0], np.random.default_rng(1).normal(size=size - 4) / 50]))


class TestLanczos:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_bounds_hold_at_every_number_of_steps(self, dtype: torch.dtype):
        eigenvalues = network_like()
        operator = DenseOperator(matrix(eigenvalues, dtype=dtype))
        rounding = 9 * torch.finfo(dtype).eps
        for steps in range(1, 25):
            run = lanczos(operator, tolerance=1e-9, max_hvps=steps, seed=0)
            for estimate in (run.lambda_max, run.lambda_min):
                distance = np.abs(eigenvalues - estimate.value).min()
                assert distance <= estimate.residual + rounding
                assert estimate.low <= estimate.value <= estimate.high
            assert run.lambda_max.hvps == len(run.ritz_values) <= steps
            assert run.lambda_min.value >= -6 - 10 * rounding and run.lambda_max.value <= 9 + 10 * rounding

    def test_stops_by_its_tolerance(self):
        operator = DenseOperator(matrix(network_like()))
        spent = []
        for tolerance in (0.1, 1e-3, 1e-8):
            run = lanczos(operator, tolerance=tolerance, max_hvps=200, seed=0)
            assert run.lambda_max.converged and run.lambda_min.converged
            assert run.lambda_max.residual <= tolerance * 9 and run.lambda_min.residual <= tolerance * 6
            spent.append(run.lambda_max.hvps)
        assert spent[0] < spent[1] < spent[2] < 100

    def test_says_when_it_did_not_converge(self):
        run = lanczos(DenseOperator(matrix(network_like())), tolerance=1e-6, max_hvps=5, seed=0)
        assert not run.lambda_max.converged and run.lambda_max.hvps == 5

    def test_a_small_end_is_not_taken_for_converged_too_soon(self):
        """λ_max = 60 beside λ_min = −480, the rest 0: at first the upper Ritz value is small, as is its residual."""
        eigenvalues = np.concatenate([[-480.0, 60.0], np.zeros(2000)])
        operator = DiagonalOperator(eigenvalues)
        run = lanczos(operator, tolerance=0.05, max_hvps=50, seed=3)
        assert run.lambda_max.value == pytest.approx(60, rel=0.05)

    @pytest.mark.parametrize("steps", range(2, 14))
    def test_the_bulk_near_zero_is_not_taken_for_the_smallest_eigenvalue(self, steps: int):
        """λ_min = −500 is small beside λ_max = 80000, so for some steps the lower Ritz value is near 0."""
        bulk = np.random.default_rng(0).normal(size=20_000)
        operator = DiagonalOperator(np.concatenate([[8e4, 3e4, 4e3, -500.0], bulk]))
        estimate = lanczos(operator, tolerance=0.05, max_hvps=steps, seed=0).lambda_min
        assert estimate.converged == (abs(estimate.value + 500) < 25)

    def test_keeps_its_basis_orthogonal(self):
        """Without reorthogonalization, found eigenvalues come back as copies once they have converged."""
        run = lanczos(
            DenseOperator(matrix(network_like(), dtype=torch.float32)), tolerance=1e-30, max_hvps=120, seed=0
        )
        assert np.sum(np.abs(np.array(run.ritz_values) - 9) < 0.01) == 1

    def test_quadrature_weights(self):
        run = lanczos(DenseOperator(matrix(network_like())), tolerance=1e-30, max_hvps=20, seed=0)
        values, weights = np.array(run.ritz_values), np.array(run.ritz_weights)
        start = (
            torch.randint(0, 2, (300,), generator=torch.Generator().manual_seed(0), dtype=torch.int8).double() * 2 - 1
        )
        moment = start @ matrix(network_like()) @ start / 300
        assert weights.sum() == pytest.approx(1, rel=1e-12)
        assert weights @ values == pytest.approx(float(moment), rel=1e-10)

    @pytest.mark.parametrize("eigenvalues", [np.zeros(7), np.full(7, -2.5), np.array([3.0])])
    def test_ends_when_the_krylov_space_is_exhausted(self, eigenvalues: np.ndarray):
        run = lanczos(DenseOperator(matrix(eigenvalues)), tolerance=1e-6, max_hvps=50, seed=0)
        assert run.lambda_max.hvps <= 2 and run.lambda_max.converged
        assert run.lambda_max.value == pytest.approx(eigenvalues[0], abs=1e-12)


class TestPowerIteration:
    def test_finds_the_largest_value_where_it_dominates(self):
        estimate = power_iteration(DenseOperator(matrix(network_like())), tolerance=1e-4, max_hvps=500, seed=0)
        assert estimate.converged and abs(estimate.value - 9) <= estimate.residual <= 9e-4

    def test_finds_the_largest_value_beside_a_larger_negative_one(self):
        eigenvalues = -network_like()
        estimate = power_iteration(DenseOperator(matrix(eigenvalues)), tolerance=1e-3, max_hvps=2000, seed=0)
        assert estimate.converged and abs(estimate.value - 6) <= estimate.residual <= 6e-3

    def test_says_when_it_did_not_converge(self):
        estimate = power_iteration(DenseOperator(matrix(network_like())), tolerance=1e-6, max_hvps=6, seed=0)
        assert not estimate.converged and estimate.hvps == 6

    def test_zero(self):
        estimate = power_iteration(DenseOperator(torch.zeros(5, 5)), tolerance=1e-3, max_hvps=9, seed=0)
        assert (estimate.value, estimate.residual, estimate.converged) == (0, 0, True)


class TestHutchinson:
    SEGMENTS = ([slice(0, 100), slice(250, 300)], [slice(100, 250)])

    def traces(self, dense: Tensor) -> list[float]:
        diagonal = dense.diagonal()
        return [float(sum(diagonal[part].sum() for part in segment)) for segment in self.SEGMENTS]

    def test_exact(self):
        dense = matrix(network_like())
        result = exact_trace(DenseOperator(dense), self.SEGMENTS)
        assert result.total.value == pytest.approx(float(dense.trace()), rel=1e-12)
        assert [segment.value for segment in result.segments] == pytest.approx(self.traces(dense), rel=1e-12)

    def test_intervals_hold_the_truth_as_often_as_they_say(self):
        """95 % of 400 seeds, give or take three standard deviations of that count."""
        dense = matrix(network_like())
        truths = [float(dense.trace()), *self.traces(dense)]
        held = np.zeros(3)
        for seed in range(400):
            result = hutchinson(DenseOperator(dense), self.SEGMENTS, tolerance=1e-9, max_hvps=16, seed=seed)
            estimates = [result.total, *result.segments]
            held += [e.low <= truth <= e.high for e, truth in zip(estimates, truths, strict=True)]
        assert np.all(np.abs(held / 400 - 0.95) <= 0.033)

    def test_standard_error_is_that_of_rademacher_probes(self):
        """Var = 2 (‖A‖_F² − Σ aᵢᵢ²) / m."""
        dense = matrix(network_like())
        result = hutchinson(DenseOperator(dense), self.SEGMENTS, tolerance=1e-9, max_hvps=4000, seed=0)
        variance = 2 * float((dense**2).sum() - (dense.diagonal() ** 2).sum()) / 4000
        assert result.total.std_error == pytest.approx(variance**0.5, rel=0.05)

    def test_two_probes(self):
        """On paper: mean (a + b) / 2, standard error |a − b| / 2, Student's t with one degree of freedom 12.706."""
        dense, generator = matrix(network_like()), torch.Generator().manual_seed(5)
        probes = [
            torch.randint(0, 2, (300,), generator=generator, dtype=torch.int8).double() * 2 - 1 for _ in range(2)
        ]
        a, b = (float(probe @ dense @ probe) for probe in probes)
        total = hutchinson(DenseOperator(dense), self.SEGMENTS, tolerance=0.1, max_hvps=2, seed=5).total
        assert (total.value, total.std_error) == pytest.approx(((a + b) / 2, abs(a - b) / 2), rel=1e-10)
        assert total.high - total.value == pytest.approx(12.7062047 * total.std_error, rel=1e-8)

    def test_stops_by_its_tolerance_within_its_budget(self):
        dense = matrix(np.linspace(1, 3, 300))
        result = hutchinson(DenseOperator(dense), self.SEGMENTS, tolerance=0.01, max_hvps=1000, seed=0)
        assert result.total.converged and result.total.std_error <= 0.01 * result.total.value
        assert result.total.hvps < 1000 and result.total.hvps % LOCKSTEP == 0
        short = hutchinson(DenseOperator(matrix(network_like())), self.SEGMENTS, tolerance=0.01, max_hvps=7, seed=0)
        assert short.total.hvps == 7 and not short.total.converged

    def test_same_seed_same_numbers(self):
        operator = DenseOperator(matrix(network_like()))
        options = {"tolerance": 0.1, "max_hvps": 8}
        first, again, other = (hutchinson(operator, self.SEGMENTS, seed=seed, **options) for seed in (0, 0, 1))
        assert first == again != other


def test_operators_work_in_scipy():
    operator = DenseOperator(matrix(network_like())).to_scipy()
    found = scipy.sparse.linalg.eigsh(operator, k=2, which="BE", return_eigenvectors=False)
    assert sorted(found) == pytest.approx([-6, 9], rel=1e-10)
