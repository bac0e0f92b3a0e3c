# SPDX-License-Identifier: Apache-2.0
"""Models under FSDP2 (`fully_shard`): measured on whole parameters, or on the shards where those do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import Work, all_reduce
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard

from ..config import OptimizabilityConfig
from ..curvature.gradient import norm_of
from ..device_memory import free_memory
from ..errors import MeasurementError
from ..linalg.communicator import ProcessGroup
from ..linalg.row_partition import RowPartition
from ..model_state.state import settle
from ..objective.batches import batch_size
from ..objective.objective import Objective, ProbeBatch
from ..quantities.preconditioner import TensorReader


_SHARE = 0.5
"""Of the free memory, what the whole parameters and the vectors may take; the rest is for the graph of a batch."""


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to the model or to a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Puts whole parameters in the place of a model's shards, and the shards back after, also when it raises.

    Inside, the model is one without FSDP: its hooks are set aside and its mixed precision with them, and the
    parameters are plain tensors, gathered from the shards in float32 at least, that can be differentiated twice. The
    shards are not touched; what is written to the whole parameters is lost. Parameters must be read anew inside, as
    `Objective.parameters` does. A model without FSDP is left as it is.

    All ranks must come in and out together. Memory: all parameters, frozen ones included, in float32.

    Raises:
        MeasurementError: If the parameters are offloaded, or split by tensor parallelism too.
    """
    reshard(model)
    settle()
    whole: dict[int, nn.Parameter] = {}
    shards = list(_shards(model))
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(_hooks_set_aside(module))
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
    """Gives an objective whose gradient can be had, and how to read of an optimizer's tensors what belongs to it.

    Without FSDP these are the objective itself and the tensors themselves. Under FSDP it is the objective over the
    whole parameters where they fit into memory on all ranks (`unsharded`), else over the shards (`on_shards`).

    Args:
        objective: To be measured by all ranks together.
        config: What is measured.
        required_bytes: Memory that a measurement over the whole parameters takes on each rank.

    Raises:
        MeasurementError: If it can be measured neither way.
    """
    model = objective.model
    if not is_sharded(model):
        yield objective, lambda tensor: tensor
        return
    free = min(objective.group.all_gather_interleaved([free_memory(objective.parameters[0].device)]))
    if required_bytes <= _SHARE * free:
        with unsharded(model):
            yield objective, full_tensor
        return
    if config.curvature != "hessian" or config.engine not in ("auto", "central_difference"):
        raise MeasurementError(
            "The whole parameters and the vectors do not fit into memory, and by the shards only the Hessian can be "
            f"had, by central differences; asked for are {config.curvature!r} and {config.engine!r}.",
            "Leave `curvature` and `engine` at their defaults, lower `max_hvps`, or free memory.",
        )
    with on_shards(objective) as sharded:
        yield sharded, local_tensor


