# SPDX-License-Identifier: Apache-2.0
"""Lanczos on matrices whose spectrum is known."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from hf_optimizability.linalg import lanczos as module
from hf_optimizability.linalg.estimate import Spectrum
from hf_optimizability.linalg.krylov import KrylovDecomposition
from hf_optimizability.linalg.lanczos import LanczosRun, lanczos, lanczos_by_segment
from hf_optimizability.linalg.operator import DenseOperator, SymmetricOperator
from hf_optimizability.linalg.row_partition import RowPartition
from hf_optimizability.serialization import structure


TWO_CLASSES = torch.tensor([[12.625, -12.625], [-12.625, 12.625]], dtype=torch.float64)
TOP, BOTTOM = [9.0, 5.0, 3.0], [-6.0, -2.0, -1.0]


def matrix(eigenvalues: np.ndarray, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A symmetric matrix with the given eigenvalues and random eigenvectors."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues))))
    return torch.from_numpy((basis * eigenvalues) @ basis.T).to(dtype)


def network_like(size: int = 300) -> np.ndarray:
    """A few outliers at both ends and a bulk near zero, as Hessians of networks have them."""
    return np.sort(np.concatenate([TOP, BOTTOM, np.random.default_rng(1).normal(size=size - 6) / 50]))


def slow(size: int = 600) -> np.ndarray:
    """Ends that are close to their neighbours."""
    bulk = np.random.default_rng(1).normal(size=size - 25) / 3
    return np.sort(np.concatenate([np.linspace(3, 10, 15), np.linspace(-5, -2, 10), bulk]))


class DiagonalOperator(SymmetricOperator):
    """A large matrix of known eigenvalues."""

    def __init__(self, eigenvalues: np.ndarray):
        self._diagonal = torch.from_numpy(eigenvalues)
        self.size, self.dtype, self.device = len(eigenvalues), torch.float64, torch.device("cpu")

    def matmat(self, vectors: Tensor) -> Tensor:
        return self._diagonal[:, None] * vectors


class Counting(DenseOperator):
    """A dense matrix that keeps what it multiplied."""

    def __init__(self, dense: Tensor):
        super().__init__(dense)
        self.multiplied: list[Tensor] = []

    def matmat(self, vectors: Tensor) -> Tensor:
        self.multiplied.append(vectors.clone())
        return super().matmat(vectors)


def spectrum_of(run: LanczosRun) -> tuple[np.ndarray, np.ndarray]:
    return np.array(run.spectrum.ritz_values), np.array(run.spectrum.ritz_weights)


class TestEnds:
    @pytest.mark.parametrize("starts", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_bounds_hold_at_every_number_of_steps(self, dtype: torch.dtype, starts: int):
        eigenvalues = network_like()
        operator = DenseOperator(matrix(eigenvalues, dtype=dtype))
        rounding = 9 * torch.finfo(dtype).eps
        for products in range(starts, 25, starts):
            run = lanczos(operator, tolerance=1e-9, max_hvps=products, seed=0, starts=starts)
            for estimate in (run.lambda_max, run.lambda_min):
                distance = np.abs(eigenvalues - estimate.value).min()
                assert distance <= estimate.residual + rounding
                assert estimate.low <= estimate.value <= estimate.high
            assert run.lambda_max.hvps == run.hvps == len(run.nodes) <= products
            assert run.lambda_min.value >= -6 - 10 * rounding and run.lambda_max.value <= 9 + 10 * rounding

    def test_stops_by_its_tolerance(self):
        operator = DenseOperator(matrix(network_like()))
        spent = []
        for tolerance in (0.1, 1e-3, 1e-8):
            run = lanczos(operator, tolerance=tolerance, max_hvps=200, seed=0)
            assert run.lambda_max.converged and run.lambda_min.converged
            assert run.lambda_max.residual <= tolerance * 9 and run.lambda_min.residual <= tolerance * 6
            spent.append(run.hvps)
        assert spent[0] < spent[1] < spent[2] < 100

    def test_says_when_it_did_not_converge(self):
        run = lanczos(DenseOperator(matrix(network_like())), tolerance=1e-6, max_hvps=5, seed=0)
        assert not run.lambda_max.converged and run.hvps == 5

    def test_a_small_end_is_not_taken_for_converged_too_soon(self):
        """λ_max = 60 beside λ_min = −480, the rest 0: at first the upper Ritz value is small, as is its residual."""
        operator = DiagonalOperator(np.concatenate([[-480.0, 60.0], np.zeros(2000)]))
        run = lanczos(operator, tolerance=0.05, max_hvps=50, seed=3)
        assert run.lambda_max.value == pytest.approx(60, rel=0.05)

    @pytest.mark.parametrize("steps", range(2, 14))
    def test_the_bulk_near_zero_is_not_taken_for_the_smallest_eigenvalue(self, steps: int):
        """λ_min = −500 is small beside λ_max = 80000, so for some steps the lower Ritz value is near 0."""
        bulk = np.random.default_rng(0).normal(size=20_000)
        operator = DiagonalOperator(np.concatenate([[8e4, 3e4, 4e3, -500.0], bulk]))
        estimate = lanczos(operator, tolerance=0.05, max_hvps=steps, seed=0).lambda_min
        assert estimate.converged == (abs(estimate.value + 500) < 25)

    @pytest.mark.parametrize("eigenvalues", [np.zeros(7), np.full(7, -2.5), np.array([3.0])])
    @pytest.mark.parametrize("starts", [1, 2])
    def test_ends_when_the_krylov_space_is_exhausted(self, eigenvalues: np.ndarray, starts: int):
        run = lanczos(DenseOperator(matrix(eigenvalues)), tolerance=1e-6, max_hvps=50, seed=0, starts=starts)
        assert run.hvps <= starts + 3 and run.lambda_max.converged
        assert run.lambda_max.value == pytest.approx(eigenvalues[0], abs=1e-12)

    @pytest.mark.parametrize("others", [[], [1.0], [-3.0, 1.0]])
    @pytest.mark.parametrize("seed", range(6))
    def test_finds_an_eigenvector_that_random_signs_may_be_orthogonal_to(self, others: list[float], seed: int):
        """A classifier of two classes has this matrix where its weights are zero."""
        dense = torch.block_diag(TWO_CLASSES, torch.diag(torch.tensor(others, dtype=torch.float64)))
        run = lanczos(DenseOperator(dense), tolerance=1e-3, max_hvps=20, seed=seed)
        assert run.lambda_max.value == pytest.approx(25.25, rel=1e-5) and run.lambda_max.converged
        assert run.lambda_min.value == pytest.approx(min([0.0, *others]), abs=1e-5)

    @pytest.mark.parametrize("size", [2, 3, 6])
    def test_a_small_matrix_is_taken_whole(self, size: int):
        """Whatever the start: one that is nearly an eigenvector has a small residual, and hides the others."""
        for seed in range(60):
            dense = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            run = lanczos(DenseOperator(dense + dense.T), tolerance=0.1, max_hvps=16, seed=seed)
            assert np.array(run.nodes) == pytest.approx(torch.linalg.eigvalsh(dense + dense.T).numpy(), abs=1e-6)

    @pytest.mark.parametrize("starts", [1, 2])
    def test_random_signs_that_are_orthogonal_to_an_eigenvector_are_not_the_last_word(self, starts: int):
        """I − oo'/n has the eigenvalue 0 along ones, of which a tenth of all signs show nothing."""
        size = 100
        dense = torch.eye(size, dtype=torch.float64) - torch.full((size, size), 1 / size, dtype=torch.float64)
        for seed in range(40):
            run = lanczos(DenseOperator(dense), tolerance=0.01, max_hvps=32, seed=seed, starts=starts)
            assert run.lambda_max.value == pytest.approx(1) and run.lambda_min.value == pytest.approx(0, abs=1e-7)
            assert run.hvps <= 2 * starts + 2 and run.lambda_min.converged
            assert run.weights.sum(axis=1) == pytest.approx(np.ones(starts))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_a_small_matrix_is_solved_by_more_starts_than_rows(self, dtype: torch.dtype):
        eigenvalues = np.array([-2.0, 1.0, 4.0])
        operator = DenseOperator(matrix(eigenvalues, dtype=dtype))
        run = lanczos(operator, tolerance=1e-6, max_hvps=8, seed=1, starts=5)
        assert run.nodes == pytest.approx(eigenvalues, abs=1e-5)
        assert run.weights.shape == (5, 3) and run.weights.sum(axis=1) == pytest.approx(np.ones(5), rel=1e-6)

    def test_same_seed_same_numbers(self):
        operator = DenseOperator(matrix(network_like()))
        first, again, other = (lanczos(operator, tolerance=0.1, max_hvps=8, seed=seed, starts=2) for seed in (0, 0, 1))
        assert first.spectrum == again.spectrum != other.spectrum

    def test_arguments_that_leave_no_room(self):
        operator = DenseOperator(matrix(network_like()))
        with pytest.raises(ValueError, match="max_hvps"):
            lanczos(operator, tolerance=0.1, max_hvps=3, seed=0, starts=4)
        with pytest.raises(ValueError, match="max_basis"):
            lanczos(operator, tolerance=0.1, max_hvps=30, seed=0, starts=2, num_eigenvalues=2, max_basis=7)


