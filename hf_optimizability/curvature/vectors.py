# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on long vectors: random probes, and dot products that stay exact enough for a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


_CHUNK = 1 << 20  # keeps the float64 copies of a dot product at 8 MB, however long the vectors


def dot(x: Tensor, y: Tensor) -> float:
    """`x · y`, accumulated in float64 whatever the dtype of the vectors.

    Example:
        >>> dot(torch.full((3,), 1e4), torch.full((3,), 1e4))
        300000000.0
    """
    chunks = zip(x.split(_CHUNK), y.split(_CHUNK), strict=True)
    return float(sum(torch.dot(a.double(), b.double()) for a, b in chunks))


def norm(x: Tensor) -> float:
    """2-norm of `x`, accumulated in float64."""
    return math.sqrt(dot(x, x))


def segment_sums(x: Tensor, segments: Sequence[Sequence[slice]]) -> list[float]:
    """Sum of `x` over each segment (a union of slices), accumulated in float64.

    Example:
        >>> segment_sums(torch.arange(6.0), [[slice(0, 2), slice(5, 6)], [slice(2, 5)]])
        [6.0, 9.0]
    """
    return [float(sum(x[part].sum(dtype=torch.float64) for part in segment)) for segment in segments]


def rademacher(size: int, *, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of independent signs ±1, drawn on the CPU so that every device and rank draws the same one."""
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8)
    return signs.to(device=device, dtype=dtype).mul_(2).sub_(1)
