# SPDX-License-Identifier: Apache-2.0
"""Trace estimators on matrices whose every entry is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_optimizability.curvature.empirical_risk import EmpiricalRisk
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.linalg.operator import DenseOperator, SymmetricOperator
from hf_optimizability.linalg.probe_vectors import PROBE_BLOCK_SIZE
from hf_optimizability.linalg.statistics import jackknife
from hf_optimizability.linalg.trace import MIN_PROBES, HutchinsonAccumulator, exact_trace, hutchinson
from hf_optimizability.linalg.trace_result import TraceResult
from hf_optimizability.model_state.measuring import math_attention
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_models
from tests.support.known_traces import (
    METHODS,
    NEVER,
    cases,
    coverage,
    estimate,
    matrix,
    nearly_dominant,
    projected,
    segments,
    signs,
    truths,
    values,
    with_eigenvalues,
)


class TestCoverage:
    """95 % intervals hold the truth in 92 to 98 % of runs, give or take what 250 runs can tell (two deviations).

    Higher for what is an upper bound by design: traces of segments that couple to others, and ‖A‖_F² of flat spectra.
    """

    LOW, HIGH = 0.92 - 0.015, 0.98 + 0.015

    def check(self, dense: Tensor, run: Callable[[int], TraceResult]) -> None:
        held = coverage(dense, run)
        assert self.LOW <= held[0] <= self.HIGH, held
        assert held.min() >= 0.9, held

    @pytest.mark.parametrize(("name", "tolerance"), cases(0.25, "bert-adaptive"))
    def test_hutchinson(self, name: str, tolerance: float):
        dense = matrix(name)
        self.check(dense, lambda seed: estimate("hutchinson", dense, tolerance=tolerance, max_hvps=24, seed=seed))

    @pytest.mark.parametrize(("name", "tolerance"), cases(0.03, "network-adaptive"))
    def test_deflated(self, name: str, tolerance: float):
        dense = matrix(name)
        options = {"tolerance": tolerance, "max_hvps": 16, "deflation": nearly_dominant(dense, 5)}
        self.check(dense, lambda seed: estimate("hutchinson", dense, seed=seed, **options))

    @pytest.mark.parametrize(("name", "tolerance"), cases(0.1, "decaying-fixed"))
    def test_hutchplusplus(self, name: str, tolerance: float):
        dense = matrix(name)
        self.check(dense, lambda seed: estimate("hutch++", dense, tolerance=tolerance, max_hvps=32, seed=seed))


class TestHutchinson:
    def test_standard_error_is_that_of_rademacher_probes(self):
        """Var = 2 (‖A‖_F² − Σ aᵢᵢ²) / m, also as the spread of results over seeds."""
        dense = matrix("network")
        variance = 2 * float((dense**2).sum() - (dense.diagonal() ** 2).sum())
        options = {"tolerance": NEVER, "max_hvps": 16}
        results = [estimate("hutchinson", dense, seed=seed, **options).total for seed in range(300)]
        assert np.var([total.value for total in results]) == pytest.approx(variance / 16, rel=0.2)
        assert np.mean([total.std_error**2 for total in results]) == pytest.approx(variance / 16, rel=0.05)

    def test_on_paper(self):
        """Three probes: means, and variances term by term; 95 % of a normal distribution lie within 1.96."""
        dense, probes = matrix("network"), signs(3, 200, seed=0)
        probed = HutchinsonAccumulator(DenseOperator(dense), segments(dense))
        probed.multiply(probes)
        result = probed.run(torch.Generator(), tolerance=NEVER, max_hvps=3, method="hutchinson")
        terms = (probes * (probes @ dense)).numpy()
        std_error = (2 * terms.var(axis=0, ddof=1).sum() / 3) ** 0.5
        assert (result.total.value, result.total.std_error) == pytest.approx((terms.sum(1).mean(), std_error))
        assert result.total.high - result.total.value == pytest.approx(1.96 * std_error, rel=1e-4)
        assert result.total.value - result.total.low == pytest.approx(1.96 * std_error, rel=1e-4)
        assert values(result)[4] == pytest.approx(float(((probes @ dense) ** 2).sum() / 3))
        assert torch.allclose(result.diagonal, torch.from_numpy(terms.mean(axis=0)))

    def test_a_diagonal_matrix_has_no_variance(self):
        dense = torch.diag(torch.linspace(-3, 5, 60, dtype=torch.float64))
        result = estimate("hutchinson", dense, tolerance=1e-7, max_hvps=100, seed=0)  # up to rounding
        assert result.total.converged and result.total.hvps == MIN_PROBES
        assert values(result) == pytest.approx(truths(dense), rel=1e-12) and result.total.std_error < 1e-6
        assert torch.allclose(result.diagonal, dense.diagonal())

    def test_diagonal(self):
        """Its error, in the 2-norm, is the trace's standard error / √2."""
        dense, options = matrix("network"), {"tolerance": NEVER, "max_hvps": 64}
        results = [estimate("hutchinson", dense, seed=seed, **options) for seed in range(20)]
        errors = [float((result.diagonal - dense.diagonal()).norm() ** 2) for result in results]
        stated = [result.total.std_error**2 / 2 for result in results]
        assert np.mean(errors) == pytest.approx(np.mean(stated), rel=0.2)

    def test_stops_by_its_tolerance_within_its_budget(self):
        spent = []
        for tolerance in (0.5, 0.02, 0.01):
            total = estimate("hutchinson", matrix("flat"), tolerance=tolerance, max_hvps=500, seed=0).total
            assert total.converged and total.std_error <= tolerance * total.value
            assert total.hvps % PROBE_BLOCK_SIZE == 0
            spent.append(total.hvps)
        assert MIN_PROBES == spent[0] < spent[2] < 500
        short = estimate("hutchinson", matrix("network"), tolerance=0.01, max_hvps=7, seed=0).total
        assert short.hvps == 7 and not short.converged


