# SPDX-License-Identifier: Apache-2.0
"""The empirical Fisher matrix against gradients taken example by example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_optimizability.curvature.empirical_risk import HvpCounter
from hf_optimizability.curvature.fisher import EmpiricalFisherOperator
from hf_optimizability.objective.batches import count_items
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_models


EXAMPLES = 5
PRECISION = {"gpt2": 1e-6, "llama": 1e-6}  # Transformers computes the loss of language models in float32


def dense(model: nn.Module, rows: list[dict[str, Tensor]]) -> Tensor:
    """`Σ gᵢgᵢᵀ / N`, from the model's own mean losses and `backward`."""
    total, items = 0, 0
    for batch in tiny_models.cut(rows, 1):
        count = count_items(model, batch)
        model.zero_grad(set_to_none=False)
        model(**batch).loss.backward()
        named = [parameter for parameter in model.parameters() if parameter.requires_grad]
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in named]
        gradient = count * torch.cat([piece.flatten() for piece in pieces])
        total, items = total + torch.outer(gradient, gradient), items + count
    model.zero_grad()
    return total / items


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_columns_are_multiplied_by_the_dense_matrix(name: str):
    rows = tiny_models.examples(name, EXAMPLES)
    model = tiny_models.make(name).eval()
    expected = dense(model, rows)
    spent: list[int] = []
    operator = EmpiricalFisherOperator(Objective(model, tiny_models.cut(rows, 3)).counting(HvpCounter(spent.append)))
    vectors = torch.randn(operator.size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = operator.matmat(vectors) - expected @ vectors
    assert error.norm() <= PRECISION.get(name, 1e-12) * (expected @ vectors).norm()
    assert spent == [3]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_and_unused_parameters():
    model = tiny_models.make("bert").eval()
    model.bert.embeddings.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    rows = tiny_models.examples("bert", EXAMPLES)
    operator = EmpiricalFisherOperator(Objective(model, tiny_models.cut(rows, 2)))
    vector = torch.ones(operator.size, dtype=torch.float64)
    product = operator.matvec(vector)
    assert torch.equal(product[:3], torch.zeros(3)) and product.norm() > 0.01
    assert torch.allclose(product, dense(model, rows) @ vector, rtol=1e-10, atol=1e-12)


def test_with_labels_from_the_model_it_is_the_gauss_newton_matrix_in_expectation():
    """Of softmax regression, summed over all labels with their probabilities: H = mean of (diag p − ppᵀ) ⊗ xxᵀ."""
    torch.manual_seed(0)
    model = nn.Linear(2, 3, bias=False, dtype=torch.float64)
    x = torch.randn(1, 2, dtype=torch.float64)
    p = model(x).softmax(dim=1)[0].detach()
    vectors = torch.eye(6, dtype=torch.float64)
    expectation = sum(
        p[label] * EmpiricalFisherOperator(
            Objective(
                model,
                [(x, torch.tensor([label]))],
                loss_fn=lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
            )
        ).matmat(vectors)
        for label in range(3)
    )  # fmt: skip
    assert torch.allclose(expectation, torch.kron(torch.diag(p) - torch.outer(p, p), x.T @ x), atol=1e-14)


def test_batches_that_cannot_be_cut_are_refused():
    model = nn.Linear(2, 1)
    batch = (torch.ones(4, 2), torch.ones(3))
    with pytest.raises(ValueError, match="can't be cut"):
        EmpiricalFisherOperator(Objective(model, [batch], loss_fn=lambda model, batch: model(batch[0]).mean()))
