# SPDX-License-Identifier: Apache-2.0
"""The metrics against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

from hf_optimizability.tasks.metrics import compute_metrics


RANDOM = np.random.default_rng(0)
CASES = {
    "two classes": (RANDOM.integers(0, 2, 50), RANDOM.integers(0, 2, 50)),
    "rare class": (RANDOM.integers(0, 2, 50), (np.arange(50) == 7).astype(int)),
    "five classes": (RANDOM.integers(0, 5, 200), RANDOM.integers(0, 5, 200)),
    "a class that is never predicted": (np.zeros(30, int), RANDOM.integers(0, 3, 30)),
    "a class that never occurs": (RANDOM.integers(0, 4, 30), RANDOM.integers(0, 3, 30)),
    "all wrong": (np.zeros(5, int), np.ones(5, int)),
    "all right": (np.arange(4), np.arange(4)),
}


@pytest.mark.parametrize("case", CASES)
def test_accuracy_and_macro_f1_are_scikit_learns(case: str) -> None:
    predictions, references = CASES[case]
    logits = np.eye(5)[predictions]
    assert compute_metrics(EvalPrediction(logits, references)) == {
        "accuracy": pytest.approx(accuracy_score(references, predictions), abs=1e-12),
        "f1": pytest.approx(f1_score(references, predictions, average="macro"), abs=1e-12),
    }


def test_models_that_return_more_than_logits() -> None:
    prediction = EvalPrediction((np.eye(3), np.zeros((3, 7))), np.array([0, 1, 1]))
    assert compute_metrics(prediction)["accuracy"] == pytest.approx(2 / 3)
