# SPDX-License-Identifier: Apache-2.0
"""Slices through the loss landscape against closed forms, and against losses at weights that were moved by hand."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_optimizability import Measurement, MeasurementError, OptimizabilityConfig, measure
from hf_optimizability.curvature.empirical_risk import EmpiricalRisk
from hf_optimizability.files import finite
from hf_optimizability.linalg.estimate import Estimate
from hf_optimizability.measurement.forecast import forecast
from hf_optimizability.quantities.loss_landscape import Axis, Landscape, loss_line, loss_plane
from hf_optimizability.serialization import structure
from tests.support import tiny_models


PRECISE = OptimizabilityConfig(eigen_tolerance=1e-12, trace_tolerance=0.5, max_hvps=200, landscape=True)
RATE = 0.02


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Of a linear regression, in uneven batches."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(12, size, generator=generator, dtype=torch.float64) for size in (5, 1))
    return [(x[:7], y[:7]), (x[7:], y[7:])]


def regression() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(5, 1, bias=False, dtype=torch.float64)


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def bits(model: nn.Module) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


@pytest.fixture(scope="module")
def measured() -> Measurement:
    """Of the regression, before a step of SGD."""
    model = regression()
    return measure(model, pairs(), PRECISE, loss_fn=squares, optimizer=torch.optim.SGD(model.parameters(), lr=RATE))


class TestQuadratic:
    """H = (2/N)XᵀX, so that the loss is its quadratic model."""

    x, y = (torch.cat(pieces).numpy() for pieces in zip(*pairs(), strict=True))
    weights = regression().weight.detach().numpy()[0]
    residual = x @ weights - y[:, 0]
    loss = float((residual**2).mean())
    gradient = 2 / 12 * x.T @ residual
    eigenvalues, eigenvectors = np.linalg.eigh(2 / 12 * x.T @ x)

    def along(self, index: int) -> tuple[float, np.ndarray, float]:
        """Eigenvalue and eigenvector, the largest first; and how the loss falls along it, towards where it falls."""
        vector = self.eigenvectors[:, -1 - index]
        vector = vector * np.sign(self.gradient @ vector)
        return float(self.eigenvalues[-1 - index]), vector, float(self.gradient @ vector)

    def test_an_axis_is_a_unit_of_the_loss_by_the_curvature(self, measured):
        plane = measured.landscape.eigenvectors
        for index, (axis, estimate) in enumerate(zip(plane.axes, plane.eigenvalues, strict=True)):
            eigenvalue, _, fall = self.along(index)
            assert estimate.value == pytest.approx(eigenvalue, rel=1e-10)
            assert eigenvalue * axis.length**2 / 2 == pytest.approx(self.loss, rel=1e-10)
            assert axis.curvature == pytest.approx(2 * self.loss, rel=1e-10)
            assert axis.slope == pytest.approx(-fall * axis.length, rel=1e-8)
            assert axis.at == pytest.approx(np.linspace(-1, 1, 11), abs=1e-15)

    def test_the_slices_are_the_closed_form(self, measured):
        plane = measured.landscape.eigenvectors
        (first, _, down_first), (second, _, down_second) = self.along(0), self.along(1)
        across, up = (np.array(axis.at) * axis.length for axis in plane.axes)
        for row, t in zip(plane.losses, up, strict=True):
            for loss, s in zip(row, across, strict=True):
                truth = self.loss - down_first * s + first * s**2 / 2 - down_second * t + second * t**2 / 2
                assert loss == pytest.approx(truth, rel=1e-10)

    def test_they_are_what_weights_moved_by_hand_give(self, measured):
        plane = measured.landscape.eigenvectors
        units = [self.along(index)[1] * plane.axes[index].length for index in (0, 1)]
        for (i, s), (j, t) in itertools.product(enumerate(plane.axes[0].at), enumerate(plane.axes[1].at)):
            moved = self.weights - s * units[0] - t * units[1]
            assert plane.losses[j][i] == pytest.approx(((self.x @ moved - self.y[:, 0]) ** 2).mean(), rel=1e-9)

    def test_the_quadratic_model_is_the_loss_along_each_line(self, measured):
        plane = measured.landscape.eigenvectors
        for line in (measured.landscape.update, *plane.lines):
            for s, loss in zip(line.axis.at, line.losses, strict=True):
                assert self.loss + line.axis.quadratic_change(s) == pytest.approx(loss, rel=1e-10)

    def test_the_update_of_sgd_is_the_gradient(self, measured):
        line, critical = measured.landscape.update, measured.optimizer_stability.critical
        bend = float(self.gradient @ (2 / 12 * self.x.T @ self.x) @ self.gradient)
        assert line.axis.slope == pytest.approx(-float(self.gradient @ self.gradient), rel=1e-10)
        assert line.axis.curvature == pytest.approx(bend, rel=1e-10)
        assert line.axis.length == pytest.approx(float(np.linalg.norm(self.gradient)), rel=1e-10)
        for s, loss in zip(line.axis.at, line.losses, strict=True):
            moved = self.weights - s * self.gradient
            assert loss == pytest.approx(((self.x @ moved - self.y[:, 0]) ** 2).mean(), rel=1e-10)
        assert critical.low <= line.axis.quadratic_return <= critical.high
        assert (min(line.axis.at), max(line.axis.at)) == (-critical.value / 2, 1.5 * critical.value)
        assert {0.0, RATE} < set(line.axis.at)
        assert len(line.axis.at) == 22


@pytest.mark.parametrize("optimizer", [pytest.param(None, marks=pytest.mark.slow), torch.optim.AdamW])
def test_of_a_network_they_are_what_weights_moved_along_dense_eigenvectors_give(optimizer: Any):
    """Rows of the embeddings that no token looks up are left out where the eigenvectors are found."""
    model = tiny_models.make("bert", vocab_size=40).eval()
    rows = tiny_models.examples("bert", 6)
    [whole] = tiny_models.cut(rows, 6)
    hessian = tiny_models.dense_hessian(model, whole)
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    pieces = torch.autograd.grad(model(**whole).loss, list(model.parameters()), materialize_grads=True)
    gradient = torch.cat([piece.flatten() for piece in pieces])
    options = {} if optimizer is None else {"optimizer": optimizer(model.parameters(), lr=1e-3, weight_decay=0.1)}
    before = bits(model)
    found = measure(model, tiny_models.cut(rows, 4), PRECISE, **options)
    assert bits(model) == before
    assert found.unused_embedding_parameters > 0
    plane = found.landscape.eigenvectors
    eigenvalues, eigenvectors = torch.linalg.eigh(hessian)
    vectors = [eigenvectors[:, -1 - index] for index in (0, 1)]
    vectors = [
        vector * torch.sign(gradient @ vector) * axis.length for vector, axis in zip(vectors, plane.axes, strict=True)
    ]
    for index in (0, 1):
        assert plane.eigenvalues[index].value == pytest.approx(float(eigenvalues[-1 - index]), rel=1e-6)
    for i, j in ((0, 0), (10, 2), (5, 5), (3, 9)):
        moved = start - plane.axes[0].at[i] * vectors[0] - plane.axes[1].at[j] * vectors[1]
        nn.utils.vector_to_parameters(moved, model.parameters())
        assert plane.losses[j][i] == pytest.approx(float(model(**whole).loss.detach()), rel=1e-5)
    if optimizer is None:
        assert found.landscape.update is None
        return
    line = found.landscape.update
    update = gradient / (gradient.abs() + 1e-8) + 0.1 * start  # the first step of AdamW
    assert line.axis.curvature == pytest.approx(float(update @ hessian @ update), rel=1e-6)
    assert line.axis.slope == pytest.approx(-float(gradient @ update), rel=1e-6)
    for s, loss in list(zip(line.axis.at, line.losses, strict=True))[::7]:
        nn.utils.vector_to_parameters(start - s * update, model.parameters())
        assert loss == pytest.approx(float(model(**whole).loss.detach()), rel=1e-6)


def test_the_weights_come_back_where_a_loss_raises():
    model, calls = regression(), itertools.count()
    plain = OptimizabilityConfig(max_hvps=16)

    def count(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        next(calls)
        return squares(model, batch)

    measure(model, pairs(), plain, loss_fn=count)
    without = next(calls)

    def fail_late(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if next(passes) > without + 60:
            raise KeyError("in the middle of the plane")
        return squares(model, batch)

    before, passes = bits(model), itertools.count()
    with pytest.raises(MeasurementError, match="in the middle of the plane"):
        measure(model, pairs(), OptimizabilityConfig(max_hvps=16, landscape=True), loss_fn=fail_late)
    assert bits(model) == before


class Fixed(EmpiricalRisk):
    """A loss of two weights."""

    parameters = ()

    def __init__(self, loss: Any):
        self.parameters = [torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)]
        self._loss = loss

    def losses(self) -> Any:
        yield self._loss(self.parameters[0]), 1


def eigenvalue(value: float) -> Estimate:
    return Estimate(value, value, value, "lanczos", 1, converged=True, residual=0.0)


def plane_of(loss: Any, *values: float, present: float = 25.0) -> Any:
    eye = torch.eye(2, dtype=torch.float64)[: len(values)]
    gradient = torch.tensor([6.0, -8.0], dtype=torch.float64)
    return loss_plane(Fixed(loss), eye, [eigenvalue(v) for v in values], gradient=gradient, present=present)


def test_a_direction_without_curvature_gets_a_unit_of_finite_length():
    plane = plane_of(lambda weights: weights.square().sum(), 2.0, 0.0)
    assert [axis.length for axis in plane.axes] == pytest.approx([5, 5 * math.sqrt(1000)])
    assert plane.axes[1].curvature == 0
    saddle = plane_of(lambda weights: weights.square().sum(), 2.0, -2.0)
    assert [axis.curvature for axis in saddle.axes] == pytest.approx([50, -50])


def test_positive_is_downhill():
    plane = plane_of(lambda weights: 6 * weights[0] - 8 * weights[1], 2.0, 1.0)
    assert [axis.slope for axis in plane.axes] == pytest.approx([-30, -8 * math.sqrt(50)])
    assert plane.losses[5] == tuple(sorted(plane.losses[5], reverse=True))
    assert plane.lines[1].losses == tuple(sorted(plane.lines[1].losses, reverse=True))


@pytest.mark.parametrize("values", [(), (1.0,), (0.0, 0.0)])
def test_without_two_curved_directions_there_is_no_plane(values: tuple[float, ...]):
    assert plane_of(lambda weights: weights.sum(), *values) is None


def test_at_a_loss_of_zero_a_unit_changes_it_by_one():
    assert plane_of(lambda weights: weights.sum(), 2.0, 1.0, present=0.0).axes[0].length == 1


def test_a_loss_that_is_not_finite_is_infinite_and_comes_back_from_json():
    direction = torch.ones(2, dtype=torch.float64)
    objective = Fixed(lambda weights: torch.log(weights[0] - 3.1))
    line = loss_line(objective, direction, gradient=direction, curvature=1.0, reach=1.0, step=0.0)
    assert math.isfinite(line.losses[0]) and line.losses[-1] == math.inf
    plane = plane_of(lambda weights: torch.log(weights[0]), 2.0, 1.0)
    landscape = Landscape(line, plane)
    data = json.loads(json.dumps(finite(asdict(landscape)), allow_nan=False))
    assert structure(Landscape, data) == landscape
    assert structure(Landscape, asdict(Landscape(None, None))) == Landscape(None, None)


@pytest.mark.parametrize(("slope", "curvature", "back"), [(-1, 4, 0.5), (1, 4, None), (-1, 0, None), (-1, -4, None)])
def test_where_the_quadratic_model_is_back(slope: float, curvature: float, back: float | None):
    axis = Axis((0.0, 1.0), 1.0, slope, curvature)
    assert axis.quadratic_return == back
    if back is not None:
        assert axis.quadratic_change(back) == 0


def test_it_is_asked_for_and_its_price_is_forecast():
    model = regression()
    assert measure(model, pairs(), OptimizabilityConfig(), loss_fn=squares).landscape is None
    calls = itertools.count()

    def count(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        next(calls)
        return squares(model, batch)

    def passes(**options: Any) -> tuple[int, int, int]:
        """Over the probe set; products, and those that were forecast."""
        before = next(calls)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        config = OptimizabilityConfig(max_hvps=16, **options)
        hvps = measure(model, pairs(), config, loss_fn=count, optimizer=optimizer).hvps
        made = (next(calls) - before - 1) // 2
        return made, hvps, forecast(model, pairs(), config, loss_fn=squares, optimizer=optimizer).hvps

    (plain, hvps, most), (more, one_more, most_more) = passes(), passes(landscape=True)
    assert one_more == hvps + 1
    assert most_more == most + 1
    # 121 and 22 losses, a gradient; the embeddings that there are not take no pass.
    assert more - plain == 121 + 22 + 1


def test_power_iteration_has_not_the_eigenvectors():
    with pytest.raises(ValueError, match="`landscape` needs the top two eigenvectors"):
        OptimizabilityConfig(landscape=True, eigen_method="power_iteration")
