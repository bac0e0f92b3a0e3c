# SPDX-License-Identifier: Apache-2.0
"""The losses of single examples, out of the pass of a whole batch.

The loss functions of torch reduce the losses of a batch's items to one number. Held around a forward pass, the mode
here keeps them apart, by example, and weights them before they are reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function on a batch's outputs.

    Attributes:
        outputs: What the loss is a function of, of shape (items, classes) or (items,).
        losses: The losses of the items before they were reduced, of shape (items,).
        count: What the sum of the losses is divided by; 1 for a sum.
        loss: `loss(z)` gives the losses at other outputs, of shape (items,).
        curvature: `curvature(z, v)` gives vᵀ(∂²ℓ/∂z²)v of each item, of shape (items,).
    """

    outputs: Tensor
    losses: Tensor
    count: float
    loss: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor], Tensor]


class ExampleLosses(TorchFunctionMode):
    """Keeps the losses of a batch's examples apart, and weights them, while a model computes its loss.

    Knows `cross_entropy`, `mse_loss`, `binary_cross_entropy_with_logits`, `huber_loss` and `smooth_l1_loss`, called on
    tensors whose items lie example by example, as the heads of Transformers do. Class weights are not known: their
    mean is over other weights.

    Args:
        examples: How many examples the batch has.
        weights: The weight of each example, of shape (examples,); 1 by default.

    Attributes:
        calls: The calls that were made, in order.
        unknown: The name of a loss function that was called in a way that is not known, if one was.

    Example:
        >>> logits, labels = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> with ExampleLosses(2, torch.tensor([1.0, 3.0])) as mode:
        ...     loss = F.cross_entropy(logits, labels)
        >>> [round(value, 3) for value in mode.calls[0].losses.tolist()], round(loss.item(), 3)
        ([0.693, 2.127], 3.537)
    """

    def __init__(self, examples: int, weights: Tensor | None = None):
        super().__init__()
        self._examples = examples
        self._weights = weights
        self.calls: list[LossCall] = []
        self.unknown: str | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        apart = _APART.get(func)
        if apart is None:
            return func(*args, **(kwargs or {}))
        items = apart(*args, **(kwargs or {}))
        if items is None or items.losses.numel() % self._examples:
            self.unknown = func.__name__
            return func(*args, **(kwargs or {}))
        return self._reduce(items)

    def _reduce(self, items: _Items) -> Tensor:
        losses = items.losses
        if self._weights is not None:
            by_example = losses.reshape(self._examples, -1) * self._weights.to(losses)[:, None]
            losses = by_example.reshape(losses.shape)
        reduced = losses.sum() / (items.count or 1.0)
        self.calls.append(
            LossCall(items.outputs, items.losses.flatten(), items.count or 1.0, items.loss, items.curvature)
        )
        return losses if items.count is None else reduced

    def by_example(self, loss: Tensor) -> Tensor | None:
        """Return each example's part of a batch's mean loss, of shape (examples,), in float64.

        Args:
            loss: The loss that the model or its Trainer made of the calls: their sum, or that times a number.

        Returns:
            Parts that sum to the loss; `None` where no known loss function was called, or another one too.
        """
        return self._parts(loss, [call.losses for call in self.calls])

    def item_weights(self, loss: Tensor) -> list[float]:
        """Return by how much the loss of an item of each call counts in a batch's loss; 0 for a call without a loss.

        Args:
            loss: As for `by_example`.
        """
        factor = self._factor(loss) or 0.0
        return [factor / call.count if call.losses.any() else 0.0 for call in self.calls]

    def rest(self, loss: Tensor) -> Tensor | None:
        """Return what a loss has beyond the calls, with its graph; `None` where that is not known.

        Args:
            loss: As for `by_example`.
        """
        factor = self._factor(loss)
        if factor is None:
            return None
        return loss - factor * torch.stack([call.losses.sum() / call.count for call in self.calls]).sum()

    def losses_at(self, loss: Tensor, outputs: Iterable[Tensor]) -> Tensor | None:
        """Return each example's part of the loss at other outputs, of shape (examples,), in float64.

        Args:
            loss: As for `by_example`.
            outputs: Outputs of each call.
        """
        return self._parts(loss, [call.loss(z.double()) for call, z in zip(self.calls, outputs, strict=True)])

    def curvature_by_example(self, loss: Tensor, outputs: Iterable[Tensor], moves: Iterable[Tensor]) -> Tensor | None:
        """Return `(Jv)ᵀH_ℓ(Jv)` of each example's part of the loss, of shape (examples,), in float64.

        Args:
            loss: As for `by_example`.
            outputs: The outputs of each call to take H_ℓ at.
            moves: The change Jv of the outputs of each call.
        """
        calls = zip(self.calls, outputs, moves, strict=True)
        return self._parts(loss, [call.curvature(output.double(), move.double()) for call, output, move in calls])

    def _parts(self, loss: Tensor, values: Sequence[Tensor]) -> Tensor | None:
        factor = self._factor(loss)
        if factor is None:
            return None
        parts = [
            value.double().reshape(self._examples, -1).sum(1) / call.count
            for call, value in zip(self.calls, values, strict=True)
        ]
        return factor * torch.stack(parts).sum(0)

    def _factor(self, loss: Tensor) -> float | None:
        if not self.calls or self.unknown is not None:
            return None
        total = sum(float(call.losses.detach().double().sum()) / call.count for call in self.calls)
        return float(loss.detach()) / total if total else self.calls[0].count  # a sum over the items


