# SPDX-License-Identifier: Apache-2.0
"""The recipe of two tasks from a file of scored sentences to a report, with a tiny BERT as trunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import several_tasks
from datasets import Dataset
from transformers import AutoConfig, AutoModel

from hf_optimizability import OptimizabilityReport
from tests.support.tiny_texts import SENTENCES, save_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("second", ["intensity", "negated"])
def test_a_run_tells_both_tasks(tmp_path: Path, run_recipe: Callable[..., Path], second: str):
    checkpoint, folder = save_checkpoint(tmp_path / "tiny-bert"), tmp_path / "data"
    config = AutoConfig.from_pretrained(checkpoint)
    AutoModel.from_config(config).save_pretrained(checkpoint)
    folder.mkdir()
    sentences = (SENTENCES * 40)[:40]
    scores = [(index % 5 - 2.5) * 1.2 for index in range(40)]
    for split in ("train", "test"):
        Dataset.from_dict({"sentence": sentences, "score": scores}).to_parquet(folder / f"{split}.parquet")
    output = run_recipe(
        several_tasks,
        model_name_or_path=checkpoint,
        dataset_name=str(folder),
        second_task=second,
        max_train_samples=24,
        max_eval_samples=16,
        probe_examples=8,
        max_hvps=16,
        eval_strategy="epoch",
    )
    report = OptimizabilityReport.load(output / "optimizability")
    assert not report.failures
    last = report.measurements[-1].multitask
    assert list(last.tasks) == sorted(["polarity", second])
    assert report.dynamics["tasks"]["polarity"]["loss_gap"]["loss_gap"] is not None
    assert "## Tasks" in (output / "optimizability/report.md").read_text()
