# SPDX-License-Identifier: Apache-2.0
"""Full-batch training drives the curvature up to the optimizer's stability limit and holds it there.

Cohen et al., arXiv 2103.00065 (gradient descent, 2/η) and arXiv 2207.14484 (Adam, preconditioned, 38/η).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from hf_optimizability.curvature.empirical_risk import EmpiricalRisk
from hf_optimizability.curvature.gradient import gradient
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.linalg.lanczos import lanczos
from hf_optimizability.linalg.operator import PreconditionedOperator
from hf_optimizability.quantities.preconditioner import read_preconditioner


class RandomLabels(EmpiricalRisk):
    """A tanh network of 253 parameters on 40 examples with labels that it has to learn by heart."""

    parameters = ()

    def __init__(self):
        torch.manual_seed(0)
        layers = nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)
        self.network = nn.Sequential(*layers).double()
        self.parameters = list(self.network.parameters())
        self._inputs = torch.randn(40, 6, dtype=torch.float64)
        self._labels = torch.randn(40, 1, dtype=torch.float64).sign()

    def losses(self) -> Iterator[tuple[Tensor, int]]:
        yield (self.network(self._inputs) - self._labels).square().sum(), len(self._inputs)


def sharpness(task: RandomLabels, optimizer: Optimizer) -> float:
    at_point = gradient(task)
    diagonal = read_preconditioner(optimizer, task.parameters, gradients=at_point.tensors).diagonal
    operator = PreconditionedOperator(HessianOperator(task), diagonal)
    return lanczos(operator, tolerance=0.01, max_hvps=40, seed=0).lambda_max.value


def train(task: RandomLabels, optimizer: Optimizer, steps: int, *, measure_from: int) -> list[float]:
    """Full-batch steps; the sharpness at every 50th."""
    found = []
    for step in range(steps):
        if step >= measure_from and step % 50 == 0:
            found.append(sharpness(task, optimizer))
        for parameter, tensor in zip(task.parameters, gradient(task).tensors, strict=True):
            parameter.grad = tensor
        optimizer.step()
    return found


def test_gradient_descent_settles_at_two_over_the_learning_rate():
    task = RandomLabels()
    optimizer = SGD(task.parameters, lr=0.1)
    assert sharpness(task, optimizer) < 0.5 * 20
    found = train(task, optimizer, 1000, measure_from=400)
    assert np.mean(found) == pytest.approx(2 / 0.1, rel=0.1)
    assert read_preconditioner(optimizer, task.parameters).limit == pytest.approx(20)


def test_adam_settles_at_38_over_the_learning_rate():
    task = RandomLabels()
    optimizer = Adam(task.parameters, lr=0.01)  # β₁ = 0.9, β₂ = 0.999
    train(task, optimizer, 50, measure_from=50)
    assert sharpness(task, optimizer) < 0.8 * 3800
    found = train(task, optimizer, 1000, measure_from=400)
    assert np.mean(found) == pytest.approx(38 / 0.01, rel=0.15)
    assert read_preconditioner(optimizer, task.parameters).limit == pytest.approx(3800)
