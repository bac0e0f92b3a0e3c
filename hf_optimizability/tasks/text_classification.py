# SPDX-License-Identifier: Apache-2.0
"""Sentences, or pairs of sentences, to classify."""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .checkpoint import CheckpointArguments, load_config
from .datasets import LabelledDataArguments, require_complete


NAME = "text-classification"
MODELS = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


@dataclass
class ModelArguments(CheckpointArguments):
    """Which checkpoint to fine-tune."""

    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the checkpoint's own."})


@dataclass
class DataArguments(LabelledDataArguments):
    """Which sentences to train and evaluate on."""

    text_column_name: list[str] | None = field(
        default=None, metadata={"help": "Column of the text, or two of a pair. By default all that hold text."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Cut longer texts to this number of tokens."})


def load_model(args: ModelArguments, names: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the checkpoint with a head for the classes `names`, and its tokenizer."""
    config = load_config(args, names)
    with args.loading("The tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path, **args.hub_options())
    if tokenizer.pad_token is None:  # decoders
        tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
    return args.load_model(AutoModelForSequenceClassification, config), tokenizer


def prepare(examples: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> Dataset:
    """Convert texts to token numbers; they are padded later, batch by batch."""
    columns = text_columns(examples, args)
    for column in columns:
        require_complete(examples, column, "text")
    length = min(args.max_seq_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        tokens = tokenizer(*(batch[column] for column in columns), truncation=True, max_length=length)
        return {**tokens, "labels": batch[args.label_column_name]}

    return examples.map(encode, batched=True, remove_columns=examples.column_names, desc="Tokenizing")


def text_columns(examples: Dataset, args: DataArguments) -> list[str]:
    """Return the one or two columns that hold the text."""
    if args.text_column_name is None:
        columns = [name for name, kind in examples.features.items() if kind.dtype in ("string", "large_string")]
    else:
        columns = args.text_column_name
    if len(columns) not in (1, 2) or not set(columns) <= set(examples.column_names):
        raise ValueError(
            f"Can't read the text from {columns}; pass one or two of {examples.column_names} as --text_column_name."
        )
    return columns
