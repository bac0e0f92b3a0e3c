# SPDX-License-Identifier: Apache-2.0
"""Forecast of what a measurement costs, from a few products on one batch."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from ..config import OptimizabilityConfig
from ..curvature.block_diagonal import BlockDiagonalHessian
from ..curvature.compact_embeddings import drop_unused_embedding_rows
from ..curvature.gauss_newton import MAX_SPLIT_OUTPUTS, gauss_newton_trace
from ..curvature.hessian import ObjectiveOperator
from ..linalg.probe_vectors import PROBE_BLOCK_SIZE
from ..objective.batches import Batch, batch_size
from ..objective.objective import LossFunction, Objective
from ..objective.parameter_blocks import block_indices
from ..objective.pool import Pool
from ..quantities.loss_landscape import LINE_POINTS, PLANE_POINTS
from ..quantities.preconditioner import read_preconditioner
from .cost_model import CostModel, HvpBudget, HvpCost, allocate_hvps, count_hvps, list_stages
from .engines import HvpEngine, choose_engine
from .measure import batches_and_pool, build_objective, compute_gradient
from .out_of_memory import retry_with_smaller_batches
from .pool_pass import SIZE_PROBES
from .session import measurement_session


_GRADIENTS = 11
"""Gradients besides the products: the gradient, that of each batch for the noise scale, two forward passes; and
14 forward passes of the self-check."""

_POOL_GRADIENTS = 1 + (2 * SIZE_PROBES + 2 * 4 + 2) / 2
"""Gradients that an example of the pool takes: one, and forward passes at both sides of the random vectors, two
eigenvectors, the gradient and the optimizer's eigenvector, and in between."""

_STEP_GRADIENTS = 10
"""Gradients that the search for the critical learning rate takes at most: 20 forward passes of half a gradient."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Upper bound on the cost of one measurement; early convergence saves time, and hardly any memory.

    How many products convergence will take can't be known beforehand, so there is no expected time. Not foreseen are
    batches that must be cut into halves because the device runs out of memory on the way, and up to two products more
    where differences along an eigenvector do not agree at first (ReLU).

    Attributes:
        parameters: n, the number of trainable parameters.
        hvps: Most Hessian-vector products.
        seconds: Wall-clock time if all of them are made.
        peak_memory: Bytes that tensors take at most, on top of what the process holds now.
        vectors: Vectors as long as the measured parameters that are in memory at once.
        vector_memory: Bytes that all those vectors and the copies of the weights take.
        graph_memory: Bytes that one batch's graph takes at most, with the products made from it and what the backward
            passes add for a moment.
        seconds_per_hvp: Time of one product with the measured matrix, by itself.
    """

    parameters: int
    hvps: int
    seconds: float
    peak_memory: int
    vectors: int
    vector_memory: int
    graph_memory: int
    seconds_per_hvp: float

    def __str__(self) -> str:
        return (
            f"at most {self.hvps} Hessian-vector products with {_count(self.parameters)} parameters, "
            f"{_duration(self.seconds)} and {_bytes(self.peak_memory)} of memory "
            f"({_duration(self.seconds_per_hvp)} a product; {_bytes(self.graph_memory)} for the graph of a batch, "
            f"{_bytes(self.vector_memory)} for {self.vectors} vectors)"
        )


def forecast(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    config: OptimizabilityConfig | None = None,
    *,
    dataset: DataLoader | None = None,
    loss_fn: LossFunction | None = None,
    optimizer: Optimizer | None = None,
) -> Forecast:
    """Forecast the cost of `measure` with the same arguments, from a gradient and a few products on the largest batch.

    Each kind of product that the configuration asks for is made once to count the bytes of its tensors, and once by
    the clock; the other batches are taken to cost in proportion to their size. Weights, `.grad`, mode and random state
    stay as they are. Memory that libraries take for themselves (code, workspaces, what an allocator keeps) is not
    counted.

    Args:
        model: As for `measure`.
        batches: As for `measure`.
        config: As for `measure`.
        dataset: As for `measure`.
        loss_fn: As for `measure`.
        optimizer: As for `measure`.

    Returns:
        The forecast.

    Raises:
        TypeError: As `measure`.
        ValueError: As `measure`.
        MeasurementError: As `measure`, as far as it shows from one gradient and one batch.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.eye(2), torch.ones(2, 1))
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> cost = forecast(model, [batch], OptimizabilityConfig(profile="light"), loss_fn=loss_fn)
        >>> cost.parameters, cost.hvps
        (2, 32)
    """
    config = config or OptimizabilityConfig()
    batches, pool = batches_and_pool(model, batches, dataset, config)
    objective, optimizer = build_objective(model, batches, config, loss_fn=loss_fn, optimizer=optimizer)
    return forecast_objective(objective, config, pool=pool, optimizer=optimizer)


def forecast_objective(
    objective: Objective, config: OptimizabilityConfig, *, pool: Pool | None = None, optimizer: Optimizer | None = None
) -> Forecast:
    """Forecast the cost of `measure_objective` with the same arguments; batches that don't fit are halved as there.

    Args:
        objective: What would be measured.
        config: Precision and budget.
        pool: As there.
        optimizer: The optimizer in use, if how far it may step would be measured.

    Raises:
        MeasurementError: If the measurement can't be made.
    """
    return retry_with_smaller_batches(objective, lambda objective: _forecast(objective, config, pool, optimizer))[0]


