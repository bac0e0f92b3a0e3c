# SPDX-License-Identifier: Apache-2.0
"""Hessian-vector products of one loss, exact, by differentiating twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def double_backward(
    loss: Tensor, parameters: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[Tensor, ...]]:
    """Yields `∂/∂θ (∇L · v)` for each vector v; all of them share the forward and the first backward pass.

    Uses `torch.autograd.grad` only, which leaves `.grad` alone and makes no reference cycle, unlike
    `backward(create_graph=True)`. Parameters that the loss does not use get zeros.

    Args:
        loss: Scalar with a graph to the parameters.
        parameters: The leaves to differentiate by.
        vectors: One sequence of tensors per vector, shaped like `parameters`.

    Yields:
        The product with each vector, shaped like `parameters`.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> [product] = double_backward((x**3).sum(), [x], [[torch.ones(2)]])
        >>> product[0]
        tensor([ 6., 12.])
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    # A gradient that is constant in the parameters has no graph; its rows of the Hessian are zero.
    live = [index for index, gradient in enumerate(gradients) if gradient.requires_grad]
    for position, vector in enumerate(vectors):
        if not live:
            yield tuple(torch.zeros_like(parameter) for parameter in parameters)
            continue
        yield torch.autograd.grad(
            [gradients[index] for index in live],
            parameters,
            grad_outputs=[vector[index] for index in live],
            retain_graph=position < len(vectors) - 1,
            materialize_grads=True,
        )
