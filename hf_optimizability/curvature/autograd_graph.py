# SPDX-License-Identifier: Apache-2.0
"""What an autograd graph is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .empirical_risk import EmpiricalRisk


_WRONG = {"WeightNormInterfaceBackward0": "torch._weight_norm"}
"""Backward passes of torch whose own derivative is wrong, up to torch 2.13 at least."""

_KINKED = re.compile(
    "(Mkldnn|Cudnn|Adaptive|Fractional)?(Relu|LeakyRelu|Prelu|Rrelu|Threshold|Hard|Softshrink|Elu|Celu|Abs|Clamp|Max|Min"
    "|Amax|Amin|Median|Sort|Topk|Kthvalue|Where|L1Loss|SmoothL1|Hinge|Margin|MultiMargin)"
)
"""Backward passes of operations whose slope jumps; of others whose names begin alike, some more."""

_OURS = __name__.partition(".")[0]


def doubtful_operations(objective: EmpiricalRisk) -> list[str]:
    """Name the operations of a loss whose second derivative may be wrong: custom autograd functions, and torch's own.

    One forward pass, over the first part.

    Example:
        >>> import torch
        >>> class Reversal(torch.autograd.Function):
        ...     __module__ = "somebody_else"
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return x.clone()
        ...     @staticmethod
        ...     def backward(ctx, gradient):
        ...         return -gradient
        >>> class Line(EmpiricalRisk):
        ...     parameters = [torch.ones(1, requires_grad=True)]
        ...     def losses(self):
        ...         yield Reversal.apply(self.parameters[0]).sum(), 1
        >>> doubtful_operations(Line())
        ['Reversal']
    """
    names = (_WRONG.get(node.name()) or _custom(node) for node in _nodes(objective))
    return list(dict.fromkeys(name for name in names if name is not None))


def has_kinks(objective: EmpiricalRisk) -> bool:
    """Return whether a loss has operations whose slope jumps (ReLU, maximum, routing), as its first part shows.

    Example:
        >>> import torch
        >>> class Hinge(EmpiricalRisk):
        ...     parameters = [torch.ones(1, requires_grad=True)]
        ...     def losses(self):
        ...         yield self.parameters[0].clamp(min=0).sum(), 1
        >>> has_kinks(Hinge())
        True
    """
    return any(_KINKED.match(node.name()) for node in _nodes(objective))


def _nodes(objective: EmpiricalRisk) -> Iterator[Any]:
    """Yield the nodes of the graph of the first batch's loss."""
    for loss, _ in islice(objective.losses(), 1):
        yield from iter_autograd_nodes(loss)


def iter_autograd_nodes(*tensors: Tensor) -> Iterator[Any]:
    """Yield the nodes of the graph of some tensors, each once, from the tensors back to the leaves.

    Example:
        >>> import torch
        >>> [node.name() for node in iter_autograd_nodes(torch.ones(1, requires_grad=True).exp())]
        ['ExpBackward0', 'torch::autograd::AccumulateGrad']
    """
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def iter_leaf_uses(loss: Tensor) -> Iterator[tuple[Tensor, Any]]:
    """Yield each use of a leaf in the graph of a loss: the leaf, and the node that takes it."""
    for node in iter_autograd_nodes(loss):
        for following, _ in node.next_functions:
            if following is not None and following.name() == "torch::autograd::AccumulateGrad":
                yield following.variable, node


def _custom(node: Any) -> str | None:
    """Return the name of a function that is written in Python, unless it is our own."""
    if not isinstance(node, BackwardCFunction):
        return None
    function = type(node)._forward_cls  # type: ignore[attr-defined]
    return None if function.__module__.partition(".")[0] == _OURS else function.__name__