class TestDeflation:
    @pytest.mark.parametrize("name", ["network", "bert"])
    def test_splits_the_matrix(self, name: str):
        dense = matrix(name)
        deflation = nearly_dominant(dense, 6)
        rest = projected(dense, deflation)
        traces, squared = deflation.traces(segments(dense))
        assert traces == pytest.approx(truths(dense - rest)[1:4], rel=1e-10)
        assert squared == pytest.approx(truths(dense - rest)[4], rel=1e-10)
        assert squared + truths(rest)[4] == pytest.approx(truths(dense)[4], rel=1e-10)
        assert torch.allclose(deflation.diagonal(), (dense - rest).diagonal(), atol=1e-10)
        probes = signs(3, len(dense), seed=0)
        assert torch.allclose(deflation.reduce(probes, probes @ dense), probes @ rest, atol=1e-9)

    def test_leaves_the_variance_of_the_rest(self):
        dense = matrix("network")
        deflation = nearly_dominant(dense, 4)
        rest = projected(dense, deflation)
        variance = 2 * float((rest**2).sum() - (rest.diagonal() ** 2).sum()) / 400
        result = estimate("hutchinson", dense, tolerance=NEVER, max_hvps=400, seed=0, deflation=deflation)
        assert result.total.std_error == pytest.approx(variance**0.5, rel=0.05)
        assert abs(result.total.value - truths(dense)[0]) <= 4 * variance**0.5
        assert torch.allclose(result.diagonal, dense.diagonal(), atol=5 * variance**0.5)


class TestHutchPlusPlus:
    def test_a_matrix_of_low_rank_is_exact(self):
        dense = with_eigenvalues(np.concatenate([[-4.0, 3.0, 2.0], np.zeros(97)]))
        result = estimate("hutch++", dense, tolerance=1e-6, max_hvps=40, seed=0)
        assert values(result) == pytest.approx(truths(dense), abs=1e-9) and result.total.converged
        assert result.total.hvps == 4 + 3 + MIN_PROBES  # sketch, its span, probes that see nothing

    def test_a_flat_spectrum_gets_no_large_sketch(self):
        """50 probes for 1 %; a sketch of thirds would take 100 more."""
        flat = matrix("flat")
        plain = estimate("hutchinson", flat, tolerance=0.005, max_hvps=300, seed=0).total
        total = estimate("hutch++", flat, tolerance=0.005, max_hvps=300, seed=0).total
        assert total.converged and total.hvps <= plain.hvps + 2 * PROBE_BLOCK_SIZE + 24

    def test_starts_from_a_given_subspace(self):
        dense, options = matrix("network"), {"tolerance": 0.02, "max_hvps": 60, "seed": 0}
        cold = estimate("hutch++", dense, **options)
        warm = estimate("hutch++", dense, **options, deflation=nearly_dominant(dense, 4))
        assert cold.total.converged and warm.total.converged and warm.total.hvps < cold.total.hvps

    def test_a_budget_too_small_for_a_sketch(self):
        total = estimate("hutch++", matrix("network"), tolerance=NEVER, max_hvps=6, seed=0).total
        assert total.hvps == 6 and not total.converged


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_no_bias(self, name: str):
        dense = matrix("network")
        runs = [estimate(name, dense, tolerance=NEVER, max_hvps=20, seed=seed) for seed in range(60)]
        means, spread = np.mean([values(run) for run in runs], axis=0), np.std([values(run) for run in runs], axis=0)
        assert np.all(np.abs(means - truths(dense)) <= 3.5 * spread / 60**0.5 + 1e-9)

    def test_segments_add_up(self, name: str):
        result = estimate(name, matrix("network"), tolerance=NEVER, max_hvps=20, seed=0)
        assert sum(segment.value for segment in result.segments) == pytest.approx(result.total.value, rel=1e-10)

    def test_same_seed_same_numbers(self, name: str):
        options = {"tolerance": 0.1, "max_hvps": 24}
        first, again, other = (estimate(name, matrix("network"), seed=seed, **options) for seed in (0, 0, 1))
        assert first == again != other

    def test_float32(self, name: str):
        dense, options = matrix("network"), {"tolerance": NEVER, "max_hvps": 20, "seed": 0}
        single, double = (
            values(estimate(name, dense.to(dtype), **options)) for dtype in (torch.float32, torch.float64)
        )
        assert single == pytest.approx(double, abs=2e-3)

    def test_zero(self, name: str):
        result = estimate(name, torch.zeros(100, 100), tolerance=0.1, max_hvps=40, seed=0)
        assert result.total.converged and values(result) == [0, 0, 0, 0, 0]


