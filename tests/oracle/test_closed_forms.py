# SPDX-License-Identifier: Apache-2.0
"""The public API against Hessians known on paper, to 1e-8 in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag
from torch import Tensor, nn
from torch.nn import functional

from hf_optimizability import Measurement, OptimizabilityConfig, measure
from tests.support import tiny_models


EXAMPLES, INPUTS, CLASSES = 12, 5, 3
EXACT = OptimizabilityConfig(trace_method="exact", eigen_tolerance=1e-10, max_hvps=100)


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(EXAMPLES, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def check(measurement: Measurement, hessian: np.ndarray) -> None:
    eigenvalues = np.linalg.eigvalsh(hessian)
    assert measurement.hessian.lambda_max.value == pytest.approx(eigenvalues[-1], rel=1e-8)
    assert measurement.hessian.lambda_min.value == pytest.approx(eigenvalues[0], rel=1e-8, abs=1e-10)
    assert measurement.hessian.trace.value == pytest.approx(np.trace(hessian), rel=1e-8)


def linear(outputs: int) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(INPUTS, outputs, bias=False, dtype=torch.float64)


def batches(inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Uneven ones."""
    return [(inputs[:7], targets[:7]), (inputs[7:], targets[7:])]


def test_linear_regression(inputs: Tensor):
    measurement = measure(
        linear(1),
        batches(inputs, torch.ones(EXAMPLES, 1, dtype=torch.float64)),
        EXACT,
        loss_fn=lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]),
    )
    check(measurement, (2 / EXAMPLES * inputs.T @ inputs).numpy())


def test_logistic_regression(inputs: Tensor):
    model = linear(1)
    targets = (torch.arange(EXAMPLES) % 2).double()
    measurement = measure(
        model,
        batches(inputs, targets),
        EXACT,
        loss_fn=lambda model, batch: functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1]),
    )
    p = 1 / (1 + np.exp(-(inputs.numpy() @ model.weight.detach().numpy()[0])))
    check(measurement, inputs.numpy().T @ np.diag(p * (1 - p)) @ inputs.numpy() / EXAMPLES)


@pytest.mark.parametrize("seed", range(4))
def test_two_classes_with_class_weights_and_one_input(seed: int):
    """The null vector has entries of one size, as vectors of random signs do."""
    model = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    x, y = torch.tensor([[1.0]] * 9 + [[10.0]], dtype=torch.float64), torch.tensor([0] * 9 + [1])
    weight = torch.tensor([10 / 18, 5], dtype=torch.float64)
    measurement = measure(
        model,
        [(x, y)],
        dataclasses.replace(EXACT, probe_seed=seed),
        loss_fn=lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1], weight=weight),
    )
    mean_square = float(weight[y] @ x[:, 0] ** 2 / weight[y].sum())
    check(measurement, mean_square / 4 * np.array([[1, -1], [-1, 1]]))


@pytest.mark.parametrize("seed", [0, 2, 9, 11])
def test_a_probe_along_the_null_space_is_not_asymmetry(seed: int):
    """Of two classes, random signs that are alike for both have a product of rounding alone."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 1), torch.tensor([0, 1, 1, 0, 1, 0, 1, 0])
    torch.manual_seed(0)
    model = nn.Linear(1, 2)
    config = dataclasses.replace(EXACT, probe_seed=seed)
    found = measure(model, [(x, y)], config, loss_fn=lambda model, batch: functional.cross_entropy(model(x), y))
    p = model(x).detach().double().softmax(1)
    inputs = torch.cat([x, torch.ones(8, 1)], 1).double()
    block = (inputs * (p[:, :1] * p[:, 1:])).T @ inputs / 8  # H = [[B, -B], [-B, B]]
    assert found.hessian.lambda_max.value == pytest.approx(2 * float(torch.linalg.eigvalsh(block)[-1]), rel=1e-4)


def test_softmax_regression_with_ignored_labels_as_sum_and_count(inputs: Tensor):
    model = linear(CLASSES)
    labels = torch.arange(EXAMPLES) % CLASSES
    labels[[2, 3, 9]] = -100

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        x, y = batch
        return functional.cross_entropy(model(x), y, reduction="sum"), int((y != -100).sum())

    measurement = measure(model, batches(inputs, labels), EXACT, loss_fn=loss_fn)
    counted = inputs[labels != -100].numpy()
    logits = counted @ model.weight.detach().numpy().T
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    terms = [np.kron(np.diag(row) - np.outer(row, row), np.outer(x, x)) for row, x in zip(p, counted, strict=True)]
    check(measurement, np.mean(terms, axis=0))
    assert measurement.num_items == len(counted)


def test_blocks_of_a_block_diagonal_quadratic():
    matrices = [np.array([[2.0, 1.0], [1.0, -3.0]]), np.diag([5.0, 0.5, -0.25])]
    model = nn.ParameterDict(
        {"a": torch.ones(2, dtype=torch.float64), "b": torch.full((3,), 2.0, dtype=torch.float64)}
    )
    tensors = [torch.from_numpy(matrix) for matrix in matrices]

    def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return sum(model[name] @ matrix @ model[name] / 2 for name, matrix in zip("ab", tensors, strict=True))

    config = OptimizabilityConfig(trace_method="exact", eigen_tolerance=1e-10, max_hvps=100, blocks=["a", "b"])
    measurement = measure(model, [(torch.ones(1),)], config, loss_fn=loss_fn)
    check(measurement, block_diag(*matrices))
    for name, matrix, point in zip("ab", matrices, (np.ones(2), np.full(3, 2.0)), strict=True):
        block = measurement.blocks[name]
        assert block.trace.value == pytest.approx(np.trace(matrix), rel=1e-8)
        assert block.grad_norm == pytest.approx(np.linalg.norm(matrix @ point), rel=1e-8)
        assert block.weight_norm == pytest.approx(np.linalg.norm(point), rel=1e-8)


def test_lora_at_its_start_has_no_curvature_in_a():
    """At B = 0 the loss does not depend on A: H_AA = 0, so tr H = tr H_BB, and H is indefinite."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", modules_to_save=[])
    model = peft.get_peft_model(tiny_models.make("bert"), config).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    blocks = OptimizabilityConfig(trace_method="exact", max_hvps=100, blocks=["*lora_A*", "*lora_B*"])
    measurement = measure(model, tiny_models.cut(tiny_models.examples("bert", 4), 4), blocks)
    assert measurement.blocks["*lora_A*"].trace.value == pytest.approx(0, abs=1e-12)
    assert measurement.hessian.trace.value == pytest.approx(measurement.blocks["*lora_B*"].trace.value, rel=1e-8)
    assert measurement.hessian.lambda_min.high < 0 < measurement.hessian.lambda_max.low
