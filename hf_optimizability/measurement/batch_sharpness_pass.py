# SPDX-License-Identifier: Apache-2.0
"""Batch sharpness of the loss as it is trained: batches of one optimizer step, normalized by their own statistics."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.utils.memory import clear_device_cache
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import logging

from ..distributed.process_group import RankLostError
from ..errors import ExplainedError, MeasurementError, MeasurementInterruptedError
from ..model_state.measuring import batch_statistics
from ..objective.objective import Objective, ProbeBatch
from ..objective.step_batches import StepBatches
from ..quantities.batch_sharpness import BatchSharpness, batch_sharpness
from ..reasons import Reason
from ..redaction import redact_secrets
from .engines import HvpEngine
from .optimizer_step import OptimizerStep
from .out_of_memory import out_of_memory


logger = logging.get_logger(__name__)


def measure_batch_sharpness(
    objective: Objective, engine: HvpEngine, steps: StepBatches, optimizer: OptimizerStep | None, *, size: int
) -> BatchSharpness | Reason:
    """Measure batch sharpness, where the engine is active; where that fails, warn and return why.

    Normalization layers that training runs on the statistics of the batch do so here, and their buffers come back.

    Args:
        objective: The loss, over any batches.
        engine: Makes the products.
        steps: The batches.
        optimizer: The optimizer, whose preconditioner is read.
        size: Most examples in a pass: larger batches are summed over pieces, and over smaller ones where memory runs
            out, unless the examples of a batch depend on each other.
    """
    layers = objective.state.normalizing
    if any(isinstance(layer, _BatchNorm) for layer in layers) or not _can_cut(objective):
        size = 0
    objective = objective.unsharded().counting(None)
    preconditioner = None if optimizer is None else optimizer.preconditioner
    diagonal = None if preconditioner is None or preconditioner.is_identity else preconditioner.diagonal
    while True:
        try:
            with batch_statistics(layers), steps.reading():
                losses = _losses(objective, steps, size)
                return batch_sharpness(losses, preconditioner=diagonal, hessian=engine.operator)
        except (MeasurementInterruptedError, RankLostError):
            raise
        except Exception as error:  # whatever the model's code raises
            if not out_of_memory(error) or size <= 1:
                failure = error
                if not isinstance(failure, ExplainedError):
                    failure = MeasurementError("batch_sharpness_failed", error=error)
                return not_measured(failure)
        clear_device_cache(garbage_collection=True)
        size = -(-size // 2)


def not_measured(error: ExplainedError) -> Reason:
    """Warn that there will be no batch sharpness, and return why."""
    logger.warning_once(f"Batch sharpness is not measured. {redact_secrets(str(error))}")
    return error.why


def _can_cut(objective: Objective) -> bool:
    return objective.self_check is not None and objective.self_check.can_cut


def _losses(objective: Objective, steps: StepBatches, size: int) -> Iterator[Objective]:
    """Yield the mean loss of each step's batches, in pieces of at most `size` examples if that is not 0."""
    index = 0
    for batches in steps:
        parts: list[ProbeBatch] = []
        for batch in batches:
            whole = objective.probe_batch(batch, index)
            parts += objective.pieces(whole, size) if size else [whole]
            index += 1
        if any(part.items for part in parts):
            yield objective.over(parts)
