# SPDX-License-Identifier: Apache-2.0
"""What the numerics need of a process group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor


Item = TypeVar("Item")


class ProcessGroup:
    """Processes that each hold a share of a sum; this base class is a single process, which holds all of it.

    All ranks must call the same methods in the same order, with tensors of the same shape. An error that one rank
    raises in between is raised by the others at their next call, so that no rank waits for one that has left.

    Attributes:
        world_size: Number of processes.
        rank: Index of this process.

    Example:
        >>> ProcessGroup().all_gather_interleaved([1, 2])
        [1, 2]
    """

    world_size = 1
    rank = 0

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; every rank gets the same bits."""
        return tensor

    def all_reduce_many_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each of several tensors over the ranks, in place."""

    def all_gather_interleaved(self, items: list[Item]) -> list[Item]:
        """All-gather the items and interleave them round-robin: the inverse of `items[rank::world_size]`."""
        return items

    def barrier(self) -> None:
        """Wait for all ranks, before a collective of another library."""

    @contextmanager
    def propagate_errors(self) -> Iterator[None]:
        """Make all ranks raise the same exception if any of them raises one inside.

        Catch exceptions outside this context; otherwise the ranks diverge.
        """
        yield


SINGLE_PROCESS = ProcessGroup()
"""A single process."""
