# SPDX-License-Identifier: Apache-2.0
"""The Krylov decomposition, against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_optimizability.linalg.krylov import BASIS_CHUNK, KrylovDecomposition
from hf_optimizability.linalg.row_partition import RowPartition


SIZE = 60


def symmetric() -> Tensor:
    matrix = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return matrix + matrix.T


def started(number: int) -> KrylovDecomposition:
    starts = torch.randn(number, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return KrylovDecomposition(starts, RowPartition.whole(SIZE))


def grow(krylov: KrylovDecomposition, matrix: Tensor, *, blocks: int) -> None:
    for _ in range(blocks):
        krylov.absorb(krylov.extend() @ matrix)


def basis_of(krylov: KrylovDecomposition) -> Tensor:
    return krylov.combine(np.eye(len(krylov.basis)))


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("number", [1, 3])
class TestDecomposition:
    """AQᵀ = QᵀT + ZᵀCᵀ with orthonormal rows of Q, across chunks of the basis and restarts."""

    def grown(self, number: int, *, restarted: bool) -> KrylovDecomposition:
        krylov = started(number)
        grow(krylov, symmetric(), blocks=2 * BASIS_CHUNK // number)
        if restarted:
            krylov.restart(keep=6)
            grow(krylov, symmetric(), blocks=3)
        return krylov

    def test_the_basis_is_orthonormal(self, number: int, restarted: bool):
        basis = basis_of(self.grown(number, restarted=restarted))
        assert torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-7)

    def test_multiplies_without_a_further_product(self, number: int, restarted: bool):
        krylov = self.grown(number, restarted=restarted)
        assert krylov.restarted == restarted
        products = krylov.multiply(np.eye(len(krylov.basis)))
        assert torch.allclose(products, basis_of(krylov) @ symmetric(), atol=1e-6)

    def test_ritz_pairs_are_those_of_the_projected_matrix(self, number: int, restarted: bool):
        krylov = self.grown(number, restarted=restarted)
        basis = basis_of(krylov)
        projected = basis @ symmetric() @ basis.T
        assert krylov.values == pytest.approx(np.linalg.eigvalsh(projected.numpy()), abs=1e-6)
        top = krylov.eigenvalues(1, 0.01, 1, 0)[0]
        ritz = krylov.combine(krylov.vectors[:, -1:].T)[0]
        residual = float((symmetric() @ ritz - top.value * ritz).norm())
        assert top.residual == pytest.approx(residual, rel=1e-6)


def test_the_starts_are_in_the_basis():
    krylov = started(2)
    grow(krylov, symmetric(), blocks=3)
    starts = torch.randn(2, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(krylov.combine(krylov.starts), starts, atol=1e-10)


def test_is_exhausted_once_the_block_has_no_new_direction():
    """In a matrix of rank 4 one start spans 5 dimensions; two meet before they have 10."""
    matrix = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    matrix[range(4), range(4)] = torch.tensor([-3.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    for number, dimensions in ((1, 5), (2, 6)):
        krylov = started(number)
        while not krylov.exhausted:
            grow(krylov, matrix, blocks=1)
        assert len(krylov.basis) == dimensions
