# SPDX-License-Identifier: Apache-2.0
"""Parameters moved for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def restored(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield a copy of parameters that are moved inside; at exit they get its values back, bit for bit.

    Both ways by `.data`, which leaves their version counters alone: a graph that a caller holds can still be
    differentiated.

    Example:
        >>> import torch
        >>> weight = torch.tensor([1.0])
        >>> with restored([weight]) as [original]:
        ...     _ = weight.data.copy_(3 * original)
        ...     print(weight)
        tensor([3.])
        >>> weight
        tensor([1.])
    """
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        yield saved
    finally:
        for parameter, original in zip(parameters, saved, strict=True):
            parameter.data.copy_(original)


@contextmanager
def displaced(parameters: Sequence[Tensor], direction: Sequence[Tensor], steps: Sequence[float]) -> Iterator[None]:
    """Add `steps[i] * direction[i]` to each parameter, in place; restore the saved values bit for bit at exit.

    Args:
        parameters: What is moved. Memory: a copy of them.
        direction: Tensors shaped like the parameters.
        steps: The step of each parameter.

    Example:
        >>> import torch
        >>> weight = torch.tensor([1.0])
        >>> with displaced([weight], [torch.tensor([2.0])], [0.5]):
        ...     print(weight)
        tensor([2.])
        >>> weight
        tensor([1.])
    """
    with restored(parameters):
        for parameter, piece, step in zip(parameters, direction, steps, strict=True):
            parameter.data.add_(piece.detach().to(parameter.device), alpha=step)
        yield
