# SPDX-License-Identifier: Apache-2.0
"""What a run has measured so far, stored in the Trainer's state, which is part of every checkpoint.

`TrainerState.stateful_callbacks` is written with each checkpoint, in one file with the rest of the state, and read
back before training begins. A Trainer restores what bears the name of a callback's class there, and nothing else.
`log_history` stays the Trainer's: callbacks, trackers and tests read its entries by position.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from transformers import TrainerState
from transformers.utils import logging

from ..files import finite
from ..log_keys import PREFIX
from ..measurement.results import Measurement, MeasurementFailure
from ..report_data.schema import failure_with_reason, require_valid_measurement, with_current_names
from .clock import Clock


logger = logging.get_logger(__name__)

RECORDS = f"{PREFIX}records"
"""Key of `stateful_callbacks` that holds the records of all callbacks, in chronological order."""

RECORD = f"{PREFIX}record"
"""Key, in a record, of the measurement or the failure."""

_ENTRY = f"{PREFIX}hvps"
"""Key that all log entries of measurements have, and no others."""


SCHEDULING_OPTIONS = ("profile", "measure_strategy", "measure_steps", "overhead_budget")
"""Options that say when to measure, not what; `profile` is among them, as the options it fills in are stored too."""


class History(NamedTuple):
    """What a run has measured.

    Attributes:
        measurements: In the order of the steps.
        failures: Measurements that could not be made.
        measured_seconds: Time of each measurement and failure.
        train_seconds: Time of training until the last of them, without measurements.
    """

    measurements: list[Measurement]
    failures: list[MeasurementFailure]
    measured_seconds: list[float]
    train_seconds: float

    @property
    def steps(self) -> list[int]:
        """Steps at which a measurement was made or tried."""
        return [one.step for one in self.measurements] + [one.step for one in self.failures]


def record(
    state: TrainerState, result: Measurement | MeasurementFailure, *, config: dict[str, Any], clock: Clock
) -> None:
    """Add a measurement, or a failure, to the state that goes into the next checkpoint.

    Args:
        state: The Trainer's state.
        result: The measurement, or why there is none.
        config: The options it was measured with: several callbacks may share a state.
        clock: Times the run; its last measurement is this one.
    """
    kind = "measurement" if isinstance(result, Measurement) else "failure"
    data = result.to_dict()
    times = {"seconds": clock.measured[-1], "train_seconds": clock.train_seconds}
    stored = {kind: finite(data), "config": config, **times}
    if isinstance(result, Measurement):
        stored["blocks"] = list(result.blocks)  # the Trainer sorts all keys
    entry: dict[str, Any] = {RECORD: stored, "epoch": state.epoch, "step": result.step}
    _records(state).append(entry)


def restore(state: TrainerState, *, config: dict[str, Any]) -> History:
    """Return what a resumed run has measured with these options; nothing in a new run.

    Options that say when to measure may change between runs. If others have changed, the report starts over at the
    checkpoint, as with a callback that is new to the run: a report is about one probe set and one precision, and
    several callbacks may share a state. No record is lost, and a warning says what is not restored.

    Version 0.1 stored its records, and an entry for each, in `log_history`. They are moved out of there.

    Args:
        state: The Trainer's state, as a checkpoint left it.
        config: The options to measure with.
    """
    _move_out_of_log(state)
    history = History([], [], [], 0.0)
    others: list[dict[str, Any]] = []
    for stored in _stored_records(state):
        if _measuring_options(stored.config) != _measuring_options(config):
            others.append(stored.config)
        elif stored.result.step not in history.steps:  # two callbacks with the same options measure the same
            if isinstance(stored.result, Measurement):
                history.measurements.append(stored.result)
            else:
                history.failures.append(stored.result)
            history.measured_seconds.append(stored.seconds)
            history = history._replace(train_seconds=stored.train_seconds)
    resumed = state.global_step > 0  # otherwise they are those of another callback, which has just begun
    if resumed and others and not history.steps:
        options = _measuring_options(config)
        changed = ", ".join(f"`{name}`" for name, value in options.items() if others[-1].get(name) != value)
        logger.warning(
            f"The run was measured {len(others)} times with another {changed}. Those measurements stay in "
            "`trainer_state.json`; the report starts over, and the earlier one is kept under another name."
        )
    return history


class _Record(NamedTuple):
    result: Measurement | MeasurementFailure
    config: dict[str, Any]
    seconds: float
    train_seconds: float


def _stored_records(state: TrainerState) -> Iterator[_Record]:
    """Yield the records in the state; a damaged one is left where it is, with a warning."""
    for entry in _records(state):
        try:
            yield _read(entry[RECORD])
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            step = entry.get("step") if isinstance(entry, Mapping) else None
            logger.warning(
                f"The measurement at step {step} in the checkpoint can't be read "
                f"({type(error).__name__}: {error}). It stays in `trainer_state.json` but not in the report."
            )


def _read(stored: Any) -> _Record:
    result: Measurement | MeasurementFailure
    if "measurement" in stored:
        data = with_current_names(stored["measurement"])
        require_valid_measurement(data)
        measurement = Measurement.from_dict(data)
        result = _with_block_order(measurement, stored["blocks"])
    else:
        result = MeasurementFailure.from_dict(failure_with_reason(stored["failure"]))
    times = stored["seconds"], stored["train_seconds"]
    if not all(isinstance(time, (int, float)) and 0 <= time < math.inf for time in times):
        raise ValueError(f"its times are {times}")
    return _Record(result, dict(stored["config"]), *map(float, times))


def _with_block_order(measurement: Measurement, blocks: list[str]) -> Measurement:
    """Return the measurement with its blocks in the model's order, everywhere."""
    multitask = measurement.multitask
    if multitask is not None:
        tasks = {
            name: replace(task, blocks={block: task.blocks[block] for block in blocks})
            for name, task in multitask.tasks.items()
        }
        conflicts = (replace(c, blocks={block: c.blocks[block] for block in blocks}) for c in multitask.conflicts)
        multitask = replace(multitask, tasks=tasks, conflicts=tuple(conflicts))
    in_order = {name: measurement.blocks[name] for name in blocks}
    return replace(measurement, blocks=in_order, multitask=multitask)


def _measuring_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a measurement depends on."""
    return {name: value for name, value in config.items() if name not in SCHEDULING_OPTIONS}


def merged_log(log_history: list[dict[str, Any]], entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the Trainer's log with the entries of measurements in it, before the Trainer's of the same step.

    Args:
        log_history: The Trainer's.
        entries: One for each measurement, in the order of the steps.
    """
    return list(heapq.merge(entries, log_history, key=lambda entry: entry.get("step") or 0))


def _records(state: TrainerState) -> list[Any]:
    """Return the list of records in the state; adding to it adds to the state."""
    callbacks = cast("dict[str, list[Any]]", state.stateful_callbacks)
    return callbacks.setdefault(RECORDS, [])


def _move_out_of_log(state: TrainerState) -> None:
    log = state.log_history
    _records(state)[:0] = [entry for entry in log if RECORD in entry]
    log[:] = [entry for entry in log if RECORD not in entry and _ENTRY not in entry]
