# SPDX-License-Identifier: Apache-2.0
"""Out of memory: the same work on batches of half the size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

from ..curvature.backward_errors import raised_in_backward
from ..distributed.process_group import RankLostError
from ..errors import MeasurementError
from ..objective.objective import Objective


logger = logging.get_logger(__name__)

Result = TypeVar("Result")


def retry_with_smaller_batches(
    objective: Objective, attempt: Callable[[Objective], Result]
) -> tuple[Result, Objective]:
    """Run `attempt` on an objective; where memory runs out, run it again in smaller batches.

    Args:
        objective: In batches as large as wanted.
        attempt: What to do. Where the device runs out of memory it is tried again on batches of half the size.

    Returns:
        What `attempt` returned, and the objective in the batches that it returned it for.

    Raises:
        RankLostError: If another process has ended.
        MeasurementError: If not even a single example fits, or `attempt` fails otherwise; it says what to do.
    """
    while True:
        try:
            with objective.group.propagate_errors():
                return attempt(objective), objective
        except (MeasurementError, RankLostError):
            raise
        except Exception as error:  # whatever the model's code raises
            if not out_of_memory(error) or objective.batch_size <= (2 if objective.unit == "pairs" else 1):
                raise _explained(error) from error
        objective = _halved(objective)


def out_of_memory(error: Exception) -> bool:
    """Return whether an error says so, also on devices that have no error of their own for it."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _halved(objective: Objective) -> Objective:
    """Return the objective in batches of half the size, with the device's memory released."""
    clear_device_cache(garbage_collection=True)
    size = -(-objective.batch_size // 2)
    logger.warning_once(f"The device ran out of memory while measuring; trying again with batches of {size}.")
    try:
        return objective.unsharded().cut(size).shard(objective.group)
    except ValueError as error:
        raise MeasurementError("out_of_memory_uncut", error=error) from error


def _explained(error: Exception) -> MeasurementError:
    """Return the error that says what went wrong, and what to do about it."""
    if out_of_memory(error):
        return MeasurementError("out_of_memory")
    if isinstance(error, FloatingPointError):
        return MeasurementError("not_finite", error=error)
    return MeasurementError("backward_fails_later" if raised_in_backward(error) else "model_fails", error=error)