def _forecast(
    objective: Objective, config: OptimizabilityConfig, pool: Pool | None, optimizer: Optimizer | None
) -> Forecast:
    trained, before = objective.parameters, set(map(id, _tensors(objective.model)))
    with measurement_session(objective, config) as (objective, read_tensor):
        objective = objective.unsharded()
        started = time.perf_counter()
        point = compute_gradient(objective)
        gradient_seconds = time.perf_counter() - started
        preconditions = False
        if optimizer is not None:
            read = read_preconditioner(optimizer, trained, gradients=point.tensors, read_tensor=read_tensor)
            preconditions = not read.is_identity
        engine, costs = choose_engine(objective, config, lambda engine: _time_products(engine, objective, config))
        copied = sum(_size(tensor) for tensor in _tensors(objective.model) if id(tensor) not in before)
    steps = optimizer is not None
    shares = allocate_hvps(config, engine, preconditions=preconditions, population=pool is not None)
    hvps = count_hvps(config, engine, shares, size=costs.size, update=config.landscape and steps)
    examples = sum(batch_size(batch) for batch in objective.batches)
    gradients = float(_GRADIENTS + _STEP_GRADIENTS * steps + 2 * (config.task_column is not None))
    if config.landscape:
        gradients += 2 + (PLANE_POINTS**2 + (LINE_POINTS + 1) * steps) / 2  # 2: one, and a pass that finds rows
    if pool is not None:
        gradients += _POOL_GRADIENTS * len(pool) / examples
        copied += costs.all_bytes  # its gradient
    stage = max(list_stages(config, hvps, costs), key=lambda stage: stage.vector_memory + stage.graph_memory)
    # Copies of the weights (to restore them, and in float32), the gradient, and the optimizer's preconditioner.
    copies = sum(map(_size, trained)) + copied + (1 + steps) * costs.all_bytes
    return Forecast(
        parameters=sum(parameter.numel() for parameter in trained),
        hvps=hvps.number,
        seconds=gradients * gradient_seconds + _seconds(hvps, costs),
        peak_memory=copies + stage.vector_memory + stage.graph_memory,
        vectors=stage.vectors,
        vector_memory=copies + stage.vector_memory,
        graph_memory=stage.graph_memory,
        seconds_per_hvp=costs.one.seconds,
    )


def _time_products(engine: HvpEngine, objective: Objective, config: OptimizabilityConfig) -> CostModel:
    """Return what each kind of product takes, from products on the largest batch."""
    with drop_unused_embedding_rows(objective) as used:
        part, share = objective.largest()
        calls = 2 if objective.parts > 1 else 3  # the graph of an only batch is kept, from the second product on
        one = _price(engine.operator(part), 1, calls, share)
        lockstep = _price(engine.trace_operator(part), PROBE_BLOCK_SIZE, calls, share)
        block = None
        if engine.differentiates_hessian and config.budget.block_eigenvalues:
            blocks = list(block_indices(objective.names, config).values())
            block = _price(BlockDiagonalHessian(part, blocks), 1, calls, share)
        splits = engine.differentiates_hessian and engine.cheap and config.trace_method == "hutchinson"
        known_part = _gauss_newton_seconds(objective) if splits else 0.0
        operator = engine.operator(part)
    itemsize = operator.dtype.itemsize
    return CostModel(
        size=operator.size,
        vector_bytes=operator.size * itemsize,
        all_bytes=(operator.size + used.left_out) * itemsize,
        one=one,
        lockstep=lockstep,
        block=block,
        known_part=known_part,
    )


def _gauss_newton_seconds(objective: Objective) -> float:
    """Return the seconds of the Gauss-Newton part's trace, from those of one example; 0 where it is not computed."""
    everything = [[slice(0, sum(parameter.numel() for parameter in objective.parameters))]]
    seconds = 0.0
    with suppress(ValueError):
        example = objective.first_example()
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            gauss_newton_trace(example, everything, max_outputs=MAX_SPLIT_OUTPUTS)
            seconds = time.perf_counter() - started
    return seconds * sum(batch_size(batch) for batch in objective.batches)


def _price(operator: ObjectiveOperator, columns: int, calls: int, share: float) -> HvpCost:
    """Time the last of several calls with `columns` products each, and measure the memory of those before."""
    vectors = torch.ones(operator.size, columns, dtype=operator.dtype, device=operator.device)
    with PeakMemory() as memory:
        for _ in range(calls - 1):
            operator.matmat(vectors)
    started = time.perf_counter()
    operator.matmat(vectors)  # looks at its sum, so that it has ended
    return HvpCost(share * (time.perf_counter() - started) / columns, memory.bytes)


def _seconds(products: HvpBudget, prices: CostModel) -> float:
    blocks = 0.0 if prices.block is None else products.blocks * prices.block.seconds
    alone = products.ends + products.tasks + products.sharpness + products.checks
    return alone * prices.one.seconds + products.trace * prices.lockstep.seconds + blocks + prices.known_part


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside: those that are alive, on any device, at most.

    Attributes:
        bytes: The most that were alive at once.

    Example:
        >>> with PeakMemory() as memory:
        ...     total = (torch.ones(100) + 1).sum()  # 400 bytes and 400 bytes, then 400 and 4
        >>> memory.bytes
        800
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {id(storage) for storage in _storages((args, kwargs))}  # for views, and what is written in place
        for storage in _storages(result):
            if id(storage) not in known:
                known.add(id(storage))
                self._alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.bytes = max(self.bytes, self._alive)
        return result

    def _freed(self, number: int) -> None:
        self._alive -= number


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return (tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided)  # sparse ones have none


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _count(number: int) -> str:
    return _scaled(number, 1000, ["", "k", "M", "G"])


def _bytes(number: int) -> str:
    return _scaled(number, 1024, [" B", " KiB", " MiB", " GiB", " TiB"])


def _scaled(number: float, step: int, units: list[str]) -> str:
    for unit in units[:-1]:
        if number < step:
            return f"{number:.3g}{unit}"
        number /= step
    return f"{number:.3g}{units[-1]}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
