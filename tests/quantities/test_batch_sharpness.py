# SPDX-License-Identifier: Apache-2.0
"""Batch sharpness against closed forms, dense float64 Hessians, and its value over very many batches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from torch import Tensor, nn

from hf_optimizability.curvature.central_difference import CentralDifferenceHessian
from hf_optimizability.model_state.measuring import math_attention
from hf_optimizability.objective.objective import Objective
from hf_optimizability.quantities.batch_sharpness import batch_sharpness, ratio_of_means
from tests.support import tiny_models


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def test_linear_regression_is_the_closed_form():
    """With f = xᵀw and one example (x, y) in a batch, g = 2rx and H = 2xxᵀ: Σ 8r²‖x‖⁴/Σ 4r²‖x‖²."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    targets = torch.randn(7, 1, dtype=torch.float64, generator=generator)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    examples = zip(inputs.split(1), targets.split(1), strict=True)
    batches = [Objective(model, [example], loss_fn=squared_error) for example in examples]
    residuals = (model(inputs) - targets).detach()[:, 0].square()
    lengths = inputs.square().sum(1)
    truth = float(2 * (residuals * lengths.square()).sum() / (residuals * lengths).sum())
    found = batch_sharpness(batches)
    assert found.sharpness.value == pytest.approx(truth, rel=1e-12)
    assert found.preconditioned is None and found.as_stepped is found.sharpness
    assert (found.batches, found.items, found.sharpness.hvps) == (7, 1, 7)
    rate = found.rate
    assert rate is not None and rate.value == pytest.approx(2 / truth, rel=1e-12)
    assert (rate.low, rate.high) == (2 / found.sharpness.high, 2 / found.sharpness.low)
    flat = replace(found, sharpness=replace(found.sharpness, low=-1.0))
    assert flat.rate.high == math.inf
    for value in (-1.0, 5e-324):
        assert replace(found, sharpness=replace(found.sharpness, value=value)).rate is None


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_of_a_model_it_is_that_of_dense_hessians(name: str):
    """Uneven batches, in one part or in two; and with an optimizer's P, infinite where it does not move."""
    model = tiny_models.make(name).eval()
    rows = tiny_models.examples(name, 10)
    chunks = [rows[:3], rows[3:5], rows[5:9], rows[9:]]
    batches = [Objective(model, tiny_models.cut(chunk, 2)) for chunk in chunks]
    size = sum(p.numel() for p in model.parameters())
    diagonal = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    diagonal[::5] = math.inf
    above, below = np.zeros((2, len(chunks))), np.zeros((2, len(chunks)))
    for index, chunk in enumerate(chunks):
        [whole] = tiny_models.cut(chunk, len(chunk))
        hessian = tiny_models.dense_hessian(model, whole)
        g = torch.cat([t.flatten() for t in torch.autograd.grad(model(**whole).loss, list(model.parameters()))])
        u = g / diagonal.sqrt()
        scaled = hessian / torch.outer(diagonal.sqrt(), diagonal.sqrt())
        above[:, index] = float(g @ hessian @ g), float(u @ scaled @ u)
        below[:, index] = float(g @ g), float(u @ u)
    with math_attention():
        found = batch_sharpness(batches, preconditioner=diagonal)
    values = found.sharpness.value, found.as_stepped.value
    assert values == pytest.approx(above.sum(1) / below.sum(1), rel=1e-6)  # GPT-2 has its loss in float32
    assert values[0] != pytest.approx(values[1], rel=0.1)
    differences = batch_sharpness(batches, hessian=CentralDifferenceHessian).sharpness
    assert differences.value == pytest.approx(values[0], rel=1e-3)
    assert (differences.low, differences.high) == pytest.approx((found.sharpness.low, found.sharpness.high), rel=1e-2)


def test_delete_one_values_are_those_of_doing_it_again():
    above, below = np.array([3.0, 1.0, 4.0, 1.5]), np.array([2.0, 0.0, 1.0, 3.0])
    found = ratio_of_means(above, below, tolerance=0.1)
    rest = np.array([np.delete(above, i).sum() / np.delete(below, i).sum() for i in range(4)])
    error = math.sqrt(3 / 4 * ((np.log(rest) - np.log(rest).mean()) ** 2).sum())
    deviations = above - found.value * below
    kurtosis = (deviations**4).mean() / (deviations**2).mean() ** 2
    quantile = student.ppf(0.975, min(3, 8 / (kurtosis - 1)))
    assert found.value == above.sum() / below.sum()
    assert found.std_error == pytest.approx(math.sqrt(3 / 4 * ((rest - rest.mean()) ** 2).sum()), rel=1e-12)
    assert math.log(found.high / found.value) == pytest.approx(quantile * error, rel=1e-9)
    assert math.log(found.value / found.low) == pytest.approx(quantile * error, rel=1e-9)
    assert not found.converged and ratio_of_means(above, below, tolerance=0.9).converged


@pytest.mark.parametrize("size", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_intervals_hold_the_value_over_very_many_batches(size: int):
    """Of a small network: gradients and Hessians of its examples, in float64, give those of any batch of them."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    number = 400
    inputs = torch.randn(number, 4, dtype=torch.float64, generator=generator)
    targets = torch.randn(number, 1, dtype=torch.float64, generator=generator)
    shapes = dict(model.named_parameters())

    def loss(vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in shapes.values()])
        values = {name: piece.view(p.shape) for (name, p), piece in zip(shapes.items(), pieces, strict=True)}
        return (torch.func.functional_call(model, values, (x,)) - y).square().sum()

    torch.manual_seed(0)
    point = torch.randn(sum(p.numel() for p in shapes.values()), dtype=torch.float64)
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(point, inputs, targets).numpy()
    hessians = torch.func.vmap(torch.func.hessian(loss), (None, 0, 0))(point, inputs, targets).numpy()
    rng = np.random.default_rng(0)

    def draws(batches: int) -> tuple[np.ndarray, np.ndarray]:
        rows = rng.integers(number, size=(batches, size))
        g = gradients[rows].mean(1)
        products = sum(np.einsum("bij,bj->bi", hessians[row], g) for row in rows.T) / size
        return (g * products).sum(1), (g * g).sum(1)

    above, below = draws(40_000)
    truth = above.mean() / below.mean()
    found = [ratio_of_means(*draws(30), tolerance=0.1) for _ in range(400)]
    share = np.mean([estimate.low <= truth <= estimate.high for estimate in found])
    assert 0.91 <= share <= 0.98
    assert abs(np.median([estimate.value for estimate in found]) / truth - 1) < 0.1


def test_what_has_no_direction_or_no_spread():
    with pytest.raises(ValueError, match="at least 3 batches, not 2"):
        model = nn.Linear(1, 1)
        batch = (torch.ones(1, 1), torch.ones(1, 1))
        batch_sharpness([Objective(model, [batch], loss_fn=squared_error)] * 2)
    with pytest.raises(ValueError, match="of all batches are 0"):
        ratio_of_means(np.zeros(3), np.zeros(3), tolerance=0.1)
    alone = ratio_of_means(np.array([6.0, 0.0, 0.0]), np.array([2.0, 0.0, 0.0]), tolerance=0.1)
    assert (alone.low, alone.value, alone.high, alone.converged) == (-math.inf, 3.0, math.inf, False)
