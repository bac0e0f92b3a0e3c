# SPDX-License-Identifier: Apache-2.0
"""The number of in-place writes to a tensor, which torch counts for autograd."""

from __future__ import annotations

from torch import Tensor


def write_count(tensor: Tensor) -> int:
    """Return how often a tensor's memory was written to in place, through any alias; not through `.data`.

    Example:
        >>> import torch
        >>> tensor = torch.zeros(2)
        >>> before = write_count(tensor)
        >>> _ = tensor[:1].add_(1), tensor.detach().mul_(2)
        >>> write_count(tensor) - before
        2
    """
    return tensor._version
