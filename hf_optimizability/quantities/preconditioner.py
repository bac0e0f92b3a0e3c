# SPDX-License-Identifier: Apache-2.0
"""What the optimizer in use makes of a gradient: its diagonal preconditioner, its stability limit, its next update."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from transformers.optimization import Adafactor

from ..model_state.snapshot import Snapshot
from .step_size import stability_limit


SUPPORTED = (SGD, Adam, AdamW, Adafactor)
"""Optimizers whose state can be read; with accelerate's wrapper around them or without."""

Group = dict[str, Any]
TensorReader = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """An optimizer as preconditioned gradient descent, θ ← θ − η P⁻¹m, where m is a moving average of the gradient.

    Attributes:
        diagonal: The diagonal of P, of shape (n,), in the order of the parameters. Infinite for a parameter that stays
            where it is: its learning rate is 0 while others move, or the optimizer does not hold it.
        name: Class of the optimizer.
        learning_rate: η, the largest learning rate among the parameters' groups. A smaller one is folded into P: a
            group at η/10 has 10 times the P.
        limit: Gradient descent with this P held still is stable where λ_max(P^-½ H P^-½) is below `limit`; infinite
            at η = 0. Weight decay is left out.
        peak_learning_rate: The largest `initial_lr` of the groups, which schedules scale by at most 1; `None` without
            a schedule.
    """

    diagonal: Tensor
    name: str
    learning_rate: float
    limit: float
    peak_learning_rate: float | None = None

    @property
    def is_identity(self) -> bool:
        """Whether it is plain gradient descent, P = 1."""
        return bool((self.diagonal == 1).all())


def read_preconditioner(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    *,
    gradients: Sequence[Tensor] | None = None,
    read_tensor: TensorReader = lambda tensor: tensor,
) -> Preconditioner:
    """Read the diagonal preconditioner P from an optimizer's state, and leaves the optimizer as it is.

    P is 1 for SGD, √v̂ + ε for Adam and AdamW (v̂ the bias-corrected second moment, or its maximum under `amsgrad`;
    Cohen et al., arXiv 2207.14484), and √v̂ over the parameter scale for Transformers' Adafactor, with the
    second moment put together from its factors (its clipping of the update left out). A parameter that has no state
    yet gets the P that one step on the given gradient would make.

    Args:
        optimizer: SGD, Adam, AdamW or Adafactor, bare or inside accelerate's wrapper.
        parameters: The parameters to read for, in the order wanted. n entries in all.
        gradients: Gradients shaped like `parameters`; needed before the first step only. Memory: one parameter's state
            at a time.
        read_tensor: Of a tensor of the optimizer that lies over ranks, what is measured of it: the whole, or what is
            here (not with Adafactor, whose state is not entry by entry). Gradients are shaped like this.

    Returns:
        The preconditioner, in float32 (float64 if a parameter is); memory: one n-vector.

    Raises:
        TypeError: If the optimizer is not supported.
        ValueError: If no parameter is in the optimizer, the groups differ in momentum, or state and gradients are
            both missing.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = torch.optim.Adam([weight], lr=0.1, eps=0.0)
        >>> preconditioner = read_preconditioner(optimizer, [weight], gradients=[torch.tensor([3.0, -4.0])])
        >>> preconditioner.diagonal.round(decimals=3), round(preconditioner.limit)
        (tensor([3., 4.]), 380)
    """
    optimizer = unwrapped(optimizer)
    groups = _groups_of(optimizer, parameters)
    present, relative = _learning_rates(groups)
    limits = {stability_limit(present, **_momentum(optimizer, group)) for group in groups if group is not None}
    if len(limits) > 1:
        raise ValueError("The parameter groups differ in momentum, so there is no one stability limit.")
    pieces = []
    for index, (parameter, group, rate) in enumerate(zip(parameters, groups, relative, strict=True)):
        if group is None:
            pieces.append(torch.full_like(read_tensor(parameter.detach()), math.inf, dtype=torch.float32))
            continue
        state = optimizer.state.get(parameter, {})
        if not state and not isinstance(optimizer, SGD):
            if gradients is None:
                raise ValueError(
                    f"{type(optimizer).__name__} has no state yet for the parameter at position {index}. "
                    "Pass `gradients`, or read it after the first step."
                )
            state = _lone_step(optimizer, read_tensor(parameter.detach()), {}, gradients[index], group)[1]
        pieces.append(
            _denominator(optimizer, read_tensor(parameter.detach()), group, _read_state(state, read_tensor)) / rate
        )
    initial = [float(group["initial_lr"]) for group in groups if group is not None and "initial_lr" in group]
    peak = max(initial, default=None)
    return Preconditioner(_joined(pieces, parameters), type(optimizer).__name__, present, limits.pop(), peak)


