# SPDX-License-Identifier: Apache-2.0
"""Lanczos from a start that old eigenvectors are mixed into: it saves products and misses no eigenvalue."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor
from warm_start import extreme_eigenvalues, run_lanczos

from hf_optimizability.linalg.operator import SymmetricOperator


class Rotated(SymmetricOperator):
    """A large matrix of known eigenvalues and eigenvectors without structure (cosine transforms with random signs).

    `angle` turns each eigenvector towards its neighbour in the spectrum, and towards a random other one.
    """

    def __init__(self, eigenvalues: np.ndarray, *, angle: float = 0.0):
        self.size, self.dtype, self.device = len(eigenvalues), torch.float64, torch.device("cpu")
        self._eigenvalues, self._angle = eigenvalues, angle
        rng = np.random.default_rng(7)
        self._signs = rng.choice([-1.0, 1.0], size=(2, self.size, 1))
        self._pairings = [np.arange(self.size).reshape(-1, 2), rng.permutation(self.size).reshape(-1, 2)]

    def eigenvectors(self, indices: list[int]) -> Tensor:
        return torch.from_numpy(self._from_eigenbasis(np.eye(self.size)[:, indices]).T.copy())

    def matmat(self, vectors: Tensor) -> Tensor:
        coordinates = self._into_eigenbasis(vectors.numpy())
        return torch.from_numpy(self._from_eigenbasis(self._eigenvalues[:, None] * coordinates))

    def _from_eigenbasis(self, columns: np.ndarray) -> np.ndarray:
        columns = self._signs[0] * self._turned(self._turned(columns, 0, self._angle), 1, self._angle)
        columns = self._signs[1] * scipy.fft.dct(columns, axis=0, norm="ortho")
        return scipy.fft.dct(columns, axis=0, norm="ortho")

    def _into_eigenbasis(self, columns: np.ndarray) -> np.ndarray:
        columns = self._signs[1] * scipy.fft.idct(columns, axis=0, norm="ortho")
        columns = self._signs[0] * scipy.fft.idct(columns, axis=0, norm="ortho")
        return self._turned(self._turned(columns, 1, -self._angle), 0, -self._angle)

    def _turned(self, columns: np.ndarray, pairing: int, angle: float) -> np.ndarray:
        first, second = self._pairings[pairing].T
        turned = np.empty_like(columns)
        turned[first] = np.cos(angle) * columns[first] - np.sin(angle) * columns[second]
        turned[second] = np.sin(angle) * columns[first] + np.cos(angle) * columns[second]
        return turned


def outliers_and_bulk(kind: str, size: int = 2000) -> np.ndarray:
    """Outliers in a geometric row or evenly spaced, the largest at 0, the smallest at 14, and a normal bulk."""
    bulk = np.random.default_rng(0).normal(size=size - 24)
    if kind == "geometric":
        return np.concatenate([np.geomspace(9, 0.5, 14), -np.geomspace(5.9, 0.5, 10), bulk / 20])
    return np.concatenate([np.linspace(10, 3, 14), np.linspace(-5, -2, 10), bulk / 3])


def drifted(kind: str, seed: int) -> tuple[Tensor, np.ndarray, Rotated]:
    """Ritz vectors of both ends, and a matrix of eigenvectors turned by 7 % and eigenvalues up by 10 to 30 %."""
    eigenvalues = outliers_and_bulk(kind)
    _, old = run_lanczos(Rotated(eigenvalues), None, max_hvps=100, seed=9)
    later = eigenvalues * np.random.default_rng(seed).uniform(1.1, 1.3, size=len(eigenvalues))
    return old.combine(old.vectors[:, [-1, 0]].T), later, Rotated(later, angle=0.07)


@pytest.mark.parametrize("kind", ["geometric", "even"])
class TestWarmStart:
    def test_saves_products_of_the_largest_eigenvalue(self, kind: str):
        """Would save less with a larger share of the old vector, which hides what it does not know of for longer."""
        counts = []
        for seed in range(16):
            warm_start, _, operator = drifted(kind, seed)
            runs = [run_lanczos(operator, start, max_hvps=100, seed=seed) for start in (None, warm_start[:1])]
            counts.append([spent.top_converged for spent, _ in runs])
        cold, warm = np.sum(counts, axis=0)
        assert warm <= 0.75 * cold

    def test_converges_to_the_ends(self, kind: str):
        for seed in range(4):
            warm_start, eigenvalues, operator = drifted(kind, seed)
            cold, _ = run_lanczos(operator, None, max_hvps=100, seed=seed)
            warm, krylov = run_lanczos(operator, warm_start, max_hvps=100, seed=seed)
            top, bottom = extreme_eigenvalues(krylov)
            assert warm.ends_converged <= cold.ends_converged
            assert top.value == pytest.approx(eigenvalues.max(), rel=1e-2)
            assert bottom.value == pytest.approx(eigenvalues.min(), rel=1e-2)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_does_not_miss_an_eigenvalue_that_its_vectors_know_nothing_of(self, kind: str, sign: int):
        """The old vectors are exact eigenvectors still, orthogonal to the new outlier: their residual is 0 at once."""
        eigenvalues = outliers_and_bulk(kind)
        old = Rotated(eigenvalues).eigenvectors([0, 14])
        eigenvalues[1000] = 1.3 * (eigenvalues.max() if sign == 1 else eigenvalues.min())
        for seed in range(10):
            _, krylov = run_lanczos(Rotated(eigenvalues), old, max_hvps=100, seed=seed)
            end = extreme_eigenvalues(krylov)[0 if sign == 1 else 1]
            assert end.converged and end.value == pytest.approx(eigenvalues[1000], rel=1e-2)

    def test_vectors_of_no_use_do_no_harm(self, kind: str):
        eigenvalues = outliers_and_bulk(kind)
        inner = Rotated(eigenvalues).eigenvectors([500, 600])
        _, krylov = run_lanczos(Rotated(eigenvalues), inner, max_hvps=100, seed=0)
        top, bottom = extreme_eigenvalues(krylov)
        assert top.value == pytest.approx(eigenvalues.max(), rel=1e-3)
        assert bottom.value == pytest.approx(eigenvalues.min(), rel=1e-3)


def test_waits_in_many_dimensions_for_what_its_vector_does_not_know_of():
    """After three products the residual at the old eigenvalue 10 is small, and the new one, 12, has not shown yet."""
    size = 4_000_000
    bulk = np.random.default_rng(0).normal(size=size - 2) / 40
    diagonal = torch.from_numpy(np.concatenate([[10.0, 12.0], bulk]))

    class Diagonal(SymmetricOperator):
        dtype, device = torch.float64, torch.device("cpu")

        def __init__(self) -> None:
            self.size = size

        def matmat(self, vectors: Tensor) -> Tensor:
            return diagonal[:, None] * vectors

    old = torch.zeros(1, size, dtype=torch.float64)
    old[0, 0] = 1
    seen = []
    for products in (3, 6):
        spent, krylov = run_lanczos(Diagonal(), old, max_hvps=products, seed=0)
        seen.append((spent.top is not None, extreme_eigenvalues(krylov)[0].value > 11.9, spent.top_converged))
    assert seen == [(True, False, None), (True, True, 5)]  # the residual alone would have been believed
