# SPDX-License-Identifier: Apache-2.0
"""The gradient of an objective, and norms by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    items: int
    tensors: tuple[Tensor, ...]


def gradient(objective: EmpiricalRisk) -> Gradient:
    """Compute loss and gradient over all parts of an objective, on all ranks; leave `.grad` alone."""
    group = objective.group
    totals, loss_sum, items = gradient_sum(objective)
    group.all_reduce_many_(totals)
    loss_sums, counts = zip(*group.all_gather_interleaved([(loss_sum, items)]), strict=True)
    items = sum(counts)
    return Gradient(sum(loss_sums) / items, items, tuple(total / items for total in totals))


def gradient_sum(objective: EmpiricalRisk) -> tuple[list[Tensor], float, int]:
    """Return the gradient of the sum of the losses, shaped like the parameters; that sum; and the number of items."""
    totals = [torch.zeros_like(parameter) for parameter in objective.parameters]
    loss_sum, items = 0.0, 0
    for loss, count in objective.losses():
        pieces = torch.autograd.grad(loss, objective.parameters, materialize_grads=True)
        for total, piece in zip(totals, pieces, strict=True):
            total += piece
        loss_sum += float(loss.detach())
        items += count
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