def optimizer_update(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    read_tensor: TensorReader = lambda tensor: tensor,
) -> Tensor:
    """Return the direction u of the optimizer's next step θ ← θ − ηu, if it met these gradients.

    The optimizer's own `step` says so, on a float64 copy of one parameter and its state at a time: momentum, bias
    correction, weight decay and clipping of the update included. The optimizer stays as it is, and so do `.grad`s.
    Gradients are taken as given: clip them first if training does.

    Args:
        optimizer: SGD, Adam, AdamW or Adafactor, bare or inside accelerate's wrapper.
        parameters: The parameters, n entries in all.
        gradients: Shaped like `parameters`.
        read_tensor: As for `read_preconditioner`.

    Returns:
        u, of shape (n,), for η the largest learning rate among the parameters' groups; where that is 0 (as at the
        start of a warm-up), in the proportions of the groups' `initial_lr`. In float32 (float64 if a parameter is).

    Raises:
        TypeError: If the optimizer is not supported.
        ValueError: If no parameter is in the optimizer.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> sgd = torch.optim.SGD([weight], lr=0.1, weight_decay=0.5)
        >>> optimizer_update(sgd, [weight], [torch.tensor([3.0, 4.0])])
        tensor([3.5000, 5.0000])
    """
    optimizer = unwrapped(optimizer)
    groups = _groups_of(optimizer, parameters)
    present, relative = _learning_rates(groups)
    reference = present or 1.0
    pieces = []
    for parameter, gradient, group, rate in zip(parameters, gradients, groups, relative, strict=True):
        before, state = read_tensor(parameter.detach()), _read_state(optimizer.state.get(parameter, {}), read_tensor)
        if group is None:
            pieces.append(torch.zeros_like(before))
            continue
        after, _ = _lone_step(optimizer, before, state, gradient, {**group, "lr": rate * reference})
        pieces.append((before.double() - after) / reference)
    return _joined(pieces, parameters)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside accelerate's wrapper, once it is known to be supported.

    Raises:
        TypeError: If it is not, or if Adafactor sets its own learning rate.
    """
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if not isinstance(inner, SUPPORTED):
        supported = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise TypeError(
            f"The state of {type(inner).__name__} can't be read as a preconditioner; supported are {supported}. "
            "Use one of them to have this quantity measured."
        )
    if isinstance(inner, Adafactor) and any(group["relative_step"] for group in inner.param_groups):
        raise TypeError("Adafactor with `relative_step` has no learning rate. Pass `relative_step=False` and an `lr`.")
    return inner


def _groups_of(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[Group | None]:
    """Return the parameter group of each parameter; `None` for one that the optimizer does not hold."""
    owners = {id(member): group for group in optimizer.param_groups for member in group["params"]}
    groups = [owners.get(id(parameter)) for parameter in parameters]
    if all(group is None for group in groups):
        raise ValueError("The optimizer holds none of the parameters.")
    return groups


def _learning_rates(groups: Sequence[Group | None]) -> tuple[float, list[float]]:
    """Return the largest learning rate now, and each parameter's relative to it (by `initial_lr` where all are 0).

    Where those are 0 too, nothing is trained, and all parameters count alike. A parameter without a group has 0.
    """
    present = [0.0 if group is None else float(group["lr"]) for group in groups]
    initial = [0.0 if group is None else float(group.get("initial_lr", 0.0)) for group in groups]
    rates = next((rates for rates in (present, initial) if max(rates) > 0), [1.0] * len(groups))
    return max(present), [rate / max(rates) for rate in rates]


def _momentum(optimizer: Optimizer, group: Group) -> dict[str, Any]:
    """Return how the group averages gradients, as arguments of `stability_limit`."""
    if isinstance(optimizer, SGD):
        if group["momentum"] == 0:  # then there is no buffer to dampen
            return {}
        return {name: group[name] for name in ("momentum", "dampening", "nesterov")}
    beta = (group["beta1"] or 0.0) if isinstance(optimizer, Adafactor) else float(group["betas"][0])
    return {"momentum": beta, "dampening": beta}


def _denominator(optimizer: Optimizer, parameter: Tensor, group: Group, state: dict[str, Any]) -> Tensor:
    """Return the denominator under the averaged gradient of one parameter."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if isinstance(optimizer, SGD):
        return torch.ones_like(parameter, dtype=dtype)
    if isinstance(optimizer, Adafactor):
        scale = max(group["eps"][1], float(state["RMS"])) if group["scale_parameter"] else 1.0
        if "exp_avg_sq" in state:
            return state["exp_avg_sq"].to(dtype).sqrt() / scale
        row, column = state["exp_avg_sq_row"].to(dtype), state["exp_avg_sq_col"].to(dtype)
        share = row / row.mean(dim=-1, keepdim=True)
        # Roots before the product: both factors may be as small as 1e-30, where no gradient came.
        return share.sqrt()[..., None] * column.sqrt()[..., None, :] / scale
    second_moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].to(dtype)
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    return (second_moment / correction).sqrt() + group["eps"]


