# SPDX-License-Identifier: Apache-2.0
"""Layer normalization with a second derivative in closed form: a few passes over the data where torch makes dozens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .selective_grad import Mask, apply, apply_many, is_requested


aten = torch.ops.aten


def layer_norm(x: Tensor, shape: Sequence[int], w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """Compute `y = u w + b`, `u = (x − mean) r`, `r = 1/√(variance + eps)`, each example over its last dimensions.

    Forward and in the first backward pass by torch's kernels. Derivatives of any order are right, if not cheap.

    Args:
        x: Examples.
        shape: Of one example; the last dimensions of x.
        w: Of that shape, or `None`.
        b: Of that shape, or `None`.
        eps: Added to the variance.

    Returns:
        y, of the shape of x.

    Example:
        >>> x = torch.tensor([[0.0, 2.0]], requires_grad=True)
        >>> y = layer_norm(x, [2], None, None, eps=3.0)  # ±s / √(s² + 3) for half the distance s
        >>> (slope,) = torch.autograd.grad(y[0, 1], x, create_graph=True)
        >>> slope.tolist(), torch.autograd.grad(slope[0, 1], x)[0].tolist()
        ([[-0.1875, 0.1875]], [[0.0703125, -0.0703125]])
    """
    return apply(_LayerNorm, x, list(shape), w, b, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        y: Tensor
        y, *statistics = aten.native_layer_norm(x, shape, w, b, eps)
        ctx.shape, ctx.eps = shape, eps
        ctx.save_for_backward(x, w, b, *statistics)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, *statistics = ctx.saved_tensors
        by_x, _, by_w, by_b, _ = ctx.needs_input_grad
        mask = by_x, by_w and is_requested(w), by_b and is_requested(b)
        gx, gw, gb = apply_many(_Adjoints, gy, x, w, b, *statistics, ctx.shape, ctx.eps, mask)
        return gx, None, gw, gb, None


class _Adjoints(torch.autograd.Function):
    """The gradients by x, w and b: `r P(gy w)`, and the sums over examples of `gy u` and of gy.

    `P v = v − ⟨v⟩ − u ⟨u v⟩` takes off the parts along 1 and u, where ⟨·⟩ is the mean over an example.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gy: Tensor,
        x: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        mean: Tensor,
        r: Tensor,
        shape: list[int],
        eps: float,
        mask: Mask,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gy, x, w, mean, r)
        ctx.shape, ctx.eps = shape, eps
        gx, gw, gb = aten.native_layer_norm_backward(gy, x, shape, mean, r, w, b, mask)
        return gx, gw, gb

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of `⟨vx, gx⟩ + ⟨vw, gw⟩ + ⟨vb, gb⟩` by gy, x, w; `∂u = r P ∂x`, `∂r = −r² ⟨u ∂x⟩`."""
        gy, x, w, mean, r = ctx.saved_tensors
        by_gy, by_x, by_w, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # then it must be part of the graph of a higher derivative
            r = (x.var(_normalized(ctx.shape), correction=0, keepdim=True) + ctx.eps).rsqrt()
        u = apply(_LayerNorm, x, ctx.shape, None, None, ctx.eps)

        def pulled_back(v: Tensor) -> Tensor:
            """Return `r P v`."""
            arguments = v, x, None, None, mean, r, ctx.shape, ctx.eps, (True, False, False)
            gx: Tensor = apply_many(_Adjoints, *arguments)[0]
            return gx

        def dot(left: Tensor, right: Tensor) -> Tensor:
            return (left * right).mean(_normalized(ctx.shape), keepdim=True)

        for_gy = for_x = for_w = to_pull = None
        if vx is not None:
            q, h = pulled_back(vx), gy if w is None else gy * w
            if by_gy:
                for_gy = q if w is None else q * w
            if by_w and is_requested(w):
                for_w = (gy * q).sum_to_size(w.shape)
            if by_x:
                for_x = -r * (dot(q, h) * u + dot(u, h) * q)
                to_pull = -r * dot(u, vx) * h
        if vw is not None:
            if by_gy:
                for_gy = u * vw if for_gy is None else torch.addcmul(for_gy, u, vw)
            if by_x:
                to_pull = gy * vw if to_pull is None else torch.addcmul(to_pull, gy, vw)
        if vb is not None and by_gy:
            for_gy = vb.expand_as(gy) if for_gy is None else for_gy + vb
        if to_pull is not None:
            pulled = pulled_back(to_pull)
            for_x = pulled if for_x is None else for_x + pulled
        return for_gy, for_x, for_w, *[None] * 6


def _normalized(shape: list[int]) -> list[int]:
    """Return the indices of the last dimensions, which have this shape."""
    return list(range(-len(shape), 0))
