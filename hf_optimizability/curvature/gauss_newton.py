# SPDX-License-Identifier: Apache-2.0
"""The generalized Gauss-Newton matrix: the Hessian without the curvature of the network itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..linalg.batch_traces import BatchTraces, exact_estimates
from ..linalg.estimate import Estimate
from ..linalg.trace import HutchinsonAccumulator
from ..linalg.trace_result import TraceResult
from ..linalg.vectors import Segments, norm, segment_sums
from .empirical_risk import EmpiricalRisk
from .hessian import ObjectiveOperator
from .hessian_vector_product import require_second_derivative
from .layer_decoupled import DecoupledHessian


MAX_OUTPUTS = 1024
"""Outputs per example up to which the exact trace is offered: the Hessian of a loss in them is held dense."""

MAX_SPLIT_OUTPUTS = 16
"""Outputs per example up to which `split_trace` is offered. On a CPU its exact part takes the time of 1.1 gradients
(MobileNetV2) to 2.3 (MiniLM-L6) for each output, so at 16 that of 9 to 18 products; probes of the decoupled Hessian
take 20 (MiniLM-L6) to 62 products (MobileNetV2) for a trace to 10 %."""

_ROUNDING = 1e-9
"""Relative error of a sum of shares of items."""

_SAME_MATRIX = 0.05
"""Relative difference of two products above which they are not of one matrix, whatever rounding does to them."""


class GaussNewtonOperator(ObjectiveOperator):
    """`JᵀH_ℓJ`: J the Jacobian of the outputs by the parameters, H_ℓ the Hessian of the loss by the outputs.

    Positive semidefinite where the loss is convex in the outputs (cross-entropy, squared error), for which it is the
    Fisher matrix too (Martens, arXiv 1412.1193, section 9). `Jv` is the derivative by u of `Jᵀu`, which is linear in u
    (Schraudolph 2002, section 4 has the product; the trick is Townsend's of 2017), so that the k columns of a
    product share the forward and the first backward pass.

    Args:
        objective: The loss, in parts, with the outputs it is a function of.

    Raises:
        RuntimeError: If the weights are quantized, or, from a product, if an operation has no second derivative.
        ValueError: From the first product, if the loss depends on the parameters otherwise than through the outputs.
        FloatingPointError: From a product that is not finite.

    Example:
        >>> class Line(EmpiricalRisk):  # z = 3 x, loss z⁴: J = 3, H_ℓ = 12 z²
        ...     parameters = [torch.tensor([1.0], requires_grad=True)]
        ...     def outputs_and_losses(self):
        ...         z = 3 * self.parameters[0]
        ...         yield [z], (z**4).sum(), 1
        >>> GaussNewtonOperator(Line()).matvec(torch.ones(1))
        tensor([972.])
    """

    def __init__(
        self,
        objective: EmpiricalRisk,
    ):
        if objective.second_derivative_blocker is not None:
            raise objective.second_derivative_blocker
        super().__init__(objective)
        self._objective = objective
        self._checked = False

    def _parts(self, vectors: Tensor) -> Iterator[tuple[Iterable[Sequence[Tensor]], float]]:
        parameters = self._objective.parameters
        columns = [self._split(vector, parameters) for vector in vectors]
        for outputs, loss, items in self._objective.outputs_and_losses():
            if not self._checked:
                _require_no_other_path(outputs, loss, parameters)
                self._checked = True
            yield _products(outputs, loss, parameters, columns), items


def _products(
    outputs: Sequence[Tensor], loss: Tensor, parameters: Sequence[Tensor], columns: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield `Jᵀ H_ℓ (J v)` for each column v."""
    slopes = torch.autograd.grad(loss, outputs, create_graph=True, materialize_grads=True)
    cotangents = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    pulled = torch.autograd.grad(
        outputs, parameters, grad_outputs=cotangents, create_graph=True, materialize_grads=True
    )
    require_second_derivative([*slopes, *pulled])
    for vector in columns:
        pushed = _derivative(pulled, cotangents, vector)
        curved = _derivative(slopes, outputs, pushed)
        yield torch.autograd.grad(outputs, parameters, grad_outputs=curved, retain_graph=True, materialize_grads=True)


def _derivative(of: Sequence[Tensor], by: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return `∂(of · weights)/∂by`, where some of `of`, or all, may be constant."""
    live = [index for index, tensor in enumerate(of) if tensor.requires_grad]
    if not live:
        return tuple(torch.zeros_like(tensor) for tensor in by)
    return torch.autograd.grad(
        [of[index] for index in live],
        by,
        grad_outputs=[weights[index] for index in live],
        retain_graph=True,
        materialize_grads=True,
    )


def _require_no_other_path(outputs: Sequence[Tensor], loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """Refuse a loss whose gradient is not that through its outputs alone, as with a penalty on the weights."""
    direct = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    slopes = torch.autograd.grad(loss, outputs, retain_graph=True, materialize_grads=True)
    through = torch.autograd.grad(outputs, parameters, grad_outputs=slopes, retain_graph=True, materialize_grads=True)
    missing = sum(norm((a - b).flatten()) ** 2 for a, b in zip(direct, through, strict=True))
    whole = sum(norm(a.flatten()) ** 2 for a in direct)
    # Both gradients come from one graph, so that they differ by rounding alone.
    if missing > torch.finfo(direct[0].dtype).eps * whole:
        raise ValueError(
            "The loss depends on the parameters otherwise than through the model's logits (a penalty on the weights, "
            "an auxiliary loss, a loss of hidden states), so that it has no Gauss-Newton matrix in them. "
            "Measure the Hessian instead, or pass a `loss_fn` of the logits alone."
        )


def _require_no_other_curvature(outputs: Sequence[Tensor], loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """Refuse a loss with a term in the weights alone whose gradient is 0 at present, such as a penalty at its centre.

    Where an operation has no second derivative, nothing is refused: then the trace is not split either.
    """
    direct = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    slopes = torch.autograd.grad(loss, outputs, create_graph=True, materialize_grads=True)
    through = torch.autograd.grad(outputs, parameters, grad_outputs=slopes, create_graph=True, materialize_grads=True)
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    rest, whole = (
        math.fsum(float(norm(piece.flatten())) ** 2 for piece in _derivative(slope, parameters, vectors))
        for slope in ([a - b for a, b in zip(direct, through, strict=True)], direct)
    )
    if rest > torch.finfo(direct[0].dtype).eps * whole:
        raise ValueError("The loss has a term in the parameters alone, so that its Hessian can't be split.")


def gauss_newton_trace(
    objective: EmpiricalRisk,
    segments: Segments,
    *,
    max_outputs: int = MAX_OUTPUTS,
) -> tuple[Estimate, tuple[Estimate, ...]]:
    """Return the trace of the generalized Gauss-Newton matrix, in all and by segment, exactly and without probes.

    With H_ℓ = Σ λ q qᵀ for each example, the diagonal of JᵀH_ℓJ is Σ λ (Jᵀq)².
    Takes, for each example by itself, a forward pass and one backward pass for each eigenvalue of H_ℓ that is not
    zero: C − 1 for cross-entropy over C classes, times the labels of an example in token tasks. And one forward pass
    over the parts.

    Args:
        objective: The loss, in parts, with the outputs it is a function of.
        segments: Slices of the rows; together they must hold each row once.
        max_outputs: Most outputs of an example to do this for.

    Returns:
        The trace, and the traces of the segments' diagonal blocks, with standard error 0 and no product spent; the
        `data_std_error` is the jackknife over the parts.

    Raises:
        RuntimeError: If the weights are quantized, or an operation of the loss has no second derivative.
        ValueError: If the loss depends on the parameters otherwise than through the outputs, an example has more than
            `max_outputs` of them, or the batches can't be cut into examples whose losses add up to the batch's.
        FloatingPointError: If the loss is not finite.

    Example:
        >>> class Line(EmpiricalRisk):  # z = 3 x, loss z⁴: J = 3, H_ℓ = 12 z²
        ...     parameters = [torch.tensor([1.0], requires_grad=True)]
        ...     def outputs_and_losses(self):
        ...         z = 3 * self.parameters[0]
        ...         yield [z], (z**4).sum(), 1
        ...     def cut(self, size):
        ...         return self
        >>> total, [segment] = gauss_newton_trace(Line(), [[slice(0, 1)]])
        >>> total.value
        972.0
    """
    known = _gauss_newton_part(objective, segments, max_outputs=max_outputs)
    return exact_estimates(known.traces, known.items, hvps=0)


def split_trace(
    objective: EmpiricalRisk,
    segments: Segments,
    *,
    tolerance: float,
    max_hvps: int,
    seed: int,
) -> TraceResult:
    """Estimate the trace of the Hessian; compute that of its Gauss-Newton part exactly.

    H = G + R with `G = JᵀH_ℓJ` and `R = Σ ∂ℓ/∂zᵢ ∇²zᵢ` over the outputs z (Schraudolph 2002, section 3; Martens, arXiv
    1412.1193, section 8). `gauss_newton_trace` has tr G without probes, which leaves their variance to R: to nothing
    in a ReLU network, whose outputs have no curvature on the diagonal. R is the Hessian of `Σ sᵢ zᵢ` with the slopes
    s = ∂ℓ/∂z held constant, so that `DecoupledHessian` gives products with a smaller matrix of the same diagonal.

    The exact part costs, for each example by itself, a forward pass and a backward pass for each eigenvalue of H_ℓ
    that is not zero: C − 1 for cross-entropy over C classes. Worth it where R's probes vary little: on MobileNetV2,
    decoupled, they are 0, exactly; on a MiniLM-L6 after 25 steps, they vary nearly as much as the Hessian's.

    Args:
        objective: The loss, in parts, with the outputs it is a function of.
        segments: Slices of the rows; together they must hold each row once.
        tolerance: Standard error to stop at, relative to the whole trace.
        max_hvps: Most products with R to spend, at least 2.
        seed: Seed of the probes.

    Returns:
        As `hutchinson`, with the standard error of R's trace, `hvps` the products with R, and no `frobenius_squared`.

    Raises:
        RuntimeError: If the weights are quantized, or an operation has no second derivative.
        ValueError: If the loss depends on the parameters otherwise than through the outputs, an example has more than
            `MAX_SPLIT_OUTPUTS` of them, or the batches can't be cut into examples whose losses add up to the batch's.
            Then use `hutchinson` on a `DecoupledHessian`.
        FloatingPointError: If the loss or a product is not finite.

    Example:
        >>> class Cubic(EmpiricalRisk):  # z = x³, loss z²: G = 2 (3 x²)², R = 2 z · 6 x
        ...     parameters = [torch.tensor([1.0], requires_grad=True)]
        ...     def outputs_and_losses(self):
        ...         z = self.parameters[0] ** 3
        ...         yield [z], (z**2).sum(), 1
        ...     def cut(self, size):
        ...         return self
        >>> split_trace(Cubic(), [[slice(0, 1)]], tolerance=0.1, max_hvps=8, seed=0).total.value
        30.0
    """
    known = _gauss_newton_part(objective, segments, max_outputs=MAX_SPLIT_OUTPUTS)
    rest = DecoupledHessian(_WithSlopesHeld(objective))
    probes = HutchinsonAccumulator(
        rest,
        segments,
        exact_traces=np.average(known.traces, axis=0, weights=known.items),
        batch_traces=BatchTraces(segments, known.traces),
    )
    generator = torch.Generator().manual_seed(seed)
    method = "gauss-newton + hutchinson"
    result = probes.run(generator, tolerance=tolerance, max_hvps=max_hvps, method=method)
    assert result.diagonal is not None
    return replace(result, frobenius_squared=None, diagonal=known.diagonal.add_(result.diagonal))


class _WithSlopesHeld(EmpiricalRisk):
    """The mean of `Σ sᵢ zᵢ` with constant slopes s = ∂ℓ/∂z. Its Hessian is R, what the network itself curves."""

    def __init__(self, objective: EmpiricalRisk):
        self._objective = objective
        self.group, self.hvp_counter = objective.group, objective.hvp_counter

    @property
    def parameters(self) -> Sequence[Tensor]:
        return self._objective.parameters

    def losses(self) -> Iterator[tuple[Tensor, float]]:
        for outputs, loss, items in self._objective.outputs_and_losses():
            slopes = torch.autograd.grad(loss, outputs, retain_graph=True, materialize_grads=True)
            yield torch.stack([(s * z).sum() for s, z in zip(slopes, outputs, strict=True)]).sum(), items


class _GaussNewtonPart(NamedTuple):
    """Of the Gauss-Newton matrix, traces of shape (parts, segments), items of each part, and the whole diagonal."""

    traces: np.ndarray
    items: list[float]
    diagonal: Tensor


def _gauss_newton_part(objective: EmpiricalRisk, segments: Segments, *, max_outputs: int) -> _GaussNewtonPart:
    if objective.second_derivative_blocker is not None:
        raise objective.second_derivative_blocker
    sums, items = [], []
    diagonal = _flat_zeros(objective.parameters)
    group = objective.group
    with group.propagate_errors():  # a loss that can't be split is not fatal: the caller falls back to Hutchinson
        for part, count in _diagonal_by_part(objective, max_outputs=max_outputs):
            sums.append(segment_sums(part, segments))
            items.append(count)
            diagonal += part
    group.all_reduce_(diagonal)
    sums, items = group.all_gather_interleaved(sums), group.all_gather_interleaved(items)
    return _GaussNewtonPart(np.array(sums) / np.array(items)[:, None], items, diagonal.div_(sum(items)))


def _diagonal_by_part(objective: EmpiricalRisk, *, max_outputs: int) -> Iterator[tuple[Tensor, float]]:
    """Yield the diagonal of JᵀH_ℓJ, summed over each part's items, and their number."""
    parameters = objective.parameters
    examples = iter(objective.cut(1).outputs_and_losses())
    first = True
    for outputs, loss, items in objective.outputs_and_losses():
        whole = float(loss.detach())
        if not math.isfinite(whole):
            raise FloatingPointError("The loss of a batch is not finite, so that it has no curvature.")
        diagonal, probe = _flat_zeros(parameters), _Probe(parameters)
        counted, apart = 0.0, 0.0
        while counted < items * (1 - _ROUNDING) and (example := next(examples, None)) is not None:
            single, single_loss, count = example
            _require_few_outputs(single, max_outputs)
            if first:
                _require_no_other_path(single, single_loss, parameters)
                _require_no_other_curvature(single, single_loss, parameters)
                first = False
            _add_diagonal(single, single_loss, parameters, diagonal, probe)
            counted, apart = counted + count, apart + float(single_loss.detach())
        # Rounding differs with the shapes; a loss near 0 is a difference of logits.
        if not math.isclose(counted, items, rel_tol=_ROUNDING) or not math.isclose(
            whole, apart, rel_tol=1e-3, abs_tol=1e-5 * items
        ):
            raise _coupled(
                f"a batch has {items} items and {whole:.6g} as the sum of their losses, its examples one by one have "
                f"{counted} and {apart:.6g}"
            )
        rounding = 4 * torch.finfo(loss.dtype).eps * items / abs(whole) if whole else math.inf
        probe.compare(outputs, loss, tolerance=min(1e-3 + rounding, _SAME_MATRIX))
        yield diagonal, items


class _Probe:
    """A product with JᵀH_ℓJu, u random, from the examples of a batch one by one, to compare with the batch's own.

    Losses and slopes do not show each coupling: where all predictions are alike, as with a head at zero, class weights
    and terms in the mean prediction leave them as they are, and not the matrix.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self._parameters = parameters
        self._directions: list[list[Tensor]] = []
        self._product = _flat_zeros(parameters)
        self._generator = torch.Generator().manual_seed(0)

    def draw(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return random directions, shaped like the outputs of the next example."""
        drawn = [torch.randn(output.shape, generator=self._generator).to(output) for output in outputs]
        self._directions.append(drawn)
        return drawn

    def add(self, row: Tensor, weight: float) -> None:
        """Add `λ (q · u) Jᵀq`, for an eigenpair of an example's H_ℓ and its part u of the directions."""
        self._product.add_(row, alpha=weight)

    def compare(self, outputs: Sequence[Tensor], loss: Tensor, *, tolerance: float) -> None:
        """Raise a `ValueError` unless the whole batch has the same product."""
        slopes = torch.autograd.grad(loss, outputs, create_graph=True, materialize_grads=True)
        kinds = zip(*self._directions, strict=True)
        directions = [_in_batch(list(pieces), slope.detach()) for pieces, slope in zip(kinds, slopes, strict=True)]
        curved = _derivative(slopes, outputs, directions)
        whole = torch.autograd.grad(outputs, self._parameters, grad_outputs=curved, materialize_grads=True)
        places = self._product.split([parameter.numel() for parameter in self._parameters])
        missing = sum(norm(a.flatten() - b.to(a)) ** 2 for a, b in zip(whole, places, strict=True))
        if math.sqrt(missing) > tolerance * math.sqrt(sum(norm(piece.flatten()) ** 2 for piece in whole)):
            raise _coupled("the curvature of a batch's loss in the logits is not that of its examples one by one")


def _in_batch(pieces: list[Tensor], slope: Tensor) -> Tensor:
    """Lay what belongs to single examples out like the whole batch's; zeros for examples without items."""
    rows = [torch.atleast_1d(piece) for piece in pieces]
    joined, whole = torch.cat(rows), torch.atleast_1d(slope)
    if joined.shape == whole.shape:
        return joined.reshape(slope.shape)
    counted = whole.flatten(1).any(dim=1) if whole.dim() > 1 else whole != 0
    if joined.shape[1:] != whole.shape[1:] or len(joined) != len(rows) or len(rows) != int(counted.sum()):
        raise _coupled(f"the logits of a batch have the shape {tuple(whole.shape)}, together {tuple(joined.shape)}")
    laid_out = torch.zeros_like(whole)
    laid_out[counted] = joined
    return laid_out


def _coupled(reason: str) -> ValueError:
    """Return the error for a loss that couples the examples of a batch: one by one, they have another matrix."""
    return ValueError(
        f"The loss is not a mean over examples: {reason} (class weights, a contrastive loss, a term in the mean "
        "prediction, a layer that mixes the examples). Estimate the trace by `hutchinson`, which takes whole batches."
    )


def _flat_zeros(parameters: Sequence[Tensor]) -> Tensor:
    double = any(parameter.dtype == torch.float64 for parameter in parameters)
    size = sum(parameter.numel() for parameter in parameters)
    return torch.zeros(size, dtype=torch.float64 if double else torch.float32, device=parameters[0].device)


def _add_diagonal(
    outputs: Sequence[Tensor], loss: Tensor, parameters: Sequence[Tensor], diagonal: Tensor, probe: _Probe
) -> None:
    """Add the diagonal of one example's JᵀH_ℓJ."""
    direction = probe.draw(outputs)
    for eigenvalue, cotangents in _loss_eigenpairs(outputs, loss):
        pieces = torch.autograd.grad(
            outputs, parameters, grad_outputs=cotangents, retain_graph=True, materialize_grads=True
        )
        row = torch.cat([piece.reshape(-1).to(diagonal) for piece in pieces])
        diagonal.addcmul_(row, row, value=eigenvalue)
        along = sum(float((q * u).sum()) for q, u in zip(cotangents, direction, strict=True))
        probe.add(row, eigenvalue * along)


def _require_few_outputs(outputs: Sequence[Tensor], most: int) -> None:
    number = sum(output.numel() for output in outputs)
    if number > most:
        raise ValueError(
            f"An example has {number} outputs, and the exact trace of the Gauss-Newton matrix is offered up to {most} "
            "here. Estimate the trace by `hutchinson`: of this matrix on a `GaussNewtonOperator`, of the Hessian on a "
            "`DecoupledHessian`."
        )


def _loss_eigenpairs(outputs: Sequence[Tensor], loss: Tensor) -> Iterator[tuple[float, list[Tensor]]]:
    """Yield the eigenvalues of H_ℓ that are not zero, with eigenvectors shaped like the outputs."""
    sizes = [output.numel() for output in outputs]
    slopes = torch.autograd.grad(loss, outputs, create_graph=True, materialize_grads=True)
    require_second_derivative(slopes)
    unit_vectors = torch.eye(sum(sizes), dtype=loss.dtype, device=loss.device)
    rows = [_derivative(slopes, outputs, _shaped(vector, outputs)) for vector in unit_vectors]
    hessian = torch.stack([torch.cat([piece.flatten() for piece in row]) for row in rows]).double()
    eigenvalues, eigenvectors = torch.linalg.eigh((hessian + hessian.T) / 2)
    rounding = sum(sizes) * torch.finfo(loss.dtype).eps * eigenvalues.abs().max()
    for eigenvalue, vector in zip(eigenvalues, eigenvectors.T, strict=True):
        if eigenvalue.abs() > rounding:
            yield float(eigenvalue), _shaped(vector, outputs)


def _shaped(vector: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    pieces = zip(vector.split([output.numel() for output in outputs]), outputs, strict=True)
    return [piece.reshape(output.shape).to(output) for piece, output in pieces]
