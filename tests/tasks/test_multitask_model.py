# SPDX-License-Identifier: Apache-2.0
"""One trunk with several heads: which head answers, what is saved, what the data set of all tasks holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BertModel

from hf_optimizability import OptimizabilityConfig, measure
from hf_optimizability.tasks.multitask_model import MultiTaskConfig, MultiTaskModel, combine_tasks
from tests.support import tiny_models


def make() -> MultiTaskModel:
    torch.manual_seed(0)
    return MultiTaskModel(MultiTaskConfig(trunk=tiny_models.bert().config.to_dict(), heads={"a": 2, "b": 3})).eval()


BATCH = {
    "input_ids": torch.tensor([[3, 4, 5], [6, 7, 8], [3, 4, 5]]),
    "task": torch.tensor([0, 1, 1]),
    "labels": torch.tensor([1, 2, 0]),
}


def test_each_example_is_answered_by_the_head_of_its_task():
    model = make()
    found = model(**BATCH)
    pooled = model.trunk(BATCH["input_ids"]).pooler_output
    first = model.heads["a"](pooled[:1])
    torch.testing.assert_close(found.logits[:1, :2], first)
    torch.testing.assert_close(found.logits[1:], model.heads["b"](pooled[1:]))
    assert found.logits[0].softmax(-1)[2] == 0
    losses = [
        torch.nn.functional.cross_entropy(first, BATCH["labels"][:1]),
        torch.nn.functional.cross_entropy(found.logits[1:], BATCH["labels"][1:], reduction="sum"),
    ]
    torch.testing.assert_close(found.loss, sum(losses) / 3)


def test_it_saves_and_loads(tmp_path: Path):
    model = make()
    model.save_pretrained(tmp_path / "whole")
    again = MultiTaskModel.from_pretrained(tmp_path / "whole").eval()
    assert again.config.heads == {"a": 2, "b": 3}
    torch.testing.assert_close(again(**BATCH).logits, model(**BATCH).logits)
    trunk = tiny_models.bert().bert
    trunk.save_pretrained(tmp_path / "trunk")
    built = MultiTaskModel.on_checkpoint(str(tmp_path / "trunk"), {"x": 2})
    assert isinstance(built.trunk, BertModel)
    for name, weight in trunk.state_dict().items():
        assert torch.equal(built.trunk.state_dict()[name], weight)


def test_its_second_derivatives_by_the_classes_a_task_does_not_have_are_none():
    batches = [{key: value[:1] for key, value in BATCH.items()}, {key: value[1:] for key, value in BATCH.items()}]
    found = measure(make(), batches, OptimizabilityConfig(profile="light", task_column="task", max_hvps=16))
    assert found.engine == "double_backward" and found.hessian.lambda_max.value > 0
    assert list(found.multitask.tasks) == ["0", "1"]


def test_a_mixed_data_set_names_its_tasks():
    sets = {"a": Dataset.from_dict({"x": [1]}), "b": Dataset.from_dict({"x": [2, 3]})}
    rows = combine_tasks(sets)
    assert rows["x"][:] == [1, 2, 3] and rows.features["task"].int2str(rows["task"][:]) == ["a", "b", "b"]
    with pytest.raises(ValueError, match="'a' has a column 'task' already"):
        combine_tasks({"a": rows})
