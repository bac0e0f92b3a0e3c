# SPDX-License-Identifier: Apache-2.0
"""A mean loss as a function of the shards of its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from ..errors import WrongDerivativeError
from ..linalg.row_partition import RowPartition
from ..objective.objective import Objective, ProbeBatch
from .tensors import local_tensor, reshard


class ShardedObjective(Objective):
    """A mean loss as a function of this rank's shards; made by `fsdp.on_shards`.

    Args:
        objective: The same loss over the whole parameters.
        parameters: The sharded parameters.
        rows: The partition of vectors over the parameters.
    """

    def __init__(self, objective: Objective, parameters: Sequence[DTensor], rows: RowPartition):
        vars(self).update(vars(objective.unsharded()))
        self._sharded = parameters
        self._rows = rows
        self._cut = True
        self._shards = [local_tensor(parameter).detach().requires_grad_() for parameter in parameters]

    @property
    def parameters(self) -> Sequence[Tensor]:
        """This rank's shards, in the memory that FSDP gathers from."""
        return self._shards

    @property
    def second_derivative_blocker(self) -> WrongDerivativeError:
        """The reason why there are no second derivatives."""
        return WrongDerivativeError("sharded")

    @property
    def rows(self) -> RowPartition:
        """The partition of vectors over the whole parameters: this rank has the rows of its shards."""
        return self._rows

    def uncut(self) -> ShardedObjective:
        """Return the objective whose batches are not split over the ranks: each passes all of them, for their values.

        Passes are FSDP's collectives, so that all ranks must make them together.
        """
        objective = copy(self)
        objective._cut = False
        return objective

    def losses(self) -> Iterator[tuple[Tensor, float]]:
        """Yield each batch's sum of losses, differentiable w.r.t. the shards unless uncut, and its number of items."""
        for batch in self._local:
            if batch.items:
                yield self._sum_over_ranks(batch) if self._cut else self._value(batch)

    def _value(self, batch: ProbeBatch) -> tuple[Tensor, float]:
        """Return the sum of losses of a batch that this rank passes as a whole."""
        loss, items = self._pass(batch)
        reshard(self.model)  # unsharded copies would not follow when the shards are displaced
        return loss, items

    def _sum_over_ranks(self, batch: ProbeBatch) -> tuple[Tensor, float]:
        """Return the sum of losses of a batch that is split over the ranks."""
        loss, items = self._share(batch)
        gradients = self._backward(loss) if torch.is_grad_enabled() else []
        reshard(self.model)
        sums = self.rows.group.all_reduce_(torch.tensor([float(loss.detach()), items], dtype=torch.float64))
        total = sums[0].to(loss)
        return (_PrecomputedGradient.apply(total, gradients, *self._shards) if gradients else total), int(sums[1])

    def _share(self, batch: ProbeBatch) -> tuple[Tensor, float]:
        """Return the loss of this rank's examples of a batch; if none of them counts, 0 times that of others."""
        pieces = self._pieces_for_ranks(batch)
        rank = self.rows.group.rank
        if rank < len(pieces) and pieces[rank].items:
            return self._pass(pieces[rank])
        other = next(piece for piece in pieces if piece.items)  # all ranks must take part in FSDP's collectives
        return 0 * self._pass(other)[0], 0

    def _pieces_for_ranks(self, batch: ProbeBatch) -> list[ProbeBatch]:
        """Cut a batch into at most one piece per rank; one that can't be cut goes to the first rank."""
        try:
            return self.pieces(batch, math.ceil(self.examples(batch.inputs) / self.rows.group.world_size))
        except ValueError:
            return [batch]

    def _backward(self, loss: Tensor) -> list[Tensor]:
        """Return the gradient of the sum of the ranks' losses w.r.t. the shards; FSDP itself takes the mean."""
        loss.backward()
        gradients = []
        for parameter, shard in zip(self._sharded, self._shards, strict=True):
            gradient = parameter.grad
            gradients.append(
                torch.zeros_like(shard)
                if gradient is None
                else local_tensor(gradient).mul_(self.rows.group.world_size)
            )
            parameter.grad = None
        return gradients


class _PrecomputedGradient(torch.autograd.Function):
    """A scalar with a precomputed gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *variables: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient.mul_(scale) for gradient in ctx.gradients)  # in place, since it is used once
