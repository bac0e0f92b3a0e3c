# SPDX-License-Identifier: Apache-2.0
"""Finds custom autograd functions whose backward pass has no derivative: fused kernels that compute out of its sight.

The backward pass of such a function (Liger's, FlashAttention's, Unsloth's) returns tensors that no graph leads to.
Differentiated again it raises nothing: what it should have added is missing from second derivatives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..errors import WrongDerivativeError
from .autograd_graph import iter_autograd_nodes
from .empirical_risk import EmpiricalRisk


_OWN = __name__.partition(".")[0]


def require_second_derivatives(objective: EmpiricalRisk) -> None:
    """Raise if the loss passes through a custom function whose backward pass has no derivative.

    One part is evaluated; only if its graph has custom functions, it is differentiated once. PyTorch's own operations
    are not looked at: where they have no second derivative, differentiating them again raises.

    Raises:
        WrongDerivativeError: If there is such a function; the message has its library and name.

    Example:
        >>> class Square(torch.autograd.Function):
        ...     __module__ = "fused_kernels"
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x**2
        ...     @staticmethod
        ...     def backward(ctx, gradient):
        ...         return (2 * ctx.saved_tensors[0] * gradient).detach()  # as a fused kernel
        >>> class Loss(EmpiricalRisk):
        ...     parameters = [torch.ones(2, requires_grad=True)]
        ...     def losses(self):
        ...         yield Square.apply(self.parameters[0]).sum(), 1
        >>> require_second_derivatives(Loss())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        hf_optimizability.errors.WrongDerivativeError: The backward pass of `fused_kernels.Square` has no ...
    """
    loss, _ = next(iter(objective.losses()), (None, 0))
    if loss is None:
        return
    fused = _without_derivative(loss, objective.parameters)
    if fused:
        names = tuple(f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}" for kind in fused)
        raise WrongDerivativeError("function_without_derivative", functions=names)


def _without_derivative(loss: Tensor, parameters: Collection[Tensor]) -> list[type]:
    """Return the custom functions in a loss's graph whose backward passes leave no graph."""
    found: dict[type, None] = {}
    nodes = list(_custom_nodes(loss))

    def watch(node: Any) -> Any:
        def look(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
            returned = [gradient for gradient in grad_inputs if gradient is not None]
            depends = any(gradient is not None and gradient.requires_grad for gradient in grad_outputs)
            if returned and not any(g.requires_grad for g in returned) and (depends or _keeps_numbers(node)):
                found.setdefault(node._forward_cls)

        return node.register_hook(look)

    if nodes:
        handles = [watch(node) for node in nodes]
        try:
            torch.autograd.grad(loss, list(parameters), create_graph=True, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
    return list(found)


def _custom_nodes(loss: Tensor) -> Iterator[Any]:
    """Yield the nodes of a graph that are custom functions, except for those of this package."""
    for node in iter_autograd_nodes(loss):
        if not isinstance(node, BackwardCFunction):
            continue
        if type(node)._forward_cls.__module__.partition(".")[0] != _OWN:  # type: ignore[attr-defined]
            yield node


def _keeps_numbers(node: Any) -> bool:
    """Return whether a custom function keeps what its gradient is made of. A linear one needs nothing."""
    kept = [*node.saved_tensors, *vars(node).values()]
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in kept)
