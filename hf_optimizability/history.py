# SPDX-License-Identifier: Apache-2.0
"""What a run has measured so far, kept in the Trainer's log, which lives in every checkpoint."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import TrainerState
from transformers.utils import logging

from .files import finite
from .measurement import PREFIX, Measurement, MeasurementFailure


logger = logging.get_logger(__name__)

RECORD = f"{PREFIX}record"
"""Key of the entries of `log_history` that hold a measurement, or why there is none."""


class History(NamedTuple):
    """What a run has measured.

    Attributes:
        measurements: In the order of the steps.
        failures: Measurements that could not be made.
        train_seconds: Time that training took until the last of them, without measurements.
    """

    measurements: list[Measurement]
    failures: list[MeasurementFailure]
    train_seconds: float


def record(
    state: TrainerState,
    found: Measurement | MeasurementFailure,
    *,
    config: dict[str, Any],
    train_seconds: float,
) -> None:
    """Adds a measurement, or a failure, to the log that goes into the next checkpoint; no tracker gets to see it.

    Args:
        state: The Trainer's state.
        found: What was measured, or why nothing was.
        config: The options it was measured with: several callbacks may share a log.
        train_seconds: Time of training so far, without measurements.
    """
    data = found.to_dict() if isinstance(found, Measurement) else vars(found)
    kind = "measurement" if isinstance(found, Measurement) else "failure"
    entry: dict[str, Any] = {RECORD: {kind: finite(data), "config": config, "train_seconds": train_seconds}}
    state.log_history.append({**entry, "epoch": state.epoch, "step": found.step})


def restore(state: TrainerState, *, config: dict[str, Any]) -> History:
    """What the log of a resumed run says was measured with these options; nothing in a run that begins."""
    history = History([], [], 0.0)
    steps = set()  # two callbacks with the same options measure the same
    for entry in state.log_history:
        held: dict[str, Any] = entry.get(RECORD, {})  # type: ignore[assignment]
        if held.get("config") != config or entry["step"] in steps:
            continue
        steps.add(entry["step"])
        try:
            if "measurement" in held:
                history.measurements.append(Measurement.from_dict(held["measurement"]))
            elif "failure" in held:
                history.failures.append(MeasurementFailure(**held["failure"]))
            history = history._replace(train_seconds=held["train_seconds"])
        except (KeyError, TypeError, AttributeError) as error:
            logger.warning(
                f"The measurement at step {entry.get('step')} in the checkpoint's log can't be read "
                f"({type(error).__name__}: {error}). It stays in `trainer_state.json`; the report goes on without it."
            )
    return history


def without_records(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log as it is without the measurements in full: numbers by name."""
    return [entry for entry in log_history if RECORD not in entry]
