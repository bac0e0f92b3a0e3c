# SPDX-License-Identifier: Apache-2.0
"""One measurement, from an objective to its gradient and curvature."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise

import torch
from torch import nn
from tqdm.auto import tqdm

from .blocks import match_blocks, name_blocks
from .configuration import OptimizabilityConfig
from .curvature.estimates import HessianEstimates, Spectrum
from .curvature.lanczos import lanczos
from .curvature.operators import HessianOperator
from .curvature.power_iteration import power_iteration
from .curvature.trace import TraceResult, exact_trace, hutchinson
from .gradients import Gradient, gradient, norm_of
from .measurement import BlockMeasurement, Measurement, MeasurementError
from .objective import Batch, LossFunction, Objective
from .safety import eager_attention, math_attention, measuring, pretrained


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    config: OptimizabilityConfig | None = None,
    *,
    loss_fn: LossFunction | None = None,
    progress: bool = False,
) -> Measurement:
    """Measures gradient and curvature of a model's loss over given batches, without a Trainer.

    Args:
        model: Any module; its parameters with `requires_grad` are what is differentiated by. Measured in eval mode,
            and left as it was.
        batches: What the model takes (dict or `BatchEncoding` with labels), batch by batch.
        config: Precision and budget; when to measure does not matter here.
        loss_fn: `loss_fn(model, batch)` returns the batch's mean loss, or the pair (sum of losses, number of items).
            By default the model's own loss.
        progress: Whether to show a progress bar.

    Returns:
        The measurement.

    Raises:
        ValueError: If an argument can't work: no trainable parameter, no batch, no loss, an unknown block.
        MeasurementError: If the measurement can't be made: a loss that is not finite, no second derivative, no memory.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.eye(2), torch.ones(2, 1))
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> round(measure(model, [batch], loss_fn=loss_fn).hessian.trace.value, 4)  # H = (2/N) XᵀX = I
        2.0
    """
    config = config or OptimizabilityConfig()
    objective = Objective(model, batches, loss_fn=loss_fn)
    block_indices(objective.names, config)
    objective.check(seed=config.probe_seed)
    with measuring_bar(config, disable=not progress) as bar:
        return measure_objective(objective, config, on_products=bar.update)


def measuring_bar(config: OptimizabilityConfig, *, disable: bool) -> tqdm:
    """A progress bar over the products of one measurement; it vanishes after and leaves a bar above it alone."""
    total = config.budget.max_hvps
    return tqdm(total=total, desc="Measuring curvature", unit="hvp", leave=False, dynamic_ncols=True, disable=disable)


def block_indices(names: list[str], config: OptimizabilityConfig) -> dict[str, list[int]]:
    """The blocks to report on: the configured patterns, or embeddings, layers and head."""
    return name_blocks(names) if config.blocks is None else match_blocks(names, config.blocks)


def measure_objective(
    objective: Objective,
    config: OptimizabilityConfig,
    *,
    step: int = 0,
    epoch: float | None = None,
    on_products: Callable[[int], object] | None = None,
) -> Measurement:
    """Measures an objective at the present parameters.

    Args:
        objective: What to measure.
        config: Precision and budget.
        step: Recorded in the measurement.
        epoch: Recorded in the measurement.
        on_products: Called with the number of Hessian-vector products just made.

    Returns:
        The measurement.

    Raises:
        MeasurementError: If it can't be made; the message says why and what to do.
    """
    started = time.perf_counter()
    try:
        with measuring(objective.model, seed=config.probe_seed):
            at_point = gradient(objective)
            _require_finite(at_point)
            operator = HessianOperator(objective, on_products=on_products)
            hessian, trace, attention = _with_second_derivative(
                objective.model, lambda: _estimate(operator, objective, config)
            )
            blocks = _blocks(objective, config, at_point, trace)
    except torch.OutOfMemoryError as error:
        raise MeasurementError(
            "The device ran out of memory while measuring.", "Lower `probe_batch_size`, or free memory on the device."
        ) from error
    except FloatingPointError as error:
        raise MeasurementError(
            str(error), "Check the loss for overflow (logarithms, divisions); measure in float32 or better."
        ) from error
    return Measurement(
        step=step,
        epoch=epoch,
        loss=at_point.loss,
        items=at_point.items,
        grad_norm=math.hypot(*(block.grad_norm for block in blocks.values())),
        hessian=hessian,
        blocks=blocks,
        engine=config.engine,
        attention=attention,
        dtype=str(operator.dtype).removeprefix("torch."),
        hvps=hessian.lambda_max.hvps + hessian.trace.hvps,
        seconds=time.perf_counter() - started,
    )


def _require_finite(at_point: Gradient) -> None:
    if not math.isfinite(at_point.loss):
        raise MeasurementError(
            f"The loss on the probe set is {at_point.loss}.",
            "Look for a learning rate that is too high, or for inputs and labels that are not finite.",
        )
    if not all(torch.isfinite(tensor).all() for tensor in at_point.tensors):
        raise MeasurementError(
            "The gradient on the probe set is not finite.", "Look for operations whose derivative is infinite."
        )


def _estimate(
    operator: HessianOperator, objective: Objective, config: OptimizabilityConfig
) -> tuple[HessianEstimates, TraceResult]:
    """Eigenvalues first, with at most half the budget; the trace, which needs more, gets the rest."""
    budget = config.budget
    tolerance, half = budget.eigen_tolerance, budget.max_hvps // 2
    if config.eigen_method == "lanczos":
        run = lanczos(operator, tolerance=tolerance, max_hvps=half, seed=config.probe_seed)
    else:
        estimate = power_iteration(operator, tolerance=tolerance, max_hvps=half, seed=config.probe_seed)
        run = Spectrum(lambda_max=estimate)
    segments = _segments(objective, block_indices(objective.names, config).values())
    if config.trace_method == "exact":
        trace = exact_trace(operator, segments)
    else:
        trace = hutchinson(
            operator,
            segments,
            tolerance=budget.trace_tolerance,
            max_hvps=budget.max_hvps - run.lambda_max.hvps,
            seed=config.probe_seed + 1,
        )
    return HessianEstimates(trace=trace.total, **vars(run)), trace


def _segments(objective: Objective, blocks: Iterable[list[int]]) -> list[list[slice]]:
    """Where each block's parameters lie in the long vector of all of them."""
    ends = list(accumulate((parameter.numel() for parameter in objective.parameters), initial=0))
    places = [slice(start, end) for start, end in pairwise(ends)]
    return [[places[index] for index in block] for block in blocks]


