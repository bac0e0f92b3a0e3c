# SPDX-License-Identifier: Apache-2.0
"""Sentences of six words, and a BERT that knows no others: small enough to train in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertTokenizer

from tests.support import tiny_models


WORDS = ["good", "bad", "film", "a", "the", "very"]
SENTENCES = [f"{WORDS[i % 3]} {WORDS[i % 4]} {WORDS[i % 5]}" for i in range(16)]
LABELS = ["good" if i % 3 else "bad" for i in range(16)]


def tokenizer() -> BertTokenizer:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(specials + WORDS)})


def save_checkpoint(folder: Path) -> str:
    """A checkpoint with three classes."""
    torch.manual_seed(0)
    tiny_models.bert(vocab_size=len(tokenizer())).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_data(path: Path) -> str:
    """A Parquet file with the columns `sentence` and `label`, which is a name."""
    Dataset.from_dict({"sentence": SENTENCES, "label": LABELS}).to_parquet(path)
    return str(path)