@torch.no_grad()
def _lone_step(
    optimizer: Optimizer, parameter: Tensor, state: dict[str, Any], gradient: Tensor, group: Group
) -> tuple[Tensor, dict[str, Any]]:
    """Step the optimizer on float64 copies of one parameter and its state; return both as they are after it.

    The supported optimizers treat each parameter by itself, so one at a time is the same and needs little memory.
    """
    copy = parameter.to(torch.float64, copy=True)
    copy.grad = gradient.detach().to(copy)
    alone: Optimizer = object.__new__(type(optimizer))
    alone.__setstate__(
        {
            "defaults": dict(optimizer.defaults),
            "param_groups": [{**group, "params": [copy], "foreach": False, "fused": False}],
            "state": defaultdict(dict, {copy: _read_state(state, lambda tensor: tensor.to(torch.float64, copy=True))}),
        }
    )
    with _nothing_kept(optimizer, group):
        alone.step()
    return copy, alone.state[copy]


@contextmanager
def _nothing_kept(optimizer: Optimizer, group: Group) -> Iterator[None]:
    """Put back what a user's own `step` changes besides its copy: attributes of its class, lists in its group."""
    others = {name: value for name, value in group.items() if name != "params"}
    before = Snapshot({"optimizer": object.__new__(type(optimizer)), "group": others})
    try:
        yield
    finally:
        before.restore()


def _read_state(state: dict[str, Any], read_tensor: TensorReader) -> dict[str, Any]:
    """Return a parameter's state with other tensors in place of its own."""
    return {name: read_tensor(value) if isinstance(value, Tensor) else value for name, value in state.items()}


def _joined(pieces: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Concatenate one piece for each parameter into one long vector."""
    double = any(parameter.dtype == torch.float64 for parameter in parameters)
    dtype = torch.float64 if double else torch.float32
    return torch.cat([piece.reshape(-1).to(device=parameters[0].device, dtype=dtype) for piece in pieces])
