# SPDX-License-Identifier: Apache-2.0
"""The private parts of torch's FSDP2 that measuring on shards relies on; no other file names them.

`tests/distributed/test_fsdp_internals.py` has a canary test for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed import Work
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..errors import MeasurementError
from ..linalg.communicator import ProcessGroup
from .tensors import fsdp_modules, reshard


STATE_ATTRIBUTES = ("_fsdp_param_groups", "_is_root", "_mp_policy", "_state_ctx")
"""What is used of the state that FSDP keeps for a module."""

GROUP_ATTRIBUTES = (
    "_all_gather_comm", "_init_mp_dtypes", "_reduce_scatter_comm", "all_reduce_grads", "fsdp_params",
    "gradient_divide_factor", "mp_policy", "reduce_grads",
)  # fmt: skip
"""What is used of a group of parameters that FSDP gathers together."""

PARAMETER_ATTRIBUTES = ("all_gather_outputs", "unsharded_accumulated_grad")
"""What is used of one parameter of a group, besides `_unsharded_param`, which appears with the first all-gather."""


def require_known_internals(model: nn.Module) -> None:
    """Raise if this version of torch lacks something that measuring on shards relies on.

    Raises:
        MeasurementError: If it does.
    """
    missing = {"reset_iter_state" for module in fsdp_modules(model) if not hasattr(module, "reset_iter_state")}
    for state in _states(model):
        missing |= _missing(state, STATE_ATTRIBUTES)
        for group in [] if missing else state._fsdp_param_groups:
            missing |= _missing(group, GROUP_ATTRIBUTES)
            for parameter in [] if missing else group.fsdp_params:
                missing |= _missing(parameter, PARAMETER_ATTRIBUTES)
    if missing:
        raise MeasurementError(
            "sharded_by_another_torch", version=str(torch.__version__), names=tuple(sorted(missing))
        )


@contextmanager
def without_unshard_hooks(model: nn.Module) -> Iterator[None]:
    """Remove the hooks by which FSDP unshards the parameters around passes, and restore them at exit."""
    registries: list[dict[int, Callable[..., Any]]] = [
        registry for module in model.modules() for registry in (module._forward_pre_hooks, module._forward_hooks)
    ]
    originals = [dict(registry) for registry in registries]
    try:
        for registry, hooks in zip(registries, originals, strict=True):
            for key, hook in hooks.items():
                if str(hook.__module__).startswith("torch.distributed.fsdp"):
                    del registry[key]
        yield
    finally:
        for registry, hooks in zip(registries, originals, strict=True):
            registry.clear()
            registry.update(hooks)


@contextmanager
def shard_precision(model: nn.Module) -> Iterator[None]:
    """Make FSDP compute and reduce in the precision of the shards, in every backward pass, and average plainly.

    There is no public way to change a mixed precision policy: this repeats what `fully_shard` sets up from one.
    """
    groups = _groups(model)
    policy = MixedPrecisionPolicy()
    with ExitStack() as stack:
        for state in _states(model):
            stack.enter_context(_replaced(state, _mp_policy=policy))
            stack.enter_context(_replaced(state._state_ctx, is_last_backward=True))
        for group in groups:
            stack.callback(group._init_mp_dtypes)
            stack.enter_context(
                _replaced(
                    group, mp_policy=policy, reduce_grads=True, all_reduce_grads=True, gradient_divide_factor=None
                )
            )
            group._init_mp_dtypes()
        for parameter in [parameter for group in groups for parameter in group.fsdp_params]:
            # Buffers, which are allocated again in the other dtype, and the gradients accumulated by micro-batches.
            stack.enter_context(_replaced(parameter, all_gather_outputs=[], unsharded_accumulated_grad=None))
            stack.enter_context(_without_attribute(parameter, "_unsharded_param"))
        try:
            yield
        except BaseException:
            for module in fsdp_modules(model):
                if module._get_fsdp_state()._is_root:  # after a pass that broke off
                    module.reset_iter_state()
            raise
        finally:
            reshard(model)


@contextmanager
def synchronized_collectives(model: nn.Module, group: ProcessGroup) -> Iterator[None]:
    """Exchange errors before each collective of FSDP: if a pass fails on one rank, all raise, and none waits."""
    with ExitStack() as stack:
        for parameters in _groups(model):
            gather = _SynchronizedCollective(parameters._all_gather_comm, group)
            scatter = _SynchronizedCollective(parameters._reduce_scatter_comm, group)
            stack.enter_context(_replaced(parameters, _all_gather_comm=gather, _reduce_scatter_comm=scatter))
        yield


def collectives_are_synchronized(model: nn.Module) -> bool:
    """Return whether `synchronized_collectives` is active on a part of the model."""
    return any(isinstance(group._all_gather_comm, _SynchronizedCollective) for group in _groups(model))


class _SynchronizedCollective:
    """A collective of FSDP that is preceded by a barrier."""

    def __init__(self, collective: Any, group: ProcessGroup):
        self.allocate = collective.allocate
        self._collective = collective
        self._group = group

    def __call__(self, *args: Any, **options: Any) -> Work | None:
        self._group.barrier()
        return self._collective(*args, **options)


def _states(model: nn.Module) -> list[Any]:
    """Return FSDP's state of each module, once where several modules share it."""
    return list({id(state): state for state in (module._get_fsdp_state() for module in fsdp_modules(model))}.values())


def _groups(model: nn.Module) -> list[Any]:
    """Return the groups of parameters that FSDP gathers together."""
    return [group for state in _states(model) for group in state._fsdp_param_groups]


def _missing(owner: Any, names: tuple[str, ...]) -> set[str]:
    return {name for name in names if not hasattr(owner, name)}


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes to other values, and restore them at exit."""
    before = {name: getattr(owner, name) for name in values}
    try:
        vars(owner).update(values)
        yield
    finally:
        vars(owner).update(before)


@contextmanager
def _without_attribute(owner: Any, name: str) -> Iterator[None]:
    """Delete an attribute if there is one, and restore it at exit."""
    before = {key: value for key, value in vars(owner).items() if key == name}
    try:
        vars(owner).pop(name, None)
        yield
    finally:
        vars(owner).pop(name, None)
        vars(owner).update(before)
