# SPDX-License-Identifier: Apache-2.0
"""One measurement, from an objective to its gradient and curvature."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers.optimization import Adafactor
from transformers.utils import logging

from ..config import OptimizabilityConfig
from ..curvature.block_diagonal import BlockDiagonalHessian
from ..curvature.compact_embeddings import drop_unused_embedding_rows
from ..curvature.eigenvalue_check import EigenvalueCheck
from ..curvature.gauss_newton import split_trace
from ..curvature.gradient import Gradient, gradient, norm_of
from ..curvature.hessian import ObjectiveOperator
from ..curvature.layer_decoupled import DecoupledHessian
from ..distributed.fsdp import ShardedObjective, is_sharded, materialize_parameters, reshard
from ..distributed.process_group import training_process_group
from ..distributed.supported import require_supported
from ..errors import MeasurementError
from ..linalg.estimate import Estimate, Spectrum
from ..linalg.lanczos import lanczos, lanczos_by_segment
from ..linalg.operator import SharedColumns, SymmetricOperator
from ..linalg.preconditioned import PreconditionedOperator
from ..linalg.spectrum_and_trace import SpectrumAndTrace, estimate_spectrum_and_trace
from ..linalg.trace import PROBE_BLOCK_SIZE
from ..linalg.vectors import dot, norm
from ..model_state.measuring import full_precision, measuring
from ..objective.objective import Batch, LossFunction, Objective
from ..objective.parameter_blocks import match_blocks, name_blocks
from ..objective.self_check import SelfCheck
from ..objective.task_labels import assign_tasks, require_several
from ..quantities.loss_landscape import Landscape, LossLine, LossPlane, loss_line, loss_plane
from ..quantities.noise_scale import MIN_PARTS, noise_scale
from ..quantities.preconditioner import Preconditioner, optimizer_update, read_preconditioner
from ..quantities.preconditioner import unwrapped as unwrapped_optimizer
from ..quantities.step_size import QuadraticModel, critical_learning_rate, loss_along, quadratic_model
from .cost_model import measurement_bytes
from .eigenvector_check import check_along_eigenvectors, engine_error, require_symmetric
from .engines import HvpEngine, OnProducts, run_with_engine_fallback
from .mean_check import check_mean, weights_left_alone
from .multitask import TaskCurvature, eigenvalues_by_task, means_by_task, several_tasks, traces_by_task
from .out_of_memory import in_memory, out_of_memory
from .results import BlockMeasurement, Measurement, OptimizerStability
from .slope_check import slope_errors


logger = logging.get_logger(__name__)

_GRAPH, _PRODUCT = 1.5, 2.0
"""Gradients that the graph of a part takes, and each product made from it."""

_START = 1e-3
"""Where the search for the critical learning rate starts if the learning rate is 0, as at the start of a warm-up."""


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    config: OptimizabilityConfig | None = None,
    *,
    loss_fn: LossFunction | None = None,
    optimizer: Optimizer | None = None,
    progress: bool = False,
) -> Measurement:
    """Measures gradient and curvature of a model's loss over given batches, without a Trainer.

    Args:
        model: Any module; its parameters with `requires_grad` are what is differentiated by. Measured in eval mode,
            and left as it was.
        batches: What the model takes (dict or `BatchEncoding` with labels), batch by batch. Under FSDP2 all processes
            call this together, with the same batches, and share the work. With `config.task_column` each also has that
            key, with the task of each example or one for all; batches that mix tasks are cut. A model whose `forward`
            does not name the key gets its batches without it; a `loss_fn` gets them as they are.
        config: Precision and budget; when to measure does not matter here.
        loss_fn: `loss_fn(model, batch)` returns the batch's mean loss, or the pair (sum of losses, number of items).
            By default the model's own loss.
        optimizer: SGD, Adam, AdamW or Adafactor over the model's parameters: how far it may step is measured too.
        progress: Whether to show a progress bar.

    Returns:
        The measurement.

    Raises:
        TypeError: If the state of the optimizer can't be read.
        ValueError: If an argument can't work: no trainable parameter, no batch, no loss, an unknown block.
        MeasurementError: If the measurement can't be made: a loss that is not finite, no second derivative, no memory.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.eye(2), torch.ones(2, 1))
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> round(measure(model, [batch], loss_fn=loss_fn).hessian.lambda_max.value, 4)  # H = (2/N) XᵀX = I
        1.0
    """
    config = config or OptimizabilityConfig()
    objective, optimizer = checked(model, batches, config, loss_fn=loss_fn, optimizer=optimizer)
    with measuring_bar(config, disable=not progress) as bar:
        return measure_objective(objective, config, optimizer=optimizer, on_products=bar.update)[0]


def checked(
    model: nn.Module,
    batches: Iterable[Batch],
    config: OptimizabilityConfig,
    *,
    loss_fn: LossFunction | None,
    optimizer: Optimizer | None,
) -> tuple[Objective, Optimizer | None]:
    """The objective, and the optimizer bare, once every argument of `measure` is known to work.

    Raises:
        TypeError: If the state of the optimizer can't be read.
        ValueError: If another argument can't work.
    """
    if optimizer is not None:
        optimizer = unwrapped_optimizer(optimizer)
    require_supported(model)
    tasks = None
    if config.task_column is not None:
        batches, tasks = assign_tasks(model, batches, config.task_column, drop=loss_fn is None)
        require_several(tasks, config.task_column)
    objective = Objective(model, batches, loss_fn=loss_fn, tasks=tasks, seed=config.probe_seed)
    if is_sharded(model):
        objective = objective.shared(training_process_group(objective.parameters[0].device))
    block_indices(objective.names, config)
    try:
        objective.check()
    except Exception as error:  # whatever the model's code raises
        if not out_of_memory(error):  # the measurement tries smaller batches then
            raise
    return objective, optimizer


def measuring_bar(config: OptimizabilityConfig, *, disable: bool) -> tqdm:
    """A progress bar over the products of one measurement; it vanishes after and leaves a bar above it alone."""
    total = config.budget.max_hvps
    return tqdm(total=total, desc="Measuring curvature", unit="hvp", leave=False, dynamic_ncols=True, disable=disable)


def block_indices(names: list[str], config: OptimizabilityConfig, *, strict: bool = True) -> dict[str, list[int]]:
    """Return the blocks to report on: the configured patterns, or embeddings, layers and head.

    Args:
        names: Names of the trainable parameters.
        config: Its `blocks`.
        strict: Whether each pattern has to fit a parameter: one that did may not, once layers are frozen in mid-run.
    """
    return name_blocks(names) if config.blocks is None else match_blocks(names, config.blocks, strict=strict)


def measure_objective(
    objective: Objective,
    config: OptimizabilityConfig,
    *,
    optimizer: Optimizer | None = None,
    step: int = 0,
    epoch: float | None = None,
    on_products: OnProducts = lambda products: None,
) -> tuple[Measurement, Objective]:
    """Measures an objective at the present parameters.

    Where memory does not suffice the batches are cut into halves. That changes what is measured by rounding alone; the
    noise scale and the errors over the data are then from more, smaller parts.

    Args:
        objective: What to measure.
        config: Precision and budget.
        optimizer: The optimizer in use, if how far it may step shall be measured.
        step: Recorded in the measurement.
        epoch: Recorded in the measurement.
        on_products: Called with the number of Hessian-vector products just made.

    Returns:
        The measurement, and the objective in batches that fit into memory.

    Raises:
        MeasurementError: If it can't be made; the message says why and what to do.
    """
    started = time.perf_counter()
    spent: list[int] = []

    def count(products: int) -> None:
        spent.append(products)
        on_products(products)

    if objective.self_check is None:
        objective = _with_known_mean(objective, config)
    found, objective = in_memory(objective, lambda objective: _found(objective, config, optimizer, count))
    seconds = time.perf_counter() - started
    measurement = Measurement(step=step, epoch=epoch, hvps=sum(spent), seconds=seconds, **found)
    assert measurement.self_check is not None
    return measurement, objective.checked(measurement.self_check)


def _with_known_mean(objective: Objective, config: OptimizabilityConfig) -> Objective:
    """Return the objective in batches of which a forward pass fits into memory, weighted by what its mean is over.

    Raises:
        MeasurementError: If the loss is not the same in each pass, or batches don't fit and can't be cut.
    """

    def check(objective: Objective) -> SelfCheck:
        reshard(objective.model)
        with (
            measuring(objective.model, seed=config.probe_seed, state=objective.state),
            materialize_parameters(objective, config, required_bytes=measurement_bytes(objective, config)) as (
                objective,
                _,
            ),
            full_precision(objective.model),
        ):
            return check_mean(objective)

    size = objective.batch_size
    found, objective = in_memory(objective, check)
    # Whole batches were not seen. If halves of the smaller ones have the same mean, these are halves of that kind too.
    if objective.batch_size < size and (found.mean_error is None or found.unit == "pairs"):
        raise MeasurementError(
            f"The device ran out of memory in a forward pass of a batch of {size} examples, and smaller batches are "
            "not known to have the same mean loss.",
            "Collate fewer examples at a time (`probe_batch_size`), or free memory on the device.",
        )
    return objective.checked(found)


def _found(
    objective: Objective,
    config: OptimizabilityConfig,
    optimizer: Optimizer | None,
    count: OnProducts,
) -> dict[str, Any]:
    """The fields of the measurement."""
    reshard(objective.model)
    in_optimizer = objective.parameters  # others may be put in their place
    with (
        measuring(objective.model, seed=config.probe_seed, state=objective.state),
        materialize_parameters(objective, config, required_bytes=measurement_bytes(objective, config)) as (
            objective,
            held,
        ),
        full_precision(objective.model),
    ):
        if isinstance(objective, ShardedObjective) and isinstance(optimizer, Adafactor):
            optimizer = None  # what it makes of a part of a gradient is no part of what it makes of the whole
        point = compute_gradient(objective)
        check = objective.self_check
        assert check is not None
        if check.slope_errors is None:
            check = replace(check, slope_errors=slope_errors(objective, point))
        preconditioner, next_update = None, None
        if optimizer is not None:
            try:
                preconditioner = read_preconditioner(optimizer, in_optimizer, gradients=point.tensors, held=held)
                next_update = partial(optimizer_update, optimizer, in_optimizer, point.tensors, held=held)
            except ValueError as error:
                logger.warning_once(f"How far the optimizer may step is not measured. {error}")

        def curvature_by(way: HvpEngine) -> _Curvature:
            return _curvature(way, objective, config, point, preconditioner, next_update, count)

        curvature, way = run_with_engine_fallback(objective, config, curvature_by, count)
        step_size = line = None
        if next_update is not None and preconditioner is not None and curvature.sharpness is not None:
            update = next_update()
            step_size = _step_size(objective, preconditioner, update, curvature.sharpness)
            if curvature.along_update is not None:
                line = _line(objective, point, update, curvature.along_update, step_size)
        landscape = Landscape(line, _plane(objective, curvature.spectrum)) if config.landscape else None
        indices = block_indices(objective.names, config, strict=False)
        blocks = _blocks(objective, indices, point, curvature)
        noise = None
        if objective.parts >= MIN_PARTS:
            noise = noise_scale(
                objective, mean_gradient=point.tensors, group=objective.group, parameter_group=objective.rows.group
            )
        return {
            "loss": point.loss,
            "num_items": point.items,
            "grad_norm": math.hypot(*(block.grad_norm for block in blocks.values())),
            "hessian": curvature.spectrum.estimates,
            "blocks": blocks,
            "curvature": config.curvature,
            "quadratic_model": curvature.along_gradient,
            "noise_scale": None if noise is None else noise.noise_scale,
            "optimizer_stability": step_size,
            "landscape": landscape,
            "multitask": None if config.task_column is None else several_tasks(objective, indices, curvature.tasks),
            "engine": way.engine,
            "attention": way.attention,
            "fallback": way.fallback,
            "central_difference_error": engine_error(way, curvature.checks),
            "eigenvalue_checks": curvature.checks,
            "dtype": str(point.tensors[0].dtype).removeprefix("torch."),
            "batch_size": objective.batch_size,
            "unused_embedding_parameters": curvature.left_out,
            "self_check": check,
        }


def compute_gradient(objective: Objective) -> Gradient:
    """The gradient, once it is known to be finite and the model to leave its weights alone.

    Raises:
        MeasurementError: If it is not, or the model does not.
    """
    with weights_left_alone(objective):
        point = gradient(objective, group=objective.group)
    if not math.isfinite(point.loss):
        raise MeasurementError(
            f"The loss on the probe set is {point.loss}.",
            "Look for a learning rate that is too high, or for inputs and labels that are not finite.",
        )
    finite = all(torch.isfinite(tensor).all() for tensor in point.tensors)
    if not all(objective.rows.group.all_gather_interleaved([finite])):
        raise MeasurementError(
            "The gradient on the probe set is not finite.", "Look for operations whose derivative is infinite."
        )
    return point


@dataclass(frozen=True)
class _Curvature:
    """What one way to multiply found."""

    spectrum: SpectrumAndTrace
    left_out: int
    by_block: tuple[Spectrum, ...] | None
    along_gradient: QuadraticModel
    along_update: float | None
    sharpness: Estimate | None
    tasks: TaskCurvature
    checks: tuple[EigenvalueCheck, ...]


def _curvature(
    way: HvpEngine,
    objective: Objective,
    config: OptimizabilityConfig,
    point: Gradient,
    preconditioner: Preconditioner | None,
    next_update: Callable[[], Tensor] | None,
    count: OnProducts,
) -> _Curvature:
    preconditions = preconditioner is not None and not all(
        objective.rows.group.all_gather_interleaved([preconditioner.is_identity])
    )
    twice = way.exact and config.curvature == "hessian"  # the Hessian itself, by differentiating twice
    by_task = config.task_column is not None and way.engine != "central_difference"
    shares = config.budget.shares(
        sharpness=preconditions,
        blocks=twice and config.budget.block_eigenvalues,
        tasks=by_task and config.budget.task_eigenvalues,
        differences=config.curvature == "hessian",
    )
    options: dict[str, Any] = {"tolerance": config.budget.eigen_tolerance, "seed": config.probe_seed}
    shared: dict[str, Any] = {"group": objective.group, "on_products": count}
    matrix = partial(way.operator, objective, curvature=config.curvature, on_products=count)
    update = next_update() if config.landscape and next_update is not None else None
    # First, since it finds what is no Hessian.
    along_gradient, along_update, along_parts = _directional_curvature(
        matrix(), objective, point, update, config, way, count
    )
    del update
    with drop_unused_embedding_rows(objective, group=objective.group) as left_out:
        blocks = list(block_indices(objective.names, config, strict=False).values())
        segments = _segments(objective, blocks)
        found = estimate_spectrum_and_trace(
            matrix,
            segments,
            trace_matrix=_trace_matrix(objective, way, config, count),
            split_trace=partial(split_trace, objective, segments, **shared) if twice and way.cheap else None,
            eigen_tolerance=config.budget.eigen_tolerance,
            trace_tolerance=config.budget.trace_tolerance,
            max_hvps=shares.spectrum,
            seed=config.probe_seed,
            eigen_method=config.eigen_method,
            trace_method=config.trace_method,
            num_eigenvalues=config.num_eigenvalues,
            left_out=left_out,
            deflate=not by_task,
        )
        checks = check_along_eigenvectors(found, objective, point, way, config, count)
        lambda_max = {}
        if shares.tasks:
            lambda_max = eigenvalues_by_task(objective, way, config, max_hvps=shares.tasks, on_products=count)
        by_block = None
        if shares.blocks:
            block_diagonal = BlockDiagonalHessian(objective, blocks, **shared)
            by_block = lanczos_by_segment(block_diagonal, segments, max_hvps=shares.blocks, **options)
    sharpness = None
    if preconditioner is not None:
        sharpness = found.estimates.lambda_max
        if preconditions:
            preconditioned = PreconditionedOperator(matrix(), preconditioner.diagonal)
            sharpness = lanczos(preconditioned, max_hvps=shares.sharpness, **options).lambda_max
    found = replace(found, eigenvectors=found.eigenvectors if config.landscape else None, extremal=())
    tasks = TaskCurvature({}, {}, {})
    if by_task:
        traces = traces_by_task(objective, found, tolerance=config.budget.trace_tolerance)
        tasks = TaskCurvature(means_by_task(objective, *along_parts), lambda_max, traces)
    return _Curvature(found, left_out, by_block, along_gradient, along_update, sharpness, tasks, checks)


def _trace_matrix(
    objective: Objective, way: HvpEngine, config: OptimizabilityConfig, count: OnProducts
) -> Callable[[], SymmetricOperator]:
    """Builds the matrix that the trace is estimated from.

    Its vectors come in lockstep. Their products are shared over ranks by parts of the objective or by vectors,
    whichever leaves less to the busiest rank.
    """

    def whole(objective: Objective, **options: Any) -> ObjectiveOperator:
        if way.exact and way.cheap and config.curvature == "hessian":
            return DecoupledHessian(objective, group=objective.group, **options)
        return way.operator(objective, curvature=config.curvature, **options)

    group, parts = objective.group, objective.parts
    by_part = math.ceil(parts / group.world_size) * (_GRAPH + PROBE_BLOCK_SIZE * _PRODUCT)
    by_vector = parts * (_GRAPH + math.ceil(PROBE_BLOCK_SIZE / group.world_size) * _PRODUCT)
    if by_vector < by_part:
        return lambda: SharedColumns(whole(objective.whole()), group, on_products=count)
    return lambda: whole(objective, on_products=count)


def _segments(objective: Objective, blocks: Iterable[list[int]]) -> list[list[slice]]:
    """Where each block's parameters lie in the long vector of all of them."""
    ends = list(accumulate((parameter.numel() for parameter in objective.parameters), initial=0))
    places = [slice(start, end) for start, end in pairwise(ends)]
    return [[places[index] for index in block] for block in blocks]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _directional_curvature(
    operator: ObjectiveOperator,
    objective: Objective,
    point: Gradient,
    update: Tensor | None,
    config: OptimizabilityConfig,
    way: HvpEngine,
    count: OnProducts,
) -> tuple[QuadraticModel, float | None, tuple[np.ndarray, list[int]]]:
    """The quadratic model along −g, the curvature uᵀHu along an update, and gᵀHg and the items of each part.

    A further product in lockstep tells whether the matrix is symmetric at all. The gradient is multiplied as a vector
    of norm 1: where the loss is scaled down, products of small numbers would vanish.
    """
    group = operator.rows.group
    flat = _flat(point.tensors).to(operator.device, operator.dtype)
    length = norm(flat, group) or 1.0
    direction = flat / length
    generator = torch.Generator().manual_seed(config.probe_seed)
    probe = operator.rows.rademacher(generator=generator, dtype=operator.dtype, device=operator.device)
    columns = [direction, probe] if update is None else [direction, probe, update.to(operator.device, operator.dtype)]
    products, forms, items = operator.matmat_per_batch(torch.stack(columns, dim=1), [[slice(0, len(flat))]])
    along, other, *along_update = products.T
    require_symmetric((direction, along), (probe, other), objective, point, way, count)
    bend = dot(columns[2], along_update[0], group) if along_update else None
    return quadratic_model(flat, along * length, group), bend, (forms[:, 0, 0] * length**2, items)