@dataclass(frozen=True)
class _Items:
    """The losses of items before their reduction; `count` is what a mean divides by, 1 for a sum, else `None`."""

    outputs: Tensor
    losses: Tensor
    count: float | None
    loss: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor], Tensor]


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> _Items | None:
    if weight is not None or size_average is not None or reduce is not None or input.dim() < 2:
        return None
    losses = F.cross_entropy(
        input, target, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if target.is_floating_point():
        counted = torch.ones(losses.shape, dtype=torch.bool, device=losses.device)
    else:
        counted = target != ignore_index
    outputs = input.movedim(1, -1).reshape(-1, input.shape[1])
    flat = target.movedim(1, -1).reshape(outputs.shape) if target.is_floating_point() else target.flatten()

    def loss(logits: Tensor) -> Tensor:
        labels = flat.to(logits) if flat.is_floating_point() else flat
        return F.cross_entropy(
            logits, labels, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
        )

    def curvature(logits: Tensor, move: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        mean = (probabilities * move).sum(-1, keepdim=True)
        return (probabilities * (move - mean).square()).sum(-1) * counted.flatten()

    return _Items(outputs, losses, _count(int(counted.sum()), reduction), loss, curvature)


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> _Items | None:
    if weight is not None or size_average is not None or reduce is not None or input.shape != target.shape:
        return None
    losses = F.mse_loss(input, target, reduction="none")
    wanted = target.flatten()
    return _Items(
        input.flatten(),
        losses,
        _count(losses.numel(), reduction),
        lambda outputs: (outputs - wanted.to(outputs)).square(),
        lambda outputs, move: 2 * move.square(),
    )


def _binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> _Items | None:
    if weight is not None or pos_weight is not None or size_average is not None or reduce is not None:
        return None
    losses = F.binary_cross_entropy_with_logits(input, target, reduction="none")

    wanted = target.flatten()

    def loss(logits: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, wanted.to(logits), reduction="none")

    def curvature(logits: Tensor, move: Tensor) -> Tensor:
        probabilities = logits.sigmoid()
        return probabilities * (1 - probabilities) * move.square()

    return _Items(input.flatten(), losses, _count(losses.numel(), reduction), loss, curvature)


def _huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> _Items | None:
    if weight is not None or input.shape != target.shape:
        return None
    losses = F.huber_loss(input, target, reduction="none", delta=delta)
    wanted, inside = target.flatten(), ((input - target).abs() < delta).flatten()
    return _Items(
        input.flatten(),
        losses,
        _count(losses.numel(), reduction),
        lambda outputs: F.huber_loss(outputs, wanted.to(outputs), reduction="none", delta=delta),
        lambda outputs, move: inside * move.square(),
    )


def _smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> _Items | None:
    if size_average is not None or reduce is not None or input.shape != target.shape:
        return None
    losses = F.smooth_l1_loss(input, target, reduction="none", beta=beta)
    wanted, inside = target.flatten(), ((input - target).abs() < beta).flatten()
    return _Items(
        input.flatten(),
        losses,
        _count(losses.numel(), reduction),
        lambda outputs: F.smooth_l1_loss(outputs, wanted.to(outputs), reduction="none", beta=beta),
        lambda outputs, move: inside * move.square() / (beta or 1.0),
    )


def _count(items: int, reduction: str) -> float | None:
    return {"mean": float(items), "sum": 1.0}.get(reduction)


_APART: dict[Callable[..., Any], Callable[..., _Items | None]] = {
    F.cross_entropy: _cross_entropy,
    F.mse_loss: _mse_loss,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy_with_logits,
    F.huber_loss: _huber_loss,
    F.smooth_l1_loss: _smooth_l1_loss,
}
