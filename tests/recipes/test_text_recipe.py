# SPDX-License-Identifier: Apache-2.0
"""The text recipe from a file of sentences to a report, with a BERT small enough to train in a second."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import text_classification
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.support.tiny_texts import LABELS, SENTENCES, save_checkpoint, save_data


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return save_checkpoint(tmp_path / "tiny-bert")


@pytest.fixture
def train_file(tmp_path: Path) -> str:
    return save_data(tmp_path / "train.parquet")


def test_a_run_ends_with_checkpoint_metrics_card_and_report(
    checkpoint: str, train_file: str, run_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = run_recipe(
        text_classification,
        model_name_or_path=checkpoint,
        train_file=train_file,
        validation_file=train_file,
        ignore_mismatched_sizes=True,  # the checkpoint has three classes, the data two
        config_overrides="hidden_dropout_prob=0.25",
    )
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.hidden_dropout_prob == 0.25

    tokens = AutoTokenizer.from_pretrained(output)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = [model.config.id2label[int(number)] for number in model.eval()(**tokens).logits.argmax(1)]
    accuracy = sum(name == label for name, label in zip(predicted, LABELS, strict=True)) / len(LABELS)
    metrics = json.loads((output / "all_results.json").read_text())
    assert metrics["eval_accuracy"] == pytest.approx(accuracy)
    assert metrics.keys() >= {"train_loss", "eval_loss", "eval_f1"}

    report = json.loads((output / "optimizability/report.json").read_text())
    assert [measurement["step"] for measurement in report["measurements"]] == [0, 2]
    assert not report["failures"]
    assert "- accuracy" in (output / "README.md").read_text()
    printed = capsys.readouterr().out
    assert "Hessian trace" in printed
    assert printed.endswith(f"Report: {output / 'optimizability/report.md'}\n")
    assert (output / "optimizability/report.md").exists()


def test_flags_on_the_command_line(
    checkpoint: str, train_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"""--model_name_or_path {checkpoint} --train_file {train_file} --text_column_name sentence --do_train
        --ignore_mismatched_sizes --max_steps 1 --probe_examples 2 --max_hvps 16 --measure_strategy no --seed 3
        --cache_dir {tmp_path / "cache"} --report_dir {tmp_path / "report"} --output_dir {tmp_path / "out"}"""
    monkeypatch.setattr(sys, "argv", ["text_classification", *flags.split()])
    text_classification.main()
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["config"]["max_hvps"] == 16


def test_an_unknown_argument_fails_by_name(run_recipe: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="learning_rat"):
        run_recipe(text_classification, model_name_or_path="m", train_file="a.csv", learning_rat=1.0)


def test_code_that_comes_with_a_checkpoint_runs_only_on_request(
    tmp_path: Path, train_file: str, run_recipe: Callable[..., Path]
) -> None:
    model = tmp_path / "stranger"
    model.mkdir()
    settings = {"model_type": "stranger", "auto_map": {"AutoConfig": "code.StrangerConfig"}}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="contains custom code which must be executed"):
        run_recipe(text_classification, model_name_or_path=str(model), train_file=train_file)
    assert not (tmp_path / "ran").exists()
