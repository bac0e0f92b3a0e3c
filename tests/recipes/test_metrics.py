# SPDX-License-Identifier: Apache-2.0
"""The carried metrics against scikit-learn's."""

from __future__ import annotations

from pathlib import Path

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score


METRICS = Path(__file__).parents[2] / "recipes/metrics"
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
def test_accuracy_and_macro_f1_are_scikit_learns(case: str, tmp_path: Path) -> None:
    predictions, references = CASES[case]
    for name, truth in {
        "accuracy": accuracy_score(references, predictions),
        "f1": f1_score(references, predictions, average="macro"),
    }.items():
        metric = evaluate.load(str(METRICS / f"{name}.py"), cache_dir=str(tmp_path))
        assert metric.compute(predictions=predictions, references=references) == {
            name: pytest.approx(truth, abs=1e-12)
        }
