# SPDX-License-Identifier: Apache-2.0
"""The numbers of a measurement that go to the log and the trackers."""

from __future__ import annotations

import math

from ..linalg.estimate import Estimate
from ..log_keys import PREFIX
from ..measurement.quantities_table import QUANTITIES, TASK_QUANTITIES
from ..measurement.results import Measurement, MultitaskMeasurement
from ..measurement.values import number_of


def log_entry(measurement: Measurement) -> dict[str, float]:
    """Return the finite numbers of a measurement by their keys in the log."""
    numbers: dict[str, float | None] = {}
    for quantity in QUANTITIES:
        value = quantity.get(measurement)
        if quantity.logged:
            numbers[quantity.name] = number_of(value)
        if quantity.logged_error and isinstance(value, Estimate):
            bounded = quantity.logged_error == "residual" and value.residual is not None
            kind = "residual" if bounded else "std_error"
            numbers[f"{quantity.name}_{kind}"] = value.residual if bounded else value.std_error
    if measurement.multitask is not None:
        numbers |= _task_entry(measurement.multitask)
    numbers |= {"hvps": measurement.hvps, "seconds": measurement.seconds}
    return {PREFIX + name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}


def _task_entry(multitask: MultitaskMeasurement) -> dict[str, float | None]:
    """Return the numbers of each task and of each pair of tasks."""
    numbers = {
        f"task/{name}/{quantity.log_key}": number_of(quantity.get(task))
        for name, task in multitask.tasks.items()
        for quantity in TASK_QUANTITIES
        if quantity.log_key
    }
    cosines = {f"task_cosine/{pair.first}/{pair.second}": number_of(pair.cosine) for pair in multitask.conflicts}
    return {**numbers, **cosines}
