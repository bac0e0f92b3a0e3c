# SPDX-License-Identifier: Apache-2.0
"""Whether products with the curvature matrix are those of the loss: symmetry, and eigenvalues along their vectors."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ..curvature.autograd_graph import doubtful_operations, has_kinks
from ..curvature.central_difference import CentralDifferenceHessian, usual_step
from ..curvature.eigenvalue_check import AGREEMENT, FINER, STEPS, EigenvalueCheck, check_eigenvalues
from ..curvature.gradient import Gradient, norm_of
from ..errors import MeasurementError, WrongDerivativeError
from ..linalg.probe_vectors import random_rows
from ..linalg.spectrum_and_trace import SpectrumAndTrace
from ..linalg.vectors import dot, norm
from ..objective.objective import Objective
from ..objective.padding_rows import without_padding_rows
from ..reasons import Reason
from .engines import LARGEST_DIFFERENCE_ERROR, HvpEngine


LARGEST_ASYMMETRY = 1e-4
"""`|uᵀHv − vᵀHu| / (‖u‖‖Hv‖)` above which a backward pass is not the derivative of its loss: rounding makes 1e-6,
unless the loss is nearly 0. There `p − y`, and with it all that follows, is a small difference of numbers near 1."""

LARGEST_ASYMMETRY_OF_DIFFERENCES = 0.03
"""The same of central differences, which are off by 0.3 % or so."""

CANCELLATION = 0.5
"""Of the machine epsilon over the loss: what that rounding is allowed to be. A classifier that has learnt its examples
by heart stays below 0.15, over losses from 1e-3 to 3e-7."""

_OFF = 0.01
"""Relative error of a parameter's part of a product that is worth a name."""

_SAME_ERROR = 0.95
"""Share of an error that is the same at two steps, from which on it is one of the product. Of kinks and rounding it is
up to 0.7, of a wrong second derivative next to them 0.99."""


def require_symmetric(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    objective: Objective,
    point: Gradient,
    engine: HvpEngine,
) -> None:
    """Refuse a matrix that is less symmetric than rounding makes it, or of which rounding leaves nothing.

    Args:
        first: A vector u and its product.
        second: A vector v and its product.
        objective: What is differentiated.
        point: Loss and gradient.
        engine: How the products were made.

    Raises:
        WrongDerivativeError: If it is not symmetric, and the products are exact.
        MeasurementError: If it is not symmetric otherwise, or rounding leaves nothing of it.
    """
    (u, along_u), (v, along_v) = first, second
    group = objective.rows.group
    asymmetry = abs(dot(u, along_v, group) - dot(v, along_u, group)) / ((norm(u, group) * norm(along_v, group)) or 1.0)
    if engine.name == "central_difference":
        if asymmetry > LARGEST_ASYMMETRY_OF_DIFFERENCES:
            raise MeasurementError("differences_not_symmetric", asymmetry=asymmetry, because=engine.fallback)
        return
    if not engine.exact or asymmetry <= LARGEST_ASYMMETRY:
        return
    rounding = CANCELLATION * torch.finfo(u.dtype).eps / abs(point.loss) if point.loss else math.inf
    if rounding >= 1:
        raise MeasurementError("loss_near_zero", loss=point.loss, dtype=str(u.dtype))
    if asymmetry > rounding:
        raise WrongDerivativeError(
            "not_symmetric",
            asymmetry=asymmetry,
            parameters=_off_parameters(objective, v, along_v),
            operations=tuple(doubtful_operations(objective)),
        )


def require_right_derivatives(objective: Objective, engine: HvpEngine, *, seed: int) -> None:
    """Refuse custom autograd functions that are differentiated wrongly, which the first example shows.

    A product with a random vector is compared with differences at two steps. Of one example hardly a unit switches
    within them (ReLU): an error of kinks and rounding is another vector at another step, and one of a wrong second
    derivative is the same. Losses without custom functions are not looked at.

    Raises:
        MeasurementError: If the product is off by the same vector at both steps.
    """
    if engine.curvature != "hessian" or not engine.exact:
        return
    few = _few_examples(objective)
    if few is None or not (operations := doubtful_operations(few)):
        return
    operator = engine.operator(few)
    [probe] = random_rows(operator, 1, seed=seed)
    product, usual = operator.matvec(probe), usual_step(few.parameters)
    errors = [
        product - CentralDifferenceHessian(few, relative_step=share * usual).matvec(probe) for share in STEPS[:2]
    ]
    lengths = [norm(error) for error in errors]
    off = min(lengths) / (norm(product) or math.inf)
    if off <= AGREEMENT or dot(errors[0], errors[1]) < _SAME_ERROR * max(lengths) ** 2:
        return
    raise MeasurementError("wrong_product", off=off, operations=tuple(operations))


def _few_examples(objective: Objective) -> Objective | None:
    """Return the loss of an example, or a batch if it can't be cut, for each process by itself; `None` of nothing."""
    whole = objective.unsharded().counting(None)
    for batch in whole.local_batches[:1]:
        try:
            pieces = [piece for piece in whole.pieces(batch, 1) if piece.items]
        except ValueError:
            pieces = [batch]
        return whole.over(pieces[:1])
    return None


