# SPDX-License-Identifier: Apache-2.0
"""XTrace on matrices whose every entry is known; what it shares with the other estimators is tested beside them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from hf_optimizability.linalg.deflation import Deflation
from hf_optimizability.linalg.probe_vectors import PROBE_BLOCK_SIZE
from hf_optimizability.linalg.row_partition import RowPartition
from tests.support.known_traces import (
    NEVER,
    cases,
    coverage,
    estimate,
    matrix,
    projected,
    segments,
    truths,
    values,
    with_eigenvalues,
)


@pytest.mark.parametrize(("name", "tolerance"), cases(0.1, "bert-adaptive"))
def test_coverage(name: str, tolerance: float):
    """As often as they say or, where the diagonal matters, more often."""
    dense = matrix(name)
    held = coverage(dense, lambda seed: estimate("xtrace", dense, tolerance=tolerance, max_hvps=24, seed=seed))
    assert held[0] >= 0.905 and held.min() >= 0.9, held


class TestXTrace:
    def test_leave_one_out_values(self):
        """Against projectors computed anew without each test vector, in two rounds of them."""
        dense = matrix("network")
        generator = torch.Generator().manual_seed(3)
        draw = partial(RowPartition.whole(200).rademacher, generator=generator, dtype=dense.dtype, device=dense.device)
        tests = torch.stack([draw() for _ in range(7)])
        expected, squares = [], []
        for index in range(7):
            others = torch.cat([tests[:index], tests[index + 1 :]]) @ dense
            vectors = torch.linalg.qr(others.T)[0].T
            rest = projected(dense, Deflation(vectors, vectors @ dense))
            terms = (dense - rest).diagonal() + tests[index] * (rest @ tests[index])
            expected.append([float(sum(terms[part].sum() for part in s)) for s in segments(dense)])
            squares.append(float((rest @ tests[index]).square().sum()))
        result = estimate("xtrace", dense, tolerance=NEVER, max_hvps=15, seed=3)
        assert result.total.hvps == 14
        assert values(result)[1:4] == pytest.approx(np.mean(expected, axis=0), rel=1e-8)
        assert result.total.std_error == pytest.approx((2 * np.mean(squares) / 7) ** 0.5, rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_a_matrix_of_low_rank_is_exact(self, dtype: torch.dtype):
        dense = with_eigenvalues(np.concatenate([[-4.0, 3.0, 2.0], np.zeros(97)])).to(dtype)
        result = estimate("xtrace", dense, tolerance=1e-3, max_hvps=40, seed=0)
        assert values(result)[:4] == pytest.approx(truths(dense)[:4], abs=1e-5) and result.total.converged
        assert result.total.hvps <= 8

    def test_fast_decay_in_float32(self):
        """Eigenvalues 3⁻ⁱ: the products are parallel up to rounding, and one orthogonalization would not do."""
        dense = with_eigenvalues(3.0 ** -np.arange(200.0)).float()
        total = estimate("xtrace", dense, tolerance=NEVER, max_hvps=24, seed=0).total
        assert total.value == pytest.approx(1.5, abs=1e-5) and total.std_error < 1e-5

    def test_rank_one(self):
        dense = with_eigenvalues(np.eye(1, 100)[0] * -2)
        result = estimate("xtrace", dense, tolerance=1e-3, max_hvps=40, seed=0)
        assert result.total.value == pytest.approx(-2, abs=1e-6) and result.total.hvps == PROBE_BLOCK_SIZE + 1

    def test_stops_by_its_tolerance(self):
        spent = []
        for tolerance in (0.3, 1e-2, 1e-3):
            total = estimate("xtrace", matrix("decaying"), tolerance=tolerance, max_hvps=200, seed=0).total
            assert total.converged and total.std_error <= tolerance * total.value
            spent.append(total.hvps)
        assert spent[0] < spent[1] < spent[2] < 120
