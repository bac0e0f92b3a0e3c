# SPDX-License-Identifier: Apache-2.0
"""Parameters moved along a direction for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def displaced(parameters: Sequence[Tensor], direction: Sequence[Tensor], steps: Sequence[float]) -> Iterator[None]:
    """Add `steps[i] * direction[i]` to each parameter, in place; at the end the saved values come back bit for bit.

    Args:
        parameters: What is moved. Memory: a copy of them.
        direction: Tensors shaped like the parameters.
        steps: The step of each parameter.

    Example:
        >>> weight = torch.tensor([1.0])
        >>> with displaced([weight], [torch.tensor([2.0])], [0.5]):
        ...     print(weight)
        tensor([2.])
        >>> weight
        tensor([1.])
    """
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, piece, step in zip(parameters, direction, steps, strict=True):
                parameter.add_(piece.to(parameter.device), alpha=step)
        yield
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, saved, strict=True):
                parameter.copy_(original)