def norms_over_ranks(tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """2-norm of all entries of each list of tensors, wherever they are; reading it synchronizes.

    Where they lie over ranks, all ranks must call this together; it takes one small message.

    Example:
        >>> norms_over_ranks({"layer": [torch.tensor([3.0]), torch.tensor([[4.0]])]})
        {'layer': tensor(5., dtype=torch.float64)}
    """
    norms = {name: norm_of([local_tensor(tensor) for tensor in held]) for name, held in tensors.items()}
    some = next((tensor for held in tensors.values() for tensor in held if isinstance(tensor, DTensor)), None)
    if some is None:
        return norms
    squares = torch.stack(list(norms.values())).square()
    for dimension, placement in enumerate(some.placements):
        if placement.is_shard():
            all_reduce(squares, group=some.device_mesh.get_group(dimension))
    return dict(zip(norms, squares.sqrt(), strict=True))


def class_name(module: nn.Module) -> str:
    """Name of a module's class; of the one that it had before `fully_shard` gave it one of its own."""
    return next(kind.__name__ for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that lies over ranks as one plain tensor; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that lies over ranks; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def on_shards(objective: Objective) -> Iterator[Objective]:
    """Gives an objective as a function of the shards of its parameters that this rank holds.

    No rank ever holds more than FSDP unshards at once. Gradients are FSDP's own, reduced to the shards, in the
    precision of the shards whatever its mixed precision policy: there are no second derivatives. A batch's examples
    are split over the ranks, so that its parts are the same as in one process; a rank without a share goes through the
    passes with weight 0, since all must take part. `.grad`s and FSDP's settings come back after, also when it raises.

    All ranks must come in and out together, with the same batches.

    Args:
        objective: Over the whole parameters, shared by all ranks.

    Raises:
        MeasurementError: If the shards can't be measured on: half-precision weights, parameters outside FSDP, shards
            along other dimensions than the first.
    """
    model = objective.model
    reshard(model)
    parameters = [cast(DTensor, parameter) for parameter in objective.parameters]
    rows = _rows(model, parameters, objective.group)
    gradients = [parameter.grad for parameter in parameters]
    try:
        with _in_own_precision(model), _synchronize_collectives(model, objective.group):
            for parameter in parameters:
                parameter.grad = None
            yield ShardedObjective(objective, parameters, rows)
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


class ShardedObjective(Objective):
    """A mean loss as a function of the shards that this rank holds; see `on_shards`, which makes it.

    Args:
        objective: The same over the whole parameters.
        parameters: The sharded parameters.
        rows: How vectors over them lie.
    """

    def __init__(self, objective: Objective, parameters: Sequence[DTensor], rows: RowPartition):
        vars(self).update(vars(objective.unsharded()))
        self._sharded = parameters
        self._rows = rows
        self._shards = [local_tensor(parameter).detach().requires_grad_() for parameter in parameters]

    @property
    def parameters(self) -> list[Tensor]:  # type: ignore[override]
        """The shards, in the memory that FSDP gathers from."""
        return self._shards

    @property
    def second_derivative_blocker(self) -> str:
        """Why there are no second derivatives."""
        return (
            "The whole parameters and the vectors of a measurement do not fit into memory, and FSDP gives only first "
            "derivatives by the shards."
        )

    @property
    def rows(self) -> RowPartition:
        """Which rows of vectors over the whole parameters belong to the shards that are here."""
        return self._rows

    def losses(self) -> Iterator[tuple[Tensor, int]]:
        """Yield each batch's sum of losses over all ranks, with its gradient by the shards, and its items."""
        for batch in self._local:
            if not batch.items:
                continue
            loss, items = self._share(batch)
            gradients = self._backward(loss) if torch.is_grad_enabled() else []
            reshard(self.model)  # what stays unsharded would not see that the shards are moved
            both = self.rows.group.all_reduce_(torch.tensor([float(loss.detach()), items], dtype=torch.float64))
            total = both[0].to(loss)
            yield (_Known.apply(total, gradients, *self._shards) if gradients else total), int(both[1])

    def _share(self, batch: ProbeBatch) -> tuple[Tensor, int]:
        """The loss of this rank's examples of a batch; of others and times 0 where it has none that count."""
        pieces = self._pieces_for_ranks(batch)
        mine = pieces[self.rows.group.rank : self.rows.group.rank + 1]
        if mine and mine[0].items:
            return self._pass(mine[0])
        other = next(piece for piece in pieces if piece.items)
        return 0 * self._pass(other)[0], 0

    def _pieces_for_ranks(self, batch: ProbeBatch) -> list[ProbeBatch]:
        """At most one piece for each rank; a batch that can't be cut is the first rank's."""
        try:
            return self.pieces(batch, math.ceil(batch_size(batch.inputs) / self.rows.group.world_size))
        except ValueError:
            return [batch]

    def _backward(self, loss: Tensor) -> list[Tensor]:
        """The gradient by the shards of the sum of the ranks' losses, of which FSDP makes the mean."""
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


class _Known(torch.autograd.Function):
    """A number whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *variables: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient.mul_(scale) for gradient in ctx.gradients)  # in place: it is asked for once


def _rows(model: nn.Module, parameters: Sequence[DTensor], group: ProcessGroup) -> RowPartition:
    """How vectors over parameters lie over the ranks that hold their shards."""
    half = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4), None)
    if half is not None:
        raise MeasurementError(
            f"The whole parameters do not fit into memory, and the shards are in {half}, in which the step of a "
            "central difference rounds away.",
            "Train float32 weights in mixed precision (as FSDP2 does through Accelerate), or free memory.",
        )
    places, before = [], 0
    for parameter in parameters:
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        if placements != (Shard(0),) or parameter.device_mesh.size() != group.world_size:
            raise MeasurementError(
                "The whole parameters do not fit into memory, and not all of them are sharded over all processes "
                "along their first dimension alone.",
                "Free memory, or shard by `fully_shard` over all processes, with neither replicas nor "
                "`ignored_params` nor `shard_placement_fn`.",
            )
        length = math.ceil(parameter.shape[0] / group.world_size) * (parameter.numel() // parameter.shape[0])
        start = min(parameter.device_mesh.get_local_rank() * length, parameter.numel())
        places.append(slice(before + start, before + min(start + length, parameter.numel())))
        before += parameter.numel()
    return RowPartition(before, tuple(places), group)


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _states(model: nn.Module) -> list[Any]:
    """FSDP's own, each once: it may be of several modules."""
    return list({id(state): state for state in (module._get_fsdp_state() for module in _fsdp_modules(model))}.values())


def _groups(model: nn.Module) -> list[Any]:
    """Parameters that FSDP gathers together."""
    return [group for state in _states(model) for group in state._fsdp_param_groups]


def reshard(model: nn.Module) -> None:
    """Puts the shards back in the place of what a forward pass without a backward pass left unsharded."""
    for module in _fsdp_modules(model):
        module.reshard()


def _shards(model: nn.Module) -> Iterator[tuple[nn.Module, str, DTensor]]:
    """Where each sharded parameter is held; a tied one more than once."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, DTensor):
                if parameter.device.type != parameter.device_mesh.device_type:
                    raise MeasurementError(
                        "The parameters are offloaded to the CPU, where they can't be put together.",
                        "Train without `cpu_offload`, or do not measure.",
                    )
                if sum(placement.is_shard() for placement in parameter.placements) > 1:
                    raise MeasurementError(
                        "The parameters are split by tensor parallelism, which can't be measured under.",
                        "Shard by data parallelism alone (FSDP2, also with replicas), or do not measure.",
                    )
                yield module, name, parameter


@contextmanager
def _hooks_set_aside(module: nn.Module) -> Iterator[None]:
    """Takes off the hooks by which FSDP unshards a module's parameters around its passes."""
    registries: list[dict[int, Callable[..., Any]]] = [module._forward_pre_hooks, module._forward_hooks]
    held = [dict(registry) for registry in registries]
    try:
        for registry, hooks in zip(registries, held, strict=True):
            for key, hook in hooks.items():
                if str(hook.__module__).startswith("torch.distributed.fsdp"):
                    del registry[key]
        yield
    finally:
        for registry, hooks in zip(registries, held, strict=True):
            registry.clear()
            registry.update(hooks)


@contextmanager
def _in_own_precision(model: nn.Module) -> Iterator[None]:
    """Makes FSDP compute and reduce in the precision of the shards, in every backward pass, and average plainly.

    There is no public way to change a mixed precision policy: this is what `fully_shard` sets up from one.
    """
    groups = _groups(model)
    members = [member for group in groups for member in group.fsdp_params]
    own = MixedPrecisionPolicy()
    with ExitStack() as stack:
        for state in _states(model):
            stack.enter_context(_held(state, _mp_policy=own))
            stack.enter_context(_held(state._state_ctx, is_last_backward=True))
        for group in groups:
            stack.callback(group._init_mp_dtypes)
            stack.enter_context(
                _held(group, mp_policy=own, reduce_grads=True, all_reduce_grads=True, gradient_divide_factor=None)
            )
            group._init_mp_dtypes()
        for member in members:  # buffers, made anew in the other dtype, and what micro-batches have accumulated there
            stack.enter_context(_held(member, all_gather_outputs=[], unsharded_accumulated_grad=None))
            stack.enter_context(_without(member, "_unsharded_param"))
        try:
            yield
        except BaseException:
            for module in _fsdp_modules(model):
                if module._get_fsdp_state()._is_root:  # after a pass that broke off
                    module.reset_iter_state()
            raise
        finally:
            reshard(model)


class _SynchronizedCollective:
    """A collective of FSDP's, before which the ranks exchange whether all of them got there."""

    def __init__(self, collective: Any, group: ProcessGroup):
        self.allocate = collective.allocate
        self._collective = collective
        self._group = group

    def __call__(self, *args: Any, **options: Any) -> Work | None:
        self._group.barrier()
        return self._collective(*args, **options)


@contextmanager
def _synchronize_collectives(model: nn.Module, group: ProcessGroup) -> Iterator[None]:
    """Lets no rank wait in FSDP's collectives for one whose pass has failed: its error is raised on all instead."""
    with ExitStack() as stack:
        for parameters in _groups(model):
            gather = _SynchronizedCollective(parameters._all_gather_comm, group)
            scatter = _SynchronizedCollective(parameters._reduce_scatter_comm, group)
            stack.enter_context(_held(parameters, _all_gather_comm=gather, _reduce_scatter_comm=scatter))
        yield


@contextmanager
def _held(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes with other values, and their own back after."""
    before = {name: getattr(owner, name) for name in values}
    try:
        vars(owner).update(values)
        yield
    finally:
        vars(owner).update(before)


@contextmanager
def _without(owner: Any, name: str) -> Iterator[None]:
    """An attribute that is not there, and whatever was there back after."""
    before = {key: value for key, value in vars(owner).items() if key == name}
    try:
        vars(owner).pop(name, None)
        yield
    finally:
        vars(owner).pop(name, None)
        vars(owner).update(before)
