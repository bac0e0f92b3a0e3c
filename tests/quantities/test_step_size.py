# SPDX-License-Identifier: Apache-2.0
"""The quadratic model and the critical learning rate against closed forms and dense line searches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from hf_optimizability.curvature.empirical_risk import EmpiricalRisk
from hf_optimizability.curvature.gradient import gradient
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.objective.objective import Objective
from hf_optimizability.quantities.preconditioner import optimizer_update
from hf_optimizability.quantities.step_size import critical_learning_rate, loss_along, quadratic_model
from tests.support import tiny_models


class Quadratic(EmpiricalRisk):
    """½xᵀAx + 1, which is not 0 at its minimum."""

    parameters = ()

    def __init__(self, *, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        self.matrix = (root @ root.T).to(dtype)
        self.parameters = [torch.randn(6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()]

    def losses(self) -> Iterator[tuple[Tensor, int]]:
        yield 3 * (self.parameters[0] @ self.matrix @ self.parameters[0] / 2 + 1), 3


def tanh_network(dtype: torch.dtype = torch.float32) -> Objective:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    inputs = torch.randn(20, 4).to(dtype)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    return Objective(network, [inputs[:13], inputs[13:]], loss_fn=loss_fn)


def tiny_bert() -> Objective:
    model = tiny_models.make("bert", dtype=torch.float32).eval()
    return Objective(model, tiny_models.cut(tiny_models.examples("bert", 6), 4))


def first_rise(loss: Callable[[float], float], *, upto: float) -> float:
    """Where the loss first exceeds its present value, on a grid of 2 % steps."""
    steps = np.geomspace(upto / 1e4, upto, 470)
    present = loss(0.0)
    return next(step for step in steps if loss(float(step)) > present)


def test_quadratic_model_is_that_of_the_dense_hessian():
    objective = tanh_network(torch.float64)
    g = torch.cat([tensor.reshape(-1) for tensor in gradient(objective).tensors])
    model = quadratic_model(g, HessianOperator(objective).matvec(g))
    eye = torch.eye(len(g), dtype=torch.float64)
    bend = float(g @ HessianOperator(objective).matmat(eye) @ g)
    assert bend > 0
    assert model.gradient_squared == pytest.approx(float(g @ g))
    assert model.curvature == pytest.approx(bend)
    step = 1e-3 * model.best_step
    with loss_along(objective, g) as loss:  # the model is the loss, to second order
        slope = (loss(step) - loss(-step)) / (2 * step)
        second = (loss(step) - 2 * loss(0.0) + loss(-step)) / step**2
    assert slope == pytest.approx(-model.gradient_squared, rel=1e-4)
    assert second == pytest.approx(model.curvature, rel=1e-4)


def test_best_step_and_its_gain_on_a_quadratic():
    quadratic = Quadratic()
    g = quadratic.matrix @ quadratic.parameters[0].detach()
    model = quadratic_model(g, HessianOperator(quadratic).matvec(g))
    with loss_along(quadratic, g) as loss:
        assert loss(0.0) - loss(model.best_step) == pytest.approx(model.predicted_decrease, rel=1e-10)
        assert loss(model.best_step) < min(loss(0.99 * model.best_step), loss(1.01 * model.best_step))
        assert loss(2 * model.best_step) == pytest.approx(loss(0.0), rel=1e-10)


@pytest.mark.parametrize("curvature", [-2.0, 0.0])
def test_where_the_loss_bends_down_there_is_no_best_step(curvature: float):
    model = quadratic_model(torch.ones(2), curvature * torch.ones(2))
    assert model.curvature == 2 * curvature
    assert model.best_step is None and model.predicted_decrease is None


def test_small_gradients_do_not_underflow():
    model = quadratic_model(torch.full((4,), 1e-25), torch.full((4,), 1e-25))
    assert model.best_step == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1 / 300, 1 / 3.9, 0.99, 1.01, 3.9, 300])
def test_on_a_quadratic_it_is_two_over_the_rayleigh_quotient(factor: float, dtype: torch.dtype):
    quadratic = Quadratic(dtype=dtype)
    weights = quadratic.parameters[0].detach()
    g = quadratic.matrix @ weights
    update = g / torch.arange(1, 7, dtype=dtype)
    truth = float(2 * g @ update / (update @ quadratic.matrix @ update))
    with loss_along(quadratic, update) as loss:
        found = critical_learning_rate(loss, start=factor * truth)
        fine = critical_learning_rate(loss, start=factor * truth, tolerance=1e-4, max_forward_passes=40)
    assert found.low <= truth <= found.high <= 1.1 * found.low and found.converged
    assert found.forward_passes <= (8 if 0.25 < factor < 4 else 14)
    assert fine.value == pytest.approx(truth, rel=1e-4)
    assert fine.sharpness == pytest.approx(float(update @ quadratic.matrix @ update / (g @ update)), rel=1e-4)


@pytest.mark.parametrize("make", [tanh_network, tiny_bert])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_on_a_network_it_is_where_a_dense_line_search_has_it(
    make: Callable[[], Objective], kind: Callable[..., Optimizer]
):
    objective = make()
    optimizer = kind(objective.parameters, lr=0.01)
    update = optimizer_update(optimizer, objective.parameters, gradient(objective).tensors)
    with loss_along(objective, update) as loss:
        truth = first_rise(loss, upto=100.0)
        for start in (truth / 50, truth / 2, 3 * truth):
            assert critical_learning_rate(loss, start=start).value == pytest.approx(truth, rel=0.1)


def test_rounding_of_the_loss_is_no_rise():
    """A change of 1e-7 of the loss, as float32 has it, where the step is too short to make a true one."""
    for start in np.geomspace(1e-10, 1e-7, 20):
        found = critical_learning_rate(
            lambda step: (step - 1) ** 2 + 1 + 2e-7 * math.sin(1e12 * step), start=float(start), max_forward_passes=50
        )
        assert found.low <= 2 <= found.high and found.converged


def test_uphill_it_is_zero_as_far_as_can_be_seen():
    found = critical_learning_rate(lambda step: 1 + step, start=1.0, max_forward_passes=60)
    assert found.low == 0 and not found.converged and found.value == found.high < 1e-5


def test_a_loss_that_never_rises_has_no_upper_end():
    found = critical_learning_rate(lambda step: math.exp(-step), start=1.0, max_forward_passes=6)
    assert (found.low, found.high, found.value, found.converged) == (16.0, math.inf, 16.0, False)
    assert found.forward_passes == 6


def test_a_loss_that_is_not_finite_has_risen():
    found = critical_learning_rate(lambda step: math.nan if step > 3 else 1 - step / 10, start=0.5)
    assert found.low <= 3 <= found.high and found.converged
    with pytest.raises(FloatingPointError, match="present loss"):
        critical_learning_rate(lambda step: math.nan, start=0.5)


@pytest.mark.parametrize("start", [0.0, -1.0, math.nan])
def test_a_start_that_is_not_positive_is_refused(start: float):
    with pytest.raises(ValueError, match="`start`"):
        critical_learning_rate(lambda step: step, start=start)


def bits(objective: Objective) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in objective.parameters]


def test_weights_come_back_bit_for_bit():
    objective = tiny_bert()
    with torch.no_grad():
        objective.parameters[0][0, 0] = -0.0
    before = bits(objective)
    update = torch.full((sum(parameter.numel() for parameter in objective.parameters),), 1 / 3)
    with loss_along(objective, update) as loss:
        loss(0.1)
        assert bits(objective) != before
        assert loss(0.0) == pytest.approx(gradient(objective).loss, rel=1e-6)
    assert bits(objective) == before
    with pytest.raises(KeyError), loss_along(objective, update) as loss:
        loss(0.1)
        objective.batches[0].pop("input_ids")
        objective._loss_fn = lambda model, batch: batch["input_ids"]
        loss(0.2)
    assert bits(objective) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in objective.parameters)
