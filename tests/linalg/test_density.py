# SPDX-License-Identifier: Apache-2.0
"""Spectral densities against matrices whose spectrum is known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.stats import wasserstein_distance
from torch import Tensor

from hf_optimizability.linalg.density import Density, density
from hf_optimizability.linalg.lanczos import LanczosRun, lanczos
from hf_optimizability.linalg.operator import DenseOperator
from hf_optimizability.linalg.row_partition import RowPartition
from hf_optimizability.serialization import structure


def signs(size: int, generator: torch.Generator) -> Tensor:
    """The start that a run draws."""
    return RowPartition.whole(size).rademacher(generator=generator, dtype=torch.float64, device=torch.device("cpu"))


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


def network(size: int = 400) -> np.ndarray:
    """Ten outliers, 10 to 1000 times the bulk, on both sides."""
    outliers = [1000.0, 600.0, 350.0, 200.0, 120.0, 60.0, 30.0, -15.0, -40.0, -100.0]
    return np.concatenate([outliers, np.random.default_rng(1).normal(size=size - 10)])


def decaying(size: int = 400) -> np.ndarray:
    return 1 / np.arange(1, size + 1)


def nearly_multiple(size: int = 400) -> np.ndarray:
    outliers = [100.0, 100.5, 101.0, 50.0, 50.2, 50.4, -20.0, -20.1, 20.0, 20.1]
    return np.concatenate([outliers, np.random.default_rng(1).normal(size=size - 10)])


def wishart(size: int = 400) -> np.ndarray:
    return np.linalg.svd(np.random.default_rng(1).normal(size=(4 * size, size)), compute_uv=False) ** 2 / (4 * size)


def traceless(size: int = 400) -> np.ndarray:
    half = np.random.default_rng(1).exponential(size=size // 2)
    return np.concatenate([half, -half])


def pair(size: int = 400) -> np.ndarray:
    """An outlier that is there twice, exactly: one start sees a single eigenvalue of random weight, two see both."""
    return np.concatenate([[30.0, 30.0], np.random.default_rng(1).uniform(-1, 1, size=size - 2)])


def lanczos_of(dense: Tensor, *, steps: int, starts: int = 1, seed: int = 0, num_eigenvalues: int = 1) -> LanczosRun:
    options = {"tolerance": 1e-30, "max_hvps": steps * starts, "num_eigenvalues": num_eigenvalues}
    return lanczos(DenseOperator(dense), seed=seed, starts=starts, **options)


def measured(
    dense: Tensor,
    *,
    steps: int,
    starts: int = 1,
    seed: int = 0,
    num_eigenvalues: int = 1,
    left_out: int = 0,
    width: float | None = None,
) -> Density:
    run = lanczos_of(dense, steps=steps, starts=starts, seed=seed, num_eigenvalues=num_eigenvalues)
    options = {"size": len(dense), "hvps": run.hvps, "tolerance": 0.1, "zero_rows": left_out, "width": width}
    return density(run.nodes, run.weights, run.residuals, **options)


def truths(eigenvalues: np.ndarray, size: int) -> np.ndarray:
    """Mean, mean square, Frobenius norm, effective rank and negative mass of `size` eigenvalues, the rest zero."""
    trace, squares = eigenvalues.sum(), (eigenvalues**2).sum()
    return np.array(
        [trace / size, squares / size, math.sqrt(squares), trace**2 / squares, np.sum(eigenvalues < 0) / size]
    )


def holds(result: Density, truth: np.ndarray) -> np.ndarray:
    """Which of the intervals hold the truth, to rounding."""
    estimates = [*result.moments, result.frobenius_norm, result.effective_rank, result.negative_mass]
    low, high = np.array([(estimate.low, estimate.high) for estimate in estimates]).T
    slack = 1e-9 * np.abs(truth) + 1e-12
    return (low - slack <= truth) & (truth <= high + slack)


def outliers_in_float32() -> np.ndarray:
    return np.concatenate([[60.0, 40.0, -50.0], np.random.default_rng(0).uniform(-1, 1, size=386)])


def distance(nodes: np.ndarray, weights: np.ndarray, residuals: np.ndarray) -> float:
    """Wasserstein-1 distance of the density to `outliers_in_float32`."""
    result = density(nodes, weights, residuals, size=389, hvps=0, tolerance=0.1)
    return wasserstein_distance(result.nodes, outliers_in_float32(), result.weights)


def three_term_recurrence(dense: np.ndarray, *, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lanczos as the textbook has it: nodes, weights and residuals, with copies of what converged."""
    vector = np.random.default_rng(seed).choice([-1, 1], len(dense)).astype(dense.dtype) / math.sqrt(len(dense))
    vector, before, diagonal, off_diagonal = vector.astype(dense.dtype), 0 * dense[0], [], [0.0]
    for _ in range(steps):
        product = dense @ vector - dense.dtype.type(off_diagonal[-1]) * before
        diagonal.append(float(product @ vector))
        product -= dense.dtype.type(diagonal[-1]) * vector
        off_diagonal.append(float(np.linalg.norm(product)))
        before, vector = vector, product / dense.dtype.type(off_diagonal[-1])
    nodes, vectors = eigh_tridiagonal(diagonal, off_diagonal[1:-1])
    return nodes, vectors[:1] ** 2, off_diagonal[-1] * np.abs(vectors[-1])


