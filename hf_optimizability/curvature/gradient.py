# SPDX-License-Identifier: Apache-2.0
"""The gradient of an objective, and norms by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.communicator import SINGLE_PROCESS, ProcessGroup
from .empirical_risk import EmpiricalRisk


@dataclass(frozen=True)
class Gradient:
    """A mean loss and its gradient.

    Attributes:
        loss: The mean loss.
        items: What the mean is over.
        tensors: The gradient, shaped like the parameters.
    """

    loss: float
    items: float
    tensors: tuple[Tensor, ...]


class BatchGradient(NamedTuple):
    """What one batch contributes.

    Attributes:
        tensors: The gradient of the sum of its losses, shaped like the parameters.
        loss: That sum, without its graph.
        items: The number of items it sums over.
    """

    tensors: tuple[Tensor, ...]
    loss: Tensor
    items: float


def batch_gradients(objective: EmpiricalRisk) -> Iterator[BatchGradient]:
    """Yield the gradient of each local batch; leave `.grad` alone.

    Example:
        >>> class Lines(EmpiricalRisk):
        ...     parameters = [torch.ones(1, requires_grad=True)]
        ...     def losses(self):
        ...         for slope in (1.0, 3.0):
        ...             yield (slope * self.parameters[0]).sum(), 1
        >>> [batch.tensors for batch in batch_gradients(Lines())]
        [(tensor([1.]),), (tensor([3.]),)]
    """
    for loss, items in objective.losses():
        tensors = torch.autograd.grad(loss, objective.parameters, materialize_grads=True)
        yield BatchGradient(tensors, loss.detach(), items)


def gradient(objective: EmpiricalRisk) -> Gradient:
    """Compute loss and gradient over all parts of an objective, on all ranks; leave `.grad` alone."""
    group = objective.group
    totals, loss_sum, items = gradient_sum(objective)
    group.all_reduce_many_(totals)
    loss_sums, counts = zip(*group.all_gather_interleaved([(loss_sum, items)]), strict=True)
    items = sum(counts)
    return Gradient(sum(loss_sums) / items, items, tuple(total / items for total in totals))


def gradient_sum(objective: EmpiricalRisk) -> tuple[list[Tensor], float, float]:
    """Return the gradient of the sum of the losses, shaped like the parameters; that sum; and the number of items."""
    totals = [torch.zeros_like(parameter) for parameter in objective.parameters]
    loss_sum, items = 0.0, 0.0
    for batch in batch_gradients(objective):
        for total, piece in zip(totals, batch.tensors, strict=True):
            total += piece
        loss_sum += float(batch.loss)
        items += batch.items
    return totals, loss_sum, items


def norm_of(tensors: Sequence[Tensor], group: ProcessGroup = SINGLE_PROCESS) -> Tensor:
    """Return the 2-norm of all entries of all tensors, on the first one's device: reading it synchronizes.

    In float64 where the device has it: squares of float32 numbers overflow, and vanish below 1e-23. Tensors may be of
    several types, complex or sparse.

    Args:
        tensors: What is here of them.
        group: The processes that hold all entries between them.

    Example:
        >>> norm_of([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5., dtype=torch.float64)
    """
    device = tensors[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    entries = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    real = [torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor for tensor in entries]
    norms = [torch.linalg.vector_norm(tensor, dtype=dtype).to(device) for tensor in real]
    total = torch.linalg.vector_norm(torch.stack(norms))
    return total if group is SINGLE_PROCESS else group.all_reduce_(total.square()).sqrt()
