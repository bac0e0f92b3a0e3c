# SPDX-License-Identifier: Apache-2.0
"""The recipe for words: labels by hand, scores against scikit-learn, and a run with a BERT of a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import token_classification
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertConfig, EvalPrediction

from tests.support import tiny_texts


TAGS = ["B-PER", "O"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return tiny_texts.save_checkpoint(tmp_path / "tiny-bert")


@pytest.fixture
def train_file(tmp_path: Path) -> str:
    """Words that the tokenizer knows, words that it cuts, and tags by name."""
    rows = {"tokens": [["good", "film!"], ["a", "very", "bad", "film"]] * 8}
    rows["ner_tags"] = [["O", "B-PER"], ["O", "O", "B-PER", "O"]] * 8
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    return str(tmp_path / "train.parquet")


def test_the_first_token_of_a_word_bears_its_tag(checkpoint: str):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    examples = Dataset.from_dict({"tokens": [["a", "film!", "good"]], "ner_tags": [[1, 0, 1]]})
    given = {"dataset_name": "none", "max_seq_length": 8}
    numbers = {0: 0, 1: 1}
    (row,) = token_classification.prepare(
        examples, tokenizer, token_classification.DataArguments(**given), numbers
    ).to_list()
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "a", "film", "[UNK]", "good", "[SEP]"]
    assert row["labels"] == [-100, 1, 0, -100, 1, -100]
    (row,) = token_classification.prepare(
        examples, tokenizer, token_classification.DataArguments(**given, label_all_tokens=True), numbers
    ).to_list()
    assert row["labels"] == [-100, 1, 0, 0, 1, -100]


def test_tags_are_numbered_as_in_the_checkpoint():
    """By name whatever its case; but exactly, where two names differ in nothing else."""
    config = BertConfig(id2label={0: "o", 1: "b-per"}, label2id={"o": 0, "b-per": 1})
    assert token_classification.numbers_in(config, TAGS) == {0: 1, 1: 0, "B-PER": 1, "O": 0}
    config = BertConfig(id2label={0: "o", 1: "O"}, label2id={"o": 0, "O": 1})
    assert token_classification.numbers_in(config, ["O", "o"]) == {0: 1, 1: 0, "O": 1, "o": 0}


def test_scores_are_those_of_scikit_learn_and_pass_over_ignored_labels():
    generator = np.random.default_rng(0)
    actual = generator.integers(0, 3, (6, 9))
    ignored = generator.random(actual.shape) < 0.4
    labels = np.where(ignored, -100, actual)
    logits = generator.normal(size=(6, 9, 4)) + 2 * np.eye(4)[actual] - [0, 0, 0, 50]
    predicted = logits.argmax(-1)[~ignored]
    scores = token_classification.compute_metrics(EvalPrediction(logits, labels), ["a", "b", "c", "never"])
    each = f1_score(actual[~ignored], predicted, average=None)
    expected = dict(zip(["f1_a", "f1_b", "f1_c"], each, strict=True))
    assert scores == pytest.approx(
        {"accuracy": accuracy_score(actual[~ignored], predicted), "f1": each.mean(), **expected}
    )


@pytest.mark.slow
def test_a_run_measures_the_loss_on_the_tagged_words_alone(
    checkpoint: str, train_file: str, run_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    output = run_recipe(
        token_classification,
        model_name_or_path=checkpoint,
        train_file=train_file,
        validation_file=train_file,
        ignore_mismatched_sizes=True,  # the checkpoint has three classes, the data two
        probe_examples=16,
        probe_batch_size=3,
        learning_rate=1e-12,
    )
    report = json.loads((output / "optimizability/report.json").read_text())
    assert [measurement["step"] for measurement in report["measurements"]] == [0, 2]
    assert not report["failures"]
    assert report["data"]["probe_items"] == 8 * (2 + 4)
    assert {"eval_loss", "eval_accuracy", "eval_f1", "eval_f1_O"} <= json.loads(
        (output / "all_results.json").read_text()
    ).keys()

    # All examples are in the probe set, and the weights stayed as they were.
    model = AutoModelForTokenClassification.from_pretrained(output).eval()
    assert model.config.id2label == dict(enumerate(TAGS))
    tokenizer = AutoTokenizer.from_pretrained(output)
    losses = []
    for text, tags in (("good film", {1: 1, 2: 0}), ("a very bad film", {1: 1, 2: 1, 3: 0, 4: 1})):
        inputs = tokenizer(text.replace("good film", "good film!"), return_tensors="pt")
        with torch.no_grad():
            logs = model(**inputs).logits.double().log_softmax(-1)[0]
        losses += [-logs[token, tag].item() for token, tag in tags.items()]
    assert report["measurements"][0]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert capsys.readouterr().out.endswith(f"Report: {output / 'optimizability/report.md'}\n")


def test_a_column_without_lists_of_tags_is_named(checkpoint: str, train_file: str, run_recipe: Callable[..., Path]):
    with pytest.raises(ValueError, match="'pos' holds no lists of tags; pass one of tokens, ner_tags"):
        run_recipe(token_classification, model_name_or_path=checkpoint, train_file=train_file, label_column_name="pos")