def papyan(size: int = 1000) -> Tensor:
    """Three spikes on a Marchenko–Pastur bulk: diag(5, 4, 3, 0, …) + ZZᵀ/n (Papyan 2018, arXiv 1811.07062)."""
    noise = np.random.default_rng(0).normal(size=(size, size))
    return torch.from_numpy(np.diag([5.0, 4.0, 3.0, *np.zeros(size - 3)]) + noise @ noise.T / size)


class TestFoundEigenvalues:
    def test_have_their_true_mass(self):
        result = measured(rotated(network()), steps=25)
        nodes, weights = np.array(result.nodes), np.array(result.weights)
        for outlier in np.sort(network())[[0, 1, 2, -7, -6, -5, -4, -3, -2, -1]]:
            assert weights[np.isclose(nodes, outlier, rtol=1e-6)] == pytest.approx([1 / 400], rel=1e-12)
        assert weights.sum() == pytest.approx(1, rel=1e-12)

    def test_leave_the_others_the_quadrature_of_what_is_left(self):
        """Of the same start without its components along the outliers, had from a matrix without them."""
        dense, eigenvalues = rotated(network()), network()
        basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(400, 400)))  # as in `rotated`
        generator = torch.Generator().manual_seed(3)
        start = signs(400, generator).numpy()
        shares = (basis[:, 10:].T @ start) ** 2
        result = measured(dense, steps=25, seed=3)
        for power in (1, 2, 3, 6):
            rest = 390 / 400 * np.average(eigenvalues[10:] ** power, weights=shares)
            moment = np.array(result.weights) @ np.array(result.nodes) ** power
            assert moment == pytest.approx(rest + np.sum(eigenvalues[:10] ** power) / 400, rel=1e-6)

    @pytest.mark.parametrize("size", [1, 20, 150])
    def test_are_the_whole_spectrum_of_a_small_matrix(self, size: int):
        eigenvalues = np.random.default_rng(2).normal(size=size)
        result = measured(rotated(eigenvalues), steps=size, num_eigenvalues=size)
        assert np.array(result.nodes) == pytest.approx(np.sort(eigenvalues), abs=1e-10)
        assert result.weights == pytest.approx([1 / size] * size)
        estimates = [*result.moments, result.frobenius_norm, result.effective_rank, result.negative_mass]
        for estimate, truth in zip(estimates, truths(eigenvalues, size), strict=True):
            assert estimate.value == pytest.approx(truth, rel=1e-9, abs=1e-12)
            assert estimate.std_error == 0 and estimate.converged
            assert estimate.low == pytest.approx(estimate.high, rel=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_of_a_matrix_of_low_rank_are_all_and_zero_has_the_rest(self, dtype: torch.dtype):
        """As the Gauss-Newton matrix of a few examples; the Ritz value at zero has a residual of zero, too."""
        eigenvalues = np.concatenate([np.arange(1.0, 11), np.zeros(290)])
        result = measured(rotated(eigenvalues).to(dtype), steps=11, seed=1)
        assert result.weights == pytest.approx([290 / 300] + [1 / 300] * 10, rel=1e-6)
        assert result.effective_rank.value == pytest.approx(55**2 / 385, rel=1e-5)
        assert result.effective_rank.std_error == pytest.approx(0, abs=1e-4)
        assert result.negative_mass.value == result.negative_mass.high == 0 and result.negative_mass.converged

    def test_are_none_when_too_few_for_the_size(self):
        """Five different eigenvalues of six: one is there twice, and nothing says which."""
        nodes, weights = np.array([1.0, 2.0, 4.0, 7.0, 11.0]), np.array([[0.3, 0.3, 0.2, 0.15, 0.05]])
        result = density(nodes, weights, np.zeros(5), size=6, hvps=5, tolerance=0.1)
        assert len(result.weights) == 5
        assert result.weights == pytest.approx(weights[0])
        assert result.moments[0].std_error > 0.5

    def test_are_not_copies_that_only_rounding_tells_apart(self):
        """Two starts see an eigenvalue that is there six times twice, with no residual in the end."""
        nodes, residuals = np.array([-1.0, 1.0, 2.0, 3.0, 9.0, 9.0 + 1e-6]), np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
        weights = np.array([[0.3, 0.3, 0.2, 0.194, 0.002, 0.004], [0.3, 0.3, 0.2, 0.194, 0.004, 0.002]])
        result = density(nodes, weights, residuals, size=1000, hvps=6, tolerance=0.1)
        assert result.weights == pytest.approx(weights.mean(axis=0), rel=1e-12)

    def test_are_none_without_convergence(self):
        run = lanczos_of(rotated(wishart()), steps=8)
        result = density(run.nodes, run.weights, run.residuals, size=400, hvps=8, tolerance=0.1)
        assert result.weights == pytest.approx(run.weights[0], rel=1e-12)


class TestErrors:
    @pytest.mark.parametrize(
        ("spectrum", "starts", "steps"),
        [
            *((spectrum, 1, 10) for spectrum in (network, nearly_multiple, traceless)),
            (decaying, 4, 5),
            # Spectra and numbers of starts that the others hold, in other pairs.
            *(pytest.param(spectrum, 1, 10, marks=pytest.mark.slow) for spectrum in (decaying, wishart)),
            *(
                pytest.param(spectrum, 4, 5, marks=pytest.mark.slow)
                for spectrum in (network, nearly_multiple, wishart, traceless)
            ),
            pytest.param(network, 2, 6, marks=pytest.mark.slow),
            pytest.param(decaying, 1, 16, marks=pytest.mark.slow),
        ],
    )
    def test_intervals_hold_the_truth_as_often_as_they_say(self, spectrum, starts: int, steps: int):
        """95 % of 200 seeds; more where eigenvalues are on the way to being found, and for the negative mass."""
        eigenvalues = spectrum()
        dense, truth = rotated(eigenvalues), truths(eigenvalues, len(eigenvalues))
        held = [holds(measured(dense, steps=steps, starts=starts, seed=seed), truth) for seed in range(200)]
        assert np.all(np.mean(held, axis=0) >= 0.92)

    @pytest.mark.parametrize(("spectrum", "steps"), [(wishart, 5), (network, 20)], ids=["wishart", "network"])
    def test_standard_errors_are_the_spread(self, spectrum, steps: int):
        """But for a start in some hundreds, whose share of an outlier is too large for that of one eigenvalue."""
        dense = rotated(spectrum())
        results = [measured(dense, steps=steps, seed=seed) for seed in range(100)]
        for quantity in (
            lambda result: result.moments[0],
            lambda result: result.moments[1],
            lambda result: result.frobenius_norm,
            lambda result: result.effective_rank,
        ):
            estimates = [quantity(result) for result in results]
            values, std_error = [e.value for e in estimates], np.median([e.std_error for e in estimates])
            kept = [value for value in values if abs(value - np.median(values)) < 5 * std_error]
            assert len(kept) >= 99 and std_error == pytest.approx(np.std(kept), rel=0.15)

    def test_of_the_negative_mass_is_that_of_a_share(self):
        """Two clusters, each one node: the weights differ from the shares by sampling alone."""
        eigenvalues = np.concatenate([np.random.default_rng(0).normal(-5, 0.01, 120), np.full(280, 5.0)])
        dense = rotated(eigenvalues)
        results = [measured(dense, steps=3, seed=seed).negative_mass for seed in range(200)]
        spread = np.std([result.value for result in results])
        assert spread == pytest.approx(math.sqrt(2 * 0.3 * 0.7 / 400), rel=0.1)
        assert np.mean([result.std_error for result in results]) == pytest.approx(spread, rel=0.1)

    def test_a_pair_is_told_from_a_single_eigenvalue_by_two_starts(self):
        eigenvalues = pair()
        dense, truth = rotated(eigenvalues), truths(eigenvalues, 400)
        results = [measured(dense, steps=8, starts=2, seed=seed) for seed in range(200)]
        assert np.mean([holds(result, truth) for result in results], axis=0) == pytest.approx(0.96, abs=0.041)
        assert all(np.sum(np.array(result.nodes) > 29) == 2 for result in results)

    def test_rows_left_out_are_zeros(self):
        eigenvalues = wishart(size=200) - 0.8
        dense, truth = rotated(eigenvalues), truths(eigenvalues, 400)
        results = [measured(dense, steps=6, left_out=200, seed=seed) for seed in range(200)]
        assert np.all(np.mean([holds(result, truth) for result in results], axis=0) >= 0.92)
        estimates = [result.moments[0] for result in results]
        spread = np.std([estimate.value for estimate in estimates])
        assert np.median([estimate.std_error for estimate in estimates]) == pytest.approx(spread, rel=0.15)

    def test_many_starts_shrink_them(self):
        dense = rotated(wishart())
        one, nine = (measured(dense, steps=4, starts=starts).moments[0] for starts in (1, 9))
        assert one.std_error / nine.std_error == pytest.approx(3, rel=0.1)
        assert nine.converged

    def test_a_start_that_misses_an_outlier_overflows_nothing(self):
        """The start is all but orthogonal to the eigenvector, whose Ritz value has not converged yet."""
        nodes, residuals = np.array([-1e-3, 1e-3, 900.0]), np.array([1e-3, 1e-3, 50.0])
        weights = np.array([[0.5, 0.5, 1e-30]])
        result = density(nodes, weights, residuals, size=2000, hvps=3, tolerance=0.1)
        assert result.moments[1].high > 900**2 / 2000 and result.moments[1].low >= 0
        assert not result.frobenius_norm.converged


class TestMoments:
    @pytest.mark.parametrize("starts", [1, 4])
    def test_the_first_is_hutchinson_on_the_same_probes(self, starts: int):
        dense = rotated(indefinite())
        run = lanczos(DenseOperator(dense), tolerance=1e-30, max_hvps=5 * starts, seed=0, starts=starts)
        generator = torch.Generator().manual_seed(0)
        probes = torch.stack([signs(200, generator) for _ in range(starts)])
        samples = (probes * (probes @ dense)).sum(dim=1).numpy()
        result = density(run.nodes, run.weights, run.residuals, size=200, hvps=run.hvps, tolerance=0.1)
        assert 200 * result.moments[0].value == pytest.approx(samples.mean(), rel=1e-10)
        squares = ((probes @ dense) ** 2).sum(dim=1).numpy()
        assert result.frobenius_norm.value == pytest.approx(math.sqrt(squares.mean()), rel=1e-10)

    def test_many_starts_find_them(self):
        eigenvalues = indefinite()
        result = measured(rotated(eigenvalues), steps=3, starts=100)
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
    @pytest.mark.parametrize(("starts", "steps"), [(1, 12), (4, 6), pytest.param(4, 12, marks=pytest.mark.slow)])
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

    def test_rows_left_out_have_their_mass_at_zero(self):
        """As the same matrix with zero rows and columns, all of whose eigenvalues are known."""
        eigenvalues = np.random.default_rng(2).normal(size=30) + 3
        result = measured(rotated(eigenvalues), steps=30, num_eigenvalues=30, left_out=90, width=0.05)
        padded = np.concatenate([eigenvalues, np.zeros(90)])
        assert wasserstein_distance(result.nodes, padded, result.weights) < 1e-10
        assert list(result.nodes) == sorted(result.nodes) and sum(result.weights) == pytest.approx(1)
        assert np.interp(0, result.grid, result.density) == pytest.approx(
            0.75 / (0.05 * math.sqrt(2 * math.pi)), rel=0.01
        )
        assert np.trapezoid(result.density, result.grid) == pytest.approx(1, rel=1e-6)
        estimates = [*result.moments, result.frobenius_norm, result.effective_rank, result.negative_mass]
        assert [estimate.value for estimate in estimates] == pytest.approx(truths(eigenvalues, 120))

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

    @pytest.mark.parametrize(("starts", "bound"), [(1, 0.05), (4, 0.03)])
    def test_is_close_to_the_spectrum_and_has_no_ghosts(self, starts: int, bound: float):
        """In float32, after so many steps that outliers come back as copies without reorthogonalization."""
        dense, distances = rotated(outliers_in_float32()).float(), []
        for seed in range(5):
            run = lanczos_of(dense, steps=60, starts=starts, seed=seed, num_eigenvalues=25)
            assert len(run.nodes) == 60 * starts
            distances.append(distance(run.nodes, run.weights, run.residuals))
            assert [np.sum(np.abs(run.nodes - outlier) < 5) for outlier in (60, 40, -50)] == [1, 1, 1]
        assert np.mean(distances) < bound

    @pytest.mark.parametrize("broken", ["weights", "residuals", "orthogonality"])
    def test_is_not_close_when_broken(self, broken: str):
        """The bound above can tell equal weights, no eigenvalue found, and Lanczos without reorthogonalization."""
        dense, distances = rotated(outliers_in_float32()).float(), []
        for seed in range(5):
            nodes, weights, residuals = three_term_recurrence(dense.numpy(), steps=60, seed=seed)
            if broken != "orthogonality":
                run = lanczos_of(dense, steps=60, seed=seed, num_eigenvalues=25)
                nodes, weights, residuals = run.nodes, run.weights, run.residuals
            if broken == "weights":
                weights = np.full_like(weights, 1 / len(nodes))
            if broken == "residuals":
                residuals = np.full_like(residuals, np.inf)
            distances.append(distance(nodes, weights, residuals))
        assert np.mean(distances) > 0.1

    def test_papyans_spikes_and_bulk(self):
        dense = papyan()
        eigenvalues = np.linalg.eigvalsh(dense.numpy())
        result = measured(dense, steps=20, starts=4)
        assert wasserstein_distance(result.nodes, eigenvalues, result.weights) < 0.06
        assert np.array(result.nodes)[-3:] == pytest.approx(eigenvalues[-3:], rel=1e-3)
        spikes = np.array(result.nodes) > 4.5
        assert np.array(result.weights)[spikes].sum() == pytest.approx(3 / 1000, abs=3e-3)

    def test_marchenko_pastur(self):
        """XᵀX/N of an N × n Gaussian X: the spectrum of n = γN ends at (1 ± √γ)², and has the moments 1 and 1 + γ."""
        rows, size = 4000, 1000
        samples = torch.from_numpy(np.random.default_rng(0).normal(size=(rows, size)))
        result = measured(samples.T @ samples / rows, steps=30)
        assert result.nodes[0] == pytest.approx((1 - math.sqrt(size / rows)) ** 2, rel=0.05)
        assert result.nodes[-1] == pytest.approx((1 + math.sqrt(size / rows)) ** 2, rel=0.05)
        assert result.negative_mass.value == 0 and result.negative_mass.high < 0.002
        for moment, truth in zip(result.moments, [1, 1 + size / rows], strict=True):
            assert moment.value == pytest.approx(truth, abs=2 * moment.std_error)
            assert moment.converged and moment.std_error < 0.06
        grid = np.linspace(0.25, 2.25, 20_001)
        law = np.sqrt((2.25 - grid) * (grid - 0.25)) / (2 * math.pi * 0.25 * grid)
        assert wasserstein_distance(result.nodes, grid, result.weights, law) < 0.05


class TestDensity:
    def test_survives_json(self):
        result = measured(rotated(indefinite()), steps=8, starts=2)
        assert structure(Density, json.loads(json.dumps(asdict(result)))) == result

    def test_too_few_steps_for_an_error(self):
        with pytest.raises(ValueError, match="3 steps"):
            measured(rotated(indefinite()), steps=2, starts=4)
