# SPDX-License-Identifier: Apache-2.0
"""The processes that share the work on one matrix, as far as numerics need to know of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor


Item = TypeVar("Item")


class ProcessGroup:
    """Processes that each hold a share of a sum; this one stands for a single process, which holds it all.

    All ranks must call the same methods in the same order, with tensors of the same shape. What one of them raises in
    between, the others raise at their next call: nobody waits for a rank that has gone another way.

    Attributes:
        world_size: How many there are.
        rank: Which of them this process is.

    Example:
        >>> ProcessGroup().all_gather_interleaved([1, 2])
        [1, 2]
    """

    world_size = 1
    rank = 0

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Adds up what the ranks hold, in place; every rank gets the same bits."""
        return tensor

    def all_reduce_many_(self, tensors: Sequence[Tensor]) -> None:
        """Adds up each of several tensors, in place."""

    def all_gather_interleaved(self, items: list[Item]) -> list[Item]:
        """What all ranks hold, in the order in which it was dealt to them: one to each, again and again."""
        return items

    def barrier(self) -> None:
        """Waits for all ranks, before a collective of somebody else's."""

    @contextmanager
    def propagate_errors(self) -> Iterator[None]:
        """Around what may raise, wherever that is not the end of the work: all ranks raise the same error, or none.

        Whoever catches an error and goes on another way must catch it outside of this, or the ranks part.
        """
        yield


SINGLE_PROCESS = ProcessGroup()
"""A single process."""
