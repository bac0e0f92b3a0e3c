# SPDX-License-Identifier: Apache-2.0
"""Spectral densities against matrices whose spectrum is known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from hf_optimizability.curvature.density import Density, density
from hf_optimizability.curvature.lanczos import lanczos
from hf_optimizability.curvature.operators import DenseOperator


def rotated(eigenvalues: np.ndarray) -> Tensor:
    """A symmetric matrix with the given eigenvalues and random eigenvectors."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(len(eigenvalues), len(eigenvalues))))
    return torch.from_numpy((basis * eigenvalues) @ basis.T)


def indefinite(size: int = 200) -> np.ndarray:
    rng = np.random.default_rng(1)
    inner = np.concatenate([rng.exponential(size=size - 53), -0.1 * rng.exponential(size=50)])
    return np.concatenate([[8.0, 5.0, -3.0], inner])


def positive(size: int = 200) -> np.ndarray:
    return np.concatenate([[8.0, 5.0], np.random.default_rng(1).exponential(size=size - 2)])


def outliers_at_both_ends(size: int = 200) -> np.ndarray:
    return np.concatenate([[9.0, 5.0, -6.0, -2.0], np.random.default_rng(1).normal(size=size - 4) / 50])


def half_zero(size: int = 200) -> np.ndarray:
    """As where many embedding rows are never used."""
    bulk = np.random.default_rng(1).normal(size=size // 2 - 3) / 5
    return np.concatenate([[9.0, 5.0, -6.0], bulk, np.zeros(size // 2)])


def measured(dense: Tensor, *, steps: int, starts: int, seed: int = 0, width: float | None = None) -> Density:
    run = lanczos(DenseOperator(dense), tolerance=1e-30, max_hvps=steps * starts, seed=seed, starts=starts)
    return density(run.nodes, run.weights, size=len(dense), hvps=run.hvps, tolerance=0.1, width=width)


def papyan(size: int = 1000) -> Tensor:
    """Three spikes on a Marchenko–Pastur bulk: diag(5, 4, 3, 0, …) + ZZᵀ/n (Papyan 2018, arXiv 1811.07062)."""
    noise = np.random.default_rng(0).normal(size=(size, size))
    return torch.from_numpy(np.diag([5.0, 4.0, 3.0, *np.zeros(size - 3)]) + noise @ noise.T / size)


class TestMoments:
    @pytest.mark.parametrize("starts", [1, 4])
    def test_the_first_is_hutchinson_on_the_same_probes(self, starts: int):
        dense = rotated(indefinite())
        run = lanczos(DenseOperator(dense), tolerance=1e-30, max_hvps=5 * starts, seed=0, starts=starts)
        generator = torch.Generator().manual_seed(0)
        probes = torch.stack(
            [
                torch.randint(0, 2, (200,), generator=generator, dtype=torch.int8).double() * 2 - 1
                for _ in range(starts)
            ]
        )
        samples = (probes * (probes @ dense)).sum(dim=1).numpy()
        result = density(run.nodes, run.weights, size=200, hvps=run.hvps, tolerance=0.1)
        assert 200 * result.moments[0].value == pytest.approx(samples.mean(), rel=1e-10)
        if starts > 1:
            std_error = samples.std(ddof=1) / math.sqrt(starts)
            assert 200 * result.moments[0].std_error == pytest.approx(std_error, rel=1e-8)
        squares = ((probes @ dense) ** 2).sum(dim=1).numpy()
        assert result.frobenius_norm.value == pytest.approx(math.sqrt(squares.mean()), rel=1e-10)

    @pytest.mark.parametrize("spectrum", [indefinite, positive, outliers_at_both_ends], ids=lambda f: f.__name__)
    @pytest.mark.parametrize(("starts", "steps"), [(4, 6), (8, 4)])
    def test_intervals_hold_the_truth_as_often_as_they_say(self, spectrum, starts: int, steps: int):
        """95 % of 300 seeds; a few outliers make samples of ‖A‖_F² so skewed that four of them know it less well."""
        eigenvalues = spectrum()
        dense, seeds = rotated(eigenvalues), 300
        trace, squares = eigenvalues.sum(), (eigenvalues**2).sum()
        truths = [trace / 200, squares / 200, math.sqrt(squares), trace**2 / squares]
        held = np.zeros(4)
        for seed in range(seeds):
            result = measured(dense, steps=steps, starts=starts, seed=seed)
            estimates = [*result.moments, result.frobenius_norm, result.effective_rank]
            held += [e.low <= truth <= e.high for e, truth in zip(estimates, truths, strict=True)]
        assert np.all(held / seeds >= [0.92, 0.89, 0.89, 0.89])
        assert held[0] / seeds <= 0.98

    def test_many_starts_find_them(self):
        eigenvalues = indefinite()
        result = measured(rotated(eigenvalues), steps=2, starts=100)
        trace, squares = eigenvalues.sum(), (eigenvalues**2).sum()
        assert result.moments[0].value == pytest.approx(trace / 200, rel=0.05)
        assert result.moments[1].value == pytest.approx(squares / 200, rel=0.1)
        assert result.effective_rank.value == pytest.approx(trace**2 / squares, rel=0.1)
        assert result.frobenius_norm.converged

    def test_a_multiple_of_the_identity(self):
        result = measured(-2.5 * torch.eye(50, dtype=torch.float64), steps=3, starts=2)
        assert result.effective_rank.value == pytest.approx(50, rel=1e-12)
        assert result.negative_mass.value == pytest.approx(1, rel=1e-12)
        assert np.trapezoid(result.density, result.grid) == pytest.approx(1, rel=1e-6)

    def test_zero(self):
        result = measured(torch.zeros(50, 50, dtype=torch.float64), steps=3, starts=2)
        assert (result.effective_rank.value, result.frobenius_norm.value, result.negative_mass.value) == (0, 0, 0)


class TestNegativeMass:
    @pytest.mark.parametrize(
        "spectrum", [indefinite, positive, outliers_at_both_ends, half_zero], ids=lambda f: f.__name__
    )
    @pytest.mark.parametrize(("starts", "steps"), [(1, 12), (4, 6), (4, 12)])
    def test_interval_holds_the_truth(self, spectrum, starts: int, steps: int):
        eigenvalues = spectrum()
        dense = rotated(eigenvalues)
        truth, seeds = np.mean(eigenvalues < 0), 60
        results = [measured(dense, steps=steps, starts=starts, seed=seed).negative_mass for seed in range(seeds)]
        assert np.mean([result.low <= truth <= result.high for result in results]) >= 0.95
        assert all(0 <= result.low <= result.value <= result.high <= 1 + 1e-12 for result in results)

    def test_is_a_mass_and_not_a_count(self):
        """A hundred steps of two starts find every negative outlier: a third of the Ritz values, 2 % of the mass."""
        eigenvalues = np.concatenate([-np.linspace(1, 9, 40), np.random.default_rng(0).uniform(5, 5.1, size=1960)])
        result = measured(torch.diag(torch.from_numpy(eigenvalues)), steps=30, starts=2).negative_mass
        assert result.value == pytest.approx(0.02, abs=0.002)
        assert result.converged and result.high < 0.1

    def test_an_unresolved_bulk_has_not_converged(self):
        result = measured(rotated(half_zero()), steps=6, starts=4).negative_mass
        assert not result.converged and result.high - result.low > 0.3


class TestDistribution:
    def test_masses_and_curve_sum_to_one(self):
        result = measured(rotated(outliers_at_both_ends()), steps=8, starts=4)
        assert sum(result.weights) == pytest.approx(1, rel=1e-12)
        assert np.trapezoid(result.density, result.grid) == pytest.approx(1, rel=1e-6)
        assert result.width == pytest.approx(0.01 * (result.nodes[-1] - result.nodes[0]))
        assert np.diff(result.grid).max() <= result.width / 2

    def test_the_curve_is_smoothed_by_the_stated_width(self):
        """Smoothing adds the kernel's variance to that of the spectrum."""
        result = measured(rotated(indefinite()), steps=8, starts=4, width=0.7)
        grid, curve = np.array(result.grid), np.array(result.density)
        mean = np.trapezoid(grid * curve, grid)
        variance = np.trapezoid((grid - mean) ** 2 * curve, grid)
        first, second = (moment.value for moment in result.moments)
        assert mean == pytest.approx(first, rel=1e-6)
        assert variance == pytest.approx(second - first**2 + 0.7**2, rel=1e-6)
        assert result.width == 0.7

    @pytest.mark.parametrize(("starts", "bound"), [(1, 0.4), (4, 0.25)])
    def test_is_close_to_the_spectrum_and_has_no_ghosts(self, starts: int, bound: float):
        """In float32, after so many steps that outliers come back as copies without reorthogonalization."""
        eigenvalues = np.concatenate([[60.0, 40.0, -50.0], np.random.default_rng(0).uniform(-1, 1, size=386)])
        operator = DenseOperator(rotated(eigenvalues).float())
        run = lanczos(operator, tolerance=0, max_hvps=60 * starts, seed=0, starts=starts, num_eigenvalues=25)
        assert len(run.nodes) == 60 * starts
        result = density(run.nodes, run.weights, size=389, hvps=run.hvps, tolerance=0.1)
        assert wasserstein_distance(result.nodes, eigenvalues, result.weights) < bound
        assert [np.sum(np.abs(run.nodes - outlier) < 5) for outlier in (60, 40, -50)] == [1, 1, 1]

    def test_papyans_spikes_and_bulk(self):
        dense = papyan()
        eigenvalues = np.linalg.eigvalsh(dense.numpy())
        result = measured(dense, steps=20, starts=4)
        assert wasserstein_distance(result.nodes, eigenvalues, result.weights) < 0.06
        assert np.array(result.nodes)[-3:] == pytest.approx(eigenvalues[-3:], rel=1e-3)
        spikes = np.array(result.nodes) > 4.5
        assert np.array(result.weights)[spikes].sum() == pytest.approx(3 / 1000, abs=3e-3)

    def test_marchenko_pastur_edges(self):
        """XᵀX/N of an N × n Gaussian X: the spectrum of n = γN ends at (1 ± √γ)²."""
        rows, size = 4000, 1000
        samples = torch.from_numpy(np.random.default_rng(0).normal(size=(rows, size)))
        result = measured(samples.T @ samples / rows, steps=30, starts=2)
        assert result.nodes[0] == pytest.approx((1 - math.sqrt(size / rows)) ** 2, rel=0.05)
        assert result.nodes[-1] == pytest.approx((1 + math.sqrt(size / rows)) ** 2, rel=0.05)
        assert result.negative_mass.value == 0
        assert result.moments[0].value == pytest.approx(1, rel=0.02)
        assert result.moments[1].value == pytest.approx(1 + size / rows, rel=0.03)


class TestDensity:
    def test_one_start_has_no_standard_error(self):
        result = measured(rotated(indefinite()), steps=8, starts=1)
        for estimate in (*result.moments, result.frobenius_norm, result.effective_rank):
            assert estimate.std_error is None and not estimate.converged
            assert (estimate.low, estimate.high) == (-math.inf, math.inf)
        assert (result.negative_mass.low, result.negative_mass.high) == (0, 1)

    def test_survives_json(self):
        result = measured(rotated(indefinite()), steps=8, starts=2)
        assert Density.from_dict(json.loads(json.dumps(asdict(result)))) == result

    def test_no_random_start(self):
        operator = DenseOperator(rotated(indefinite()))
        run = lanczos(operator, tolerance=0.1, max_hvps=50, seed=0, warm_start=torch.eye(200, dtype=torch.float64)[:1])
        with pytest.raises(ValueError, match="starts"):
            density(run.nodes, run.weights, size=200, hvps=run.hvps, tolerance=0.1)
