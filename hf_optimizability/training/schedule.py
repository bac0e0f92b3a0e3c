# SPDX-License-Identifier: Apache-2.0
"""When to measure between the first and the last step of training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import TrainerState

from ..config import OptimizabilityConfig
from ..linalg.communicator import ProcessGroup
from .clock import Clock


MAX_SCHEDULING_POLLS = 100
"""How often in a run several processes agree on whether there is time to measure: each time takes a message."""

RESERVED_FOR_END = 3
"""Measurements' worth of time reserved for the end of a run: the last measurement, as much for the generalization gap
and the report, and as much again in case the last ones take longer than any before."""


class Schedule:
    """Decide after each step and epoch whether to measure, as `measure_strategy` says.

    Args:
        config: When to measure.
        group: Processes that train together.
        clock: Times training and measurements.
    """

    def __init__(self, config: OptimizabilityConfig, *, group: ProcessGroup, clock: Clock):
        self._config, self._group, self._clock = config, group, clock

    def is_due_after_step(self, state: TrainerState, *, measured: bool) -> bool:
        """Return whether to measure after a step; `measured` is whether any measurement has succeeded so far."""
        if self._config.measure_strategy == "steps":
            return state.global_step % self._config.measure_steps == 0
        if self._config.measure_strategy != "auto" or not measured:
            return False
        group = self._group
        if group.world_size > 1 and state.global_step % math.ceil(state.max_steps / MAX_SCHEDULING_POLLS):
            return False
        due = affordable(
            state.global_step,
            max_steps=state.max_steps,
            budget=self._config.overhead_budget,
            step_seconds=self._clock.step_seconds,
            measured_seconds=self._clock.measured,
        )
        return group.all_gather_interleaved([due])[0]  # rank 0 decides for all

    def is_due_after_epoch(self) -> bool:
        """Return whether to measure after an epoch."""
        return self._config.measure_strategy == "epoch"

    def is_due_on_resuming(self, state: TrainerState) -> bool:
        """Return whether the checkpoint ends an epoch: it was saved before that epoch's measurement."""
        return self.is_due_after_epoch() and state.epoch is not None and state.epoch % 1 == 0


def affordable(
    step: int, *, max_steps: int, budget: float, step_seconds: float, measured_seconds: Sequence[float]
) -> bool:
    """Return whether to measure after this step, so that all measurements together stay within the budget.

    The time of the whole training is estimated from that of a step, and the price of a measurement from the most
    expensive so far. What the first measurement and the end of the run leave of the budget is spread over the run with
    the square of the measurement's number: at 1/9 and 4/9 of the steps if there are two. Curvature changes fastest at
    first.

    Args:
        step: Optimizer steps taken.
        max_steps: Optimizer steps of the whole run.
        budget: Share of the training time that may go into measurements.
        step_seconds: Time that a step takes.
        measured_seconds: Time of each measurement so far, including failed ones; the first was made before the first
            step.

    Example:
        >>> costs = {"max_steps": 1260, "budget": 0.05, "step_seconds": 1.0}  # 1260 s pay for six of 10 s
        >>> [step for step in (139, 140, 559) if affordable(step, measured_seconds=[10.0], **costs)]
        [140, 559]
        >>> [step for step in (559, 560) if affordable(step, measured_seconds=[10.0, 10.0], **costs)]
        [560]
    """
    spent, price = sum(measured_seconds), max(measured_seconds)
    between = len(measured_seconds) - 1
    spare = budget * step_seconds * max_steps - spent - RESERVED_FOR_END * price
    number = between + max(0, int(spare // price))
    return number > between and (number + 1) * math.sqrt(step / max_steps) >= between + 1
