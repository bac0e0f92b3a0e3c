# SPDX-License-Identifier: Apache-2.0
"""One measurement, from an objective to its gradient and curvature."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..config import OptimizabilityConfig
from ..curvature.empirical_risk import HvpCounter
from ..curvature.gradient import Gradient, gradient, norm_of
from ..distributed.process_group import training_process_group
from ..distributed.supported import require_supported
from ..distributed.tensors import is_sharded
from ..errors import MeasurementError, UnmeasurableError
from ..linalg.estimate import Estimate
from ..objective.objective import Batch, LossFunction, Objective
from ..objective.parameter_blocks import block_indices
from ..objective.pool import Pool
from ..objective.self_check import SelfCheck
from ..objective.step_batches import StepBatches
from ..objective.task_labels import assign_tasks, require_several
from ..quantities.batch_sharpness import MIN_BATCHES, BatchSharpness
from ..quantities.loss_landscape import Landscape
from ..quantities.noise_scale import MIN_PARTS, noise_scale
from ..quantities.preconditioner import unwrapped as unwrapped_optimizer
from ..quantities.step_size import QuadraticModel
from ..reasons import Reason
from .batch_sharpness_pass import measure_batch_sharpness, not_measured
from .curvature_pass import CurvatureEstimates, DirectionalCurvature, estimate_curvature, measure_directions
from .eigenvector_check import engine_error
from .engines import HvpEngine, choose_engine
from .mean_check import check_mean, weights_left_alone
from .multitask import measure_tasks
from .optimizer_step import OptimizerStep, eigenvector_plane, measure_stability, update_line
from .out_of_memory import out_of_memory, retry_with_smaller_batches
from .pool_pass import draw_from_pool
from .population_estimates import about_population, gradient_of_pool, noise_scale_of
from .results import BlockMeasurement, Measurement, PopulationMeasurement
from .session import measurement_session
from .slope_check import slope_errors


POOL_FAILURES = ("losses_not_apart", "products_not_apart", "rows_unreadable", "rows_refused")
"""Reasons why examples can't be drawn from a pool; random ones may do."""


