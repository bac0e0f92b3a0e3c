# SPDX-License-Identifier: Apache-2.0
"""Macro F1 as an `evaluate` module that is loaded from this file, without network."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class F1(evaluate.Metric):
    """The mean over the classes of F1 = 2 TP / (2 TP + FP + FN), each class counted alike however rare it is.

    The classes are those that occur among the predictions or the references.

    Example:
        >>> evaluate.load("recipes/metrics/f1.py").compute(predictions=[0, 0, 1, 1], references=[0, 1, 1, 1])
        {'f1': 0.7333333333333334}
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Macro F1: the mean over the classes of the harmonic mean of precision and recall.",
            citation="",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        predicted, actual = np.asarray(predictions), np.asarray(references)
        classes = np.union1d(predicted, actual)
        hits = np.array([np.sum((predicted == c) & (actual == c)) for c in classes])
        # A class's predictions and references together count its hits twice and each of its errors once.
        together = np.array([np.sum(predicted == c) + np.sum(actual == c) for c in classes])
        return {"f1": float(np.mean(2 * hits / together))}
