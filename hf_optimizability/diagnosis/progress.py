# SPDX-License-Identifier: Apache-2.0
"""Rules about how far the loss got."""

from __future__ import annotations

from ..number_format import format_number
from ..report_data.data import ReportData
from .evidence import final_measurement
from .generalization import gap_with_error, loss_gap
from .learning_rate import against_raising, learning_rate_far_below_limit
from .loss_curve import UNDERFIT_SHARE, instability, mean_loss, still_falling, unchanged_loss
from .outcome import Finding, Fine, NotChecked, Outcome


def not_converged(report: ReportData) -> Outcome:
    """Report a loss that was still falling at the end."""
    last, falling = final_measurement(report), still_falling(report)
    if isinstance(last, NotChecked):
        return last
    if not isinstance(falling, str):
        return falling
    if instability(report):
        return Fine("Training was unstable.")
    evidence = [falling, f"gradient norm at step {last.step:,}: {format_number(last.grad_norm)}"]
    gain = None if last.quadratic_model is None else last.quadratic_model.predicted_decrease
    if gain is not None and gain <= last.loss:
        lower = f"would lower the loss of {format_number(last.loss)} by {format_number(gain)}"
        evidence.append(f"one best step along it {lower}")
    higher = "" if against_raising(report) else ", or at a higher learning rate if it was steady"
    return Finding(
        name="not_converged",
        severity="warning",
        sentence="The loss was still falling when training ended.",
        evidence=tuple(evidence),
        advice=f"Train for more steps{higher}.",
        source="95 % interval of a fit to this run's log, as in dynamics/convergence_speed.py",
    )


def underfitting(report: ReportData) -> Outcome:
    """Report a loss close to its start, on training and evaluation data alike."""
    last, gap, unchanged = final_measurement(report), gap_with_error(report), unchanged_loss(report)
    if isinstance(last, NotChecked):
        return last
    if not isinstance(unchanged, str):
        return unchanged
    if isinstance(gap, NotChecked):
        return gap
    if gap["high"] > (1 - UNDERFIT_SHARE) * mean_loss(last):
        return Fine()
    explained = (not_converged, learning_rate_far_below_limit)
    if instability(report) or any(isinstance(rule(report), Finding) for rule in explained):
        return Fine("Another finding explains it.")
    return Finding(
        name="underfitting",
        severity="warning",
        sentence="The model has learnt next to nothing: its loss is about where it started.",
        evidence=(unchanged, f"eval loss − train loss: {loss_gap(gap)}"),
        advice=f"Check that the labels belong to the inputs and that nothing needed is frozen. {_then_try(report)}",
        source="less than a tenth of the starting loss is gone, with no gap to new data; Goodfellow et al. 2016, "
        "section 5.2",
    )


def _then_try(report: ReportData) -> str:
    """Return what else may help a model that has learnt nothing, by what is known of its learning rate."""
    against = against_raising(report)
    if not against:
        return "Then try a higher learning rate, more steps, or a larger model."
    return f"Then try more steps, or a larger model; not a higher learning rate: {against[0]}."
