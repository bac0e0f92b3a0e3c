# SPDX-License-Identifier: Apache-2.0
"""The recipe for language models with LoRA, on a GPT-2 that knows six words: what its loss is over, and at B = 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import causal_language_modeling_lora
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction

from tests.support import tiny_models, tiny_texts


TEXTS = ["good film", "a very bad film", "the film", "a good very good film"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """Its padding token is its end-of-text token too, as in many decoders."""
    folder = tmp_path / "tiny-gpt2"
    tokenizer = tiny_texts.tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    tiny_models.gpt2(
        vocab_size=len(tokenizer), n_positions=16, eos_token_id=end, pad_token_id=end, bos_token_id=end
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train_file(tmp_path: Path) -> str:
    Dataset.from_dict({"text": TEXTS * 2}).to_parquet(tmp_path / "train.parquet")
    return str(tmp_path / "train.parquet")


def test_the_loss_is_over_all_next_tokens_but_padding_and_has_no_curvature_in_a_at_first(
    checkpoint: str, train_file: str, run_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    output = run_recipe(
        causal_language_modeling_lora,
        model_name_or_path=checkpoint,
        train_file=train_file,
        validation_file=train_file,
        probe_examples=8,
        probe_batch_size=3,
        lora_rank=2,
        learning_rate=0.1,
        blocks=["*lora_A*", "*lora_B*"],
    )
    report = json.loads((output / "optimizability/report.json").read_text())
    first, last = report["measurements"]
    assert not report["failures"]

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()  # at B = 0 it is the same function
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    losses: list[float] = []
    for text in TEXTS:
        inputs = tokenizer(text + "[SEP]", return_tensors="pt")
        with torch.no_grad():
            logs = model(**inputs).logits[0].double().log_softmax(-1)
        losses += [-logs[place, token].item() for place, token in enumerate(inputs["input_ids"][0, 1:])]
    assert report["data"]["probe_items"] == 2 * len(losses)
    assert first["loss"] == pytest.approx(np.mean(losses), rel=1e-5)

    assert first["blocks"]["*lora_A*"]["trace"]["value"] == pytest.approx(0, abs=1e-6)
    assert abs(first["blocks"]["*lora_B*"]["trace"]["value"]) > 1e-4
    assert abs(last["blocks"]["*lora_A*"]["trace"]["value"]) > 1e-6
    assert (output / "adapter_model.safetensors").exists()
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2
    assert 0 <= json.loads((output / "all_results.json").read_text())["eval_accuracy"] <= 1
    assert capsys.readouterr().out.endswith(f"Report: {output / 'optimizability/report.md'}\n")


def test_a_text_ends_with_a_token_that_is_learnt(checkpoint: str):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    args = causal_language_modeling_lora.DataArguments(dataset_name="none", max_seq_length=16)
    (row,) = causal_language_modeling_lora.prepare(Dataset.from_dict({"text": ["bad"]}), tokenizer, args).to_list()
    end = tokenizer.eos_token_id
    assert row["labels"] == row["input_ids"] and end == tokenizer.pad_token_id
    assert tokenizer.convert_ids_to_tokens(row["labels"])[1:3] == ["bad", "[SEP]"]


def test_accuracy_is_of_the_next_token_and_passes_over_padding():
    labels = np.array([[5, 6, 7, -100], [5, 8, 9, 7]])
    predicted = np.array([[6, 0, 0, 0], [8, 9, 0, 5]])
    scores = causal_language_modeling_lora.compute_metrics(EvalPrediction(predicted, labels))
    assert scores == {"accuracy": 3 / 5}


def test_a_column_that_is_not_there_is_named(checkpoint: str, train_file: str, run_recipe: Callable[..., Path]):
    with pytest.raises(ValueError, match="no column 'sentence', only text; pass --text_column_name"):
        run_recipe(
            causal_language_modeling_lora,
            model_name_or_path=checkpoint,
            train_file=train_file,
            text_column_name="sentence",
        )
