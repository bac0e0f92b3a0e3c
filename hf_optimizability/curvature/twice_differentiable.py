# SPDX-License-Identifier: Apache-2.0
"""Operations in forms whose second derivative is cheap: linear layers, convolution, normalization, and GELU.

Linear layers, convolutions and normalizations by fixed statistics are bilinear, `y = B(x, w) + b`, so their second
derivative is made of the same three maps as the first: B itself and its two adjoints. Torch instead takes grouped
convolutions apart, group by group (a depthwise one has hundreds), and differentiates a batch normalization as if its
statistics came from the batch. And the gradients by w and b, whose values a second derivative does not need, can be
left out. The second derivative of GELU is the same for all vectors that a graph is multiplied with; torch computes it
for each. Layer normalization, and CTC (which torch differentiates only once), have files of their own.
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

from .ctc_loss import ctc_loss
from .layer_norm import layer_norm
from .selective_grad import Mask, ZeroShapes, apply, apply_many, is_requested, is_variable, zero_shape


aten = torch.ops.aten


class CheapSecondDerivatives(TorchFunctionMode):
    """Cheap second derivatives of `linear`, `conv1d` to `conv3d`, `layer_norm`, `gelu`, and of a fixed `batch_norm`.

    They run the kernels that they run outside, forward and in the first backward pass, so values and gradients stay
    what they are, to rounding: on a CPU, images are kept in the channels-last format, where depthwise kernels are
    several times as fast. Derivatives of any order are right, those of weight normalization as well, where torch's own
    are wrong. To be held around the forward pass; what was recorded
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
    """A map `y = B(x, w) + b`, linear in x up to an offset, and linear in w.

    Attributes:
        coupled: Whether it has its mixed second derivative by x and w; see `linear_without_coupling`.
    """

    coupled = True

    @abstractmethod
    def apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Return `B(x, w) + b`."""

    @abstractmethod
    def adjoints(self, gy: Tensor, x: Tensor, w: Tensor, mask: Mask) -> tuple[Tensor | None, ...]:
        """Return the gradients of `⟨gy, B(x, w) + b⟩` by x, w and b, as far as `mask` asks for them."""

    def without_offset(self) -> _Bilinear:
        """Return the part that is linear in x: how y changes with x."""
        return self

    def add(self, y: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """Return `y + B(x, w)`, which may overwrite y."""
        return y + self.apply(x, w, None)

    def spread(self, b: Tensor, y: Tensor) -> Tensor:
        """Return the offset in the shape of y."""
        return b.reshape(-1, *[1] * (y.dim() - 2)).expand_as(y)


@dataclass(frozen=True)
class _Linear(_Bilinear):
    """`y = x wᵀ + b` of inputs of any number of dimensions; or, with `transposed`, `y = x w + b`."""

    transposed: bool = False
    coupled: bool = True

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        y: Tensor = aten.linear(x, w.T if self.transposed else w, b)
        return y

    def adjoints(self, gy: Tensor, x: Tensor, w: Tensor, mask: Mask) -> tuple[Tensor | None, ...]:
        by_x, by_w, by_b = mask
        outputs, inputs = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
        left, right = (inputs, outputs) if self.transposed else (outputs, inputs)
        return (
            gy @ (w.T if self.transposed else w) if by_x else None,
            left.T @ right if by_w else None,
            outputs.sum(0) if by_b else None,
        )

    def add(self, y: Tensor, x: Tensor, w: Tensor) -> Tensor:
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), w if self.transposed else w.T)
        return y

    def spread(self, b: Tensor, y: Tensor) -> Tensor:
        return b.expand_as(y)


@dataclass(frozen=True)
class _Convolution(_Bilinear):
    """A convolution of any number of dimensions; the arguments are those of `torch.convolution`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        y: Tensor = aten.convolution(x, w, b, *self._geometry)
        return y

    def adjoints(self, gy: Tensor, x: Tensor, w: Tensor, mask: Mask) -> tuple[Tensor | None, ...]:
        gx, gw, gb = aten.convolution_backward(gy, x, w, [len(w)], *self._geometry, mask)
        return gx, gw, gb

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
        y: Tensor = aten.native_batch_norm(x, w, b, self.mean, self.variance, False, 0.0, self.eps)[0]
        return y

    def adjoints(self, gy: Tensor, x: Tensor, w: Tensor, mask: Mask) -> tuple[Tensor | None, ...]:
        # The last two are of a batch; those that a fixed normalization has in their place are not read, but on a GPU
        # they must be there.
        statistics = (self.mean, self.variance, self.mean, (self.variance + self.eps).rsqrt())
        # Of channels-last images, torch 2.13 reads a strided w as if it were contiguous.
        gx, gw, gb = aten.native_batch_norm_backward(gy, x, w.contiguous(), *statistics, False, self.eps, mask)
        return gx, gw, gb

    def without_offset(self) -> _Bilinear:
        return replace(self, mean=torch.zeros_like(self.mean))


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bilinear: _Bilinear, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.bilinear = bilinear
        ctx.save_for_backward(x, w, b)
        return bilinear.apply(x, w, b).detach()  # no view, which the model could not write to

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b = ctx.saved_tensors
        by_x, by_w, by_b = ctx.needs_input_grad[1:]
        mask = by_x, by_w and is_requested(w), by_b and is_requested(b)
        return None, *apply_many(_Adjoints, ctx.bilinear, gy, x, w, mask, (zero_shape(w), zero_shape(b)))


