# SPDX-License-Identifier: Apache-2.0
"""One measurement, from an objective to its gradient and curvature."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from .blocks import match_blocks, name_blocks
from .configuration import OptimizabilityConfig
from .curvature.central_difference import RELATIVE_STEP, CentralDifferenceHessian
from .curvature.decoupled import DecoupledHessian
from .curvature.estimates import HessianEstimates, Spectrum
from .curvature.forward_over_reverse import ForwardOverReverseHessian
from .curvature.lanczos import lanczos
from .curvature.operators import HessianOperator, ObjectiveOperator
from .curvature.power_iteration import power_iteration
from .curvature.trace import MIN_PROBES, Deflation, TraceResult, exact_trace, hutchinson, hutchplusplus, xtrace
from .curvature.twice_differentiable import CheapSecondDerivatives
from .curvature.vectors import norm, rademacher
from .gradients import Gradient, gradient, norm_of
from .measurement import BlockMeasurement, Measurement, MeasurementError
from .objective import Batch, LossFunction, Objective
from .safety import eager_attention, full_precision, math_attention, measuring, pretrained


logger = logging.get_logger(__name__)

LARGEST_DIFFERENCE_ERROR = 0.1
"""Relative error of central differences above which `engine="auto"` does not take them for a product."""

DEFLATED = 4
"""Ritz vectors of the largest eigenvalues that the trace treats exactly; as many as are multiplied at once."""

_ENGINES: dict[str, Callable[..., ObjectiveOperator]] = {
    "double_backward": HessianOperator,
    "forward_over_reverse": ForwardOverReverseHessian,
    "central_difference": CentralDifferenceHessian,
}


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
        >>> round(measure(model, [batch], loss_fn=loss_fn).hessian.lambda_max.value, 4)  # H = (2/N) XᵀX = I
        1.0
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
    model = objective.model
    spent: Counter[str] = Counter()

    def count(products: int) -> None:
        spent["hvps"] += products
        if on_products is not None:
            on_products(products)

    try:
        with measuring(model, seed=config.probe_seed), full_precision(model):
            versions = [parameter._version for parameter in model.parameters()]
            at_point = gradient(objective)
            if versions != [parameter._version for parameter in model.parameters()]:
                raise MeasurementError(
                    "The model changes its own weights in eval mode.",
                    "Switch that off; for RWKV by `model.config.rescale_every = 0`.",
                )
            _require_finite(at_point)
            curvature = _with_second_derivative(objective, config, count)
            blocks = _blocks(objective, config, at_point, curvature.trace)
    except torch.OutOfMemoryError as error:
        raise MeasurementError(
            "The device ran out of memory while measuring.", "Lower `probe_batch_size`, or free memory on the device."
        ) from error
    except FloatingPointError as error:
        raise MeasurementError(
            str(error), "Check the loss for overflow (logarithms, divisions); measure in float32 or better."
        ) from error
    except MeasurementError:
        raise
    except Exception as error:  # whatever the model's code raises
        raise MeasurementError(
            f"The model can't be measured: {type(error).__name__}: {error}",
            "Check that it gives a loss and a gradient in eval mode: `model.eval(); model(**batch).loss.backward()`.",
        ) from error
    return Measurement(
        step=step,
        epoch=epoch,
        loss=at_point.loss,
        items=at_point.items,
        grad_norm=math.hypot(*(block.grad_norm for block in blocks.values())),
        hessian=curvature.hessian,
        blocks=blocks,
        engine=curvature.engine,
        attention=curvature.attention,
        fallback=curvature.fallback,
        engine_error=curvature.engine_error,
        dtype=str(at_point.tensors[0].dtype).removeprefix("torch."),
        hvps=spent["hvps"],
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


@dataclass(frozen=True)
class _Curvature:
    """What one engine found."""

    hessian: HessianEstimates
    trace: TraceResult
    engine: str
    attention: str
    fallback: str | None = None
    engine_error: float | None = None


def _estimate(
    objective: Objective, config: OptimizabilityConfig, engine: str, count: Callable[[int], None]
) -> tuple[HessianEstimates, TraceResult]:
    """Eigenvalues first, with at most half the budget; the trace gets the rest."""
    budget = config.budget
    operator = _ENGINES[engine](objective, on_products=count)
    half: dict[str, Any] = {"tolerance": budget.eigen_tolerance, "max_hvps": budget.max_hvps // 2}
    half["seed"] = config.probe_seed
    vectors: Tensor | None = None
    if config.eigen_method == "lanczos":
        run = lanczos(operator, **half)
        spectrum = run.spectrum
        if run.lambda_max.converged:
            vectors = run.ritz_vectors(range(-min(DEFLATED, len(run.nodes)), 0))
        del run  # and its basis
    else:
        spectrum = Spectrum(lambda_max=power_iteration(operator, **half))
    left = budget.max_hvps - spectrum.lambda_max.hvps
    # The trace needs the diagonal alone, so it is had from the matrix whose other entries are small.
    decoupled = DecoupledHessian(objective, on_products=count) if engine == "double_backward" else operator
    trace = _trace(
        decoupled, _segments(objective, block_indices(objective.names, config).values()), config, left, vectors
    )
    return HessianEstimates(trace=trace.total, **vars(spectrum)), trace


def _trace(
    operator: ObjectiveOperator,
    segments: list[list[slice]],
    config: OptimizabilityConfig,
    max_hvps: int,
    vectors: Tensor | None,
) -> TraceResult:
    """The trace by the configured method, deflated by `vectors` where the method has use for them and they pay."""
    options: dict[str, Any] = {
        "tolerance": config.budget.trace_tolerance, "max_hvps": max_hvps, "seed": config.probe_seed + 1,
    }  # fmt: skip
    if config.trace_method == "exact":
        return exact_trace(operator, segments)
    if config.trace_method == "xtrace":
        return xtrace(operator, segments, **options)
    if config.trace_method == "hutch++":
        return hutchplusplus(operator, segments, **options)
    if vectors is None or max_hvps < len(vectors) + MIN_PROBES:
        return hutchinson(operator, segments, **options)
    deflation = Deflation(vectors, operator.matmat(vectors.T).T)
    options["max_hvps"] -= len(vectors)
    result = hutchinson(operator, segments, deflation=deflation, **options)
    hvps = result.total.hvps + len(vectors)
    segments_ = tuple(replace(segment, hvps=hvps) for segment in result.segments)
    return replace(result, total=replace(result.total, hvps=hvps), segments=segments_)


def _segments(objective: Objective, blocks: Iterable[list[int]]) -> list[list[slice]]:
    """Where each block's parameters lie in the long vector of all of them."""
    ends = list(accumulate((parameter.numel() for parameter in objective.parameters), initial=0))
    places = [slice(start, end) for start, end in pairwise(ends)]
    return [[places[index] for index in block] for block in blocks]


