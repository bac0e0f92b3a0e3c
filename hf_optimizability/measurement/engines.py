# SPDX-License-Identifier: Apache-2.0
"""Ways to multiply with a curvature matrix: which to try, in what order, and when none can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers.utils import logging

from ..config import OptimizabilityConfig
from ..curvature.central_difference import CentralDifferenceHessian, usual_step
from ..curvature.custom_functions import require_second_derivatives
from ..curvature.fisher import EmpiricalFisherOperator
from ..curvature.forward_over_reverse import ForwardOverReverseHessian
from ..curvature.gauss_newton import GaussNewtonOperator
from ..curvature.hessian import HessianOperator, ObjectiveOperator
from ..curvature.twice_differentiable import CheapSecondDerivatives
from ..errors import MeasurementError, WrongDerivativeError
from ..linalg.vectors import norm
from ..model_state.measuring import eager_attention, math_attention, pretrained
from ..objective.objective import Objective
from ..redaction import anonymous, without_secrets


logger = logging.get_logger(__name__)

LARGEST_DIFFERENCE_ERROR = 0.1
"""Relative error of central differences above which `engine="auto"` does not take them for a product."""

_CAUSES = {
    "torch.utils.checkpoint: ": "The model checkpoints activations in its own forward pass (`torch.utils.checkpoint`) "
    "and recomputes others in the backward pass.",
    "Checkpointing is not compatible with .grad()": "The model checkpoints activations in its own forward pass with "
    "`use_reentrant=True`, which can be differentiated by `.backward()` alone. Set `use_reentrant=False`.",
    "use_reentrant=True": "The model checkpoints activations in its own forward pass with `use_reentrant=True`, which "
    "can be differentiated by `.backward()` alone. Set `use_reentrant=False`.",
}
"""What torch's errors mean, by what they contain."""

_LONGEST_REASON = 300
"""Characters of an error that are kept."""

Found = TypeVar("Found")
OnProducts = Callable[[int], object]

_ENGINES: dict[str, Callable[..., ObjectiveOperator]] = {
    "double_backward": HessianOperator,
    "forward_over_reverse": ForwardOverReverseHessian,
}


@dataclass(frozen=True)
class HvpEngine:
    """One way to multiply.

    Attributes:
        engine: How products are made.
        attention: `"math"` where SDPA runs its twice differentiable kernel, `"eager"` where the model is switched,
            `"unchanged"` where no second derivative is needed.
        cheap: Whether layers get second derivatives of our own, cheap ones, and for the trace decoupled ones.
            Activation checkpointing inside a model's forward pass may refuse them: it recomputes in the backward pass,
            where they are not held.
        fallback: Why this is not the first choice; `None` if it is.
        error: Relative error of one product by central differences: against the exact product where that can be had,
            else against half the step; `None` from exact engines. Kinks (ReLU) make it large.
    """

    engine: str
    attention: str
    cheap: bool = True
    fallback: str | None = None
    error: float | None = None

    @property
    def exact(self) -> bool:
        """Whether derivatives are taken twice, so that matrices other than the Hessian itself can be had as well."""
        return self.engine == "double_backward"

    def operator(
        self, objective: Objective, *, curvature: str, on_products: OnProducts | None = None
    ) -> ObjectiveOperator:
        """The curvature matrix of an objective, multiplied this way."""
        options: dict[str, Any] = {"group": objective.group, "on_products": on_products}
        if curvature == "gauss_newton":
            return GaussNewtonOperator(objective, **options)
        if curvature == "empirical_fisher":
            return EmpiricalFisherOperator(objective, **options)
        if self.engine == "central_difference":
            return CentralDifferenceHessian(objective, rows=objective.rows, **options)
        return _ENGINES[self.engine](objective, **options)

    @contextmanager
    def held(self, model: nn.Module) -> Iterator[None]:
        """What must be held around the construction of operators and around their products."""
        with ExitStack() as stack:
            stack.enter_context(_attention(model, self.attention))
            if self.exact and self.cheap:
                stack.enter_context(CheapSecondDerivatives())
            yield


def run_with_engine_fallback(
    objective: Objective, config: OptimizabilityConfig, found_by: Callable[[HvpEngine], Found], on_products: OnProducts
) -> tuple[Found, HvpEngine]:
    """Tries the ways that the configuration allows, each held, until one has the derivatives it needs.

    Args:
        objective: What to differentiate.
        config: `engine` and `curvature`.
        found_by: What to do; a `RuntimeError` from it, other than for memory, says that a derivative is missing.
        on_products: Called with the number of products just made.

    Returns:
        What `found_by` returned, and the way it worked.

    Raises:
        MeasurementError: If none works, or none but central differences that are no derivative.
    """
    refusals: list[RuntimeError] = []
    for way in _ways(objective, config):
        if config.curvature != "empirical_fisher" and way.exact and objective.quantized is not None:
            raise MeasurementError(objective.quantized, "Set `engine='central_difference'`, or leave it at 'auto'.")
        try:
            with objective.group.propagate_errors():
                way = _validate_engine(
                    _reasoned(way, objective, config, refusals), objective, config, refusals, on_products
                )
                with way.held(objective.model):
                    if way.exact:
                        require_second_derivatives(objective)
                    found = found_by(way)
        except WrongDerivativeError as error:
            refusals.append(error)
            continue
        except (torch.OutOfMemoryError, FloatingPointError, MeasurementError):
            raise
        except RuntimeError as error:  # that is what autograd raises; NotImplementedError is one
            if should_reduce_batch_size(error):  # memory, on devices that have no error of their own for it
                raise
            refusals.append(error)
            continue
        if way.fallback is not None:
            logger.warning_once(
                f"Hessian-vector products are made by {way.engine} under {way.attention} attention, because of this: "
                f"{without_secrets(_explained(refusals[0]) if refusals else way.fallback)}"
            )
        return found, way
    if isinstance(refusals[0], WrongDerivativeError):
        raise refusals[0]
    raise MeasurementError(
        f"The loss can't be differentiated twice: {_explained(refusals[0])}",
        "Leave `engine` at 'auto' or set it to 'central_difference', which need no second derivative where there is "
        "none; or use `attn_implementation='eager'`, and replace custom autograd functions by differentiable "
        "operations.",
    ) from refusals[0]


