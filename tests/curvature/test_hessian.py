# SPDX-License-Identifier: Apache-2.0
"""The Hessian operator against dense Hessians, and what its products leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_optimizability import OptimizabilityConfig, measure
from hf_optimizability.curvature.central_difference import CentralDifferenceHessian
from hf_optimizability.curvature.empirical_risk import EmpiricalRisk, HvpCounter
from hf_optimizability.curvature.forward_over_reverse import ForwardOverReverseHessian
from hf_optimizability.curvature.gauss_newton import GaussNewtonOperator
from hf_optimizability.curvature.hessian import HessianOperator, ObjectiveOperator
from hf_optimizability.model_state.measuring import math_attention
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_models


@pytest.fixture
def objective() -> Objective:
    model = tiny_models.make("bert").eval()
    return Objective(model, tiny_models.cut(tiny_models.examples("bert", 5), 2))


def test_columns_are_multiplied_by_the_dense_hessian(objective: Objective):
    [whole] = tiny_models.cut(tiny_models.examples("bert", 5), 5)
    dense = tiny_models.dense_hessian(objective.model, whole)
    vectors = torch.randn(len(dense), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spent: list[int] = []
    operator = HessianOperator(objective.counting(HvpCounter(spent.append)))
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


class CountedLosses(EmpiricalRisk):
    """Losses in given parts that count their forward passes: Σ (xᵀ A_p x) sin(x₀)."""

    parameters = ()

    def __init__(self, *parts: tuple[torch.Tensor, int]):
        self.parameters = [torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)]
        self.parts = parts
        self.passes = 0

    def losses(self) -> Iterator[tuple[torch.Tensor, int]]:
        [x] = self.parameters
        for matrix, items in self.parts:
            self.passes += 1
            yield items * (x @ matrix @ x) * x[0].sin(), items

    def dense(self) -> torch.Tensor:
        whole = sum(matrix * items for matrix, items in self.parts) / sum(items for _, items in self.parts)
        point = self.parameters[0].detach()
        return torch.autograd.functional.hessian(lambda x: (x @ whole @ x) * x[0].sin(), point)


def parts(number: int) -> list[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 3, generator=generator, dtype=torch.float64), items) for items in (2, 5, 1)[:number]]


def test_the_graph_of_a_single_part_is_kept_until_the_weights_change():
    losses = CountedLosses(*parts(1))
    operator = HessianOperator(losses)
    eye = torch.eye(3, dtype=torch.float64)
    for _ in range(4):
        assert torch.allclose(operator.matmat(eye), losses.dense(), rtol=1e-12)
    assert losses.passes == 2  # the first finds that there is one part, the second keeps its graph
    with torch.no_grad():
        losses.parameters[0].add_(1)
    assert torch.allclose(operator.matmat(eye), losses.dense(), rtol=1e-12) and losses.passes == 3
    losses.parameters[0] = torch.ones(3, dtype=torch.float64, requires_grad=True)  # another tensor
    assert torch.allclose(operator.matmat(eye), losses.dense(), rtol=1e-12) and losses.passes == 4


def test_no_graph_of_several_parts_is_kept():
    losses = CountedLosses(*parts(3))
    operator = HessianOperator(losses)
    for _ in range(3):
        operator.matvec(torch.ones(3, dtype=torch.float64))
    assert losses.passes == 9


def test_products_by_part():
    losses = CountedLosses(*parts(3))
    operator = HessianOperator(losses)
    vectors = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]], dtype=torch.float64)
    product, forms, items = operator.matmat_per_batch(vectors, [[slice(0, 1), slice(2, 3)], [slice(1, 2)]])
    assert items == [2, 5, 1] and losses.passes == 3
    assert torch.allclose(product, losses.dense() @ vectors, rtol=1e-12)
    for found, part in zip(forms, losses.parts, strict=True):
        terms = vectors * (CountedLosses(part).dense() @ vectors)
        expected = torch.stack([terms[0] + terms[2], terms[1]], dim=1)
        assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "kind", [HessianOperator, ForwardOverReverseHessian, CentralDifferenceHessian, GaussNewtonOperator]
)
def test_of_a_block_of_parameters_the_matrix_is_a_diagonal_block(objective: Objective, kind: type[ObjectiveOperator]):
    names = [name for name in objective.names if "layer.0" in name or "classifier" in name]
    block = objective.block(names)
    sizes = [parameter.numel() for parameter in objective.parameters]
    inside = torch.repeat_interleave(torch.tensor([name in names for name in objective.names]), torch.tensor(sizes))
    vector = torch.zeros(sum(sizes), dtype=torch.float64)
    vector[inside] = torch.randn(int(inside.sum()), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with math_attention():
        expected = kind(objective).matvec(vector)[inside]
        product = kind(block).matvec(vector[inside])
    tolerance = 1e-4 if kind is CentralDifferenceHessian else 1e-10
    assert kind(block).size == int(inside.sum()) < sum(sizes)
    assert (product - expected).norm() <= tolerance * expected.norm()
    assert block.cut(1).names == names


def test_a_block_that_does_not_exist_is_refused(objective: Objective):
    with pytest.raises(ValueError, match=r"`head.weight` is not a block of trainable parameters"):
        objective.block(["head.weight"])


def test_products_whose_sum_overflows_are_finite():
    point = torch.nn.ParameterDict({"x": torch.ones(2)})
    objective = Objective(point, [torch.ones(1)], loss_fn=lambda model, batch: 1e38 * (model["x"] ** 2).sum())
    assert HessianOperator(objective).matvec(torch.ones(2)).tolist() == pytest.approx([2e38, 2e38], rel=1e-6)


class Phases(torch.nn.Module):
    """A real parameter that is used as a complex one, behind one that moves it to an odd place in a long vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.pairs = torch.nn.Parameter(torch.randn(4, 2, dtype=torch.float64))
        self.flat = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.fft(x * self.first.sum()) * torch.view_as_complex(self.pairs)
        return torch.fft.ifft(spectrum).real.tanh() + torch.view_as_complex(self.flat.view(2, 2)).abs().sum()


