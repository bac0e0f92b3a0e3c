# SPDX-License-Identifier: Apache-2.0
"""Which rows of an operator's long vectors this process holds: all of them, or one rank's share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .communicator import SINGLE_PROCESS, ProcessGroup


_MIN = torch.iinfo(torch.int64).min  # up to the greatest: each bit is a sign


@dataclass(frozen=True)
class RowPartition:
    """How the long vectors of an n × n operator lie over ranks.

    A vector, or a block of them, is held as the tensor of the rows that are here. Arithmetic by rows is the same
    everywhere; what is summed over rows (dot products, Gram matrices) must be summed over `group` as well.

    Attributes:
        size: n.
        here: Places in the whole vector of the rows that this process holds, ascending.
        group: The processes that hold each row once between them.

    Example:
        >>> rows = RowPartition(5, (slice(0, 1), slice(3, 5)))
        >>> len(rows), rows.of(torch.arange(5.0))
        (3, tensor([0., 3., 4.]))
    """

    size: int
    here: tuple[slice, ...]
    group: ProcessGroup = SINGLE_PROCESS

    @classmethod
    def whole(cls, size: int) -> RowPartition:
        """All rows, in one process."""
        return cls(size, (slice(0, size),))

    def __len__(self) -> int:
        """The number of rows here."""
        return sum(part.stop - part.start for part in self.here)

    def of(self, vector: Tensor) -> Tensor:
        """The rows that are here, of a whole vector."""
        return torch.cat([vector[:0], *(vector[part] for part in self.here)])

    def unit(self, index: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The unit vector along one of the n axes."""
        vector = torch.zeros(len(self), dtype=dtype, device=device)
        before = 0
        for part in self.here:
            if part.start <= index < part.stop:
                vector[before + index - part.start] = 1
            before += part.stop - part.start
        return vector

    def rademacher(self, *, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A vector of independent signs ±1: the same one, whatever the device and however it lies over ranks.

        Drawn on the CPU, 64 signs to a number, all n of them; they are spread out on the device.
        """
        numbers = torch.empty(-(-self.size // 64), dtype=torch.int64).random_(_MIN, None, generator=generator)
        drawn = numbers.view(torch.uint8)
        bits = torch.arange(8, dtype=torch.uint8, device=device)
        signs = torch.empty(len(self), dtype=dtype, device=device)
        place = 0
        for part in self.here:
            before, number = part.start % 8, part.stop - part.start
            here = drawn[part.start // 8 : -(-part.stop // 8), None].to(device)
            signs[place : place + number] = (here >> bits).bitwise_and_(1).flatten()[before : before + number]
            place += number
        return signs.mul_(2).sub_(1)
