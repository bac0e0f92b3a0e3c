# SPDX-License-Identifier: Apache-2.0
"""The decoupled Hessian: the Hessian's diagonal, exactly, and less of the rest; also where weights are shared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_optimizability.curvature.empirical_risk import EmpiricalRisk
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.curvature.layer_decoupled import DecoupledHessian
from hf_optimizability.model_state.measuring import math_attention, measuring
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_models


def dense(objective: Objective) -> Tensor:
    """The decoupled matrix."""
    with measuring(objective.model, seed=0), math_attention():
        operator = DecoupledHessian(objective)
        eye = torch.eye(operator.size).double()
        first, _, of_the_kept_graph = (operator.matmat(vectors) for vectors in (eye, eye[:, :2], eye[:, :8]))
        torch.testing.assert_close(of_the_kept_graph, first[:, :8])
        return first


def by_double_backward(objective: Objective) -> Tensor:
    """The Hessian (other tests hold these products against dense truth)."""
    operator = HessianOperator(objective)
    return operator.matmat(torch.eye(operator.size).double())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "vit" else name for name in sorted(tiny_models.MODELS)],
)
def test_diagonal_of_transformers_models(name: str):
    model = tiny_models.make(name)
    [batch] = tiny_models.cut(tiny_models.examples(name, 3), 3)
    decoupled = dense(Objective(model, [batch]))
    hessian = tiny_models.dense_hessian(model.eval(), batch)
    # Causal language models compute their loss in float32.
    tolerance = 1e-5 if name in ("gpt2", "llama") else 1e-10
    tolerance *= float(hessian.abs().max())
    torch.testing.assert_close(decoupled, decoupled.T, rtol=0, atol=tolerance)
    torch.testing.assert_close(decoupled.diagonal(), hessian.diagonal(), rtol=0, atol=tolerance)
    assert float(decoupled.norm()) < 0.999 * float(hessian.norm())


class Shared(nn.Module):
    """One layer used twice, whose mixed derivatives do stand on the diagonal, beside one that is used once."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.twice(torch.tanh(self.twice(x))))


class InPlace(nn.Module):
    """Operations that write to what they are given, and a mask of infinite entries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden += self.a
        hidden = torch.tanh(hidden) * 2
        hidden.add_(self.b)
        masked = hidden.masked_fill(torch.tensor([False, False, True, False]), -torch.inf)
        return self.last(torch.tanh(masked + self.c).square())


class SharedBias(nn.Module):
    """Two layers of one bias, the second behind the first; their weights are used once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x)))).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", [Shared, SharedBias, InPlace])
def test_diagonal_where_care_is_needed(kind: type[nn.Module]):
    torch.manual_seed(1)
    model = kind().double()
    data = (torch.randn(5, 3).double(), torch.randn(5, 1).double())
    objective = Objective(model, [data], loss_fn=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))
    decoupled, hessian = dense(objective), by_double_backward(objective)
    torch.testing.assert_close(decoupled.diagonal(), hessian.diagonal(), rtol=0, atol=1e-12)
    assert float(decoupled.norm()) < 0.999 * float(hessian.norm())


def test_linear_layers_leave_the_gauss_newton_matrix():
    """With squared error and layers that are (piecewise) linear in their weights, H̃ = JᵀJ · 2/N."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    objective = Objective(model, [(x, y)], loss_fn=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))
    decoupled = dense(objective)
    names = [name for name, _ in model.named_parameters()]

    def outputs(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,)).flatten()

    jacobian = torch.autograd.functional.jacobian(outputs, tuple(p.detach() for p in model.parameters()))
    J = torch.cat([piece.flatten(1) for piece in jacobian], dim=1)
    torch.testing.assert_close(decoupled, J.T @ J * 2 / 12, rtol=0, atol=1e-12)


def test_the_graph_of_a_single_part_is_kept():
    class TwoLayers(EmpiricalRisk):
        parameters = ()

        def __init__(self) -> None:
            self.parameters = [torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)]
            self.passes = 0

        def losses(self) -> Iterator[tuple[Tensor, int]]:
            self.passes += 1
            yield (self.parameters[1] * (self.parameters[0] * 3.0)).square().sum(), 1

    losses = TwoLayers()
    operator = DecoupledHessian(losses)
    for passes in (2, 3, 3, 3):  # one has found the shared parameters, the first product that there is one part
        assert operator.matmat(torch.eye(2)).tolist() == [[18.0, 18.0], [18.0, 18.0]]
        assert losses.passes == passes
