# SPDX-License-Identifier: Apache-2.0
"""What the loss did, by the log and by the measurements: evidence for the rules that judge it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from ..measurement.results import Measurement
from ..number_format import format_interval, format_number, format_percent
from ..report_data.data import ReportData
from .evidence import died_blocks, enumeration, final_measurement, is_finite
from .outcome import Fine, NotChecked


LARGE_SPIKE = 0.25
"""Share of the training loss's range. A loss that settles near 0 scatters least where most of its values are, so that
its earlier scatter counts as spikes: up to 0.16 of the range in healthy runs."""

LOSS_RISE = 1.2
"""Loss, relative to its start, above which training has made the model worse."""

CHANCE_RISE = 0.2
"""Share of the loss of a guess by which it is then above its start as well: a loss near 0 moves by any factor."""

SMOOTHING_WINDOW = 3
"""Logged losses to average for that, and ..."""

LOSS_RISE_SIGMAS = 3.0
"""... robust standard deviations of a single one by which the average is above the start."""

MIN_LOGGED_LOSSES = 6
"""Smallest number of logged losses from which the scatter can be estimated."""

LOGGED_OVER_MEASURED = 5.0
"""Logged loss, relative to the measured one at the start, that dropout does not explain, if it is above the loss of a
guess as well; ..."""

LOGGED_OVER_CHANCE = 1.5
"""... and relative to both, that is too large for either."""

UNDERFIT_SHARE = 0.9
"""Share of the initial loss that remains."""

MIN_POINTS_TO_FIT = 4
"""Logged losses that a fit of their fall needs."""

FALL_THAT_MATTERS = 0.02
"""Fall of the loss relative to its start. On shuffled labels one of 0.005 is significant, and worth nothing."""


def mean_loss(measurement: Measurement) -> float:
    """Return the training loss as it was measured: over the pool where there is one, else over the probe set."""
    return measurement.loss if measurement.population is None else measurement.population.loss.value


def grad_norm(measurement: Measurement) -> float:
    """Return the norm of that loss's gradient."""
    return measurement.grad_norm if measurement.population is None else measurement.population.grad_norm.value


def start_of(report: ReportData) -> Measurement | NotChecked:
    """Return the measurement before the first step; the first logged loss is a mean over later ones."""
    if not report.measurements:
        return NotChecked("measurement")
    return report.measurements[0] if report.measurements[0].step == 0 else NotChecked("first_measurement")


def chance_loss(report: ReportData) -> float | None:
    """Return the loss of a guess, ln C of C classes; `None` if they are not known."""
    return math.log(report.model.classes) if report.model.classes else None


def logged_losses(report: ReportData) -> list[float]:
    """Return the finite training losses of the log."""
    return [entry["loss"] for entry in report.log_history if is_finite(entry.get("loss"))]


def instability(report: ReportData) -> tuple[str, ...]:
    """Collect evidence of instability, from the log and from measurements in the mode of training."""
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
    risen = [] if report.model.batch_norm is not False else risen_measurements(report)
    rises = (_rise_in_log(report), _rise_above_measured(report), _measured_rise(report, risen))
    found += [rise for rise in rises if rise]
    if died := died_blocks(report):
        found.append(f"blocks that had a gradient at the start and have none at the end: {enumeration(died)}")
    return tuple(found)


def risen_measurements(report: ReportData) -> list[Measurement]:
    """Return the measurements whose loss is above that at the start by more than a little."""
    start = start_of(report)
    if isinstance(start, NotChecked):
        return []
    least = max(LOSS_RISE * mean_loss(start), mean_loss(start) + CHANCE_RISE * (chance_loss(report) or 0.0))
    return [measured for measured in report.measurements if mean_loss(measured) > least]


