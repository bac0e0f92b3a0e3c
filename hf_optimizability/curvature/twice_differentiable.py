# SPDX-License-Identifier: Apache-2.0
"""Operations in forms whose second derivative is cheap: convolution, batch normalization in eval mode, and GELU.

The first two are bilinear, `y = B(x, w) + b`, so their second derivative is made of the same three maps as the first:
B itself and its two adjoints. Torch instead takes grouped convolutions apart, group by group (a depthwise one has
hundreds), and differentiates a batch normalization as if its statistics came from the batch. The second derivative of
GELU is the same for all vectors that a graph is multiplied with; torch computes it for each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


aten = torch.ops.aten

Mask = tuple[bool, bool, bool]
"""Which of the gradients by x, w and b are asked for."""


class CheapSecondDerivatives(TorchFunctionMode):
    """Inside, `conv1d` to `conv3d`, `batch_norm` by running statistics, and `gelu` have cheap second derivatives.

    They run the kernels that they run outside, forward and in the first backward pass, so values and gradients stay
    what they are, to rounding: on a CPU, images are kept in the channels-last format, where depthwise kernels are
    several times as fast. Derivatives of any order are right. To be held around the forward pass; what was recorded
    inside keeps its cheap second derivative outside. Everything else, such as transposed convolutions, other norms,
    calls under autocast and on tensor subclasses, runs as it is.

    Not for the transforms of `torch.func`, which refuse such functions.

    Example:
        >>> x, w = torch.ones(1, 2, 3, requires_grad=True), torch.ones(2, 1, 3, requires_grad=True)
        >>> with CheapSecondDerivatives():
        ...     y = F.conv1d(x, w, groups=2)
        >>> (slope,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
        >>> torch.autograd.grad(slope.sum(), w)[0].flatten()
        tensor([6., 6., 6., 6., 6., 6.])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        arguments = kwargs or {}
        if func in _REPLACEMENTS and all(kind in (Tensor, nn.Parameter) for kind in types):
            result = _REPLACEMENTS[func](*args, **arguments)
            if result is not None:
                return result
        return func(*args, **arguments)


class _Bilinear(ABC):
    """A map `y = B(x, w) + b`, linear in x but for an offset, and linear in w."""

    @abstractmethod
    def apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """`B(x, w) + b`."""

    @abstractmethod
    def adjoints(self, gy: Tensor, x: Tensor, w: Tensor, mask: Mask) -> tuple[Tensor | None, ...]:
        """The gradients of `⟨gy, B(x, w) + b⟩` by x, w and b, as far as `mask` asks for them."""

    def without_offset(self) -> _Bilinear:
        """The part that is linear in x: how y changes with x."""
        return self


@dataclass(frozen=True)
class _Convolution(_Bilinear):
    """A convolution of any number of dimensions; the arguments are those of `torch.convolution`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return aten.convolution(x, w, b, *self._geometry)

    def adjoints(self, gy: Tensor, x: Tensor, w: Tensor, mask: Mask) -> tuple[Tensor | None, ...]:
        return aten.convolution_backward(gy, x, w, [len(w)], *self._geometry, mask)

    @property
    def _geometry(self) -> tuple[Any, ...]:
        not_transposed, no_output_padding = False, [0] * len(self.stride)
        return self.stride, self.padding, self.dilation, not_transposed, no_output_padding, self.groups


@dataclass(frozen=True)
class _FixedNormalization(_Bilinear):
    """`y = (x − mean) / √(variance + eps) · w + b` for each channel, of fixed mean and variance."""

    mean: Tensor
    variance: Tensor
    eps: float

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return aten.native_batch_norm(x, w, b, self.mean, self.variance, False, 0.0, self.eps)[0]

    def adjoints(self, gy: Tensor, x: Tensor, w: Tensor, mask: Mask) -> tuple[Tensor | None, ...]:
        statistics = (self.mean, self.variance, None, None)
        # Of channels-last images, torch 2.13 reads a strided w as if it were contiguous.
        return aten.native_batch_norm_backward(gy, x, w.contiguous(), *statistics, False, self.eps, mask)

    def without_offset(self) -> _Bilinear:
        return replace(self, mean=torch.zeros_like(self.mean))


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bilinear: _Bilinear, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.bilinear = bilinear
        ctx.save_for_backward(x, w)
        return bilinear.apply(x, w, b)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        return None, *_Adjoints.apply(ctx.bilinear, gy, x, w, ctx.needs_input_grad[1:])


class _Adjoints(torch.autograd.Function):
    """The gradients by x, w and b, as functions of gy, x and w: `B*(gy, w)`, `B*(gy, x)` and a sum of gy."""

    @staticmethod
    def forward(ctx: Any, bilinear: _Bilinear, gy: Tensor, x: Tensor, w: Tensor, mask: Mask) -> tuple[Any, ...]:
        ctx.bilinear = bilinear
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gy, x, w)
        return tuple(bilinear.adjoints(gy, x, w, mask))

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of `⟨vx, gx⟩ + ⟨vw, gw⟩ + ⟨vb, gb⟩ = ⟨gy, B(vx, w) + B(x, vw) + vb⟩` by gy, x and w.

        Of differentiable operations, so that derivatives of a higher order are right as well, if not cheap.
        """
        gy, x, w = ctx.saved_tensors
        _, by_gy, by_x, by_w, _ = ctx.needs_input_grad
        for_gy = for_x = for_w = None
        if vx is not None:
            linear = ctx.bilinear.without_offset()
            for_w = linear.adjoints(gy, vx, w, (False, True, False))[1] if by_w else None
            for_gy = linear.apply(vx, w, vb) if by_gy else None
        if vw is not None:
            for_x = ctx.bilinear.adjoints(gy, x, vw, (True, False, False))[0] if by_x else None
            if by_gy:
                more = ctx.bilinear.apply(x, vw, vb if vx is None else None)
                for_gy = more if for_gy is None else for_gy + more
        if by_gy and for_gy is None and vb is not None:
            for_gy = vb.reshape(-1, *[1] * (gy.dim() - 2)).expand_as(gy)
        return None, for_gy, for_x, for_w, None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return aten.gelu(x)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Tensor:
        return _GeluSlope.apply(gy, *ctx.saved_tensors)


class _GeluSlope(torch.autograd.Function):
    """`gy GELU'(x)`, which keeps `gy GELU''(x)` for the next vector."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gy, x)
        ctx.curvature = None
        return aten.gelu_backward(gy, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        gy, x = ctx.saved_tensors
        curvature = ctx.curvature
        if curvature is None or torch.is_grad_enabled():  # then it must be part of the graph of a higher derivative
            density = (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
            curvature = gy * density * (2 - x * x)
        if not torch.is_grad_enabled():
            ctx.curvature = curvature
        return aten.gelu_backward(v, x), v * curvature


def _gelu(input: Tensor, approximate: str = "none") -> Tensor | None:
    """`gelu`, with torch's names; `None` for its approximation by tanh."""
    return _Gelu.apply(input) if approximate == "none" else None


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """`conv1d` to `conv3d`, with torch's names; `None` for what is rare enough to be left to torch."""
    dims = weight.dim() - 2
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        if set(stride) == {1} and not any(amount % 2 for amount in total):
            padding = [amount // 2 for amount in total]
    if isinstance(padding, str) or input.dim() != weight.dim() or torch.is_autocast_enabled(input.device.type):
        return None
    convolution = _Convolution(stride, _each(padding, dims), dilation, groups)
    if dims == 2 and input.device.type == "cpu":  # depthwise kernels are several times as fast in this format
        input = input.contiguous(memory_format=torch.channels_last)
    return _Apply.apply(convolution, input, weight, bias)


def _normalize(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """`batch_norm`, with torch's names; `None` where it is no affine map of fixed coefficients with a weight."""
    if training or running_mean is None or running_var is None or weight is None:
        return None
    return _Apply.apply(_FixedNormalization(running_mean, running_var, eps), input, weight, bias)


def _view(input: Tensor, *shape: Any, **named: Any) -> Tensor | None:
    """`Tensor.view` for images that are channels-last in here alone: a copy where their memory can't be viewed so."""
    if named or isinstance(shape[0], torch.dtype):
        return None
    try:
        return input.view(*shape)
    except RuntimeError:
        return input.reshape(*shape)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number for each dimension; a single one, or a sequence of one, stands for all."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.conv1d: _convolve,
    F.conv2d: _convolve,
    F.conv3d: _convolve,
    F.batch_norm: _normalize,
    F.gelu: _gelu,
    Tensor.view: _view,
}
