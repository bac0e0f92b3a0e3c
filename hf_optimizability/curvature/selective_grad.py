# SPDX-License-Identifier: Apache-2.0
"""`torch.autograd.grad` that lets custom operations skip gradients nobody asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


Mask = tuple[bool, bool, bool]
"""Which of the gradients by x, w and b are asked for."""

ZeroShapes = tuple[torch.Size | None, torch.Size | None]
"""The shapes of the zeros in place of those by w and b, for those that are not wanted."""


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Apply a custom autograd function of one output; torch leaves `Function.apply` without types."""
    output: Tensor = function.apply(*arguments)
    return output


def apply_many(function: type[torch.autograd.Function], *arguments: Any) -> tuple[Any, ...]:
    """Apply a custom autograd function of several outputs."""
    outputs: tuple[Any, ...] = function.apply(*arguments)
    return outputs


def differentiate(
    outputs: Tensor | Sequence[Tensor],
    variables: Sequence[Tensor],
    *,
    grad_outputs: Sequence[Tensor] | None = None,
    retain_graph: bool = False,
    graph_only: bool = False,
) -> tuple[Tensor, ...]:
    """Run `torch.autograd.grad`; operations of `twice_differentiable.py` skip what it does not request.

    Args:
        outputs: As torch has them.
        variables: The leaves to differentiate by; those that are not used get zeros.
        grad_outputs: As torch has them.
        retain_graph: As torch has it.
        graph_only: Whether the gradients are to have a graph, and values only where these come for free: the
            derivative of ⟨∇L, v⟩ needs none, and of a linear layer they are a third of a gradient's work. Gradients
            by a bilinear operation's weights and offsets then are zeros.

    Example:
        >>> from hf_optimizability.curvature.twice_differentiable import CheapSecondDerivatives
        >>> x, w = torch.ones(1, 2), torch.ones(3, 2, requires_grad=True)
        >>> with CheapSecondDerivatives():
        ...     loss = torch.nn.functional.linear(x, w).square().sum()
        >>> (slope,) = differentiate(loss, [w], graph_only=True)
        >>> slope[0], differentiate(slope.sum(), [w])[0][0]
        (tensor([0., 0.], grad_fn=<SelectBackward0>), tensor([4., 4.]))
    """
    global _request
    before, _request = _request, _Request(frozenset(map(id, variables)), values=not graph_only)
    try:
        return torch.autograd.grad(
            outputs,
            variables,
            grad_outputs,
            retain_graph=retain_graph or graph_only,
            create_graph=graph_only,
            materialize_grads=True,
        )
    finally:
        _request = before


class _Request(NamedTuple):
    """What a backward pass is made for: the variables' ids, and whether the values of their gradients are wanted."""

    variables: frozenset[int]
    values: bool


_request: _Request | None = None  # for all threads: autograd has one of its own for each GPU


def is_variable(tensor: Tensor | None) -> bool:
    """Return whether a backward pass may differentiate w.r.t. this tensor."""
    return tensor is not None and tensor.is_leaf and tensor.requires_grad


def is_requested(tensor: Tensor | None) -> bool:
    """Return whether the current backward pass needs the gradient w.r.t. this tensor."""
    return _request is None or id(tensor) in _request.variables or not is_variable(tensor)


def zero_shape(tensor: Tensor | None) -> torch.Size | None:
    """Return the shape of a zero placeholder for a gradient whose value is not needed, or `None`."""
    only_graph = _request is not None and not _request.values
    return tensor.shape if only_graph and tensor is not None and is_variable(tensor) else None
