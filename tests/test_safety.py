# SPDX-License-Identifier: Apache-2.0
"""The contexts of a measurement: what they hold, and that they let go of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_optimizability import OptimizabilityConfig, measure
from hf_optimizability.safety import eager_attention, eval_mode, preserved_rng, unpatched_forward


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def leaves_after_error(context: AbstractContextManager) -> None:
    with pytest.raises(KeyboardInterrupt), context:
        draw()
        raise KeyboardInterrupt


def test_rng_is_given_back_after_an_error():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = draw(), draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    first = draw()
    leaves_after_error(preserved_rng(1))
    assert (first, draw()) == expected


def test_rng_is_seeded_inside():
    with preserved_rng(7):
        first = draw()
    with preserved_rng(7):
        again = draw()
    assert first == again


def test_each_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(RuntimeError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """One of mixed precision; its state is global, so that of other tests must go before, and its own after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_autocast_is_taken_off_and_put_back(accelerator: Accelerator):
    model = accelerator.prepare(nn.Linear(64, 64))
    patched, x = model.forward, torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    exact = nn.functional.linear(x, model.weight, model.bias)
    assert not torch.equal(model(x), exact)
    with unpatched_forward(model):
        assert torch.equal(model(x), exact)
    assert model.forward is patched


def fused_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """A kernel of the kind that MATH can't replace."""
    output, _ = sdpa_attention_forward(*args, **kwargs)
    return tiny_models.OnceDifferentiable.apply(output), None


def test_eager_is_the_fallback_for_attention_that_cannot_be_differentiated_twice():
    AttentionInterface.register("fused", fused_attention)
    batches = tiny_models.cut(tiny_models.examples("vit", 4), 4)
    config = OptimizabilityConfig(max_hvps=8)
    fused = tiny_models.make("vit", attn_implementation="fused")
    measurement = measure(fused, batches, config)
    expected = measure(tiny_models.make("vit"), batches, config)
    assert (measurement.attention, expected.attention) == ("eager", "math")
    assert measurement.hessian.lambda_max.value == pytest.approx(expected.hessian.lambda_max.value, rel=1e-5)
    assert fused.config._attn_implementation == "fused"
    assert {module.config._attn_implementation for module in fused.modules() if "config" in vars(module)} == {"fused"}


def test_attention_is_given_back_after_an_error():
    model = tiny_models.make("bert")
    with pytest.raises(KeyboardInterrupt), eager_attention(model):
        assert model.config._attn_implementation == "eager"
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"