def _ways(objective: Objective, config: OptimizabilityConfig) -> list[HvpEngine]:
    kernels = ["math", "eager"] if pretrained(objective.model) is not None else ["math"]
    differences = HvpEngine("central_difference", "unchanged")
    if config.curvature == "empirical_fisher":
        return [HvpEngine("single_backward", "unchanged")]
    if config.engine == "central_difference" and config.curvature == "hessian":
        return [differences]
    if config.curvature == "hessian" and config.engine == "auto" and objective.quantized is not None:
        return [differences]
    exact = "double_backward" if config.engine == "auto" or config.curvature == "gauss_newton" else config.engine
    plain = [False] if exact == "double_backward" else []
    ways = [HvpEngine(exact, kernel, cheap=cheap) for cheap in [True, *plain] for kernel in kernels]
    return [*ways, differences] if config.engine == "auto" and config.curvature == "hessian" else ways


def _attention(model: nn.Module, kernel: str) -> AbstractContextManager[None]:
    inner = pretrained(model)
    if kernel == "eager" and inner is not None:
        return eager_attention(inner)
    return math_attention() if kernel == "math" else nullcontext()


def _reasoned(
    way: HvpEngine, objective: Objective, config: OptimizabilityConfig, refusals: Sequence[RuntimeError]
) -> HvpEngine:
    """The way with why it was taken, where it was not asked for."""
    if config.engine != "auto" or config.curvature == "empirical_fisher":
        return way
    if refusals:
        return replace(way, fallback=anonymous(_explained(refusals[0])))
    return replace(way, fallback=objective.quantized) if way.engine == "central_difference" else way


def _validate_engine(
    way: HvpEngine,
    objective: Objective,
    config: OptimizabilityConfig,
    refusals: Sequence[RuntimeError],
    on_products: OnProducts,
) -> HvpEngine:
    """The way with its error; refuses differences that are no derivative, unless they were asked for."""
    if way.engine != "central_difference":
        return way
    exact = not any(isinstance(refusal, WrongDerivativeError) for refusal in refusals)
    error = _difference_error(objective, config, on_products, exact=exact)
    if way.fallback is not None and error > LARGEST_DIFFERENCE_ERROR:
        raise MeasurementError(
            f"The loss can't be differentiated twice: {way.fallback.rstrip('.')}. Central differences of its gradient "
            f"are off by {error:.0%}, as kinks (ReLU), routing and low precision make them.",
            "Replace the operation that has no second derivative.",
        )
    return replace(way, error=error)


def _explained(error: RuntimeError) -> str:
    """Why a way does not work, in a sentence or two: torch's own text may take 30 lines."""
    text = error.reason if isinstance(error, MeasurementError) else str(error)
    for sign, meaning in _CAUSES.items():
        if sign in text:
            return meaning
    first = text.strip().partition("\n")[0]
    return first if len(first) <= _LONGEST_REASON else f"{first[:_LONGEST_REASON]} …"


def _difference_error(
    objective: Objective, config: OptimizabilityConfig, on_products: OnProducts, *, exact: bool
) -> float:
    """Relative error of a product by central differences, along random signs.

    Against the exact product where there is one, else against the product with half the step: where that changes it
    by much, the gradient has kinks within the step (ReLU), or drowns in rounding.

    Args:
        objective: What to differentiate.
        config: Its seed.
        on_products: Called with the number of products just made.
        exact: Whether exact products, where there are any, can be trusted.
    """
    options: dict[str, Any] = {"group": objective.group, "on_products": on_products}
    differences = CentralDifferenceHessian(objective, rows=objective.rows, **options)
    generator = torch.Generator().manual_seed(config.probe_seed)
    probe = differences.rows.rademacher(generator=generator, dtype=differences.dtype, device=differences.device)
    product = differences.matvec(probe)
    try:
        with objective.group.propagate_errors(), math_attention(), CheapSecondDerivatives():
            if objective.quantized is not None or not exact:
                raise RuntimeError("There is no exact product.")
            require_second_derivatives(objective)
            reference = HessianOperator(objective, **options).matvec(probe)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        half = usual_step(objective.parameters) / 2
        reference = CentralDifferenceHessian(objective, relative_step=half, rows=objective.rows, **options).matvec(
            probe
        )
    group = differences.rows.group
    return norm(product - reference, group) / (norm(reference, group) or 1.0)
