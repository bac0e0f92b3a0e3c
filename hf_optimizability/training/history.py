# SPDX-License-Identifier: Apache-2.0
"""What a run has measured so far, kept in the Trainer's state, which lives in every checkpoint.

`TrainerState.stateful_callbacks` is written with each checkpoint, in one file with the rest of the state, and read
back before training begins. A Trainer takes up what bears the name of a callback's class there, and nothing else.
`log_history` stays the Trainer's: callbacks, trackers and tests read its entries by their place.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

from transformers import TrainerState
from transformers.utils import logging

from ..files import finite
from ..log_keys import PREFIX
from ..measurement.results import Measurement, MeasurementFailure
from ..report_data.schema import with_current_names
from .clock import Clock


logger = logging.get_logger(__name__)

RECORDS = f"{PREFIX}records"
"""Key of `stateful_callbacks` under which the records of all callbacks are, in the order in which they were made."""

RECORD = f"{PREFIX}record"
"""Key, in a record, of the measurement, or of why there is none."""

_ENTRY = f"{PREFIX}hvps"
"""Key that each entry for a measurement has, and no other entry."""


_WHEN = ("profile", "measure_strategy", "measure_steps", "overhead_budget")
"""Options that say when to measure, not what; the profile stands there with all that it fills in."""


class History(NamedTuple):
    """What a run has measured.

    Attributes:
        measurements: In the order of the steps.
        failures: Measurements that could not be made.
        measured_seconds: Time that each of both took.
        train_seconds: Time that training took until the last of them, without measurements.
    """

    measurements: list[Measurement]
    failures: list[MeasurementFailure]
    measured_seconds: list[float]
    train_seconds: float

    @property
    def steps(self) -> list[int]:
        """The steps at which a measurement was made or tried."""
        return [found.step for found in self.measurements] + [found.step for found in self.failures]


def record(
    state: TrainerState, found: Measurement | MeasurementFailure, *, config: dict[str, Any], clock: Clock
) -> None:
    """Add a measurement, or a failure, to the state that goes into the next checkpoint.

    Args:
        state: The Trainer's state.
        found: What was measured, or why nothing was.
        config: The options it was measured with: several callbacks may share a state.
        clock: The run's, with this as the last thing that it measured.
    """
    kind = "measurement" if isinstance(found, Measurement) else "failure"
    data = found.to_dict() if isinstance(found, Measurement) else vars(found)
    held = {kind: finite(data), "config": config, "seconds": clock.measured[-1], "train_seconds": clock.train_seconds}
    if isinstance(found, Measurement):
        held["blocks"] = list(found.blocks)  # the Trainer sorts all keys
    entry: dict[str, Any] = {RECORD: held, "epoch": state.epoch, "step": found.step}
    _records(state).append(entry)


def restore(state: TrainerState, *, config: dict[str, Any]) -> History:
    """Return what a resumed run has measured with these options; nothing in a run that begins.

    Options that say when to measure may change on the way. With others changed, the run is measured from the
    checkpoint on, as by a callback that is new to it: a report is about one probe set and one precision, and several
    callbacks may share a state. No record is lost, and a warning says what is not taken up.

    Version 0.1 kept its records, and an entry for each, in `log_history`. They are moved out of there.

    Args:
        state: The Trainer's state, as a checkpoint left it.
        config: The options to measure with.
    """
    _move_out_of_log(state)
    history = History([], [], [], 0.0)
    others: list[dict[str, Any]] = []
    for held in _supported_optimizer(state):
        if _what(held.config) != _what(config):
            others.append(held.config)
        elif held.found.step not in history.steps:  # two callbacks with the same options measure the same
            kept = history.measurements if isinstance(held.found, Measurement) else history.failures
            kept.append(held.found)  # type: ignore[arg-type]
            history.measured_seconds.append(held.seconds)
            history = history._replace(train_seconds=held.train_seconds)
    resumed = state.global_step > 0  # else they are those of another callback, which has just begun
    if resumed and others and not history.steps:
        changed = ", ".join(f"`{name}`" for name, value in _what(config).items() if others[-1].get(name) != value)
        logger.warning(
            f"The run was measured {len(others)} times with another {changed}. That stays in `trainer_state.json`; "
            "the report begins anew, and the one of before is kept beside it."
        )
    return history


class _Record(NamedTuple):
    found: Measurement | MeasurementFailure
    config: dict[str, Any]
    seconds: float
    train_seconds: float


def _supported_optimizer(state: TrainerState) -> Iterator[_Record]:
    """Yield the records in the state; one that is damaged is named in a warning and left where it is."""
    for entry in _records(state):
        try:
            yield _read(entry[RECORD])
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            logger.warning(
                f"The measurement at step {entry.get('step')} in the checkpoint can't be read "
                f"({type(error).__name__}: {error}). It stays in `trainer_state.json`; the report goes on without it."
            )


def _read(held: Any) -> _Record:
    found: Measurement | MeasurementFailure
    if "measurement" in held:
        found = Measurement.from_dict(with_current_names(held["measurement"]))
        found = _in_order(found, held["blocks"])
    else:
        found = MeasurementFailure(**held["failure"])
    return _Record(found, dict(held["config"]), float(held["seconds"]), float(held["train_seconds"]))


def _in_order(found: Measurement, blocks: list[str]) -> Measurement:
    """The measurement with its blocks in the model's order, wherever they are."""
    several = found.multitask
    if several is not None:
        tasks = {
            name: replace(task, blocks={block: task.blocks[block] for block in blocks})
            for name, task in several.tasks.items()
        }
        conflicts = (replace(c, blocks={block: c.blocks[block] for block in blocks}) for c in several.conflicts)
        several = replace(several, tasks=tasks, conflicts=tuple(conflicts))
    return replace(found, blocks={name: found.blocks[name] for name in blocks}, multitask=several)


def _what(config: dict[str, Any]) -> dict[str, Any]:
    """The options that a measurement depends on."""
    return {name: value for name, value in config.items() if name not in _WHEN}


def merged_log(log_history: list[dict[str, Any]], entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the Trainer's log with the entries of measurements in it, before the Trainer's of the same step.

    Args:
        log_history: The Trainer's.
        entries: One for each measurement, in the order of the steps.
    """
    return list(heapq.merge(entries, log_history, key=lambda entry: entry.get("step") or 0))


def _records(state: TrainerState) -> list[Any]:
    """Return the list of records in the state, to which may be added."""
    held = cast("dict[str, list[Any]]", state.stateful_callbacks)
    return held.setdefault(RECORDS, [])


def _move_out_of_log(state: TrainerState) -> None:
    log = state.log_history
    _records(state)[:0] = [entry for entry in log if RECORD in entry]
    log[:] = [entry for entry in log if RECORD not in entry and _ENTRY not in entry]