def rose_above_start(report: ReportData) -> tuple[str, ...]:
    """Return the evidence that the loss was above its start at any time, in whatever mode."""
    rises = (
        _rise_in_log(report),
        _rise_above_measured(report),
        _measured_rise(report, risen_measurements(report)),
    )
    return tuple(rise for rise in rises if rise)


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
    if speed["drop"] < FALL_THAT_MATTERS * speed["initial_loss"]:
        return Fine("It fell by too little to matter.")
    low, steps = speed.get("steps_to_90_low"), report.measurements[-1].step
    if low is not None and low > steps:
        interval = format_interval(speed["steps_to_90"], low, speed["steps_to_90_high"], nonnegative=True)
        return f"90 % of the loss's drop after {interval} steps, trained for {steps:,}"
    if str(speed.get("note")).startswith("Not yet levelled"):
        area = format_number(speed["normalized_area"], digits=3)
        return f"the loss had not levelled by step {steps:,}: area under its curve {area}, 0.5 for a straight fall"
    return NotChecked("loss_fit") if str(speed.get("note")).startswith("The loss fell, but its scatter") else Fine()


def unchanged_loss(report: ReportData) -> str | Fine | NotChecked:
    """Return the evidence that the measured loss ended close to its start."""
    first, last = start_of(report), final_measurement(report)
    if isinstance(last, NotChecked):
        return last
    if isinstance(first, NotChecked):
        return first
    rose = any(last is measurement for measurement in risen_measurements(report))
    if rose or not mean_loss(last) >= UNDERFIT_SHARE * mean_loss(first) > 0:
        return Fine()
    return measured_ends(first, last)


def measured_ends(first: Measurement, last: Measurement) -> str:
    """Return the measured loss at both ends as text."""
    ends = (f"{format_number(mean_loss(measured))} at step {measured.step:,}" for measured in (first, last))
    return f"loss on the probe set: {', '.join(ends)}"


def _measured_rise(report: ReportData, risen: Sequence[Measurement]) -> str | None:
    """Return the evidence that the measured loss rose, if there are measurements where it had."""
    return measured_ends(report.measurements[0], max(risen, key=mean_loss)) if risen else None


def _rise_in_log(report: ReportData) -> str | None:
    """Return the evidence that the training loss rose above its start by more than its scatter."""
    losses = logged_losses(report)
    if len(losses) < MIN_LOGGED_LOSSES:
        return None
    scale = report.training.get("loss_scale") or 1.0
    # Before the first step, in eval mode; the log begins after the first ones, in training mode.
    start = max([losses[0], *(mean_loss(measurement) * scale for measurement in report.measurements[:1])])
    sigma = 1.4826 * statistics.median(abs(after - before) for before, after in pairwise(losses)) / math.sqrt(2)
    top = max(_windows(losses))
    if top <= max(LOSS_RISE * start, start + LOSS_RISE_SIGMAS * sigma):
        return None
    return f"the training loss rose to {format_number(top)}, from {format_number(start)} at the start"


def _rise_above_measured(report: ReportData) -> str | None:
    """Return the evidence that the training loss, from the first logged one on, was far above the measured start.

    A run that breaks down within the first logging window falls from there: its log alone looks like a recovery.
    """
    start, losses, chance = start_of(report), logged_losses(report), chance_loss(report)
    if isinstance(start, NotChecked) or not losses:
        return None
    least = LOGGED_OVER_MEASURED * mean_loss(start)
    if report.model.batch_norm is not False:  # eval mode has other statistics than the log
        least = LOGGED_OVER_MEASURED * max(mean_loss(start), chance or 0.0)
    elif chance is not None:
        least = min(LOGGED_OVER_CHANCE * max(mean_loss(start), chance), max(least, chance))
    top = max(_windows(losses))
    if top <= least * _largest_scale(report):
        return None
    return f"the training loss was {format_number(top)} in the log, and {format_number(mean_loss(start))} at step 0"


def _largest_scale(report: ReportData) -> float:
    """Return the factor between the logged loss and its mean over items; where it is unknown, the largest there is."""
    if scale := report.training.get("loss_scale"):
        return float(scale)
    examples, at_once = (report.training.get(name) for name in ("examples_per_step", "per_device_train_batch_size"))
    return max(1.0, examples / at_once) if examples and at_once else 1.0


def _windows(losses: Sequence[float]) -> list[float]:
    """Return means of neighbouring losses."""
    width = min(SMOOTHING_WINDOW, len(losses))
    return [statistics.fmean(losses[index : index + width]) for index in range(len(losses) - width + 1)]
