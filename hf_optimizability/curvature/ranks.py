# SPDX-License-Identifier: Apache-2.0
"""The processes that measure together, as the estimators see them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Ranks:
    """One process by itself; a subclass makes several of them act as one.

    Attributes:
        number: How many there are.
        index: Which of them this is.
    """

    number = 1
    index = 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, on each of them."""
        return tensor

    def gather(self, values: list[Any]) -> list[Any]:
        """The values of all ranks, on each of them, by rank."""
        return values


ALONE = Ranks()
