# SPDX-License-Identifier: Apache-2.0
"""Partition of an operator's vectors over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .communicator import SINGLE_PROCESS, ProcessGroup


_MIN = torch.iinfo(torch.int64).min  # random numbers from here to the maximum: each bit is a sign


@dataclass(frozen=True)
class RowPartition:
    """Which rows of an n × n operator's vectors this process holds.

    A vector, or a block of them, is the tensor of the local rows. Elementwise arithmetic needs nothing else; sums over
    rows (dot products, Gram matrices) must be summed over `group` as well.

    Attributes:
        size: n.
        local: Slices of the whole vector that this process holds, ascending.
        group: The processes that hold each row once between them.

    Example:
        >>> rows = RowPartition(5, (slice(0, 1), slice(3, 5)))
        >>> len(rows), rows.select(torch.arange(5.0))
        (3, tensor([0., 3., 4.]))
    """

    size: int
    local: tuple[slice, ...]
    group: ProcessGroup = SINGLE_PROCESS

    @classmethod
    def whole(cls, size: int) -> RowPartition:
        """Return the partition with all rows in one process."""
        return cls(size, (slice(0, size),))

    def __len__(self) -> int:
        """Return the number of local rows."""
        return sum(part.stop - part.start for part in self.local)

    def select(self, vector: Tensor) -> Tensor:
        """Return the local rows of a whole vector."""
        return torch.cat([vector[:0], *(vector[part] for part in self.local)])

    def unit(self, index: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the local rows of the unit vector along one of the n axes."""
        vector = torch.zeros(len(self), dtype=dtype, device=device)
        before = 0
        for part in self.local:
            if part.start <= index < part.stop:
                vector[before + index - part.start] = 1
            before += part.stop - part.start
        return vector

    def rademacher(self, *, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the local rows of a random ±1 vector that depends on neither the device nor the partition.

        All n signs are drawn on the CPU, 64 per random number, and unpacked on the device.
        """
        numbers = torch.empty(-(-self.size // 64), dtype=torch.int64).random_(_MIN, None, generator=generator)
        packed = numbers.view(torch.uint8)
        bits = torch.arange(8, dtype=torch.uint8, device=device)
        signs = torch.empty(len(self), dtype=dtype, device=device)
        start = 0
        for part in self.local:
            offset, length = part.start % 8, part.stop - part.start
            local = packed[part.start // 8 : -(-part.stop // 8), None].to(device)
            signs[start : start + length] = (local >> bits).bitwise_and_(1).flatten()[offset : offset + length]
            start += length
        return signs.mul_(2).sub_(1)
