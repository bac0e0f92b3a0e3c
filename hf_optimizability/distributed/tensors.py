# SPDX-License-Identifier: Apache-2.0
"""Tensors and models that are sharded over ranks: what this rank holds, the whole, and norms of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..curvature.gradient import norm_of


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as one plain tensor, and any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norms_over_ranks(tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Return the 2-norm of all entries of each list of tensors, sharded or not; reading it synchronizes.

    If the tensors are sharded, all ranks must call this together; it takes one small message.

    Example:
        >>> norms_over_ranks({"layer": [torch.tensor([3.0]), torch.tensor([[4.0]])]})
        {'layer': tensor(5., dtype=torch.float64)}
    """
    norms = {name: norm_of([local_tensor(tensor) for tensor in block]) for name, block in tensors.items()}
    sharded = next((tensor for block in tensors.values() for tensor in block if isinstance(tensor, DTensor)), None)
    if sharded is None:
        return norms
    squares = torch.stack(list(norms.values())).square()
    for dimension, placement in enumerate(sharded.placements):
        if placement.is_shard():
            all_reduce(squares, group=sharded.device_mesh.get_group(dimension))
    return dict(zip(norms, squares.sqrt(), strict=True))


def is_sharded(model: nn.Module) -> bool:
    """Return whether `fully_shard` has been applied to the model or to a part of it."""
    return bool(fsdp_modules(model))


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules to which `fully_shard` has been applied."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that a forward pass without a backward pass has left unsharded."""
    for module in fsdp_modules(model):
        module.reshard()


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class, without the class that `fully_shard` puts before it."""
    return next(kind.__name__ for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
