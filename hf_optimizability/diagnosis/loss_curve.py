# SPDX-License-Identifier: Apache-2.0
"""What the loss did, by the log and by the measurements: evidence for the rules that judge it."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

from ..number_format import format_interval, format_number, format_percent
from ..report_data.data import ReportData
from .evidence import final_measurement, is_finite
from .outcome import Fine, NotChecked


LARGE_SPIKE = 0.25
"""Share of the training loss's range. A loss that settles near 0 scatters least where most of its values are, so that
its earlier scatter counts as spikes: up to 0.16 of the range in healthy runs."""

LOSS_RISE = 1.2
"""Training loss, relative to its start, above which training has made the model worse."""

SMOOTHING_WINDOW = 3
"""Logged losses to average for that, and ..."""

LOSS_RISE_SIGMAS = 3.0
"""... robust standard deviations of a single one by which the average is above the start."""

MIN_LOGGED_LOSSES = 6
"""Smallest number of logged losses from which the scatter can be estimated."""

UNDERFIT_SHARE = 0.9
"""Share of the initial loss that remains."""

MIN_POINTS_TO_FIT = 4
"""Logged losses that a fit of their fall needs."""


def instability(report: ReportData) -> tuple[str, ...]:
    """Collect evidence of instability."""
    found = []
    series = (report.dynamics.get("stability") or {}).get("loss") or {}
    if series.get("non_finite"):
        found.append(f"losses in the log that are not finite: {series['non_finite']:,}")
    norms = [entry["grad_norm"] for entry in report.log_history if "grad_norm" in entry]
    if lost := sum(not is_finite(norm) for norm in norms):
        found.append(f"gradient norms in the log that are not finite: {lost:,} of {len(norms):,}")
    failed = [failure.step for failure in report.failures if failure.why.code == "loss_not_finite"]
    if failed:
        found.append(f"loss on the probe set not finite at step {failed[0]:,}")
    if series.get("spikes") and series["largest_setback"] > LARGE_SPIKE:
        size = format_percent(series["largest_setback"])
        found.append(f"spikes of the training loss: {series['spikes']:,}, the largest of {size} of its whole range")
    if (series.get("setback_share_low") or 0.0) > 0.5:
        low, high = (format_percent(series[f"setback_share_{end}"]) for end in ("low", "high"))
        found.append(f"the training loss rose more often than it fell: {low} to {high} of the time")
    if rise := _loss_rise(report):
        found.append(rise)
    return tuple(found)


def logged_losses(report: ReportData) -> list[float]:
    """Return the finite training losses of the log."""
    return [entry["loss"] for entry in report.log_history if is_finite(entry.get("loss"))]


def still_falling(report: ReportData) -> str | Fine | NotChecked:
    """Return the evidence that more than a tenth of the loss's drop was still to come."""
    if not report.measurements:
        return NotChecked("measurement")
    speed = report.dynamics.get("convergence_speed")
    if not speed:
        return NotChecked("training")
    if speed.get("drop") is None:
        few = (speed.get("points") or 0) < MIN_POINTS_TO_FIT
        return NotChecked("logged_losses", speed.get("points") or 0, MIN_POINTS_TO_FIT) if few else Fine()
    low, steps = speed.get("steps_to_90_low"), report.measurements[-1].step
    if low is not None and low > steps:
        interval = format_interval(speed["steps_to_90"], low, speed["steps_to_90_high"], nonnegative=True)
        return f"90 % of the loss's drop after {interval} steps, trained for {steps:,}"
    if str(speed.get("note")).startswith("Not yet levelled"):
        area = format_number(speed["normalized_area"], digits=3)
        return f"the loss had not levelled by step {steps:,}: area under its curve {area}, 0.5 for a straight fall"
    return NotChecked("loss_fit") if str(speed.get("note")).startswith("The loss fell, but its scatter") else Fine()


def unchanged_loss(report: ReportData) -> str | Fine | NotChecked:
    """Return the evidence that the loss on the probe set ended close to its start."""
    last = final_measurement(report)
    if isinstance(last, NotChecked):
        return last
    first = report.measurements[0]
    if not last.loss >= UNDERFIT_SHARE * first.loss > 0:
        return Fine()
    ends = f"{format_number(first.loss)} at step {first.step:,}, {format_number(last.loss)} at step {last.step:,}"
    return f"loss on the probe set: {ends}"


def _loss_rise(report: ReportData) -> str | None:
    """Return the evidence that the training loss rose above its start by more than its scatter."""
    losses = logged_losses(report)
    if len(losses) < MIN_LOGGED_LOSSES:
        return None
    scale = report.training.get("loss_scale") or 1.0
    # Before the first step, in eval mode; the log begins after the first ones, in training mode.
    start = max([losses[0], *(measurement.loss * scale for measurement in report.measurements[:1])])
    sigma = 1.4826 * statistics.median(abs(after - before) for before, after in pairwise(losses)) / math.sqrt(2)
    top = max(
        statistics.fmean(losses[index : index + SMOOTHING_WINDOW])
        for index in range(len(losses) - SMOOTHING_WINDOW + 1)
    )
    if top <= max(LOSS_RISE * start, start + LOSS_RISE_SIGMAS * sigma):
        return None
    return f"the training loss rose to {format_number(top)}, from {format_number(start)} at the start"