def test_exact():
    dense = matrix("network")
    result = exact_trace(DenseOperator(dense), segments(dense))
    assert values(result) == pytest.approx(truths(dense), rel=1e-12)
    assert torch.allclose(result.diagonal, dense.diagonal())
    assert (result.total.hvps, result.total.std_error, result.total.converged) == (200, 0, True)


class Mean(SymmetricOperator):
    """The mean of dense matrices, each the share of so many items."""

    def __init__(self, parts: Sequence[Tensor], items: Sequence[int]):
        self._parts, self._items = parts, items
        self.size, self.dtype, self.device = len(parts[0]), parts[0].dtype, parts[0].device

    def matmat(self, vectors: Tensor) -> Tensor:
        return sum(n * (part @ vectors) for part, n in zip(self._parts, self._items, strict=True)) / sum(self._items)

    def matmat_per_batch(
        self, vectors: Tensor, segments: Sequence[Sequence[slice]]
    ) -> tuple[Tensor, np.ndarray, list[int]]:
        terms = [(vectors * (part @ vectors)).T for part in self._parts]
        rows = [torch.cat([torch.arange(len(self._parts[0]))[piece] for piece in segment]) for segment in segments]
        forms = np.array([[[float(row[index].sum()) for index in rows] for row in part] for part in terms])
        return self.matmat(vectors), forms, list(self._items)


@pytest.mark.parametrize("name", METHODS)
class TestDataStdError:
    """Twelve parts of different sizes, a common matrix and one of their own each."""

    ITEMS = (4, 8, 8, 3, 8, 90, 8, 5, 8, 8, 8, 2)

    def parts(self, *, differ: float) -> list[Tensor]:
        generator, parts = torch.Generator().manual_seed(5), []
        for _ in self.ITEMS:
            own = torch.randn(200, 20, generator=generator, dtype=torch.float64)
            size = torch.rand(1, generator=generator, dtype=torch.float64)
            parts.append(matrix("network") + differ * size * own @ own.T / 200)
        return parts

    def found(
        self, name: str, parts: Sequence[Tensor], *, items: Sequence[int] = ITEMS, **options: int
    ) -> TraceResult:
        run, rows = METHODS[name], segments(parts[0])
        return run(Mean(parts, items), rows, tolerance=NEVER, **options)

    def test_is_the_jackknife_of_the_parts_traces(self, name: str):
        parts = self.parts(differ=1.0)
        traces = np.array([truths(part)[:4] for part in parts])
        expected = np.array([jackknife(column, self.ITEMS) for column in traces.T])
        squares = []
        for seed in range(40):
            result = self.found(name, parts, max_hvps=24, seed=seed)
            squares.append([e.data_std_error**2 for e in (result.total, *result.segments)])
        # Without bias: the noise of the probes in it is taken off.
        spread = np.std(squares, axis=0) / 40**0.5
        assert np.all(np.abs(np.mean(squares, axis=0) - expected**2) <= 3.5 * spread), (
            np.mean(squares, 0),
            expected**2,
        )
        assert np.mean(squares, axis=0)[0] == pytest.approx(expected[0] ** 2, rel=0.1)

    def test_parts_alike_have_none_however_noisy_the_probes(self, name: str):
        result = self.found(name, self.parts(differ=0.0), max_hvps=16, seed=0)
        assert result.total.std_error > 0.05
        assert [e.data_std_error for e in (result.total, *result.segments)] == pytest.approx([0] * 4, abs=1e-6)
        noisy = self.found(name, self.parts(differ=0.001), max_hvps=16, seed=0)
        assert noisy.total.data_std_error < 0.03 * noisy.total.std_error

    def test_does_not_touch_the_estimates(self, name: str):
        parts = self.parts(differ=1.0)
        mean = sum(n * part for part, n in zip(parts, self.ITEMS, strict=True)) / sum(self.ITEMS)
        options = {"tolerance": NEVER, "max_hvps": 16, "seed": 0}
        plain = METHODS[name](DenseOperator(mean), segments(mean), **options)
        apart = METHODS[name](Mean(parts, self.ITEMS), segments(mean), **options)
        assert values(apart) == pytest.approx(values(plain), rel=1e-9)
        assert apart.total.std_error == pytest.approx(plain.total.std_error, rel=1e-9)

    def test_one_part_tells_nothing_of_others(self, name: str):
        [part, *_] = self.parts(differ=1.0)
        result = self.found(name, [part], items=[7], max_hvps=16, seed=0)
        assert [e.data_std_error for e in (result.total, *result.segments)] == [None] * 4


