# SPDX-License-Identifier: Apache-2.0
"""Rules about the loss on new data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..linalg.statistics import NORMAL_QUANTILE
from ..number_format import format_interval, format_number
from ..report_data.data import ReportData
from .evidence import around, is_finite
from .outcome import Finding, Fine, NotChecked, Outcome


SWING_STD_ERRORS = 3.0
"""Standard errors of the evaluation loss above which a rise or a fall is significant."""

MIN_EVALUATIONS_TO_RISE = 2
"""Evaluations after which a loss can have risen again."""

MIN_EVALUATIONS_TO_SWING = 3
"""Evaluations after which a loss can have risen and fallen again."""


def overfitting(report: ReportData) -> Outcome:
    """Report an evaluation loss that has risen again, above the training loss."""
    gap = gap_with_error(report)
    if isinstance(gap, NotChecked):
        return gap
    error, rise, evaluations = gap["std_error"], gap.get("rise_since_best"), len(_evaluations(report))
    if rise is None or (rise == 0 and evaluations < MIN_EVALUATIONS_TO_RISE):
        return NotChecked("evaluations", evaluations, MIN_EVALUATIONS_TO_RISE)
    if not (gap["low"] > 0 and rise > NORMAL_QUANTILE * error):
        return Fine()
    return Finding(
        name="overfitting",
        severity="warning",
        sentence="The model overfits: its loss on new data has risen again.",
        evidence=(
            f"eval loss up by {around(rise, error)} since its best at step {gap['best_step']:,}",
            f"eval loss − train loss at the end: {loss_gap(gap)}",
        ),
        advice="Keep the best checkpoint (`load_best_model_at_end`), stop there (`EarlyStoppingCallback`), or "
        "regularize: fewer epochs, weight decay, dropout, more data. Look for wrong labels.",
        source="95 % interval of the evaluation loss; Prechelt 1998, Early Stopping – But When?",
    )


def evaluation_unstable(report: ReportData) -> Outcome:
    """Report an evaluation loss that rises and falls again by more than its error."""
    gap, points = gap_with_error(report), _evaluations(report)
    if len(points) < MIN_EVALUATIONS_TO_SWING:
        return NotChecked("evaluations", len(points), MIN_EVALUATIONS_TO_SWING)
    if isinstance(gap, NotChecked):
        return gap
    error = gap["std_error"]
    swings = [] if error == 0 else _swings([loss for _, loss in points], least=SWING_STD_ERRORS * error)
    if not swings:
        return Fine()
    size, at = max(swings)
    return Finding(
        name="evaluation_unstable",
        severity="warning",
        sentence="The evaluation loss goes up and down by more than its error.",
        evidence=(
            f"largest swing: {around(size, error)}, up to {format_number(points[at][1])} at step "
            f"{points[at][0]:,} and down again",
            f"swings of that kind: {len(swings)} in {len(points)} evaluations",
        ),
        advice="Which checkpoint is best is partly luck: lower the learning rate towards the end, average weights, or "
        "evaluate more often and keep the best.",
        source=f"this run's log; a swing is a rise and a fall of over {SWING_STD_ERRORS} standard errors of the mean "
        "loss each",
    )


def gap_with_error(report: ReportData) -> Mapping[str, Any] | NotChecked:
    """Return the generalization gap, where both losses were measured with their errors."""
    if not report.dynamics:
        return NotChecked("training")
    gap: Mapping[str, Any] = report.dynamics.get("generalization_gap") or {}
    return NotChecked("gap") if gap.get("std_error") is None else gap


def loss_gap(gap: Mapping[str, Any]) -> str:
    """Return the gap with its interval."""
    return format_interval(gap["loss_gap"], gap["low"], gap["high"])


def _evaluations(report: ReportData) -> list[tuple[int, float]]:
    """Return step and loss of each evaluation in the log."""
    return [(entry["step"], entry["eval_loss"]) for entry in report.log_history if is_finite(entry.get("eval_loss"))]


def _swings(losses: Sequence[float], *, least: float) -> list[tuple[float, int]]:
    """Return size and top of each rise of at least `least` that is followed by a fall of at least `least`."""
    found = []
    bottom, top = 0, 0
    for index, loss in enumerate(losses):
        if loss > losses[top]:
            top = index
        size = min(losses[top] - losses[bottom], losses[top] - loss)
        if size >= least:
            found.append((size, top))
        if size >= least or loss < losses[bottom]:
            bottom = top = index
    return found