@pytest.mark.parametrize("options", [{}, {"engine": "double_backward"}, {"curvature": "gauss_newton"}], ids=str)
def test_a_real_parameter_may_be_used_as_a_complex_one(options: dict[str, Any]):
    model, x = Phases(), torch.randn(5, 4, dtype=torch.float64)

    def loss_fn(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    def loss_at(vector: torch.Tensor) -> torch.Tensor:
        named = dict(zip(names, vector.split(sizes), strict=True))
        # Times 1, as `view_as_complex` refuses slices of a vector.
        shaped = {name: 1 * named[name].view(parameter.shape) for name, parameter in model.named_parameters()}
        return torch.func.functional_call(model, shaped, (x,)).square().mean()

    names, sizes = zip(*((name, p.numel()) for name, p in model.named_parameters()), strict=True)
    found = measure(model, [x], OptimizabilityConfig(max_hvps=40, eigen_tolerance=1e-6, **options), loss_fn=loss_fn)
    assert found.engine == "double_backward" and found.fallback is None
    if "curvature" not in options:
        vector = torch.cat([p.detach().flatten() for p in model.parameters()])
        dense = torch.autograd.functional.hessian(loss_at, vector)
        assert found.hessian.lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-5)


def test_a_product_with_a_complex_view_takes_a_vector_from_anywhere():
    model = Phases()
    objective = Objective(model, [torch.ones(2, 4, dtype=torch.float64)], loss_fn=lambda model, x: model(x).mean())
    long = torch.ones(16, dtype=torch.float64)
    operator = HessianOperator(objective.block(["first", "pairs"]))
    expected = operator.matvec(torch.ones(11, dtype=torch.float64))
    assert torch.equal(operator.matvec(long[5:]), expected)
