# SPDX-License-Identifier: Apache-2.0
"""Custom functions: which have a second derivative, and which compute their gradients out of sight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_optimizability.curvature.custom_functions import require_second_derivatives
from hf_optimizability.curvature.twice_differentiable import CheapSecondDerivatives
from hf_optimizability.objective.objective import Objective


class Exponential(torch.autograd.Function):
    """With a backward pass of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class Identity(torch.autograd.Function):
    """Linear: its gradient may be a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class AuxiliaryLoss(torch.autograd.Function):
    """Gives a loss a gradient of 1 and returns the other input, as in mixtures of experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones(())


class KernelExponential(Exponential):
    """With a backward pass that writes into memory, as Triton's kernels do."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        result = torch.empty_like(gradient)
        with torch.no_grad():
            torch.mul(gradient, ctx.saved_tensors[0], out=result)
        return result


class FusedCrossEntropy(torch.autograd.Function):
    """With gradients made in the forward pass, as Liger's fused linear cross entropy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward((logits.softmax(-1) - nn.functional.one_hot(labels, logits.shape[-1])) / len(labels))
        return nn.functional.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient, None


BATCH = (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1, 1]))


def objective(middle: Any, end: Any = nn.functional.cross_entropy) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return Objective(model, [BATCH], loss_fn=lambda model, batch: end(middle(model(batch[0])), batch[1]))


@pytest.mark.parametrize(
    "middle",
    [
        Exponential.apply,
        Identity.apply,
        lambda x: AuxiliaryLoss.apply(x, x.square().mean()),
        lambda x: x,
    ],
)
def test_functions_of_differentiable_operations_pass(middle: Any):
    require_second_derivatives(objective(middle))
    with CheapSecondDerivatives():  # made of custom functions
        require_second_derivatives(objective(middle))


def test_a_linear_function_at_the_end_passes():
    require_second_derivatives(objective(lambda x: x, lambda x, labels: Identity.apply(x.square().mean())))


@pytest.mark.parametrize(
    ("middle", "end", "name"),
    [
        (KernelExponential.apply, nn.functional.cross_entropy, "KernelExponential"),
        (lambda x: x, FusedCrossEntropy.apply, "FusedCrossEntropy"),
        (lambda x: x, lambda x, labels: 3 * FusedCrossEntropy.apply(x, labels), "FusedCrossEntropy"),
        (lambda x: x, lambda x, labels: KernelExponential.apply(x).mean(), "KernelExponential"),
    ],
)
def test_kernels_are_named(middle: Any, end: Any, name: str):
    with pytest.raises(RuntimeError, match=f"`tests.{name}` has no derivative"):
        require_second_derivatives(objective(middle, end))
