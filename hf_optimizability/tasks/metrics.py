# SPDX-License-Identifier: Apache-2.0
"""Accuracy and macro F1 as `evaluate` metrics, which need no network here."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their reference.

    Example:
        >>> Accuracy().compute(predictions=[0, 1, 1, 0], references=[0, 1, 1, 1])
        {'accuracy': 0.75}
    """

    def _info(self) -> evaluate.MetricInfo:
        return _of_classes("The share of predictions that equal their reference.")

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}


class F1(evaluate.Metric):
    """The mean over the classes of F1 = 2 TP / (2 TP + FP + FN), each class counted alike however rare it is.

    The classes are those that occur among the predictions or the references.

    Example:
        >>> F1().compute(predictions=[0, 0, 1, 1], references=[0, 1, 1, 1])
        {'f1': 0.7333333333333334}
    """

    def _info(self) -> evaluate.MetricInfo:
        return _of_classes("Macro F1: the mean over the classes of the harmonic mean of precision and recall.")

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        predicted, actual = np.asarray(predictions), np.asarray(references)
        classes = np.union1d(predicted, actual)
        hits = np.array([np.sum((predicted == c) & (actual == c)) for c in classes])
        # A class's predictions and references together count its hits twice and each of its errors once.
        together = np.array([np.sum(predicted == c) + np.sum(actual == c) for c in classes])
        return {"f1": float(np.mean(2 * hits / together))}


def _of_classes(description: str) -> evaluate.MetricInfo:
    label = datasets.Value("int64")
    features = datasets.Features({"predictions": label, "references": label})
    return evaluate.MetricInfo(description=description, citation="", features=features)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute accuracy and macro F1 of a classifier's logits, for a Trainer."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    metrics = evaluate.combine([Accuracy(), F1()])
    return metrics.compute(predictions=np.argmax(logits, axis=1), references=prediction.label_ids)
