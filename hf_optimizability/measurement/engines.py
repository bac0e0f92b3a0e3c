# SPDX-License-Identifier: Apache-2.0
"""Hessian-vector product engines: which to try, in what order, and when none can be trusted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers.utils import logging

from ..config import OptimizabilityConfig
from ..curvature.backward_errors import BackwardError, backward_errors_unified
from ..curvature.central_difference import CentralDifferenceHessian, usual_step
from ..curvature.custom_functions import require_second_derivatives
from ..curvature.fisher import EmpiricalFisherOperator
from ..curvature.forward_over_reverse import ForwardOverReverseHessian
from ..curvature.gauss_newton import GaussNewtonOperator
from ..curvature.gradient import gradient
from ..curvature.hessian import HessianOperator, ObjectiveOperator
from ..curvature.layer_decoupled import DecoupledHessian
from ..curvature.twice_differentiable import CheapSecondDerivatives
from ..errors import MeasurementError, WrongDerivativeError
from ..linalg.probe_vectors import random_rows
from ..linalg.vectors import norm
from ..model_state.measuring import eager_attention, math_attention, pretrained
from ..objective.objective import Objective
from ..reasons import Reason
from ..redaction import redact_secrets


logger = logging.get_logger(__name__)

LARGEST_DIFFERENCE_ERROR = 0.1
"""Relative error of central differences above which `engine="auto"` refuses them."""

_CAUSES = {
    "torch.utils.checkpoint: ": "checkpointing_recomputes",
    "Checkpointing is not compatible with .grad()": "checkpointing_reentrant",
    "use_reentrant=True": "checkpointing_reentrant",
}
"""What torch's errors mean, by what they contain."""

_OPERATION = re.compile(r"\baten::(\w+)|^(\w+)\(\): ")
"""Where torch's errors name an operation."""

Result = TypeVar("Result")

EngineName = Literal["double_backward", "forward_over_reverse", "central_difference", "single_backward"]

_OPERATORS: dict[tuple[str, EngineName], Callable[..., ObjectiveOperator]] = {
    ("hessian", "double_backward"): HessianOperator,
    ("hessian", "forward_over_reverse"): ForwardOverReverseHessian,
    ("hessian", "central_difference"): CentralDifferenceHessian,
    ("gauss_newton", "double_backward"): GaussNewtonOperator,
    ("empirical_fisher", "single_backward"): EmpiricalFisherOperator,
}


@dataclass(frozen=True)
class HvpEngine:
    """How products with a curvature matrix are computed.

    Attributes:
        name: How the loss is differentiated.
        curvature: The matrix.
        attention: `"math"` where SDPA runs its twice differentiable kernel, `"eager"` where the model is switched,
            `"unchanged"` where no second derivative is needed.
        cheap: Whether layers get cheap second derivatives of our own, and for the trace decoupled ones. Activation
            checkpointing inside a model's forward pass may refuse them: it recomputes in the backward pass, outside of
            `active`.
        fallback: Why this is not the first choice; `None` if it is.
        error: Relative error of one product by central differences: against the exact product where there is one,
            else against half the step; `None` from exact engines. Kinks (ReLU) make it large.
    """

    name: EngineName
    curvature: str
    attention: str
    cheap: bool = True
    fallback: Reason | None = None
    error: float | None = None

    @property
    def exact(self) -> bool:
        """Whether the loss is differentiated twice, by double backward."""
        return self.name == "double_backward"

    @property
    def differentiates_hessian(self) -> bool:
        """Whether matrices derived from the Hessian (its blocks, its decoupled form) are available."""
        return self.exact and self.curvature == "hessian"

    @property
    def separates_batches(self) -> bool:
        """Whether the products of single batches are seen: a central difference is of the whole gradient."""
        return self.name != "central_difference"

    def operator(self, objective: Objective) -> ObjectiveOperator:
        """Return the curvature matrix of an objective."""
        return _OPERATORS[self.curvature, self.name](objective)

    def trace_operator(self, objective: Objective) -> ObjectiveOperator:
        """Return a matrix of the same trace, whose trace is the cheapest to estimate."""
        if self.differentiates_hessian and self.cheap:
            return DecoupledHessian(objective)
        return self.operator(objective)

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        """Hold the model's attention and layers as the operators need them, to be built and to be multiplied."""
        with ExitStack() as stack:
            stack.enter_context(_attention(model, self.attention))
            if self.exact and self.cheap:
                stack.enter_context(CheapSecondDerivatives())
            yield


def choose_engine(
    objective: Objective, config: OptimizabilityConfig, first_product: Callable[[HvpEngine], Result]
) -> tuple[HvpEngine, Result]:
    """Return the first engine that can differentiate the loss, and what `first_product` returned with it.

    Args:
        objective: What to differentiate.
        config: `engine` and `curvature`.
        first_product: Computes products with an engine that is active. A `RuntimeError` from it, other than for
            memory, or any error from a backward pass, says that a derivative is missing, and the next engine is tried.

    Raises:
        MeasurementError: If no engine works, or only central differences that are too inaccurate.
    """
    refusals: list[RuntimeError] = []
    blocker = objective.second_derivative_blocker
    for candidate in _candidates(objective, config):
        if candidate.exact and blocker is not None:
            raise blocker
        try:
            with objective.group.propagate_errors(), backward_errors_unified():
                engine = _validate_engine(
                    _with_reason(candidate, objective, config, refusals), objective, config, refusals
                )
                with engine.active(objective.model):
                    if engine.exact:
                        require_second_derivatives(objective)
                    result = first_product(engine)
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
        if engine.fallback is not None:
            why = _as_error(refusals[0]).reason if refusals else str(engine.fallback)
            logger.warning_once(
                f"Hessian-vector products are made by {engine.name} under {engine.attention} attention, because of "
                f"this: {redact_secrets(why)}"
            )
        return engine, result
    if isinstance(refusals[0], WrongDerivativeError):
        raise refusals[0]
    once = candidate.name in ("central_difference", "single_backward")
    fails_once = refusals[-1] if once else _single_backward_error(objective)
    if fails_once is not None:
        raise _as_error(fails_once, "backward_fails") from fails_once
    raise _not_differentiable(candidate, refusals) from refusals[0]


