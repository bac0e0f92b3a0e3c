# SPDX-License-Identifier: Apache-2.0
"""How much worse a model does on new data: an `evaluate` measurement that needs nothing but two loss curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import norm


FEATURES = ("step", "train_loss", "eval_loss", "train_std_error", "eval_std_error")

NOTES = {
    "nothing_evaluated": "No losses to compare: nothing was evaluated.",
    "loss_missing": "The last train loss or eval loss is missing or not finite.",
    "no_standard_errors": "Without the standard errors of both losses the gap has no error.",
}
"""What the note says where a value is missing."""

DESCRIPTION = """
Generalization gap: eval loss minus train loss with its error, and the rise of the eval loss since its best value.
"""

CITATION = """
@book{hastie2009elements,
  title = {The Elements of Statistical Learning},
  author = {Hastie, Trevor and Tibshirani, Robert and Friedman, Jerome},
  edition = {2},
  publisher = {Springer},
  year = {2009}
}
"""

INPUTS_DESCRIPTION = """
Args:
    step (list of float): Optimizer steps at which both losses were measured, in any order.
    train_loss (list of float): Loss on the training set.
    eval_loss (list of float): Loss on the evaluation set.
    train_std_error (list of float): Standard error of each train_loss, NaN or None where unknown.
    eval_std_error (list of float): Standard error of each eval_loss, NaN or None where unknown.

Returns:
    dict: of the last step: step, train_loss, eval_loss, loss_gap (eval minus train), its std_error, low and high (95 %
    confidence interval) and significant (whether the interval excludes 0); best_eval_loss, its best_step, and
    rise_since_best (last minus best eval loss); and note, which says why a value is None.
"""

VALUES = (
    "step", "train_loss", "eval_loss", "loss_gap", "std_error", "low", "high", "significant",
    "best_eval_loss", "best_step", "rise_since_best",
)  # fmt: skip
"""Results, `None` where the losses don't give them."""


class GeneralizationGap(evaluate.Measurement):
    """Eval loss minus train loss at the last step, and the rise of the eval loss since its best.

    `loss_gap` is an estimate of the optimism of the training error (Hastie, Tibshirani and Friedman 2009, section 7.4)
    if both losses are measured alike: in eval mode, with the same weights. Its standard error is
    √(train_std_error² + eval_std_error²), as the two sets are independent; `low` and `high` are 1.96 of it away.

    Example:
        >>> result = GeneralizationGap().compute(
        ...     step=[100, 200],
        ...     train_loss=[0.5, 0.25],
        ...     eval_loss=[0.5, 0.75],
        ...     train_std_error=[0.03, 0.03],
        ...     eval_std_error=[0.04, 0.04],
        ... )
        >>> result["loss_gap"], result["std_error"], result["significant"], result["rise_since_best"]
        (0.5, 0.05, True, 0.25)
    """

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value("float64") for name in FEATURES}),
        )

    def _compute(self, **columns: Sequence[float | None]) -> dict[str, Any]:
        return compare_losses(**columns)


def compare_losses(
    step: Sequence[float | None],
    train_loss: Sequence[float | None],
    eval_loss: Sequence[float | None],
    train_std_error: Sequence[float | None],
    eval_std_error: Sequence[float | None],
) -> dict[str, Any]:
    """Compute what `GeneralizationGap().compute` returns, without its detour through a file.

    Args:
        step: Optimizer steps at which both losses were measured, in any order.
        train_loss: Loss on the training set.
        eval_loss: Loss on the evaluation set.
        train_std_error: Standard error of each `train_loss`, NaN or `None` where unknown.
        eval_std_error: Standard error of each `eval_loss`, NaN or `None` where unknown.

    Returns:
        The values that `GeneralizationGap` describes, and a note that says why one is `None`.

    Example:
        >>> compare_losses([5], [0.25], [0.5], [None], [None])["note"]
        'Without the standard errors of both losses the gap has no error.'
    """
    result: dict[str, Any] = {**dict.fromkeys(VALUES), "note": ""}
    if not len(step):
        return {**result, "note": NOTES["nothing_evaluated"]}
    rows = np.array([step, train_loss, eval_loss, train_std_error, eval_std_error], dtype=float)
    rows = rows[:, np.argsort(rows[0], kind="stable")]
    steps, _, eval_losses = rows[:3]
    if np.isfinite(eval_losses).any():
        best = int(np.argmin(np.where(np.isfinite(eval_losses), eval_losses, np.inf)))
        result |= {"best_eval_loss": float(eval_losses[best]), "best_step": int(steps[best])}

    last_step, train, evaluated, *std_errors = map(float, rows[:, -1])
    result["step"] = int(last_step)
    for name, loss in (("train_loss", train), ("eval_loss", evaluated)):
        result[name] = loss if np.isfinite(loss) else None
    if np.isfinite(evaluated):
        result["rise_since_best"] = evaluated - result["best_eval_loss"]
    if not np.isfinite([train, evaluated]).all():
        return {**result, "note": NOTES["loss_missing"]}

    gap, std_error = evaluated - train, math.hypot(*std_errors)
    result["loss_gap"] = gap
    if not np.isfinite(std_error):
        return {**result, "note": NOTES["no_standard_errors"]}
    low, high = (float(end) for end in gap + std_error * norm.ppf([0.025, 0.975]))
    return {**result, "std_error": std_error, "low": low, "high": high, "significant": not low <= 0 <= high}
