# SPDX-License-Identifier: Apache-2.0
"""The Hessian operator against dense Hessians, and what its products leave alone."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from hf_optimizability.curvature.operators import HessianOperator
from hf_optimizability.objective import Objective
from hf_optimizability.safety import math_attention


@pytest.fixture
def objective() -> Objective:
    model = tiny_models.make("bert").eval()
    return Objective(model, tiny_models.cut(tiny_models.examples("bert", 5), 2))


def test_columns_are_multiplied_by_the_dense_hessian(objective: Objective):
    [whole] = tiny_models.cut(tiny_models.examples("bert", 5), 5)
    dense = tiny_models.dense_hessian(objective.model, whole)
    vectors = torch.randn(len(dense), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spent: list[int] = []
    operator = HessianOperator(objective, on_products=spent.append)
    with math_attention():
        assert torch.allclose(operator.matmat(vectors), dense @ vectors, atol=1e-10)
        assert torch.allclose(operator.matvec(vectors[:, 0]), dense @ vectors[:, 0], atol=1e-10)
    assert spent == [3, 1]
    assert all(parameter.grad is None for parameter in objective.parameters)


def test_frozen_parameters_are_left_out_and_unused_ones_have_zero_rows():
    model = tiny_models.make("bert").eval()
    model.bert.embeddings.requires_grad_(False)
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    objective = Objective(model, tiny_models.cut(tiny_models.examples("bert", 2), 2))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    operator = HessianOperator(objective)
    assert operator.size == trainable < sum(parameter.numel() for parameter in model.parameters())
    with math_attention():
        product = operator.matvec(torch.ones(trainable, dtype=torch.float64))
    unused = objective.names.index("unused")
    start = sum(parameter.numel() for parameter in objective.parameters[:unused])
    assert torch.equal(product[start : start + 3], torch.zeros(3)) and product.norm() > 0.1


def test_a_product_that_is_not_finite_is_refused():
    point = torch.nn.ParameterDict({"x": torch.zeros(2)})
    objective = Objective(point, [(torch.ones(1),)], loss_fn=lambda model, batch: model["x"].abs().pow(1.5).sum())
    with pytest.raises(FloatingPointError, match="not finite"):
        HessianOperator(objective).matvec(torch.ones(2))
