# SPDX-License-Identifier: Apache-2.0
"""What a guess would score: the classes of the model's head, and how often the most frequent label occurs."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from torch import nn

from hf_optimizability.training.provenance import describe_data, describe_model
from tests.support import tiny_models


@pytest.mark.parametrize(
    ("name", "options", "classes"),
    [
        ("bert", {"num_labels": 5}, 5),
        ("vit", {"num_labels": 4}, 4),
        ("bert", {"num_labels": 5, "problem_type": "multi_label_classification"}, None),
        ("bert", {"num_labels": 1}, None),
        ("gpt2", {}, tiny_models.VOCABULARY),
    ],
)
def test_classes_are_those_that_the_loss_chooses_among(name: str, options: dict[str, Any], classes: int | None):
    assert describe_model(tiny_models.make(name, **options)).classes == classes


def test_a_model_without_a_config_has_no_known_classes():
    assert describe_model(nn.Linear(2, 3)).classes is None


LABELS = [0, 1, 1, 2]
ROWS = [{"text": str(index), "label": label} for index, label in enumerate(LABELS)]


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        (ROWS, 0.5),
        (datasets.Dataset.from_list(ROWS), 0.5),
        (datasets.Dataset.from_list(ROWS).rename_column("label", "labels"), 0.5),
        (datasets.Dataset.from_list(ROWS).select([1, 2, 3]), 2 / 3),
        (datasets.Dataset.from_list([{"labels": [0, 1]}, {"labels": [1, 1]}]), None),
        (datasets.Dataset.from_list([{"label": 0.5}]), None),
        (datasets.Dataset.from_list([{"text": "a"}]), None),
        ([], None),
        ([(0, 1)], None),
        (None, None),
    ],
)
def test_the_share_of_the_most_frequent_label(rows: Any, share: float | None):
    assert describe_data(None, rows).majority_share == share


def test_labels_are_read_without_the_rows():
    def refuse(rows: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("A row was read.")

    assert describe_data(None, datasets.Dataset.from_list(ROWS).with_transform(refuse)).majority_share == 0.5
