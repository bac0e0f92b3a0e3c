# SPDX-License-Identifier: Apache-2.0
"""The numbers behind the plots: x and y, from the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import NoneType

from ..linalg.density import Density
from ..measurement.results import Measurement
from ..quantities.loss_landscape import Landscape, LossLine
from .data import ReportData


Points = tuple[Sequence[float], Sequence[float]]

_MODEL_POINTS = 120
"""Points of the quadratic model along an axis."""


def measured_steps(report: ReportData) -> list[int]:
    """Return the steps of the measurements."""
    return [measurement.step for measurement in report.measurements]


def logged(report: ReportData, key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one key of the Trainer's log; `None`, for a number that JSON can't hold, is NaN.

    Anything else than a number is left out: a Trainer logs what it is given.
    """
    entries = [entry for entry in report.log_history if isinstance(entry.get(key, ""), (int, float, NoneType))]
    return [entry["step"] for entry in entries], [math.nan if entry[key] is None else entry[key] for entry in entries]


def block_names(report: ReportData) -> list[str]:
    """Return the names of all blocks measured, in the model's order."""
    return list(dict.fromkeys(name for measurement in report.measurements for name in measurement.blocks))


def batch_items(report: ReportData) -> float | None:
    """Return the items (examples, or labels that count) behind a step's gradient; `None` if they are unknown."""
    examples = report.training.get("examples_per_step")
    probe = report.data.probe
    if not examples or probe is None or not probe.examples or not probe.items:
        return None
    return float(examples * probe.items / probe.examples)


def stability_limits(report: ReportData) -> Points:
    """Return the limit of the sharpness at the learning rate of each logged step and of each measurement.

    It is proportional to one over the learning rate, so that one measured limit gives all others.
    """
    measured = [(m.step, m.optimizer_stability) for m in report.measurements if m.optimizer_stability is not None]
    limits = {step: size.limit for step, size in measured if math.isfinite(size.limit)}
    products = [size.limit * size.learning_rate for _, size in measured if math.isfinite(size.limit)]
    rates = zip(*logged(report, "learning_rate"), strict=True) if products else ()
    at_log = {step: products[-1] / rate for step, rate in rates if rate > 0}
    every = at_log | limits
    return list(every), list(every.values())


def density_line(density: Density) -> Points:
    """Return the density without the tails of its kernel, below a hundredth of the density of one eigenvalue."""
    least = min((weight for weight in density.weights if weight > 0), default=0.0)
    floor = 0.01 * least / (density.width * math.sqrt(2 * math.pi)) if density.width > 0 else 0.0
    return density.grid, [value if value > floor else math.nan for value in density.density]


def landscapes(report: ReportData) -> list[tuple[Measurement, Landscape]]:
    """Return the first and the last measurement with slices through the loss landscape, or the only one."""
    known = [(m, m.landscape) for m in report.measurements if m.landscape is not None]
    return known[:: max(1, len(known) - 1)]


def next_step(measurement: Measurement, line: LossLine) -> Points:
    """Return the learning rate in use and the loss after the update alone, if it lies on the line."""
    rate = measurement.optimizer_stability.learning_rate if measurement.optimizer_stability is not None else 0.0
    losses = dict(zip(line.axis.at, line.losses, strict=True))
    return ([rate], [losses[rate]]) if rate > 0 and rate in losses else ([], [])


def quadratic_line(line: LossLine, *, present: float) -> Points:
    """Return the quadratic model of the loss along a line, where it stays near the losses."""
    known = [loss for loss in line.losses if math.isfinite(loss)] or [present]
    low, high = min(known), max(known)
    margin = 0.25 * (high - low)
    first, last = line.axis.at[0], line.axis.at[-1]
    places = [first + (last - first) * index / _MODEL_POINTS for index in range(_MODEL_POINTS + 1)]
    values = [present + line.axis.quadratic_change(s) for s in places]
    return places, [value if low - margin <= value <= high + margin else math.nan for value in values]
