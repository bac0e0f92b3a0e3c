# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on long vectors: dot products that stay exact enough for a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .communicator import SINGLE_PROCESS, ProcessGroup


_CACHED = 1 << 14  # entries of a product that stay in a CPU's cache until they are summed
_CHUNK = 1 << 20  # keeps the float64 copies of a dot product at 8 MB, however long the vectors


def dot(x: Tensor, y: Tensor, group: ProcessGroup = SINGLE_PROCESS) -> float:
    """`x · y`, accumulated in float64 whatever the dtype of the vectors.

    Args:
        x: The rows of x that are here.
        y: The rows of y that are here.
        group: The processes that hold all rows between them.

    Example:
        >>> dot(torch.full((3,), 1e4), torch.full((3,), 1e4))
        300000000.0
    """
    chunks = zip(x.split(_CHUNK), y.split(_CHUNK), strict=True)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for a, b in chunks:
        total += torch.dot(a.double(), b.double())
    return float(group.all_reduce_(total))


def norm(x: Tensor, group: ProcessGroup = SINGLE_PROCESS) -> float:
    """2-norm of `x`, accumulated in float64; of the rows on all ranks."""
    return math.sqrt(dot(x, x, group))


def segment_sums(x: Tensor, segments: Sequence[Sequence[slice]]) -> list[float]:
    """Sum of `x` over each segment (a union of slices), accumulated in float64.

    Example:
        >>> segment_sums(torch.arange(6.0), [[slice(0, 2), slice(5, 6)], [slice(2, 5)]])
        [6.0, 9.0]
    """
    return [float(sum(x[part].sum(dtype=torch.float64) for part in segment)) for segment in segments]


def segment_dots(x: Tensor, y: Tensor, segments: Sequence[Sequence[slice]]) -> list[float]:
    """`x · y` over each segment: products in the dtype of x and y (exact where one is ±1), summed in float64.

    Example:
        >>> segment_dots(torch.arange(6.0), torch.arange(6.0), [[slice(0, 2), slice(5, 6)], [slice(2, 5)]])
        [26.0, 29.0]
    """
    size = _CACHED if x.device.type == "cpu" else _CHUNK

    def over(part: slice) -> Tensor:
        pieces = zip(x[part].split(size), y[part].split(size), strict=True)
        return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pieces]).sum()

    return [float(sum(over(part) for part in segment)) for segment in segments]


def as_rows(columns: Tensor) -> Tensor:
    """The transpose, without a copy where it is one in memory; a single row has the stride of a row.

    Of a column, torch may know any stride. With another one, cuBLAS refuses to add a matrix product to it.

    Example:
        >>> as_rows(torch.ones(3, 1).as_strided((3, 1), (1, 1))).stride()
        (3, 1)
    """
    return columns.T.reshape(-1).view(columns.shape[::-1])


def concatenate(tensors: Iterable[Tensor]) -> Tensor:
    """Return the entries of all tensors in one vector, in order.

    Example:
        >>> concatenate([torch.ones(1, 2), torch.zeros(1)])
        tensor([1., 1., 0.])
    """
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
