# SPDX-License-Identifier: Apache-2.0
"""When to measure between the first and the last step of training, within a share of its time."""

from __future__ import annotations

import math
from collections.abc import Sequence


ENDING = 3
"""Measurements that the end of a run may cost: the last one, as much for the generalization gap and the report, and as
much again for what the last ones may need more than any before."""


def affordable(
    step: int, *, max_steps: int, budget: float, step_seconds: float, measured_seconds: Sequence[float]
) -> bool:
    """Whether a measurement is due after this step, so that all of them together stay within the budget.

    The time of training as a whole is told from that of a step, and the price of a measurement from the dearest so
    far. What the first measurement and the end of the run leave of the budget is spread over the run with the square
    of the measurement's number: at 1/9 and 4/9 of the steps if there are two. Curvature changes fastest at first.

    Args:
        step: Optimizer steps taken.
        max_steps: Optimizer steps of the whole run.
        budget: Share of the training time that may go into measurements.
        step_seconds: Time that a step takes.
        measured_seconds: What each measurement took so far, those that failed included; the first was made before the
            first step.

    Example:
        >>> costs = {"max_steps": 1260, "budget": 0.05, "step_seconds": 1.0}  # 1260 s pay for six of 10 s
        >>> [step for step in (139, 140, 559) if affordable(step, measured_seconds=[10.0], **costs)]
        [140, 559]
        >>> [step for step in (559, 560) if affordable(step, measured_seconds=[10.0, 10.0], **costs)]
        [560]
    """
    spent, price = sum(measured_seconds), max(measured_seconds)
    between = len(measured_seconds) - 1
    spare = budget * step_seconds * max_steps - spent - ENDING * price
    number = between + max(0, int(spare // price))
    return number > between and (number + 1) * math.sqrt(step / max_steps) >= between + 1