def measure(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    config: OptimizabilityConfig | None = None,
    *,
    dataset: DataLoader | None = None,
    loss_fn: LossFunction | None = None,
    optimizer: Optimizer | None = None,
    progress: bool = False,
) -> Measurement:
    """Measure gradient and curvature of a model's loss, over given batches or over a data set, without a Trainer.

    Args:
        model: Any module; its parameters with `requires_grad` are what is differentiated by. Measured in eval mode,
            and left as it was.
        batches: What the model takes (dict or `BatchEncoding` with labels), batch by batch. Under FSDP2 all processes
            call this together, with the same batches, and share the work. With `config.task_column` each also has that
            key, with the task of each example or one for all; batches that mix tasks are cut. A model whose `forward`
            does not name the key gets its batches without it; a `loss_fn` gets them as they are.
        dataset: In place of `batches`, a loader over the whole training set. Examples are drawn from it by their
            curvature, out of `config.pool_size` that are looked at, and the intervals of loss, gradient, traces,
            eigenvalues and sharpness are about the loss over all of it. Its sampler draws the batches of batch
            sharpness.
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
    batches, pool = batches_and_pool(model, batches, dataset, config)
    steps: StepBatches | Reason | None = None
    if config.batch_sharpness:
        steps = not_measured(UnmeasurableError("batches_given")) if dataset is None else step_batches(dataset, config)
    objective, optimizer = build_objective(model, batches, config, loss_fn=loss_fn, optimizer=optimizer)
    with progress_bar(config, disable=not progress) as bar:
        return measure_objective(
            objective, config, pool=pool, steps=steps, optimizer=optimizer, on_products=bar.update
        )[0]


def batches_and_pool(
    model: nn.Module, batches: Iterable[Batch] | None, dataset: DataLoader | None, config: OptimizabilityConfig
) -> tuple[Iterable[Batch], Pool | None]:
    """Return the batches to measure on, or random ones of a data set with its pool.

    Raises:
        ValueError: If there are both or neither, or the data set can't be sampled: rows that can't be drawn by index,
            tasks, or sharded parameters.
    """
    if batches is not None and dataset is None:
        return batches, None
    if batches is not None or dataset is None:
        raise ValueError(
            "Pass either `batches`, to measure on them, or `dataset`, to measure the loss over all of it."
        )
    if config.task_column is not None or is_sharded(model):
        raise ValueError(
            "`dataset` is for one loss on whole parameters; with `task_column`, or under FSDP2, pass `batches`."
        )
    if not config.pool_size:
        raise ValueError(
            "`dataset` needs a pool of examples, and products by batch, weighted by example; with pool_examples=0, "
            "engine='central_difference' or curvature='empirical_fisher', pass `batches`."
        )
    pool = Pool(dataset, examples=config.pool_size, seed=config.probe_seed)
    return pool.random_batches(config.budget.probe_examples, batch_size=config.probe_batch_size), pool


def step_batches(loader: DataLoader, config: OptimizabilityConfig, *, parts: int = 1) -> StepBatches | Reason:
    """Return batches of one optimizer step each, of so many batches of the loader; or warn, and return why not."""
    try:
        steps = StepBatches(loader, parts=parts, seed=config.probe_seed)
    except UnmeasurableError as error:
        return not_measured(error)
    if len(steps) >= MIN_BATCHES:
        return steps
    return not_measured(
        UnmeasurableError("too_few_batches", least=MIN_BATCHES, examples=steps.examples, number=len(steps))
    )


def build_objective(
    model: nn.Module,
    batches: Iterable[Batch],
    config: OptimizabilityConfig,
    *,
    loss_fn: LossFunction | None,
    optimizer: Optimizer | None,
) -> tuple[Objective, Optimizer | None]:
    """Return the objective and the unwrapped optimizer, once every argument of `measure` is known to work.

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
        objective = objective.shard(training_process_group(objective.parameters[0].device))
    block_indices(objective.names, config)
    try:
        objective.check()
    except Exception as error:  # whatever the model's code raises
        if not out_of_memory(error):  # the measurement tries smaller batches then
            raise
    return objective, optimizer


def progress_bar(config: OptimizabilityConfig, *, disable: bool) -> tqdm:
    """Return a progress bar over the products of one measurement; it vanishes at the end, and spares bars above it."""
    total = config.budget.max_hvps
    return tqdm(total=total, desc="Measuring curvature", unit="hvp", leave=False, dynamic_ncols=True, disable=disable)


def measure_objective(
    objective: Objective,
    config: OptimizabilityConfig,
    *,
    pool: Pool | None = None,
    steps: StepBatches | Reason | None = None,
    optimizer: Optimizer | None = None,
    step: int = 0,
    epoch: float | None = None,
    on_products: Callable[[int], object] | None = None,
) -> tuple[Measurement, Objective]:
    """Measure an objective at the present parameters, or the loss over a data set of which it has random batches.

    Where memory does not suffice the batches are cut into halves. That changes what is measured by rounding alone; the
    noise scale and the errors over the data are then from more, smaller batches.

    Args:
        objective: What to measure.
        config: Precision and budget.
        pool: Examples of the data set, or all, to draw those to measure on from; by default the objective's own.
        steps: Batches of one optimizer step each, for batch sharpness, or why there are none.
        optimizer: The optimizer in use, to measure how far it may step.
        step: Recorded in the measurement.
        epoch: Recorded in the measurement.
        on_products: Called with the number of Hessian-vector products just made.

    Returns:
        The measurement, and the objective in batches that fit into memory.

    Raises:
        MeasurementError: If it can't be made; the message says why and what to do.
    """
    started = time.perf_counter()
    counter = HvpCounter(on_products)
    objective = objective.counting(counter)
    if objective.self_check is None:
        objective = _with_checked_mean(objective, config)
    if pool is None:
        measurement, objective = retry_with_smaller_batches(
            objective, lambda objective: _measure_once(objective, config, optimizer, steps)
        )
    else:
        drawn, objective = retry_with_smaller_batches(objective, lambda objective: _drawn(objective, pool, config))
        measurement, _ = retry_with_smaller_batches(
            drawn, lambda objective: _measure_once(objective, config, optimizer, steps)
        )
    seconds = time.perf_counter() - started
    measurement = replace(measurement, step=step, epoch=epoch, hvps=counter.total, seconds=seconds)
    assert measurement.self_check is not None
    return measurement, objective.counting(None).checked(measurement.self_check)