def _single_backward_error(objective: Objective) -> RuntimeError | None:
    """Return the error of a gradient: a backward pass may fail from some call on, whatever is asked of it."""
    try:
        with objective.group.propagate_errors(), backward_errors_unified():
            gradient(objective)
    except (torch.OutOfMemoryError, MeasurementError):
        raise
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise
        return error
    return None


def _not_differentiable(last: HvpEngine, refusals: Sequence[RuntimeError]) -> MeasurementError:
    """Return the error for a loss that can be differentiated once, by the last allowed engine."""
    hessian = last.curvature == "hessian"
    return _as_error(refusals[0], "no_second_derivative" if hessian else "no_second_derivative_of_outputs")


def _candidates(objective: Objective, config: OptimizabilityConfig) -> list[HvpEngine]:
    """Return the engines that the configuration allows, in the order in which they are tried."""
    if config.curvature == "empirical_fisher":
        return [HvpEngine("single_backward", "empirical_fisher", "unchanged")]
    differences = HvpEngine("central_difference", "hessian", "unchanged")
    if config.curvature == "hessian":
        blocked = config.engine == "auto" and objective.second_derivative_blocker is not None
        if blocked or config.engine == "central_difference":
            return [differences]
    forward = config.curvature == "hessian" and config.engine == "forward_over_reverse"
    name: EngineName = "forward_over_reverse" if forward else "double_backward"
    kernels = ["math", "eager"] if pretrained(objective.model) is not None else ["math"]
    candidates = [
        HvpEngine(name, config.curvature, kernel, cheap=cheap)
        for cheap in ([True] if forward else [True, False])
        for kernel in kernels
    ]
    return [*candidates, differences] if config.engine == "auto" and config.curvature == "hessian" else candidates


def _attention(model: nn.Module, kernel: str) -> AbstractContextManager[None]:
    inner = pretrained(model)
    if kernel == "eager" and inner is not None:
        return eager_attention(inner)
    return math_attention() if kernel == "math" else nullcontext()


def _with_reason(
    engine: HvpEngine, objective: Objective, config: OptimizabilityConfig, refusals: Sequence[RuntimeError]
) -> HvpEngine:
    """Return the engine with the reason why it was chosen, where it was not asked for."""
    if config.engine != "auto" or config.curvature == "empirical_fisher":
        return engine
    if refusals:
        return replace(engine, fallback=_as_error(refusals[0]).why)
    blocker = objective.second_derivative_blocker
    return replace(engine, fallback=blocker.why) if engine.name == "central_difference" and blocker else engine


def _validate_engine(
    engine: HvpEngine, objective: Objective, config: OptimizabilityConfig, refusals: Sequence[RuntimeError]
) -> HvpEngine:
    """Return the engine with its error; refuse differences that are too inaccurate, unless they were asked for."""
    if engine.name != "central_difference":
        return engine
    exact = not any(isinstance(refusal, WrongDerivativeError) for refusal in refusals)
    error = _difference_error(objective, config, exact=exact)
    if engine.fallback is not None and error > LARGEST_DIFFERENCE_ERROR:
        raise MeasurementError("differences_inaccurate", off=error, because=engine.fallback)
    return replace(engine, error=error)


def _as_error(error: RuntimeError, code: str = "operation_without_derivative") -> MeasurementError:
    """Return why an engine does not work, as an error: itself if it is one, else one with this code.

    Args:
        error: What the engine's products raised.
        code: What it means where it is not known.
    """
    if isinstance(error, MeasurementError):
        return error
    known = next((meaning for sign, meaning in _CAUSES.items() if sign in str(error)), None)
    if known is not None:
        return MeasurementError(known)
    behind = error.__cause__ if isinstance(error, BackwardError) else error
    return MeasurementError(code, error=behind, operation=_operation_named_by(error))


def _operation_named_by(error: RuntimeError) -> str:
    """Return the operation of torch that an error names; nothing where other words have its form."""
    found = _OPERATION.search(str(error))
    name = "" if found is None else found[1] or found[2]
    return name if hasattr(torch.ops.aten, name) else ""


def _difference_error(objective: Objective, config: OptimizabilityConfig, *, exact: bool) -> float:
    """Return the relative error of a product by central differences, along a random vector.

    Against the exact product where there is one, else against the product with half the step: where that changes it
    by much, the gradient has kinks within the step (ReLU), or drowns in rounding.

    Args:
        objective: What to differentiate.
        config: Its seed.
        exact: Whether exact products, where there are any, can be trusted.
    """
    differences = CentralDifferenceHessian(objective)
    [probe] = random_rows(differences, 1, seed=config.probe_seed)
    product = differences.matvec(probe)
    try:
        with (
            objective.group.propagate_errors(),
            backward_errors_unified(),
            math_attention(),
            CheapSecondDerivatives(),
        ):
            if objective.second_derivative_blocker is not None or not exact:
                raise objective.second_derivative_blocker or RuntimeError("Exact products are wrong.")
            require_second_derivatives(objective)
            reference = HessianOperator(objective).matvec(probe)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        half = usual_step(objective.parameters) / 2
        reference = CentralDifferenceHessian(objective, relative_step=half).matvec(probe)
    group = differences.rows.group
    return norm(product - reference, group) / (norm(reference, group) or 1.0)