def check_along_eigenvectors(
    found: SpectrumAndTrace,
    objective: Objective,
    point: Gradient,
    engine: HvpEngine,
) -> tuple[EigenvalueCheck, ...]:
    """Check λ_max and λ_min along their Ritz vectors; of the Hessian alone, since differences have no other matrix.

    Differences are compared with those of half the step; exact products with differences at up to three steps.

    Raises:
        MeasurementError: If an eigenvalue is not one of the loss.
    """
    if engine.curvature != "hessian":
        return ()
    ends = [found.estimates.lambda_max, found.estimates.lambda_min]
    by_differences = engine.name == "central_difference"
    usual = usual_step(objective.parameters)
    kinks_explain = cache(lambda: _kinks_explain(objective))
    checks = check_eigenvalues(
        [end.value for end in ends[: len(found.extremal)] if end is not None],
        found.extremal,
        lambda step: CentralDifferenceHessian(objective, relative_step=step),
        steps=[usual / 2] if by_differences else [share * usual for share in STEPS],
        finer=[] if by_differences else [share * usual for share in FINER],
        tolerance=LARGEST_DIFFERENCE_ERROR if by_differences else AGREEMENT,
        has_kinks_alone=kinks_explain,
    )
    if not by_differences:
        checks = tuple(_unless_rounded(check, objective, point) for check in checks)
        checks = tuple(
            _unless_padding(check, vector, objective, engine)
            for check, vector in zip(checks, found.extremal, strict=True)
        )
    wrong = next((check for check in checks if check.verdict == "disagrees"), None)
    if wrong is None:
        return checks
    if by_differences or not kinks_explain():
        raise _no_eigenvalue(wrong, objective, engine)
    return tuple(
        replace(check, verdict="not checked", reason=Reason("kinks_settle")) if check.verdict == "disagrees" else check
        for check in checks
    )


def _kinks_explain(objective: Objective) -> bool:
    """Return whether dense kinks are why differences settle elsewhere: there are some, and nothing else is in doubt.

    The mean of many ReLUs bends where none of them does. Differences can't distinguish that from a missing second
    derivative, but torch's own operations with kinks have the right one.
    """
    explained = has_kinks(objective) and not doubtful_operations(objective)
    return all(objective.group.all_gather_interleaved([explained]))


def _unless_rounded(check: EigenvalueCheck, objective: Objective, point: Gradient) -> EigenvalueCheck:
    """Return the check, undecided where rounding of the gradient may be all that its differences show."""
    group = objective.rows.group
    parameters = [parameter.detach() for parameter in objective.parameters]
    step = min(check.steps) * (float(norm_of(parameters, group)) or 1.0)
    precision = max(torch.finfo(parameter.dtype).eps for parameter in parameters)
    rounding = precision * max(1.0, CANCELLATION / (abs(point.loss) or 1.0)) * float(norm_of(point.tensors, group))
    if check.verdict != "disagrees" or check.error * abs(check.value) > rounding / (2 * step):
        return check
    return replace(check, verdict="not checked", reason=Reason("rounding_of_gradient"))


def _unless_padding(
    check: EigenvalueCheck,
    vector: Tensor,
    objective: Objective,
    engine: HvpEngine,
) -> EigenvalueCheck:
    """Return the check, undecided where only rows of padding tokens disagree: differences move them too."""
    sizes = [parameter.numel() for parameter in objective.parameters]
    if check.verdict != "disagrees" or vector.numel() != sum(sizes):  # of a shard it can't be seen
        return check
    pieces = zip(objective.parameters, vector.split(sizes), strict=True)
    tensors = without_padding_rows(objective, [piece.reshape(parameter.shape) for parameter, piece in pieces])
    inner = torch.cat([tensor.flatten() for tensor in tensors])
    if torch.equal(inner, vector):
        return check
    product = engine.operator(objective).matvec(inner)
    by_differences = CentralDifferenceHessian(objective, relative_step=min(check.steps)).matvec(inner)
    value, other = (dot(inner, along, objective.rows.group) for along in (product, by_differences))
    if abs(value - other) > AGREEMENT * abs(value):
        return check
    return replace(check, verdict="not checked", reason=Reason("padding_rows"))


def engine_error(engine: HvpEngine, checks: tuple[EigenvalueCheck, ...]) -> float | None:
    """Return the largest relative error of central differences along the vectors tried; `None` if exact."""
    if engine.error is None:
        return None
    return max(engine.error, *(check.error for check in checks if check.verdict != "not checked"), 0.0)


def product_error(engine: HvpEngine, checks: tuple[EigenvalueCheck, ...]) -> float | None:
    """Return the largest error of central differences along the vectors tried, relative to ‖H‖; `None` if exact.

    Along eigenvectors half the step shows three quarters of it, and other vectors may have more: it counts twice.
    """
    if engine.error is None:
        return None
    scale = max((abs(check.value) for check in checks), default=0.0) or 1.0
    decided = [check for check in checks if check.verdict != "not checked"]
    return max(engine.error, *(2 * check.error * abs(check.value) / scale for check in decided), 0.0)


def _no_eigenvalue(check: EigenvalueCheck, objective: Objective, engine: HvpEngine) -> MeasurementError:
    if engine.name == "central_difference":
        return MeasurementError(
            "no_eigenvalue",
            which=check.which,
            value=check.value,
            there=check.differences,
            change=check.error,
            because=engine.fallback,
        )
    return MeasurementError(
        "wrong_eigenvalue",
        which=check.which,
        value=check.value,
        there=check.differences,
        operations=tuple(doubtful_operations(objective)),
    )


def _off_parameters(objective: Objective, vector: Tensor, product: Tensor) -> tuple[str, ...]:
    """Return the names of the parameters whose part of a product is off, worst first; none if all are."""
    differences = CentralDifferenceHessian(objective)
    sizes = [parameter.numel() for parameter in objective.parameters]
    pairs = zip(objective.names, product.split(sizes), differences.matvec(vector).split(sizes), strict=True)
    errors = {name: norm(a - b) / (norm(b) or 1.0) for name, a, b in pairs}
    off = sorted((name for name, error in errors.items() if error > _OFF), key=lambda name: -errors[name])
    return tuple(off) if len(off) < len(errors) else ()
