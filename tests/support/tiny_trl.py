# SPDX-License-Identifier: Apache-2.0
"""Tiny trainers of TRL, and their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
)

from tests.support import tiny_training


WORDS = ["<s>", "</s>", "<pad>", *"abcdefghij"]
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip

TEXTS = [{"text": " ".join("abcdefghij"[index % 5 : 3 + index % 7]) or "a b"} for index in range(16)]
COMPLETIONS = [{"prompt": "a b", "completion": f" {each['text']}"} for each in TEXTS]
PAIRS = [
    {"prompt": " ".join("abcde"[: 1 + i % 4]) + " ", "chosen": " ".join("fghij"[i % 3 :]), "rejected": "j i"}
    for i in range(8)
]
LABELLED = [
    {"prompt": each["prompt"], "completion": each["chosen"], "label": i % 2 == 0} for i, each in enumerate(PAIRS)
]


OWN = ("ref_model", "optimizability", "callbacks", "peft_config", "eval_dataset")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def language_model(seed: int = 0, config: type = LlamaConfig, cls: type = LlamaForCausalLM, **more: Any) -> Any:
    """A language model with weights large enough that its Hessian is not near zero."""
    return _spread(seed, lambda: cls(config(**{**SIZES, **more})))


def _spread(seed: int, make: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def trainer(
    folder: Path, cls: type[Trainer], config: type, rows: list[dict[str, Any]], model: PreTrainedModel, **more: Any
) -> Trainer:
    """A trainer of TRL; options that it does not take itself are for its configuration."""
    own = {key: more.pop(key) for key in list(more) if key in OWN}
    settings = {"per_device_train_batch_size": 8, "max_steps": 1, "bf16": False, "max_length": 16, **more}
    args = tiny_training.arguments(folder, config, **settings)
    data = Dataset.from_list(rows)
    return cls(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **own)


def first_batch(made: Trainer) -> dict[str, Any]:
    """The first batch that the trainer trains on."""
    return next(iter(made.get_train_dataloader()))