def _drawn(objective: Objective, pool: Pool, config: OptimizabilityConfig) -> Objective:
    """Return the loss over a pool, on examples drawn from it."""
    with measurement_session(objective, config) as (inside, _):
        batches, population = draw_from_pool(
            inside,
            pool,
            examples=config.budget.probe_examples,
            batch_size=objective.batch_size,
            seed=config.probe_seed,
        )
    return objective.sampled(batches, population)


def _with_checked_mean(objective: Objective, config: OptimizabilityConfig) -> Objective:
    """Return the objective in batches of which a forward pass fits into memory, weighted by what its mean is over.

    Raises:
        MeasurementError: If the loss is not the same in each pass, or batches don't fit and can't be cut.
    """

    def check_batches(objective: Objective) -> SelfCheck:
        with measurement_session(objective, config) as (objective, _):
            return check_mean(objective)

    size = objective.batch_size
    check, objective = retry_with_smaller_batches(objective, check_batches)
    # Whole batches were not seen. If halves of the smaller ones have the same mean, these are halves of that kind too.
    if objective.batch_size < size and (check.mean_error is None or check.unit == "pairs"):
        raise MeasurementError("out_of_memory_unknown_mean", size=size)
    return objective.checked(check)


def _measure_once(
    objective: Objective,
    config: OptimizabilityConfig,
    optimizer: Optimizer | None,
    steps: StepBatches | Reason | None,
) -> Measurement:
    """Return a measurement whose step and cost are still to be filled in."""
    trained = objective.parameters  # whole or float32 ones may take their place
    with measurement_session(objective, config) as (objective, read_tensor):
        point = compute_gradient(objective)
        check = _check_slopes(objective, point)
        met = point if objective.population is None else gradient_of_pool(objective.population)
        step = OptimizerStep.read(optimizer, trained, objective, met, read_tensor)

        def first_product(engine: HvpEngine) -> DirectionalCurvature:
            update = step.update() if config.landscape and step is not None else None
            return measure_directions(engine, objective, point, update, config)

        engine, directions = choose_engine(objective, config, first_product)
        if objective.population is not None and not engine.separates_batches:
            raise MeasurementError("products_not_apart")
        indices = block_indices(objective.names, config, strict=False)
        with engine.active(objective.model):
            curvature = estimate_curvature(
                engine, objective, config, point=point, directions=directions, step=step, blocks=indices
            )
            batches: BatchSharpness | Reason | None = None
            if isinstance(steps, StepBatches):
                batches = measure_batch_sharpness(objective, engine, steps, step, size=config.probe_batch_size)
            else:
                batches = steps
        stability = line = None
        if step is not None and curvature.sharpness is not None:
            update = step.update()
            stability = measure_stability(objective, step, update, curvature.sharpness)
            if directions.along_update is not None:
                line = update_line(objective, point, update, directions.along_update, stability)
        plane = eigenvector_plane(objective, curvature.spectrum) if config.landscape else None
        whole, quadratic, population = _of_whole_set(objective, point, directions, curvature)
        blocks = _measure_blocks(objective, indices, whole, curvature)
        multitask = measure_tasks(objective, indices, curvature.tasks) if config.task_column is not None else None
        return Measurement(
            step=0,
            epoch=None,
            hvps=0,
            seconds=0.0,
            loss=whole.loss,
            num_items=round(point.items),
            grad_norm=math.hypot(*(block.grad_norm for block in blocks.values())),
            hessian=curvature.spectrum.estimates,
            blocks=blocks,
            curvature=config.curvature,
            quadratic_model=quadratic,
            noise_scale=_noise_scale(objective, whole, population),
            optimizer_stability=stability,
            landscape=Landscape(line, plane) if config.landscape else None,
            multitask=multitask,
            engine=engine.name,
            attention=engine.attention,
            fallback=engine.fallback,
            central_difference_error=engine_error(engine, curvature.checks),
            eigenvalue_checks=curvature.checks,
            dtype=str(point.tensors[0].dtype).removeprefix("torch."),
            batch_size=objective.batch_size,
            unused_embedding_parameters=curvature.unused_parameters,
            self_check=check,
            population=population,
            batch_sharpness=batches if isinstance(batches, BatchSharpness) else None,
            batch_sharpness_failure=batches if isinstance(batches, Reason) else None,
        )