class TestRitzPairs:
    @pytest.mark.parametrize("starts", [1, 4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_several_at_both_ends(self, dtype: torch.dtype, starts: int):
        dense = matrix(network_like(), dtype=dtype)
        run = lanczos(DenseOperator(dense), tolerance=1e-4, max_hvps=200, seed=0, num_eigenvalues=3, starts=starts)
        ends = [*run.spectrum.top, *run.spectrum.bottom]
        assert [end.value for end in ends] == pytest.approx([*TOP, *BOTTOM], rel=1e-6)
        assert all(end.converged and end.residual <= 1e-4 * abs(end.value) for end in ends)
        vectors = run.ritz_vectors([-1, -2, -3, 0, 1, 2]).double()
        precision = 3e-4 if dtype == torch.float32 else 1e-8
        assert torch.allclose(vectors @ vectors.T, torch.eye(6, dtype=torch.float64), atol=precision)
        for end, vector in zip(ends, vectors, strict=True):
            residual = float((dense.double() @ vector - end.value * vector).norm())
            assert residual <= end.residual + 10 * precision

    def test_the_residual_is_the_real_one(self):
        dense = matrix(network_like())
        for products in (4, 6, 8):
            run = lanczos(DenseOperator(dense), tolerance=1e-9, max_hvps=products, seed=0, starts=2)
            [vector] = run.ritz_vectors([0])
            residual = float((dense @ vector - run.lambda_min.value * vector).norm())
            assert run.lambda_min.residual == pytest.approx(residual, rel=1e-6)
            assert residual > 1e-6  # so that there is something to compare

    @pytest.mark.parametrize("max_basis", [None, 12])
    @pytest.mark.parametrize("starts", [1, 2])
    def test_there_is_a_residual_for_every_node(self, starts: int, max_basis: int | None):
        """A run that restarted has those of its first cycle, after 12 products."""
        dense = matrix(slow())
        options = {"tolerance": 1e-9, "seed": 0, "starts": starts}
        run = lanczos(DenseOperator(dense), max_hvps=30 if max_basis else 12, max_basis=max_basis, **options)
        vectors = lanczos(DenseOperator(dense), max_hvps=12, **options).ritz_vectors(range(12)).numpy()
        true = np.linalg.norm(vectors @ dense.numpy() - run.nodes[:, None] * vectors, axis=1)
        assert run.residuals == pytest.approx(true, rel=1e-6)
        assert run.residuals.shape == run.nodes.shape and true.min() > 1e-6  # so that there is something to compare

    @pytest.mark.parametrize("max_basis", [None, 12])
    def test_products_with_ritz_vectors_come_for_free(self, max_basis: int | None):
        dense = matrix(slow())
        run = lanczos(DenseOperator(dense), tolerance=1e-9, max_hvps=40, seed=0, starts=2, max_basis=max_basis)
        vectors = run.ritz_vectors([-1, 0, 1])
        assert torch.allclose(run.ritz_products([-1, 0, 1]), vectors @ dense, atol=1e-10)

    def test_probes_and_their_products_come_for_free(self):
        operator = Counting(matrix(network_like()))
        run = lanczos(operator, tolerance=1e-9, max_hvps=3, seed=0, starts=3)
        probes, products = run.probes()
        assert torch.allclose(probes.abs(), torch.ones(3, 300, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(products, probes @ matrix(network_like()), atol=1e-10)
        assert len(operator.multiplied) == 1

    def test_several_starts_see_a_multiple_eigenvalue(self):
        eigenvalues = np.concatenate([[7.0, 7.0, 2.0], np.random.default_rng(0).normal(size=200) / 9])
        operator = DenseOperator(matrix(eigenvalues))
        for starts, second in ((1, 2.0), (2, 7.0)):
            run = lanczos(operator, tolerance=1e-6, max_hvps=12 * starts, seed=0, num_eigenvalues=2, starts=starts)
            assert run.spectrum.top[1].value == pytest.approx(second, rel=1e-6)

    def test_survive_json(self):
        run = lanczos(DenseOperator(matrix(network_like())), tolerance=1e-2, max_hvps=30, seed=0, num_eigenvalues=2)
        assert structure(Spectrum, json.loads(json.dumps(asdict(run.spectrum)))) == run.spectrum


class TestBasis:
    @pytest.mark.parametrize("starts", [1, 4])
    def test_stays_orthogonal(self, starts: int):
        """Without reorthogonalization, found eigenvalues come back as copies once they have converged."""
        operator = DenseOperator(matrix(network_like(), dtype=torch.float32))
        run = lanczos(operator, tolerance=1e-30, max_hvps=120, seed=0, starts=starts, num_eigenvalues=50)
        assert np.sum(np.abs(run.nodes - 9) < 0.01) == 1
        assert np.sum(np.abs(run.nodes + 6) < 0.01) == 1
        basis = run.ritz_vectors(range(120)).double()
        assert float((basis @ basis.T - torch.eye(120, dtype=torch.float64)).abs().max()) < 1e-3

    def test_stays_orthogonal_where_the_starts_are_nearly_parallel_after_a_step(self):
        """One eigenvalue is so large that every product points along its vector."""
        eigenvalues = np.concatenate([[1.0], 1e-8 * np.random.default_rng(0).normal(size=299)])
        operator = DenseOperator(matrix(eigenvalues))
        run = lanczos(operator, tolerance=1e-30, max_hvps=12, seed=0, starts=3, num_eigenvalues=6)
        basis = run.ritz_vectors(range(12)).double()
        assert float((basis @ basis.T - torch.eye(12, dtype=torch.float64)).abs().max()) < 1e-6

    @pytest.mark.parametrize("starts", [1, 2])
    def test_restarts_reach_the_same_tolerance(self, starts: int, monkeypatch: pytest.MonkeyPatch):
        restarts = []
        restart = KrylovDecomposition.restart
        monkeypatch.setattr(
            KrylovDecomposition, "restart", lambda self, *, keep: (restart(self, keep=keep), restarts.append(keep))
        )
        dense = matrix(slow())
        options = {"tolerance": 1e-5, "max_hvps": 400, "seed": 0, "starts": starts, "num_eigenvalues": 2}
        whole = lanczos(DenseOperator(dense), **options)
        assert not restarts
        run = lanczos(DenseOperator(dense), max_basis=12, **options)
        assert len(restarts) >= 3 and len(run.ritz_vectors(range(4))) == 4
        assert len(run._krylov.basis) <= 12
        expected = np.linalg.eigvalsh(dense.numpy())
        for ends, values in ((run.spectrum.top, expected[:-3:-1]), (run.spectrum.bottom, expected[:2])):
            assert [end.value for end in ends] == pytest.approx(values, abs=1e-8)
            assert all(end.converged and end.residual <= 1e-5 * abs(end.value) for end in ends)
        assert whole.hvps < run.hvps < 4 * whole.hvps
        for vector, value in zip(run.ritz_vectors([-1, 0]), expected[[-1, 0]], strict=True):
            assert float((dense @ vector - value * vector).norm()) <= 2e-4

    def test_a_restarted_run_keeps_its_first_quadrature_but_not_its_starts(self):
        dense = matrix(slow())
        run = lanczos(DenseOperator(dense), tolerance=1e-5, max_hvps=100, seed=0, max_basis=12)
        same = lanczos(DenseOperator(dense), tolerance=1e-5, max_hvps=12, seed=0)
        assert run.spectrum.ritz_values == same.spectrum.ritz_values
        assert run.spectrum.ritz_weights == same.spectrum.ritz_weights
        with pytest.raises(ValueError, match="max_basis"):
            run.probes()

    def test_may_lie_on_another_device(self):
        operator = DenseOperator(matrix(network_like()))
        here = lanczos(operator, tolerance=1e-4, max_hvps=30, seed=0)
        there = lanczos(operator, tolerance=1e-4, max_hvps=30, seed=0, basis_device=torch.device("cpu"))
        assert here.spectrum == there.spectrum

    def test_a_basis_on_the_cpu_meets_the_operator_in_products_only(self):
        """A device that refuses to mix stands in for an accelerator: its vectors come and go by `.to`."""
        meta = torch.device("meta")
        dense = matrix(network_like())

        class Elsewhere(DenseOperator):
            def matmat(self, vectors: Tensor) -> Tensor:
                assert vectors.device == meta
                raise NotImplementedError

        operator = Elsewhere(dense)
        operator.device = meta
        with pytest.raises(NotImplementedError):
            lanczos(operator, tolerance=1e-4, max_hvps=30, seed=0, basis_device=torch.device("cpu"))

    @pytest.mark.parametrize(("fitting", "on_cpu"), [(30, False), (29, True)])
    def test_goes_to_the_cpu_where_the_device_is_too_small(
        self, fitting: int, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
    ):
        operator = DenseOperator(matrix(network_like()))
        operator.device = torch.device("cuda")
        free = 2 * fitting * operator.size * operator.dtype.itemsize
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free // 2, 10 * free))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: free // 2 + 7)  # free to us, but for 7 bytes
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7)
        assert module._roomy_device(operator, 30) == torch.device("cpu" if on_cpu else "cuda")

    def test_restarts_where_memory_holds_few_vectors(self, monkeypatch: pytest.MonkeyPatch):
        operator = DenseOperator(matrix(slow()))
        free = 2 * 12 * operator.size * operator.dtype.itemsize
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        run = lanczos(operator, tolerance=1e-5, max_hvps=400, seed=0)
        assert run.spectrum == lanczos(operator, tolerance=1e-5, max_hvps=400, seed=0, max_basis=12).spectrum
        assert run._krylov.restarted and run.lambda_max.converged


class TestQuadrature:
    def test_one_start(self):
        run = lanczos(DenseOperator(matrix(network_like())), tolerance=1e-30, max_hvps=20, seed=0)
        values, weights = spectrum_of(run)
        start = RowPartition.whole(300).rademacher(
            generator=torch.Generator().manual_seed(0), dtype=torch.float64, device=torch.device("cpu")
        )
        moment = start @ matrix(network_like()) @ start / 300
        assert weights.sum() == pytest.approx(1, rel=1e-12)
        assert weights @ values == pytest.approx(float(moment), rel=1e-10)

    @pytest.mark.parametrize("starts", [1, 3])
    def test_is_exact_to_its_degree(self, starts: int):
        """vᵀAᵖv / n for every start and p < 2 · steps, and no further."""
        dense, steps = matrix(network_like()), 4
        run = lanczos(DenseOperator(dense), tolerance=1e-30, max_hvps=starts * steps, seed=0, starts=starts)
        probes, powers = run.probes()
        for degree in range(1, 2 * steps):
            moments = (probes * powers).mean(dim=1).numpy()
            assert run.weights @ run.nodes**degree == pytest.approx(moments, rel=1e-9)
            powers = powers @ dense
        moments = (probes * powers).mean(dim=1).numpy()
        assert run.weights @ run.nodes ** (2 * steps) != pytest.approx(moments, rel=1e-9)


class TestBySegment:
    SEGMENTS = ([slice(0, 40), slice(90, 150)], [slice(40, 90)], [slice(150, 153)])

    def blocks(self) -> list[Tensor]:
        rng = np.random.default_rng(3)
        spectra = [
            np.concatenate([[9.0, 5.0, -3.0], rng.normal(size=97) / 20]),
            np.concatenate([[0.2, -0.7], rng.normal(size=48) / 50]),
            np.array([40.0, 41.0, 50.0]),
        ]
        return [matrix(spectrum, seed=seed) for seed, spectrum in enumerate(spectra)]

    def operator(self) -> Counting:
        dense = torch.zeros(153, 153, dtype=torch.float64)
        for segment, block in zip(self.SEGMENTS, self.blocks(), strict=True):
            rows = torch.cat([torch.arange(153)[part] for part in segment])
            dense[rows[:, None], rows] = block
        return Counting(dense)

    def test_finds_the_ends_of_every_block(self):
        operator = self.operator()
        found = lanczos_by_segment(operator, self.SEGMENTS, tolerance=1e-6, max_hvps=60, seed=0)
        for spectrum, block in zip((run.spectrum for run in found), self.blocks(), strict=True):
            eigenvalues = np.linalg.eigvalsh(block.numpy())
            assert spectrum.lambda_max.converged and spectrum.lambda_min.converged
            assert spectrum.lambda_max.value == pytest.approx(eigenvalues[-1], rel=1e-9)
            assert spectrum.lambda_min.value == pytest.approx(eigenvalues[0], rel=1e-9)
            assert spectrum.lambda_max.hvps == len(operator.multiplied) < 40
            assert sum(spectrum.ritz_weights) == pytest.approx(1, rel=1e-10)

    def test_a_block_that_is_done_gets_zeros(self):
        operator = self.operator()
        found = lanczos_by_segment(operator, self.SEGMENTS, tolerance=1e-6, max_hvps=60, seed=0)
        assert [bool(vector[150:].any()) for vector in operator.multiplied[:4]] == [True, True, True, False]
        assert found[2].spectrum.ritz_values == pytest.approx([40, 41, 50], rel=1e-10)

    def test_says_what_did_not_converge(self):
        found = lanczos_by_segment(self.operator(), self.SEGMENTS, tolerance=1e-6, max_hvps=3, seed=0)
        assert [spectrum.lambda_max.converged for spectrum in found] == [False, False, True]
        for spectrum, block in zip(found, self.blocks(), strict=True):
            estimate = spectrum.lambda_max
            assert np.abs(np.linalg.eigvalsh(block.numpy()) - estimate.value).min() <= estimate.residual + 1e-12
