# SPDX-License-Identifier: Apache-2.0
"""Models that checkpoint activations or autocast in their own forward pass, against the same models without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hf_optimizability import MeasurementError, OptimizabilityConfig, measure
from hf_optimizability.model_state.plain_forward import nonreentrant_checkpoints, without_autocast


CONFIG = OptimizabilityConfig(eigen_tolerance=1e-3, max_hvps=64)


class Net(nn.Module):
    def __init__(self, how: str, activation: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.activation = how, activation
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def inner(self, hidden: Tensor) -> Tensor:
        return self.activation(self.middle(hidden))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.activation(self.first(x))
        if self.how == "plain":
            hidden = self.inner(hidden)
        elif self.how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self.inner(hidden)
        elif self.how == "fixed dtype":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self.inner(hidden.bfloat16()).float()
        else:
            hidden = checkpoint(self.inner, hidden, use_reentrant=self.how == "reentrant")
        logits = self.last(hidden.float())
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def batch() -> dict[str, Tensor]:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    return {"x": x, "labels": torch.arange(16) % 3}


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()], ids=str)
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "autocast"])
def test_the_curvature_is_that_of_the_plain_model(how: str, activation: nn.Module):
    expected = measure(Net("plain", activation), [batch()], CONFIG)
    found = measure(Net(how, activation), [batch()], CONFIG)
    assert found.engine == "double_backward"
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.hessian.lambda_max.value == pytest.approx(expected.hessian.lambda_max.value, rel=1e-3)
    assert found.hessian.lambda_min.value == pytest.approx(expected.hessian.lambda_min.value, rel=1e-2)
    error = 4 * (found.hessian.trace.std_error + expected.hessian.trace.std_error)
    assert found.hessian.trace.value == pytest.approx(expected.hessian.trace.value, abs=error)
    if how != "autocast":
        assert "checkpoints activations" in str(found.fallback) and len(str(found.fallback)) < 300


def test_a_model_that_needs_its_autocast_is_refused_by_name():
    with pytest.raises(MeasurementError, match=r"torch\.autocast.*dtype"):
        measure(Net("fixed dtype", nn.GELU()), [batch()], CONFIG)


def test_autocast_and_checkpoints_come_back():
    before = torch.autocast.__enter__, torch.autocast.__exit__, torch.utils.checkpoint.CheckpointFunction
    with pytest.raises(KeyboardInterrupt), without_autocast(), nonreentrant_checkpoints():
        assert torch.utils.checkpoint.CheckpointFunction is not before[2]
        raise KeyboardInterrupt
    assert before == (torch.autocast.__enter__, torch.autocast.__exit__, torch.utils.checkpoint.CheckpointFunction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype is torch.bfloat16


def test_what_a_reentrant_checkpoint_cuts_off_stays_cut_off():
    """Without an input that requires a gradient nothing inside has one: so it is in training."""
    layer = nn.Linear(2, 2)
    with nonreentrant_checkpoints():
        output: Any = checkpoint(layer, torch.ones(1, 2), use_reentrant=True)
    assert not output.requires_grad