def _with_second_derivative(
    objective: Objective, config: OptimizabilityConfig, count: Callable[[int], None]
) -> _Curvature:
    """Estimates by the first way that works: exactly under math attention, under eager attention, by differences."""
    refusals: list[RuntimeError] = []
    for engine, attention in _ways(objective, config):
        if engine != "central_difference" and objective.quantized is not None:
            raise MeasurementError(objective.quantized, "Set `engine='central_difference'`, or leave it at 'auto'.")
        try:
            with _attention(objective.model, attention), _cheap(engine):
                hessian, trace = _estimate(objective, config, engine, count)
        except (torch.OutOfMemoryError, FloatingPointError):
            raise
        except RuntimeError as error:  # that is what autograd raises; NotImplementedError is one
            refusals.append(error)
            continue
        found = _Curvature(hessian, trace, engine, attention)
        if engine == "central_difference":
            found = replace(found, engine_error=_difference_error(objective, config, count))
        if config.engine == "auto" and (engine, attention) != ("double_backward", "math"):
            found = replace(found, fallback=str(refusals[0]) if refusals else objective.quantized)
            _report_fallback(found)
        return found
    raise _no_second_derivative(refusals[0]) from refusals[0]


def _ways(objective: Objective, config: OptimizabilityConfig) -> list[tuple[str, str]]:
    """Engines and attention kernels, in the order to try."""
    kernels = ["math", "eager"] if pretrained(objective.model) is not None else ["math"]
    differences = ("central_difference", "unchanged")
    if config.engine == "central_difference" or (config.engine == "auto" and objective.quantized is not None):
        return [differences]
    exact: str = "double_backward" if config.engine == "auto" else config.engine
    ways = [(exact, kernel) for kernel in kernels]
    return [*ways, differences] if config.engine == "auto" else ways


def _attention(model: nn.Module, kernel: str) -> AbstractContextManager[None]:
    inner = pretrained(model)
    if kernel == "eager" and inner is not None:
        return eager_attention(inner)
    return math_attention() if kernel == "math" else nullcontext()


def _cheap(engine: str) -> AbstractContextManager[Any]:
    return CheapSecondDerivatives() if engine == "double_backward" else nullcontext()


def _difference_error(objective: Objective, config: OptimizabilityConfig, count: Callable[[int], None]) -> float:
    """Relative error of a product by central differences, along random signs.

    Against the exact product where there is one, else against the product with half the step: where that changes it
    by much, the gradient has kinks within the step (ReLU), or drowns in rounding.
    """
    differences = CentralDifferenceHessian(objective, on_products=count)
    generator = torch.Generator().manual_seed(config.probe_seed)
    probe = rademacher(differences.size, generator=generator, dtype=differences.dtype, device=differences.device)
    product = differences.matvec(probe)
    try:
        if objective.quantized is not None:
            raise RuntimeError(objective.quantized)
        with math_attention(), CheapSecondDerivatives():
            reference = HessianOperator(objective, on_products=count).matvec(probe)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        half = RELATIVE_STEP[differences.dtype] / 2
        reference = CentralDifferenceHessian(objective, relative_step=half, on_products=count).matvec(probe)
    return norm(product - reference) / (norm(reference) or 1.0)


def _report_fallback(found: _Curvature) -> None:
    """Warns once; refuses differences that are no derivative."""
    if found.engine_error is not None and found.engine_error > LARGEST_DIFFERENCE_ERROR:
        raise MeasurementError(
            f"The loss can't be differentiated twice: {found.fallback}. Central differences of its gradient are off "
            f"by {found.engine_error:.0%}, as kinks (ReLU) make them.",
            "Replace the operation that has no second derivative.",
        )
    way = f"{found.engine} under {found.attention} attention"
    logger.warning_once(f"Hessian-vector products are made by {way}, because of this: {found.fallback}")


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