def _step_size(
    objective: Objective, preconditioner: Preconditioner, update: Tensor, sharpness: Estimate
) -> OptimizerStability:
    with loss_along(objective, update, group=objective.group) as loss:
        critical = critical_learning_rate(loss, start=preconditioner.learning_rate or _START)
    return OptimizerStability(
        optimizer=preconditioner.name,
        learning_rate=preconditioner.learning_rate,
        sharpness=sharpness,
        limit=preconditioner.limit,
        critical=critical,
    )


def _line(
    objective: Objective, point: Gradient, update: Tensor, curvature: float, step_size: OptimizerStability
) -> LossLine:
    """The loss along the update, about as far as it falls and rises again."""
    critical = step_size.critical
    return loss_line(
        objective,
        update,
        gradient=_flat(point.tensors).to(update),
        curvature=curvature,
        reach=critical.value if critical.converged else step_size.learning_rate or _START,
        step=step_size.learning_rate,
        group=objective.group,
        parameter_group=objective.rows.group,
    )


def _plane(objective: Objective, found: SpectrumAndTrace) -> LossPlane | None:
    """The loss over the plane of the top two eigenvectors."""
    if found.eigenvectors is None:
        return None
    with drop_unused_embedding_rows(objective, group=objective.group):  # as where the eigenvectors were found
        point = gradient(objective, group=objective.group)
        return loss_plane(
            objective,
            found.eigenvectors,
            found.eigenvalues,
            gradient=_flat(point.tensors).to(found.eigenvectors),
            present=point.loss,
            group=objective.group,
            parameter_group=objective.rows.group,
        )


def _blocks(
    objective: Objective, blocks: Mapping[str, list[int]], point: Gradient, curvature: _Curvature
) -> dict[str, BlockMeasurement]:
    parameters = [parameter.detach() for parameter in objective.parameters]
    group, sizes = objective.rows.group, objective.sizes
    traces = curvature.spectrum.segments
    ends = curvature.by_block or [None] * len(blocks)
    return {
        name: BlockMeasurement(
            parameters=sum(sizes[index] for index in indices),
            grad_norm=float(norm_of([point.tensors[index] for index in indices], group)),
            weight_norm=float(norm_of([parameters[index] for index in indices], group)),
            trace=trace,
            lambda_max=None if spectrum is None else spectrum.lambda_max,
            lambda_min=None if spectrum is None else spectrum.lambda_min,
        )
        for (name, indices), trace, spectrum in zip(blocks.items(), traces, ends, strict=True)
    }
