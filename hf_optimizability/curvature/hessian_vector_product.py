# SPDX-License-Identifier: Apache-2.0
"""Hessian-vector products of one loss, exact, by differentiating twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import WrongDerivativeError
from .autograd_graph import iter_autograd_nodes
from .selective_grad import differentiate


def double_backward(
    loss: Tensor, parameters: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield `∂/∂θ (∇L · v)` for each vector v; all of them share the forward and the first backward pass.

    Uses `torch.autograd.grad` only, which leaves `.grad` alone and makes no reference cycle, unlike
    `backward(create_graph=True)`. Parameters that the loss does not use get zeros.

    Args:
        loss: Scalar with a graph to the parameters.
        parameters: The leaves to differentiate by.
        vectors: One sequence of tensors per vector, shaped like `parameters`.

    Yields:
        The product with each vector, shaped like `parameters`.

    Raises:
        RuntimeError: If an operation of the loss has no second derivative.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> [product] = double_backward((x**3).sum(), [x], [[torch.ones(2)]])
        >>> product[0]
        tensor([ 6., 12.])
    """
    yield from second_backward(first_backward(loss, parameters), parameters, vectors)


def first_backward(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradient with its graph; without all its values for layers recorded under `CheapSecondDerivatives`.

    Raises:
        RuntimeError: If an operation of the loss is marked to have no second derivative.
    """
    gradients = differentiate(loss, parameters, graph_only=True)
    require_second_derivative(gradients)
    return gradients


def second_backward(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    vectors: Sequence[Sequence[Tensor]],
    *,
    keep_graph: bool = False,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the product of the Hessian with each vector, from a gradient with its graph.

    Args:
        gradients: From `first_backward`.
        parameters: The leaves to differentiate by.
        vectors: One sequence of tensors per vector, shaped like `parameters`.
        keep_graph: Whether the graph is wanted again after the last vector.
    """
    # A gradient that is constant in the parameters has no graph; its rows of the Hessian are zero.
    live = [index for index, gradient in enumerate(gradients) if gradient.requires_grad]
    for position, vector in enumerate(vectors):
        if not live:
            yield tuple(torch.zeros_like(parameter) for parameter in parameters)
            continue
        yield differentiate(
            [gradients[index] for index in live],
            parameters,
            grad_outputs=[vector[index] for index in live],
            retain_graph=keep_graph or position < len(vectors) - 1,
        )


def require_second_derivative(gradients: Sequence[Tensor]) -> None:
    """Find backward passes marked `once_differentiable`.

    Autograd puts an error node in their place, but never runs it when asked for the derivative by given leaves: the
    products would come out wrong without a word.
    """
    if any(node.name() == "torch::autograd::Error" for node in iter_autograd_nodes(*gradients)):
        raise WrongDerivativeError("once_differentiable")
