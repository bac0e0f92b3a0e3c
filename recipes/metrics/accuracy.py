# SPDX-License-Identifier: Apache-2.0
"""Accuracy as an `evaluate` module that is loaded from this file, without network."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their reference.

    Example:
        >>> evaluate.load("recipes/metrics/accuracy.py").compute(predictions=[0, 1, 1, 0], references=[0, 1, 1, 1])
        {'accuracy': 0.75}
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="The share of predictions that equal their reference.",
            citation="",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}
