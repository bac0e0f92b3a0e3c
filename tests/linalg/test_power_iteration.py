# SPDX-License-Identifier: Apache-2.0
"""Estimators on matrices whose spectrum is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from hf_optimizability.linalg.operator import DenseOperator
from hf_optimizability.linalg.power_iteration import power_iteration


def matrix(eigenvalues: np.ndarray, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with the given eigenvalues and random eigenvectors."""
    size = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    return torch.from_numpy((basis * eigenvalues) @ basis.T).to(dtype)


def network_like(size: int = 300) -> np.ndarray:
    """A few outliers at both ends and a bulk near zero, as Hessians of networks have them."""
    return np.sort(np.concatenate([[-6.0, -2.0, 9.0, 5.0], np.random.default_rng(1).normal(size=size - 4) / 50]))


class TestPowerIteration:
    def test_finds_the_largest_value_where_it_dominates(self):
        estimate = power_iteration(DenseOperator(matrix(network_like())), tolerance=1e-4, max_hvps=500, seed=0)
        assert estimate.converged and abs(estimate.value - 9) <= estimate.residual <= 9e-4

    def test_finds_the_largest_value_beside_a_larger_negative_one(self):
        eigenvalues = -network_like()
        estimate = power_iteration(DenseOperator(matrix(eigenvalues)), tolerance=1e-3, max_hvps=2000, seed=0)
        assert estimate.converged and abs(estimate.value - 6) <= estimate.residual <= 6e-3

    @pytest.mark.parametrize("seed", range(6))
    def test_finds_an_eigenvector_that_random_signs_may_be_orthogonal_to(self, seed: int):
        pair = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])
        operator = DenseOperator(torch.block_diag(pair, torch.tensor([[1.0]])))
        estimate = power_iteration(operator, tolerance=1e-3, max_hvps=50, seed=seed)
        assert estimate.converged and estimate.value == pytest.approx(4, rel=1e-3)

    def test_says_when_it_did_not_converge(self):
        estimate = power_iteration(DenseOperator(matrix(network_like())), tolerance=1e-6, max_hvps=6, seed=0)
        assert not estimate.converged and estimate.hvps == 6

    def test_zero(self):
        estimate = power_iteration(DenseOperator(torch.zeros(5, 5)), tolerance=1e-3, max_hvps=9, seed=0)
        assert (estimate.value, estimate.residual, estimate.converged) == (0, 0, True)


def test_operators_work_in_scipy():
    operator = DenseOperator(matrix(network_like())).to_scipy()
    found = scipy.sparse.linalg.eigsh(operator, k=2, which="BE", return_eigenvectors=False)
    assert sorted(found) == pytest.approx([-6, 9], rel=1e-10)
