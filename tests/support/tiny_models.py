# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the families that users bring, and batches for them: small enough for a dense Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


VOCABULARY = 13
TWO_LAYERS: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 2},
    "vit": {"num_hidden_layers": 2},
    "resnet": {"hidden_sizes": [4, 6], "depths": [1, 1]},
    "gpt2": {"n_layer": 2},
    "llama": {"num_hidden_layers": 2},
}
"""Options of `make` for two layers. Models have one by default: passes through them take most of the tests' time."""
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def bert(**options: object) -> BertForSequenceClassification:
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 6, "max_position_embeddings": 8, "num_labels": 3,
    }  # fmt: skip
    return BertForSequenceClassification(BertConfig(**{**settings, **options}))


def vit(**options: object) -> ViTForImageClassification:
    settings = {
        "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 6, "num_labels": 3,
    }  # fmt: skip
    return ViTForImageClassification(ViTConfig(**{**settings, **options}))


def resnet(**options: object) -> ResNetForImageClassification:
    settings = {
        "num_channels": 1, "embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic",
        "num_labels": 3,
    }  # fmt: skip
    return ResNetForImageClassification(ResNetConfig(**{**settings, **options}))


def gpt2(**options: object) -> GPT2LMHeadModel:
    settings = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 6}
    return GPT2LMHeadModel(GPT2Config(**{**settings, **TOKEN_IDS, **options}))


def llama(**options: object) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 6, "max_position_embeddings": 8,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **TOKEN_IDS, **options}))


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "bert": bert,
    "vit": vit,
    "resnet": resnet,
    "gpt2": gpt2,
    "llama": llama,
}


def make(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options: object) -> PreTrainedModel:
    """A model with weights large enough that its Hessian is not near zero, and running statistics that matter."""
    torch.manual_seed(seed)
    model = MODELS[name](**options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.train()


def examples(name: str, number: int, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Examples for a model; language models get a different number of ignored labels (-100) in each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(number):
        if name in ("vit", "resnet"):
            pixels = torch.randn(1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
            rows.append({"pixel_values": pixels, "labels": torch.tensor(index % 3)})
            continue
        tokens = torch.randint(3, VOCABULARY, (6,), generator=generator)
        if name == "bert":
            rows.append({"input_ids": tokens, "labels": torch.tensor(index % 3)})
        else:
            labels = tokens.clone()
            labels[: index % 6] = -100
            rows.append({"input_ids": tokens, "labels": labels})
    return rows


def cut(rows: list[dict[str, Tensor]], size: int) -> list[dict[str, Tensor]]:
    """The rows in batches of `size`, the last one smaller."""
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [{key: torch.stack([row[key] for row in batch]) for key in batch[0]} for batch in batches]


class OnceDifferentiable(torch.autograd.Function):
    """The identity, with a backward pass that can't be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def dense_hessian(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The whole Hessian of the model's loss, rows and columns in the order of `named_parameters`.

    By `torch.autograd.functional.hessian`, checked against central differences of gradients under the attention kernel
    that the model comes with. (`torch.func.hessian` is no truth: through LayerNorm it gives asymmetric matrices in
    torch 2.13.)
    """
    named = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    sizes = [parameter.numel() for parameter in named.values()]

    def loss(vector: Tensor) -> Tensor:
        pieces = zip(named.items(), vector.split(sizes), strict=True)
        return functional_call(model, {name: piece.view_as(p) for (name, p), piece in pieces}, kwargs=batch).loss

    def gradient(vector: Tensor) -> Tensor:
        vector = vector.clone().requires_grad_()
        return torch.autograd.grad(loss(vector), vector)[0]

    point = torch.cat([parameter.flatten() for parameter in named.values()])
    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, point, vectorize=True)
    direction = torch.randn(len(point), generator=torch.Generator().manual_seed(0), dtype=point.dtype)
    step = 1e-4 * direction / direction.norm()
    difference = (gradient(point + step) - gradient(point - step)) / 2e-4
    assert torch.allclose(hessian @ step / 1e-4, difference, rtol=0, atol=1e-3 * float(difference.norm()))
    assert torch.allclose(hessian, hessian.T, atol=1e-6)
    return hessian
