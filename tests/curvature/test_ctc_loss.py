# SPDX-License-Identifier: Apache-2.0
"""CTC in operations that can be differentiated twice, against torch's kernel and differences of its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_optimizability.curvature.ctc_loss import ctc_loss
from hf_optimizability.curvature.twice_differentiable import CheapSecondDerivatives


LABELS = torch.tensor([[1, 2, 2, 4], [3, 1, 0, 0], [2, 0, 0, 0]])  # a repeated one, and padding
LENGTHS = torch.tensor([4, 2, 1])
FRAMES = torch.tensor([9, 6, 4])


def logits(seed: int = 0) -> Tensor:
    return torch.randn(9, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(logits: Tensor, *, targets: Tensor = LABELS, lengths: Any = LENGTHS, **options: Any) -> Tensor:
    return F.ctc_loss(logits.log_softmax(-1), targets, FRAMES, lengths, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("flat", [False, True])
def test_value_and_gradient_are_torchs(reduction: str, flat: bool):
    targets = torch.cat([row[:n] for row, n in zip(LABELS, LENGTHS.tolist(), strict=True)]) if flat else LABELS
    ours, torchs = (logits().requires_grad_() for _ in range(2))
    expected = loss_of(torchs, targets=targets, reduction=reduction)
    with CheapSecondDerivatives():
        found = loss_of(ours, targets=targets, lengths=LENGTHS.tolist(), reduction=reduction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss.sum(), x)[0] for loss, x in ((found, ours), (expected, torchs))]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_too_few_frames_and_no_label(zero_infinity: bool):
    frames, lengths = torch.tensor([3, 6, 4]), torch.tensor([4, 2, 0])
    x = logits().log_softmax(-1).requires_grad_()
    options: dict[str, Any] = {"reduction": "none", "zero_infinity": zero_infinity}
    found = ctc_loss(x, LABELS, frames, lengths, **options)
    assert found is not None
    torch.testing.assert_close(found, F.ctc_loss(x, LABELS, frames, lengths, **options), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(found[1:].sum(), x)
    assert torch.isfinite(slope).all() and not slope[:, 0].any()


def test_second_derivative_is_that_of_torchs_gradient():
    x, direction = logits().requires_grad_(), logits(1)
    with CheapSecondDerivatives():
        (slope,) = torch.autograd.grad(loss_of(x), x, create_graph=True)
    (product,) = torch.autograd.grad((slope * direction).sum(), x)
    step = 1e-5
    ends = [(logits() + sign * step * direction).requires_grad_() for sign in (1, -1)]
    ahead, behind = (torch.autograd.grad(loss_of(end), end)[0] for end in ends)
    torch.testing.assert_close(product, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)
