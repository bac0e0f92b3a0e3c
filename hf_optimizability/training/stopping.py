# SPDX-License-Identifier: Apache-2.0
"""Requests to stop training, on which a measurement is interrupted so that the exit is not delayed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import MethodType

from transformers import TrainerControl, TrainerState, TrainingArguments


class StopRequests:
    """Requests to stop, as far as a callback sees them.

    Those are `control.should_training_stop`, where it is set while a measurement runs (by another thread or a signal
    handler), and the checkpoint that `enable_jit_checkpoint=True` makes on SIGTERM. A Trainer that stops early because
    of an evaluation, or that has finished, is not asked to stop: its last weights are measured.

    Args:
        args: The Trainer's arguments.

    Attributes:
        seen: Whether training has been asked to stop.
    """

    def __init__(self, args: TrainingArguments):
        self.seen = False
        self._just_in_time = bool(vars(args).get("enable_jit_checkpoint"))  # not in Transformers 5.0
        self._checkpoint_requested = _checkpoint_requested() if self._just_in_time else lambda: False
        self._last_evaluation = -1
        self._control = TrainerControl()
        self._stopping_before = False

    def watch(self, control: TrainerControl) -> None:
        """Take it for a request if `control` asks to stop from now on."""
        self._control, self._stopping_before = control, control.should_training_stop

    def pending(self) -> bool:
        """Return whether training has been asked to stop; to be called while a measurement runs."""
        flagged = self._control.should_training_stop and not self._stopping_before
        self.seen = self.seen or flagged or self._checkpoint_requested()
        return self.seen

    def step_ended(self, state: TrainerState, control: TrainerControl) -> None:
        """Note a stop after a step, where only the checkpoint on SIGTERM, or a callback like it, asks for one."""
        if self._just_in_time and control.should_training_stop and state.global_step < state.max_steps:
            self.seen = True

    def evaluated(self, state: TrainerState) -> None:
        """Note an evaluation, after which training may stop early."""
        self._last_evaluation = state.global_step

    def train_ended(self, state: TrainerState) -> None:
        """Note the end of training: a request if it is before the last step, and not because of an evaluation."""
        early = state.global_step < state.max_steps and state.global_step != self._last_evaluation
        self.seen = self.seen or (self._just_in_time and (early or self._checkpoint_requested()))


def _checkpoint_requested() -> Callable[[], bool]:
    """Return a function that reads from Transformers' handler whether SIGTERM came."""
    from transformers.trainer_jit_checkpoint import CheckpointManager

    handler = signal.getsignal(signal.SIGTERM)
    manager = handler.__self__ if isinstance(handler, MethodType) else None
    if not isinstance(manager, CheckpointManager):
        return lambda: False
    return lambda: manager.is_checkpoint_requested
