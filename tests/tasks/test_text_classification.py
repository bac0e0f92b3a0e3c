# SPDX-License-Identifier: Apache-2.0
"""From sentences to token numbers, and what is said of columns that can't be told."""

from __future__ import annotations

import pytest
from datasets import Dataset

from hf_optimizability.tasks import text_classification
from tests.support import tiny_texts


def test_pairs_of_sentences_are_joined_and_cut() -> None:
    tokenizer = tiny_texts.tokenizer()
    pairs = Dataset.from_dict({"premise": ["good film"], "hypothesis": ["a very bad film"], "label": [1]})
    args = text_classification.DataArguments(train_file="pairs.csv", max_seq_length=8)
    tokens = text_classification.prepare(pairs, tokenizer, args)[0]
    read = [tokenizer.convert_ids_to_tokens(number) for number in tokens["input_ids"]]
    assert read == ["[CLS]", "good", "film", "[SEP]", "a", "very", "bad", "[SEP]"]
    assert tokens["labels"] == 1


@pytest.mark.parametrize("columns", [None, ["sentense"], ["a", "b", "c"]])
def test_text_that_cant_be_told_fails_by_name(columns: list[str] | None) -> None:
    examples = Dataset.from_dict({"a": ["x"], "b": ["x"], "c": ["x"]})
    args = text_classification.DataArguments(train_file="a.csv", text_column_name=columns)
    with pytest.raises(ValueError, match=r"one or two of \['a', 'b', 'c'\] as --text_column_name"):
        text_classification.text_columns(examples, args)


def test_rows_without_a_text_are_counted_by_name() -> None:
    examples = Dataset.from_dict({"text": ["good film", None, None], "label": [1, 0, 1]})
    args = text_classification.DataArguments(train_file="a.csv")
    with pytest.raises(ValueError, match=r"2 of 3 rows have no text in column 'text'"):
        text_classification.prepare(examples, tiny_texts.tokenizer(), args)
