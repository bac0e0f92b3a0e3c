# SPDX-License-Identifier: Apache-2.0
"""The loss that a Trainer minimizes, on the probe set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ExplainedError, MeasurementError, MeasurementInterruptedError
from ..linalg.communicator import ProcessGroup
from ..measurement.out_of_memory import out_of_memory
from ..objective.objective import Objective
from ..objective.probe_set import ProbeSet, tensors_in
from ..report import OptimizabilityReport
from . import provenance
from .trainer_loss import trainer_loss


if TYPE_CHECKING:
    from transformers import Trainer


class ProbeObjective:
    """The loss on the probe set, as a function of the parameters that are trained at the time.

    Args:
        model: The model as it is trained.
        probe_set: The examples.
        trainer: Whose loss to compute; without it, the model's own.
        seed: Seed for whatever the model draws.
        group: Processes that train together.
        report: Where to describe the probe set and the model.
        should_stop: Whether to interrupt a measurement.

    Attributes:
        objective: The loss as last built; a measurement may replace it by one on smaller batches.
    """

    def __init__(
        self,
        model: nn.Module,
        probe_set: ProbeSet,
        *,
        trainer: Trainer | None,
        seed: int,
        group: ProcessGroup,
        report: OptimizabilityReport,
        should_stop: Callable[[], bool],
    ):
        self.objective: Objective | None = None
        self._model, self._probe_set, self._trainer = model, probe_set, trainer
        self._seed, self._group, self._report, self._should_stop = seed, group, report, should_stop

    def current(self) -> Objective:
        """Return the loss by the parameters that are trained now, once it has been checked.

        Raises:
            MeasurementError: If the probe set can't be counted, or has no loss with a gradient.
        """
        if self.objective is not None and self.objective.names != trained_names(self._model):  # frozen or unfrozen
            self.objective = None
        if self.objective is None:
            with self._group.propagate_errors():
                self.objective = self._build()
        return self.objective

    def _build(self) -> Objective:
        batches = self._probe_set.batches
        loss_fn = None if self._trainer is None else trainer_loss(self._trainer)
        try:
            objective = Objective(
                self._model,
                batches,
                loss_fn=loss_fn,
                tasks=self._probe_set.tasks,
                seed=self._seed,
                preserved=() if self._trainer is None else (self._trainer,),
                should_stop=self._should_stop,
            ).shard(self._group)
            probe = provenance.describe_probe_set(batches, self._model)
            self._report.data = replace(self._report.data, probe=probe)
            self._report.model = provenance.describe_model(self._model)
            _check(objective)
        except MeasurementInterruptedError:
            raise
        except Exception as error:
            raise _no_loss(error, batches, own_loss=loss_fn is None) from error
        return objective


def trained_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are trained now."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _check(objective: Objective) -> None:
    """Raise if the objective has no loss; a lack of memory is left to the measurement, which cuts the batches."""
    try:
        objective.check()
    except Exception as error:
        if not out_of_memory(error):
            raise


def _no_loss(error: Exception, batches: list[Any], *, own_loss: bool) -> MeasurementError:
    """Return why there is no loss on the probe set, and what to do about it."""
    if not any(list(tensors_in(batch)) for batch in batches):
        return MeasurementError("no_tensors", error=error)
    because = error.why if isinstance(error, ExplainedError) else None
    code = "no_model_loss" if own_loss else "no_trainer_loss"
    return MeasurementError(code, error=None if because else error, because=because)
