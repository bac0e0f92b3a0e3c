# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts with their load-balancing loss, which depends on more than the logits, against dense truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from hf_optimizability import OptimizabilityConfig, measure
from tests.support import tiny_models


TINY = {
    "vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "intermediate_size": 4, "max_position_embeddings": 8, "num_experts_per_tok": 2, "output_router_logits": True,
    "router_aux_loss_coef": 0.5, **tiny_models.TOKEN_IDS,
}  # fmt: skip
MAKERS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=3)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**TINY, num_experts=3, moe_intermediate_size=4, shared_expert_intermediate_size=4)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**TINY, num_experts=3)),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MAKERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def truth(name: str, data: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Return the loss and its dense Hessian in float64, which grouped matrix products do not take."""
    model = make(name).double()
    model.set_experts_implementation("eager")
    return float(model(**data).loss.detach()), tiny_models.dense_hessian(model, data)


def batch(length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, TINY["vocab_size"], (6, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    ("name", "length"),  # few enough outputs for the exact part of the trace to be tried, and more
    [
        ("mixtral", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("mixtral", 4), ("qwen2_moe", 4), ("qwen2_moe", 2), ("olmoe", 2), ("olmoe", 4))
        ),
    ],
)
def test_the_router_loss_is_measured(name: str, length: int):
    data = batch(length)
    loss, hessian = truth(name, data)
    ends = torch.linalg.eigvalsh(hessian)
    found = measure(make(name), [data], OptimizabilityConfig(eigen_tolerance=1e-3, trace_tolerance=0.02, max_hvps=300))
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.engine == "double_backward" and found.fallback is None
    assert found.hessian.lambda_max.value == pytest.approx(float(ends[-1]), rel=2e-3)
    assert found.hessian.lambda_min.value == pytest.approx(float(ends[0]), rel=2e-3)
    assert abs(found.hessian.trace.value - float(hessian.trace())) < 4 * found.hessian.trace.std_error


@pytest.mark.parametrize("name", MAKERS)
def test_it_has_no_gauss_newton_matrix_in_the_logits(name: str):
    with pytest.raises(Exception, match="otherwise than through the model's logits"):
        measure(make(name), [batch(2)], OptimizabilityConfig(profile="light", curvature="gauss_newton"))
