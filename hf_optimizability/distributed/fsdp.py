# SPDX-License-Identifier: Apache-2.0
"""Models under FSDP2 (`fully_shard`): measured on whole parameters, or on the shards where those do not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from ..config import OptimizabilityConfig
from ..device_memory import free_memory
from ..errors import MeasurementError
from ..linalg.communicator import ProcessGroup
from ..linalg.row_partition import RowPartition
from ..model_state.state import settle
from ..objective.objective import Objective
from ..quantities.preconditioner import TensorReader
from .fsdp_internals import (
    require_known_internals,
    shard_precision,
    synchronized_collectives,
    without_unshard_hooks,
)
from .sharded_objective import ShardedObjective
from .tensors import full_tensor, is_sharded, local_tensor, reshard


_MEMORY_SHARE = 0.5
"""Share of the free memory for the whole parameters and the vectors; the graph of a batch takes the other part."""


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Replace a model's shards by whole parameters, and restore the shards at exit.

    Inside, the model works as without FSDP: its hooks, and with them its mixed precision, are removed, and the
    parameters are plain tensors, gathered from the shards in float32 at least, that can be differentiated twice. The
    shards are not touched; what is written to the whole parameters is lost. Look parameters up again inside, as
    `Objective.parameters` does. A model without FSDP is left as it is.

    All ranks must enter and leave together. Memory: all parameters, frozen ones included, in float32.

    Raises:
        MeasurementError: If the parameters are offloaded, or split by tensor parallelism too.
    """
    reshard(model)
    settle()
    whole: dict[int, nn.Parameter] = {}
    shards = list(_shards(model))
    with without_unshard_hooks(model):
        try:
            for module, name, shard in shards:
                if id(shard) not in whole:
                    tensor = full_tensor(shard.detach())
                    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                    whole[id(shard)] = nn.Parameter(tensor, requires_grad=shard.requires_grad)
                setattr(module, name, whole[id(shard)])
            yield
        finally:
            settle()
            for module, name, shard in shards:
                setattr(module, name, shard)


@contextmanager
def materialize_parameters(
    objective: Objective, config: OptimizabilityConfig, *, required_bytes: int
) -> Iterator[tuple[Objective, TensorReader]]:
    """Yield an objective that can be differentiated, and a function that reads optimizer state in the same layout.

    Without FSDP these are the objective itself and the identity. Under FSDP the objective is over the whole parameters
    if they fit into memory on all ranks (`unsharded`), else over the shards (`on_shards`).

    Args:
        objective: What all ranks measure together.
        config: Which matrix and engine; the shards allow only some.
        required_bytes: Memory that a measurement over the whole parameters takes on each rank.

    Raises:
        MeasurementError: If neither is possible.
    """
    model = objective.model
    if not is_sharded(model):
        yield objective, lambda tensor: tensor
        return
    free = min(objective.group.all_gather_interleaved([free_memory(objective.parameters[0].device)]))
    if required_bytes <= _MEMORY_SHARE * free:
        with unsharded(model):
            yield objective, full_tensor
        return
    if config.curvature != "hessian" or config.engine not in ("auto", "central_difference"):
        raise MeasurementError("sharded_matrix", curvature=config.curvature, engine=config.engine)
    with on_shards(objective) as sharded:
        yield sharded, local_tensor


@contextmanager
def on_shards(objective: Objective) -> Iterator[Objective]:
    """Yield the objective as a function of this rank's shards of its parameters.

    No rank ever holds more than FSDP unshards at once. Gradients are FSDP's own, reduced to the shards, in the
    precision of the shards whatever its mixed precision policy: there are no second derivatives. The examples of a
    batch are split over the ranks, so that the batches are the same as in one process; a rank without an example goes
    through the passes with weight 0, since all must take part. `.grad`s and FSDP's settings are restored at exit.

    All ranks must enter and leave together, with the same batches.

    Args:
        objective: Over the whole parameters, shared by all ranks.

    Raises:
        MeasurementError: If the shards can't be measured on: half-precision weights, parameters outside FSDP, shards
            along other dimensions than the first, or a version of torch with another FSDP.
    """
    model = objective.model
    reshard(model)
    require_known_internals(model)
    parameters = [cast(DTensor, parameter) for parameter in objective.parameters]
    rows = _row_partition(model, parameters, objective.group)
    gradients = [parameter.grad for parameter in parameters]
    try:
        with shard_precision(model), synchronized_collectives(model, objective.group):
            for parameter in parameters:
                parameter.grad = None
            yield ShardedObjective(objective, parameters, rows)
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _row_partition(model: nn.Module, parameters: Sequence[DTensor], group: ProcessGroup) -> RowPartition:
    """Return how vectors over the parameters are partitioned over the ranks that hold the shards."""
    half = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4), None)
    if half is not None:
        raise MeasurementError("sharded_half", dtype=str(half))
    slices, offset = [], 0
    for parameter in parameters:
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        if placements != (Shard(0),) or parameter.device_mesh.size() != group.world_size:
            raise MeasurementError("sharded_otherwise")
        length = math.ceil(parameter.shape[0] / group.world_size) * (parameter.numel() // parameter.shape[0])
        start = min(parameter.device_mesh.get_local_rank() * length, parameter.numel())
        slices.append(slice(offset + start, offset + min(start + length, parameter.numel())))
        offset += parameter.numel()
    return RowPartition(offset, tuple(slices), group)


def _shards(model: nn.Module) -> Iterator[tuple[nn.Module, str, DTensor]]:
    """Yield each sharded parameter with its module and name; a tied one more than once."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, DTensor):
                if parameter.device.type != parameter.device_mesh.device_type:
                    raise MeasurementError("parameters_offloaded")
                if sum(placement.is_shard() for placement in parameter.placements) > 1:
                    raise MeasurementError("tensor_parallel")
                yield module, name, parameter
