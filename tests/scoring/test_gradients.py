# SPDX-License-Identifier: Apache-2.0
"""Gradient alignment and predicted decrease against dense per-part gradients and Hessians, and their intervals."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.objective.objective import Objective
from hf_optimizability.scoring.gradients import decrease_with_error, gradient_scores, mean_cosine


SIZES = (3, 5, 4, 2, 6)


def objective() -> Objective:
    """A small network in float64, and parts of different sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    batches = [(torch.randn(n, 3).double() + 1, torch.randn(n, 1).double()) for n in SIZES]
    return Objective(model, batches, loss_fn=lambda model, batch: (model(batch[0]) - batch[1]).square().mean())


def dense(held: Objective) -> tuple[np.ndarray, np.ndarray]:
    """The gradient and the Hessian of each part's mean loss, by torch.func."""
    names = [name for name, _ in held.model.named_parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in held.model.parameters()])
    shapes = [p.shape for p in held.model.parameters()]

    def loss(flat: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        pieces = [
            piece.view(shape) for piece, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        outputs = torch.func.functional_call(held.model, dict(zip(names, pieces, strict=True)), (batch[0],))
        return (outputs - batch[1]).square().mean()

    parts = [(torch.func.grad(loss)(flat, b).numpy(), torch.func.hessian(loss)(flat, b).numpy()) for b in held.batches]
    return np.array([g for g, _ in parts]), np.array([H for _, H in parts])


def test_both_are_those_of_dense_gradients_and_hessians():
    held = objective()
    alignment, decrease = gradient_scores(held, HessianOperator(held))
    gradients, hessians = dense(held)
    units = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    assert alignment.value == pytest.approx(np.mean([a @ b for a, b in combinations(units, 2)]), rel=1e-10)
    weights = np.array(SIZES) / sum(SIZES)

    def predicted(weights: np.ndarray) -> float:
        g, H = weights @ gradients, np.tensordot(weights, hessians, 1)
        return float((g @ g) ** 2 / (2 * g @ H @ g))

    assert decrease.value == pytest.approx(predicted(weights), rel=1e-10)
    step = 1e-6
    slopes = np.array([predicted(np.r_[weights[:i], weights[i] + step, weights[i + 1 :]]) for i in range(len(SIZES))])
    derivatives = (slopes - predicted(weights)) / step  # by a part's own weight, the weights then not summing to 1
    moved = derivatives - weights @ derivatives
    assert decrease.std_error == pytest.approx(np.sqrt(np.sum((weights * moved) ** 2) * 5 / 4), rel=1e-4)
    assert alignment.examples == decrease.examples == sum(SIZES)


def test_the_error_of_the_mean_cosine_is_a_jackknife_and_covers():
    rng = np.random.default_rng(0)
    expected = unit(rng.normal(size=(200_000, 4)) + 0.5).mean(axis=0)
    truth = expected @ expected  # of two independent unit vectors
    covered = []
    for _ in range(300):
        units = unit(rng.normal(size=(16, 4)) + 0.5)
        total = units.sum(axis=0)
        found = mean_cosine(units @ total, total @ total, examples=16)
        without = [mean(np.delete(units, i, axis=0)) for i in range(16)]
        assert found.std_error == pytest.approx(np.sqrt(15 * np.var(without)))
        covered.append(found.low < truth < found.high)
    assert 0.91 < np.mean(covered) < 0.985


def mean(units: np.ndarray) -> float:
    """The mean cosine, pair by pair."""
    return float(np.mean([a @ b for a, b in combinations(units, 2)]))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_interval_of_the_decrease_covers_that_of_all_data():
    """Parts are linear regressions on four examples each, at weights far from the best."""
    rng = np.random.default_rng(1)
    scale, away = np.array([1.0, 2.0, 0.5]), np.array([2.0, 1.0, -1.0])
    H = np.diag(scale**2)
    g = H @ away
    truth = (g @ g) ** 2 / (2 * g @ H @ g)
    covered = []
    for _ in range(400):
        X = rng.normal(size=(40, 4, 3)) * scale
        hessians = np.einsum("pei,pej->pij", X, X) / 4
        gradients = hessians @ away + np.einsum("pei,pe->pi", X, rng.normal(size=(40, 4))) / 4
        mean_g, mean_H = gradients.mean(axis=0), hessians.mean(axis=0)
        curvatures = np.einsum("i,pij,j->p", mean_g, hessians, mean_g)
        found = decrease_with_error(gradients @ mean_g, curvatures, gradients @ mean_H @ mean_g, np.full(40, 4))
        covered.append(found.low < truth < found.high)
    assert 0.90 < np.mean(covered) < 0.985


def test_no_decrease_where_the_loss_curves_downward():
    assert decrease_with_error([1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0], [1, 1]) is None


def test_what_has_no_direction_is_told():
    model = nn.Linear(1, 1, bias=False)
    held = Objective(model, [torch.zeros(2, 1)] * 5, loss_fn=lambda model, batch: model(batch).square().mean())
    with pytest.raises(FloatingPointError, match=r"has length 0\.0, so that it has no direction"):
        gradient_scores(held, HessianOperator(held))
    few = Objective(model, [torch.ones(2, 1)] * 3, loss_fn=lambda model, batch: model(batch).square().mean())
    with pytest.raises(ValueError, match="at least 4 parts"):
        gradient_scores(few, HessianOperator(few))