def test_the_exact_trace_has_the_exact_jackknife():
    test = TestDataStdError()
    parts = test.parts(differ=1.0)
    expected = [jackknife(column, test.ITEMS) for column in np.array([truths(part)[:4] for part in parts]).T]
    result = exact_trace(Mean(parts, test.ITEMS), segments(parts[0]))
    assert [e.data_std_error for e in (result.total, *result.segments)] == pytest.approx(expected, rel=1e-10)


@pytest.mark.slow
def test_of_a_mean_over_batches():
    """Of the Hessian itself: what products with each batch's own would tell, to rounding."""
    model = tiny_models.make("bert").eval()
    batches = tiny_models.cut(tiny_models.examples("bert", 5), 2)
    whole = HessianOperator(Objective(model, batches))
    rows = [[slice(0, whole.size)]]
    with math_attention():
        found = hutchinson(whole, rows, tolerance=NEVER, max_hvps=100, seed=0).total
        traces = [exact_trace(HessianOperator(Objective(model, [batch])), rows).total.value for batch in batches]
    assert found.data_std_error == pytest.approx(jackknife(traces, [2, 2, 1]), rel=0.1)


class Quadratics(EmpiricalRisk):
    """L = the mean of ½ xᵀ Aₚ x over parts of one item each."""

    parameters = ()

    def __init__(self, matrices: torch.Tensor):
        self.matrices = matrices
        self.parameters = [torch.zeros(matrices.shape[1], dtype=matrices.dtype, requires_grad=True)]

    def losses(self):
        for each in self.matrices:
            yield 0.5 * self.parameters[0] @ each @ self.parameters[0], 1


def test_the_traces_of_some_parts_from_the_probes_of_all():
    """They add up, their intervals hold the truth, and other parts do not enter."""
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(4, 30, 12, generator=generator, dtype=torch.float64)
    matrices = roots @ roots.mT
    operator, segments = HessianOperator(Quadratics(matrices)), [[slice(0, 10)], [slice(10, 30)]]
    truth = float(matrices[:2].diagonal(dim1=1, dim2=2).sum(dim=1).mean())
    options = {"tolerance": 0.1, "method": "hutchinson", "hvps": 12}
    held = []
    for seed in range(80):
        found = hutchinson(operator, segments, tolerance=1e-9, max_hvps=12, seed=seed)
        first, second = (found.batch_traces.mean_of(places, **options) for places in ([0, 1], [2, 3]))
        assert (first[0].value + second[0].value) / 2 == pytest.approx(found.total.value, rel=1e-12)
        assert first[1].value + first[2].value == pytest.approx(first[0].value, rel=1e-12)
        held.append(first[0].low <= truth <= first[0].high)
    assert 0.91 <= np.mean(held) <= 0.99
    exact = exact_trace(operator, segments).batch_traces.mean_of([0, 1], **options)
    assert exact[0].value == pytest.approx(truth, rel=1e-12) and exact[0].std_error == 0
