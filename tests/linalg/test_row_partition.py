# SPDX-License-Identifier: Apache-2.0
"""Vectors that lie over ranks: the estimators find what they find in one process. The ranks are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_optimizability.linalg.communicator import ProcessGroup
from hf_optimizability.linalg.lanczos import lanczos
from hf_optimizability.linalg.operator import DenseOperator, PreconditionedOperator, SymmetricOperator
from hf_optimizability.linalg.power_iteration import power_iteration
from hf_optimizability.linalg.row_partition import RowPartition
from hf_optimizability.linalg.spectrum_and_trace import SpectrumAndTrace, estimate_spectrum, estimate_trace
from hf_optimizability.linalg.vectors import dot, norm


SIZE = 60
SHARES = [(slice(0, 11), slice(30, 41)), (slice(11, 30), slice(41, 60)), ()]
"""Rows of each rank, from two parameters of 30 rows; the last rank has none."""


class Threads(ProcessGroup):
    """Ranks that share one process."""

    def __init__(self, index: int, number: int, barrier: threading.Barrier, board: list[Any]):
        self.rank, self.world_size = index, number
        self._barrier, self._board = barrier, board

    def all_gather_interleaved(self, items: list[Any]) -> list[Any]:
        self._board[self.rank] = items
        self._barrier.wait(30)
        found = [item for held in self._board for item in held]
        self._barrier.wait(30)
        return found

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        total = sum(self.all_gather_interleaved([tensor.clone()]))
        return tensor.copy_(total)


class SplitMatrix(SymmetricOperator):
    """A matrix whose products are made from, and cut into, the rows of each rank."""

    def __init__(self, matrix: Tensor, rows: RowPartition):
        self._matrix, self._rows = matrix, rows
        self.size, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device

    @property
    def rows(self) -> RowPartition:
        return self._rows

    def matmat(self, vectors: Tensor) -> Tensor:
        whole = torch.zeros(self.size, vectors.shape[1], dtype=self.dtype)
        whole[_indices(self.rows)] = vectors
        return self.rows.select(self._matrix @ self.rows.group.all_reduce_(whole))


def _indices(rows: RowPartition) -> list[int]:
    return [index for part in rows.local for index in range(part.start, part.stop)]


def _on_all_ranks(action: Callable[[RowPartition], Any]) -> list[Any]:
    barrier, board = threading.Barrier(len(SHARES)), [None] * len(SHARES)
    group = [Threads(index, len(SHARES), barrier, board) for index in range(len(SHARES))]

    def run(rank: Threads) -> Any:
        try:
            return action(RowPartition(SIZE, SHARES[rank.rank], rank))
        except BaseException:
            barrier.abort()  # the others would wait
            raise

    with ThreadPoolExecutor(len(SHARES)) as pool:
        return list(pool.map(run, group))


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    values = torch.linspace(-1, 1, SIZE, dtype=torch.float64) ** 3
    values[-3:] = torch.tensor([4.0, 6.0, 9.0])
    return axes @ torch.diag(values) @ axes.T


def _whole(pieces: list[Tensor]) -> Tensor:
    """One tensor from the columns that each rank has of it."""
    whole = torch.zeros(*pieces[0].shape[:-1], SIZE, dtype=pieces[0].dtype)
    for share, piece in zip(SHARES, pieces, strict=True):
        whole[..., _indices(RowPartition(SIZE, share))] = piece
    return whole


def test_every_rank_draws_its_part_of_the_one_random_vector():
    def draw(rows: RowPartition) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.stack(
            [rows.rademacher(generator=generator, dtype=torch.float32, device=rows_device) for _ in "ab"]
        )

    rows_device = torch.device("cpu")
    alone = draw(RowPartition.whole(SIZE))
    assert not torch.equal(alone[0], alone[1])
    assert torch.equal(_whole(_on_all_ranks(draw)), alone)


def test_dot_products_are_over_all_rows():
    x, y = torch.arange(60.0), torch.ones(60)
    found = _on_all_ranks(
        lambda rows: (dot(rows.select(x), rows.select(y), rows.group), norm(rows.select(x), rows.group))
    )
    assert all(pair == pytest.approx((dot(x, y), norm(x)), rel=1e-15) for pair in found)


@pytest.mark.parametrize("max_basis", [None, 8])
def test_lanczos_keeps_its_basis_in_shares(max_basis: int | None, matrix: Tensor):
    options = {"tolerance": 1e-8, "max_hvps": 40, "seed": 3, "num_eigenvalues": 2, "max_basis": max_basis}
    alone = lanczos(DenseOperator(matrix), **options)

    def run(rows: RowPartition) -> tuple[Any, Tensor]:
        found = lanczos(SplitMatrix(matrix, rows), **options)
        assert found.ritz_vectors([-1]).shape == (1, len(rows))
        return found, found.ritz_vectors([-1])

    runs = _on_all_ranks(run)
    for found, _ in runs:
        assert found.hvps == alone.hvps
        np.testing.assert_allclose(found.nodes, alone.nodes, rtol=0, atol=1e-10)
        np.testing.assert_allclose(found.weights, alone.weights, rtol=0, atol=1e-10)
    vector = _whole([vector for _, vector in runs])[0]
    truth = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    assert abs(float(vector @ truth)) == pytest.approx(1, abs=1e-8)


def test_power_iteration(matrix: Tensor):
    alone = power_iteration(DenseOperator(matrix), tolerance=1e-3, max_hvps=30, seed=1)
    options = {"tolerance": 1e-3, "max_hvps": 30, "seed": 1}
    for found in _on_all_ranks(lambda rows: power_iteration(SplitMatrix(matrix, rows), **options)):
        assert found.hvps == alone.hvps
        assert (found.value, found.residual) == pytest.approx((alone.value, alone.residual), rel=1e-10)


def test_a_preconditioner_in_shares(matrix: Tensor):
    diagonal = torch.linspace(1, 3, SIZE, dtype=torch.float64)
    options = {"tolerance": 1e-6, "max_hvps": 40, "seed": 1}
    alone = lanczos(PreconditionedOperator(DenseOperator(matrix), diagonal), **options).lambda_max

    def run(rows: RowPartition) -> Any:
        return lanczos(PreconditionedOperator(SplitMatrix(matrix, rows), rows.select(diagonal)), **options).lambda_max

    for found in _on_all_ranks(run):
        assert found.value == pytest.approx(alone.value, rel=1e-10)


@pytest.mark.parametrize("trace_method", ["hutchinson", "hutch++", "xtrace", "exact"])
def test_a_whole_sketch(trace_method: Any, matrix: Tensor):
    def run(operator: SymmetricOperator, segments: list[list[slice]]) -> SpectrumAndTrace:
        spectrum = estimate_spectrum(operator, tolerance=1e-3, max_hvps=30, seed=0)
        trace = estimate_trace(
            operator,
            segments,
            tolerance=0.02,
            max_hvps=60 - spectrum.hvps,
            seed=1,
            method=trace_method,
            deflating_vectors=spectrum.deflating_vectors,
        )
        return SpectrumAndTrace.of(spectrum, trace)

    alone = run(DenseOperator(matrix), [[slice(0, 30)], [slice(30, 60)]])

    def run_in_shares(rows: RowPartition) -> SpectrumAndTrace:
        lengths = [part.stop - part.start for part in rows.local] or [0, 0]
        return run(SplitMatrix(matrix, rows), [[slice(0, lengths[0])], [slice(lengths[0], sum(lengths))]])

    found = _on_all_ranks(run_in_shares)
    for one in found:
        for mine, whole in zip(_numbers(one), _numbers(alone), strict=True):
            assert mine == pytest.approx(whole, rel=1e-10)
    if alone.diagonal is not None:
        diagonal = _whole([one.diagonal for one in found])
        assert torch.allclose(diagonal, alone.diagonal, rtol=0, atol=1e-10)


def _numbers(found: SpectrumAndTrace) -> list[float]:
    estimates = found.estimates
    assert estimates.density is not None and estimates.lambda_min is not None
    traces = [estimates.trace, *found.segments]
    ends = [estimates.lambda_max, estimates.lambda_min, estimates.density.frobenius_norm]
    return [*(trace.value for trace in traces), *(trace.std_error for trace in traces), *(end.value for end in ends)]