def _with_second_derivative(
    model: nn.Module, estimate: Callable[[], tuple[HessianEstimates, TraceResult]]
) -> tuple[HessianEstimates, TraceResult, str]:
    """Estimates under the attention kernels that can be differentiated twice; says which: "math" or "eager"."""
    try:
        with math_attention():
            return *estimate(), "math"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # that is what autograd raises; NotImplementedError is one
        inner = pretrained(model)
        if inner is None:
            raise _no_second_derivative(error) from error
    try:
        with eager_attention(inner):
            return *estimate(), "eager"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _no_second_derivative(error) from error


def _no_second_derivative(error: RuntimeError) -> MeasurementError:
    return MeasurementError(
        f"The loss can't be differentiated twice: {error}",
        "Use `attn_implementation='eager'`, and replace custom autograd functions by differentiable operations.",
    )


def _blocks(
    objective: Objective, config: OptimizabilityConfig, at_point: Gradient, trace: TraceResult
) -> dict[str, BlockMeasurement]:
    blocks = block_indices(objective.names, config)
    parameters = [parameter.detach() for parameter in objective.parameters]
    return {
        name: BlockMeasurement(
            parameters=sum(parameters[index].numel() for index in indices),
            grad_norm=float(norm_of([at_point.tensors[index] for index in indices])),
            weight_norm=float(norm_of([parameters[index] for index in indices])),
            trace=estimate,
        )
        for (name, indices), estimate in zip(blocks.items(), trace.segments, strict=True)
    }