def _of_whole_set(
    objective: Objective, point: Gradient, directions: DirectionalCurvature, curvature: CurvatureEstimates
) -> tuple[Gradient, QuadraticModel, PopulationMeasurement | None]:
    """Return gradient and quadratic model of the data set; those of the batches where they are all there is."""
    along = curvature.along_gradient
    if objective.population is None or along is None:
        return point, directions.quadratic, None
    population = about_population(objective.population, along.slope_std_error)
    squared = population.grad_norm.value**2
    model = QuadraticModel.of(squared, squared * along.curvature)
    return gradient_of_pool(objective.population), model, population


def _noise_scale(objective: Objective, whole: Gradient, population: PopulationMeasurement | None) -> Estimate | None:
    """Return it from random batches: those of the pool, as a sample drawn by size is not what training sees."""
    if objective.population is not None:
        return None if population is None else noise_scale_of(objective.population, population.grad_norm)
    return noise_scale(objective, mean_gradient=whole.tensors).noise_scale if objective.parts >= MIN_PARTS else None


def compute_gradient(objective: Objective) -> Gradient:
    """Compute the gradient.

    Raises:
        MeasurementError: If it is not finite, or the forward pass modifies the weights.
    """
    with weights_left_alone(objective):
        point = gradient(objective)
    if not math.isfinite(point.loss):
        raise MeasurementError("loss_not_finite", loss=str(point.loss))
    finite = all(torch.isfinite(tensor).all() for tensor in point.tensors)
    if not all(objective.rows.group.all_gather_interleaved([finite])):
        raise MeasurementError("gradient_not_finite")
    return point


def _check_slopes(objective: Objective, point: Gradient) -> SelfCheck:
    """Return the self-check, completed by the comparison of the gradient with the slope of the loss."""
    check = objective.self_check
    assert check is not None
    return replace(check, slope_errors=slope_errors(objective, point)) if check.slope_errors is None else check


def _measure_blocks(
    objective: Objective, blocks: Mapping[str, list[int]], point: Gradient, curvature: CurvatureEstimates
) -> dict[str, BlockMeasurement]:
    parameters = [parameter.detach() for parameter in objective.parameters]
    group, sizes = objective.rows.group, objective.sizes
    traces = curvature.spectrum.segments
    spectra = curvature.blocks or [None] * len(blocks)
    return {
        name: BlockMeasurement(
            parameters=sum(sizes[index] for index in indices),
            grad_norm=float(norm_of([point.tensors[index] for index in indices], group)),
            weight_norm=float(norm_of([parameters[index] for index in indices], group)),
            trace=trace,
            lambda_max=None if spectrum is None else spectrum.lambda_max,
            lambda_min=None if spectrum is None else spectrum.lambda_min,
        )
        for (name, indices), trace, spectrum in zip(blocks.items(), traces, spectra, strict=True)
    }