class _Adjoints(torch.autograd.Function):
    """The gradients by x, w and b, as functions of gy, x and w: `B*(gy, w)`, `B*(gy, x)` and a sum of gy."""

    @staticmethod
    def forward(
        ctx: Any, bilinear: _Bilinear, gy: Tensor, x: Tensor, w: Tensor, mask: Mask, zero_shapes: ZeroShapes
    ) -> tuple[Tensor | None, ...]:
        ctx.bilinear = bilinear
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gy, x, w)
        (by_x, by_w, by_b), (zero_w, zero_b) = mask, zero_shapes
        gx, gw, gb = bilinear.adjoints(gy, x, w, (by_x, by_w and not zero_w, by_b and not zero_b))
        zero = gy.new_zeros(())
        return gx, zero.expand(zero_w) if zero_w else gw, zero.expand(zero_b) if zero_b else gb

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of `⟨vx, gx⟩ + ⟨vw, gw⟩ + ⟨vb, gb⟩ = ⟨gy, B(vx, w) + B(x, vw) + vb⟩` by gy, x and w.

        Of differentiable operations, so that derivatives of a higher order are right as well, if not cheap.
        """
        gy, x, w = ctx.saved_tensors
        _, by_gy, by_x, by_w, *_ = ctx.needs_input_grad
        for_gy = for_x = for_w = None
        coupled = ctx.bilinear.coupled
        if vx is not None:
            linear = ctx.bilinear.without_offset()
            for_w = (
                linear.adjoints(gy, vx, w, (False, True, False))[1] if coupled and by_w and is_requested(w) else None
            )
            for_gy = linear.apply(vx, w, vb) if by_gy else None
        if vw is not None:
            for_x = ctx.bilinear.adjoints(gy, x, vw, (True, False, False))[0] if coupled and by_x else None
            if by_gy:
                for_gy = ctx.bilinear.apply(x, vw, vb) if for_gy is None else ctx.bilinear.add(for_gy, x, vw)
        if by_gy and for_gy is None and vb is not None:
            for_gy = ctx.bilinear.spread(vb, gy)
        return None, for_gy, for_x, for_w, None, None


def linear_without_coupling(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Apply `F.linear`, with the second derivatives of `F.linear(x, w̄) + F.linear(x̄, w) + b`, bars held constant.

    Example:
        >>> x, w = torch.ones(1, 1, requires_grad=True), torch.full((1, 1), 3.0, requires_grad=True)
        >>> (slope,) = torch.autograd.grad(linear_without_coupling(x, w, None).square().sum(), w, create_graph=True)
        >>> [float(mixed) for mixed in torch.autograd.grad(slope, [x, w])]  # of (x w)², 4 x w = 12 by x without
        [6.0, 2.0]
    """
    return apply(_Apply, _Linear(coupled=False), x, w, b)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y: Tensor = aten.gelu(x)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Tensor:
        return apply(_GeluSlope, gy, *ctx.saved_tensors)


class _GeluSlope(torch.autograd.Function):
    """`gy GELU'(x)`, which keeps `gy GELU''(x)` for the next vector."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gy, x)
        ctx.curvature = None
        gx: Tensor = aten.gelu_backward(gy, x)
        return gx

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
    """Replace `gelu`; return `None` for its approximation by tanh. Arguments have torch's names, as below."""
    return apply(_Gelu, input) if approximate == "none" else None


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Replace `linear`; return `None` for a weight that is not a variable: torch's own backward needs less."""
    if not is_variable(weight) or weight.dim() != 2 or torch.is_autocast_enabled(input.device.type):
        return None
    return apply(_Apply, _Linear(), input, weight, bias)


def _add_product(input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor | None:
    """Replace `addmm` as GPT-2's layers use it: `mat2` is the weight, `input` its bias."""
    if scales or input.dim() != 1 or not is_variable(mat2) or torch.is_autocast_enabled(mat1.device.type):
        return None
    return apply(_Apply, _Linear(transposed=True), mat1, mat2, input)


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """Replace `conv1d` to `conv3d`; return `None` for rare options, which are left to torch."""
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
    return apply(_Apply, convolution, input, weight, bias)


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
    """Replace `batch_norm`; return `None` unless it is an affine map of fixed coefficients, with a weight."""
    if training or running_mean is None or running_var is None or weight is None:
        return None
    return apply(_Apply, _FixedNormalization(running_mean, running_var, eps), input, weight, bias)


def _normalize_examples(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Replace `layer_norm`; return `None` where the tensors' dtypes differ."""
    dtypes = {tensor.dtype for tensor in (input, weight, bias) if tensor is not None}
    if len(dtypes) > 1 or torch.is_autocast_enabled(input.device.type):
        return None
    return layer_norm(input, normalized_shape, weight, bias, eps)


def _normalize_weight(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Replace `torch._weight_norm`, whose own second derivative is wrong (up to torch 2.13 at least)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _as_complex(input: Tensor) -> Tensor:
    """Replace `view_as_complex`, which refuses vectors that begin at an odd place of a longer one."""
    return torch.complex(*input.unbind(-1))


def _view(input: Tensor, *shape: Any, **named: Any) -> Tensor | None:
    """Replace `Tensor.view` for images that are channels-last in here only: copy where no view of them exists."""
    if named or isinstance(shape[0], torch.dtype):
        return None
    try:
        return input.view(*shape)
    except RuntimeError:
        return input.reshape(*shape)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return one number for each dimension, repeating a single one."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _multiply,
    torch.addmm: _add_product,
    F.conv1d: _convolve,
    F.conv2d: _convolve,
    F.conv3d: _convolve,
    F.batch_norm: _normalize,
    F.layer_norm: _normalize_examples,
    F.gelu: _gelu,
    F.ctc_loss: ctc_loss,
    torch._weight_norm: _normalize_weight,
    Tensor.view: _view,
    torch.view_as_complex: _as_complex,
}
