# SPDX-License-Identifier: Apache-2.0
"""The block-diagonal Hessian against dense Hessians with the entries between blocks struck out."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor, nn

from hf_optimizability.curvature import block_diagonal
from hf_optimizability.curvature.block_diagonal import BlockDiagonalHessian
from hf_optimizability.curvature.empirical_risk import EmpiricalRisk, HvpCounter
from hf_optimizability.curvature.twice_differentiable import CheapSecondDerivatives
from hf_optimizability.linalg.lanczos import lanczos_by_segment
from hf_optimizability.model_state.measuring import math_attention
from hf_optimizability.objective.objective import Objective
from hf_optimizability.objective.parameter_blocks import name_blocks
from tests.support import tiny_models


def places(objective: Objective, blocks: list[list[int]]) -> list[list[slice]]:
    ends = accumulate((parameter.numel() for parameter in objective.parameters), initial=0)
    slices = [slice(*ends) for ends in pairwise(ends)]
    return [[slices[index] for index in block] for block in blocks]


def diagonal_blocks(dense: Tensor, segments: list[list[slice]]) -> list[Tensor]:
    rows = [torch.cat([torch.arange(part.start, part.stop) for part in segment]) for segment in segments]
    return [dense[row][:, row] for row in rows]


def struck_out(dense: Tensor, segments: list[list[slice]]) -> Tensor:
    result = torch.zeros_like(dense)
    for segment in segments:
        for rows in segment:
            for columns in segment:
                result[rows, columns] = dense[rows, columns]
    return result


@pytest.mark.parametrize("name", ["bert", "resnet", "gpt2"])
def test_columns_and_ends_of_the_spectrum_of_every_block(name: str):
    rows = tiny_models.examples(name, 5)
    model = tiny_models.make(name).eval()
    [whole] = tiny_models.cut(rows, 5)
    dense = tiny_models.dense_hessian(model, whole)
    objective = Objective(model, tiny_models.cut(rows, 3))
    blocks = list(name_blocks(objective.names).values())
    assert len(blocks) > 2
    segments = places(objective, blocks)
    expected = struck_out(dense, segments)
    assert (expected - dense).norm() > 0.1 * dense.norm()
    spent: list[int] = []
    operator = BlockDiagonalHessian(objective.counting(HvpCounter(spent.append)), blocks)
    vectors = torch.randn(3, len(dense), generator=torch.Generator().manual_seed(0), dtype=torch.float64).T
    precision = 1e-6 if name == "gpt2" else 1e-10  # Transformers computes the loss of language models in float32
    with math_attention(), CheapSecondDerivatives():
        product = operator.matmat(vectors)
        spectra = lanczos_by_segment(operator, segments, tolerance=0.01, max_hvps=40, seed=0)
    assert (product - expected @ vectors).norm() <= precision * (expected @ vectors).norm()
    assert spent == [3] + [1] * spectra[0].lambda_max.hvps
    assert all(parameter.grad is None for parameter in model.parameters())
    for block, spectrum in zip(diagonal_blocks(dense, segments), spectra, strict=True):
        values = torch.linalg.eigvalsh(block)
        scale = float(values.abs().max())
        assert spectrum.lambda_max.value == pytest.approx(float(values[-1]), abs=0.01 * scale)
        assert spectrum.lambda_min.value == pytest.approx(float(values[0]), abs=0.01 * scale)


class Quadratic(EmpiricalRisk):
    """½ xᵀAx + bᵀy, with a linear parameter, whose gradient is constant, and one that is not used."""

    parameters = ()

    def __init__(self) -> None:
        root = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.matrix = root + root.T
        self.parameters = [nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in (2, 3, 2, 1)]

    def losses(self):
        first, linear, last, _ = self.parameters
        x = torch.cat([first, last])
        yield x @ self.matrix @ x / 2 + linear.sum(), 1


def test_parameters_that_are_linear_unused_or_in_no_block_get_zeros():
    objective = Quadratic()
    product = BlockDiagonalHessian(objective, [[3, 1, 2]]).matmat(torch.eye(8, dtype=torch.float64))
    expected = torch.zeros(8, 8, dtype=torch.float64)
    expected[5:7, 5:7] = objective.matrix[2:, 2:]
    torch.testing.assert_close(product, expected)


def test_blocks_of_zeros_are_not_multiplied(monkeypatch: pytest.MonkeyPatch):
    operator = BlockDiagonalHessian(Quadratic(), [[0], [2]])
    calls: list[object] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        block_diagonal.torch.autograd, "grad", lambda *args, **kwargs: calls.append(args) or grad(*args, **kwargs)
    )
    vector = torch.zeros(8, dtype=torch.float64)
    vector[6] = 1
    assert operator.matvec(vector)[5:7].tolist() == Quadratic().matrix[2:, 3].tolist()
    assert len(calls) == 2  # the gradient, and the second block


def test_a_parameter_in_two_blocks_is_refused():
    with pytest.raises(ValueError, match="two of the `blocks`"):
        BlockDiagonalHessian(Quadratic(), [[0, 1], [1]])


def test_operations_without_a_second_derivative_are_refused():
    def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return tiny_models.OnceDifferentiable.apply(model(batch[0])).square().mean()

    objective = Objective(nn.Linear(2, 2), [(torch.ones(1, 2),)], loss_fn=loss_fn)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        BlockDiagonalHessian(objective, [[0], [1]]).matvec(torch.ones(6))
