# SPDX-License-Identifier: Apache-2.0
"""Numbers for the Trainer's other callbacks (TensorBoard, W&B, Trackio …), which leave its own log as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from ..distributed.process_group import RankLostError
from ..redaction import redact_secrets


if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)

T = TypeVar("T")


class TrackerLog:
    """Send numbers by `on_log`, past `Trainer.log`.

    That is overridden to count and to clear metrics, and would leave an entry among the Trainer's own. What is logged
    before all trackers have begun waits until `flush`.

    Args:
        trainer: Whose callbacks to send to; without it, nothing is sent.
    """

    def __init__(self, trainer: Trainer | None):
        self._trainer = trainer
        self._pending: list[dict[str, Any]] = []
        self._open = False
        self._order: list[TrainerCallback] | None = None

    def send(self, numbers: dict[str, float], state: TrainerState) -> None:
        """Send numbers now, or once the trackers have begun."""
        self._pending.append({**numbers, "epoch": state.epoch})
        if self._open:
            self.flush()

    def flush(self) -> None:
        """Send what is pending: from now on, all trackers have begun."""
        pending, self._pending, self._open = self._pending, [], True
        if self._trainer is not None:
            for numbers in pending:
                run_safely("logging a measurement", partial(_call_on_log, self._trainer, numbers))

    def put_first(self, callback: TrainerCallback) -> None:
        """Put a callback before all others, so that it still can log when training ends, before the trackers end."""
        if self._trainer is None:
            return
        handler = self._trainer.callback_handler
        self._order = handler.callbacks
        # A new list: the handler is iterating over the present one.
        handler.callbacks = [callback, *(other for other in self._order if other is not callback)]

    def train_ended(self) -> None:
        """Restore the order of callbacks and send what is pending, unless the trackers may have ended."""
        self._open = self._order is not None
        if self._trainer is not None and self._order is not None:
            self._trainer.callback_handler.callbacks, self._order = self._order, None
            self.flush()


def _call_on_log(trainer: Trainer, numbers: dict[str, float]) -> None:
    """Call `on_log` of all callbacks as if the Trainer had logged, then restore its log and its switches."""
    state, control = trainer.state, trainer.control
    switches = control.should_log, control.should_evaluate, control.should_save
    entry = {**numbers, "step": state.global_step}
    state.log_history.append(entry)
    try:
        control = trainer.callback_handler.on_log(trainer.args, state, control, numbers)
    finally:
        state.log_history[:] = [other for other in state.log_history if other is not entry]
        control.should_log, control.should_evaluate, control.should_save = switches
        trainer.control = control


def run_safely(task: str, action: Callable[[], T]) -> T | None:
    """Run what must not take training down; a failure becomes a warning, and `None`."""
    try:
        return action()
    except RankLostError:
        raise
    except Exception as error:
        reason = redact_secrets(f"{type(error).__name__}: {error}")
        logger.warning(f"Could not finish {task}: {reason}. Training continues.")
        return None
