# SPDX-License-Identifier: Apache-2.0
"""Whether training has been asked to stop, so that a measurement lets go and the exit is not delayed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import MethodType

from transformers import TrainerControl, TrainerState, TrainingArguments


class StopRequests:
    """What a callback sees of requests to stop.

    Those are `control.should_training_stop`, where it is set while a measurement runs (by another thread or a signal
    handler), and the checkpoint that `enable_jit_checkpoint=True` makes on SIGTERM. A Trainer that stops early because
    of an evaluation, or that is done, is not asked to stop: its last weights are measured.

    Args:
        args: The Trainer's arguments.

    Attributes:
        seen: Whether training has been asked to stop.
    """

    def __init__(self, args: TrainingArguments):
        self.seen = False
        self._just_in_time = bool(vars(args).get("enable_jit_checkpoint"))  # not in Transformers 5.0
        self._checkpoint_requested = _checkpoint_requested() if self._just_in_time else lambda: False
        self._evaluated = -1

    def during(self, control: TrainerControl) -> Callable[[], bool]:
        """Return what tells, while a measurement runs, whether training has been asked to stop."""
        before = control.should_training_stop

        def asked() -> bool:
            flagged = control.should_training_stop and not before
            self.seen = self.seen or flagged or self._checkpoint_requested()
            return self.seen

        return asked

    def step_ended(self, state: TrainerState, control: TrainerControl) -> None:
        """Note a stop after a step, where only the checkpoint on SIGTERM, or a callback like it, asks for one."""
        if self._just_in_time and control.should_training_stop and state.global_step < state.max_steps:
            self.seen = True

    def evaluated(self, state: TrainerState) -> None:
        """Note an evaluation, after which training may stop early."""
        self._evaluated = state.global_step

    def train_ended(self, state: TrainerState) -> None:
        """Note the end of training: before its last step, and not because of an evaluation, if it was asked to."""
        early = state.global_step < state.max_steps and state.global_step != self._evaluated
        self.seen = self.seen or (self._just_in_time and (early or self._checkpoint_requested()))


def _checkpoint_requested() -> Callable[[], bool]:
    """Return what tells whether SIGTERM came, from the handler that Transformers has put there."""
    from transformers.trainer_jit_checkpoint import CheckpointManager

    handler = signal.getsignal(signal.SIGTERM)
    manager = handler.__self__ if isinstance(handler, MethodType) else None
    if not isinstance(manager, CheckpointManager):
        return lambda: False
    return lambda: manager.is_checkpoint_requested
