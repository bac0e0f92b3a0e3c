# SPDX-License-Identifier: Apache-2.0
"""The generalized Gauss-Newton matrix: the Hessian without the curvature of the network itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .estimates import Estimate
from .operators import ObjectiveOperator, Variables
from .products import require_second_derivative
from .vectors import norm, segment_sums


MAX_OUTPUTS = 1024
"""Outputs per example up to which the exact trace is offered: the Hessian of a loss in them is held dense."""


class LossesOfOutputs(Variables, Protocol):
    """A mean loss that depends on the parameters through the outputs of a model."""

    @property
    def quantized(self) -> str | None:
        """Why exact second derivatives can't be had of quantized weights, or `None`."""

    def outputs_and_losses(self) -> Iterable[tuple[Sequence[Tensor], Tensor, int]]:
        """For each part, the outputs, the sum of the losses and the number of items, in one graph."""

    def cut(self, size: int) -> LossesOfOutputs:
        """The same mean, in parts of at most `size` examples."""


class GaussNewtonOperator(ObjectiveOperator):
    """`JᵀH_ℓJ`: J the Jacobian of the outputs by the parameters, H_ℓ the Hessian of the loss by the outputs.

    Positive semidefinite where the loss is convex in the outputs (cross-entropy, squared error), for which it is the
    Fisher matrix too (Martens, arXiv 1412.1193, section 9). `Jv` is had by differentiating `Jᵀu`, which is linear in
    u, by u (Schraudolph 2002, section 4 has the product; the trick is Townsend's of 2017), so that the k columns of a
    product share the forward and the first backward pass.

    Args:
        objective: The loss, in parts, with the outputs it is a function of.
        on_products: Called with the number of products just made; for progress bars.

    Raises:
        RuntimeError: If the weights are quantized, or, from a product, if an operation has no second derivative.
        ValueError: From the first product, if the loss depends on the parameters otherwise than through the outputs.
        FloatingPointError: From a product that is not finite.

    Example:
        >>> class Line:  # z = 3 x, loss z⁴: J = 3, H_ℓ = 12 z²
        ...     parameters = [torch.tensor([1.0], requires_grad=True)]
        ...     quantized = None
        ...     def outputs_and_losses(self):
        ...         z = 3 * self.parameters[0]
        ...         yield [z], (z**4).sum(), 1
        >>> GaussNewtonOperator(Line()).matvec(torch.ones(1))
        tensor([972.])
    """

    def __init__(self, objective: LossesOfOutputs, *, on_products: Callable[[int], object] | None = None):
        if objective.quantized is not None:
            raise RuntimeError(objective.quantized)
        super().__init__(objective, on_products=on_products)
        self._objective = objective
        self._checked = False

    def _parts(self, vectors: Tensor) -> Iterator[tuple[Iterable[Sequence[Tensor]], int]]:
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
    """Yields `Jᵀ H_ℓ (J v)` for each column v."""
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
    """`∂(of · weights)/∂by`, where some of `of`, or all, may be constant."""
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
    """Refuses a loss whose gradient is not that through its outputs alone, as with a penalty on the weights."""
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


def gauss_newton_trace(
    objective: LossesOfOutputs, segments: Sequence[Sequence[slice]]
) -> tuple[Estimate, tuple[Estimate, ...]]:
    """The trace of the generalized Gauss-Newton matrix, in all and by segment, without error and without probes.

    With H_ℓ = Σ λ q qᵀ for each example, the diagonal of JᵀH_ℓJ is Σ λ (Jᵀq)².
    Takes, for each example by itself, a forward pass and one backward pass for each eigenvalue of H_ℓ that is not
    zero: C − 1 for cross-entropy over C classes, times the labels of an example in token tasks.

    Args:
        objective: The loss, in parts, with the outputs it is a function of.
        segments: Slices of the rows; together they must hold each row once.

    Returns:
        The trace, and the traces of the segments' diagonal blocks, with standard error 0 and no product spent.

    Raises:
        RuntimeError: If the weights are quantized, or an operation of the loss has no second derivative.
        ValueError: If the loss depends on the parameters otherwise than through the outputs, an example has more than
            `MAX_OUTPUTS` of them, or the batches can't be cut into examples.

    Example:
        >>> class Line:  # z = 3 x, loss z⁴: J = 3, H_ℓ = 12 z²
        ...     parameters = [torch.tensor([1.0], requires_grad=True)]
        ...     quantized = None
        ...     def outputs_and_losses(self):
        ...         z = 3 * self.parameters[0]
        ...         yield [z], (z**4).sum(), 1
        ...     def cut(self, size):
        ...         return self
        >>> total, [segment] = gauss_newton_trace(Line(), [[slice(0, 1)]])
        >>> total.value
        972.0
    """
    if objective.quantized is not None:
        raise RuntimeError(objective.quantized)
    parameters = objective.parameters
    diagonal = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    items = 0
    for outputs, loss, count in objective.cut(1).outputs_and_losses():
        if items == 0:
            _require_no_other_path(outputs, loss, parameters)
        for eigenvalue, cotangents in _loss_eigenpairs(outputs, loss):
            row = torch.autograd.grad(
                outputs, parameters, grad_outputs=cotangents, retain_graph=True, materialize_grads=True
            )
            for place, piece in zip(diagonal, row, strict=True):
                place.addcmul_(piece, piece, value=eigenvalue)
        items += count
    sums = np.array(segment_sums(torch.cat([place.flatten() for place in diagonal]), segments)) / items

    def exactly(value: float) -> Estimate:
        value = float(value)
        return Estimate(value, value, value, method="exact", hvps=0, converged=True, std_error=0.0)

    return exactly(sums.sum()), tuple(exactly(value) for value in sums)


def _loss_eigenpairs(outputs: Sequence[Tensor], loss: Tensor) -> Iterator[tuple[float, list[Tensor]]]:
    """Yields the eigenvalues of H_ℓ that are not zero, with eigenvectors shaped like the outputs."""
    sizes = [output.numel() for output in outputs]
    if sum(sizes) > MAX_OUTPUTS:
        raise ValueError(
            f"An example has {sum(sizes)} outputs, and the exact trace is offered up to {MAX_OUTPUTS}. "
            "Estimate it by `hutchinson` on a `GaussNewtonOperator`."
        )
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
