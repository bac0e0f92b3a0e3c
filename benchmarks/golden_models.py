# SPDX-License-Identifier: Apache-2.0
"""Tiny models, their batches and a tiny checkpoint with its data, for the cases of `golden_cases.py`."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)


VOCABULARY = 13
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the", "very"]
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SIZES = {"hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6}
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (
        BertForSequenceClassification, BertConfig,
        {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 8, "num_labels": 3},
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {**_TOKENS, "n_positions": 8, "n_embd": 4, "n_layer": 2, "n_head": 2}),
    "llama": (
        LlamaForCausalLM, LlamaConfig, {**_TOKENS, **_SIZES, "num_key_value_heads": 1, "max_position_embeddings": 8},
    ),
    "resnet": (
        ResNetForImageClassification, ResNetConfig,
        {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic",
         "num_labels": 3},
    ),
}  # fmt: skip


def build(name: str, *, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Return a model in train mode, with weights large enough that its Hessian is not near zero."""
    cls, config, defaults = _MODELS[name]
    torch.manual_seed(0)
    model: PreTrainedModel = cls(config(**{**defaults, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    moved: nn.Module = model
    moved.to(dtype)
    return model.train()


def rows(name: str, number: int, *, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Return examples for a model; those of language models have different numbers of ignored labels."""
    generator = torch.Generator().manual_seed(1)
    found: list[dict[str, Any]] = []
    for index in range(number):
        if name == "resnet":
            pixels = torch.randn(1, 8, 8, generator=generator).to(dtype)
            found.append({"pixel_values": pixels, "labels": index % 3})
            continue
        tokens = torch.randint(3, VOCABULARY, (6,), generator=generator)
        ignored = torch.arange(6) < index % 6
        labels = index % 3 if name == "bert" else tokens.masked_fill(ignored, -100)
        found.append({"input_ids": tokens, "labels": labels})
    return found


def batches(examples: list[dict[str, Any]], size: int = 4) -> list[dict[str, Tensor]]:
    """Return the examples in batches of `size`, the last one smaller."""
    pieces = [examples[start : start + size] for start in range(0, len(examples), size)]
    return [{key: torch.stack([torch.as_tensor(row[key]) for row in piece]) for key in piece[0]} for piece in pieces]


class OnceDifferentiable(torch.autograd.Function):
    """The identity, with a backward pass that can't be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the same values."""
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the same gradient."""
        return gradient


class TwoHeads(nn.Module):
    """A trunk with a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

    def forward(self, pixels: Tensor, task: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean loss, and the logits of each example's own head."""
        hidden = self.trunk(pixels).tanh()
        logits = torch.stack([head(hidden) for head in self.heads], dim=1)[torch.arange(len(task)), task]
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows_of_two_tasks(number: int = 24) -> list[dict[str, Any]]:
    """Return examples of which a third belong to the second task."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(number, 4, generator=generator) + 0.5
    return [{"pixels": pixels[i], "labels": i % 3 % 2, "task": int(i % 3 == 1)} for i in range(number)]


def save_checkpoint() -> dict[str, Any]:
    """Write a checkpoint and a data set into the working directory, and return the flags that name them."""
    build("bert", vocab_size=len(WORDS)).save_pretrained("tiny-bert")
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained("tiny-bert")
    sentences = [f"{WORDS[5 + i % 3]} {WORDS[5 + i % 4]} {WORDS[5 + i % 5]}" for i in range(16)]
    labels = ["good" if i % 3 else "bad" for i in range(16)]
    Dataset.from_dict({"sentence": sentences, "label": labels}).to_parquet("data.parquet")
    return {
        "model_name_or_path": "tiny-bert", "train_file": "data.parquet", "validation_file": "data.parquet",
        "text_column_name": ["sentence"], "ignore_mismatched_sizes": True, "cache_dir": "cache", "output_dir": "run",
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "probe_examples": 4, "max_hvps": 16,
        "dataloader_pin_memory": False, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
