# SPDX-License-Identifier: Apache-2.0
"""The measurement that a Trainer would make before its first step, without training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import Trainer

from ..config import OptimizabilityConfig
from ..measurement.forecast import Forecast, forecast
from ..measurement.measure import measure
from ..measurement.results import Measurement
from ..objective.objective import LossFunction
from ..objective.probe_set import ProbeSpec, draw_probe_set
from ..report import OptimizabilityReport
from ..training import provenance
from ..training.trainer_loss import trainer_loss


@dataclass(frozen=True)
class MeasureInputs:
    """What `measure` and `forecast` take.

    Attributes:
        model: The Trainer's model.
        batches: The probe set.
        config: What to measure.
        loss_fn: The Trainer's loss.
    """

    model: nn.Module
    batches: list[Any]
    config: OptimizabilityConfig
    loss_fn: LossFunction

    @classmethod
    def from_trainer(cls, trainer: Trainer, config: OptimizabilityConfig) -> MeasureInputs:
        """Draw the probe set from a Trainer's training set.

        Raises:
            ValueError: If the training set is too small for the probe set, or `task_column` is set.
        """
        if config.task_column is not None:
            raise ValueError(
                "`task_column` is not supported here: the command passes the model nothing but its inputs. Train with "
                "`OptimizabilityTrainer`, or call `hf_optimizability.measure`."
            )
        batches = draw_probe_set(trainer.get_train_dataloader(), ProbeSpec.from_config(config)).batches
        assert isinstance(trainer.model, nn.Module)
        return cls(trainer.model, batches, config, trainer_loss(trainer))

    def forecast(self) -> Forecast:
        """Return what the measurement will take at most."""
        return forecast(self.model, self.batches, self.config, loss_fn=self.loss_fn)

    def measure(self, *, progress: bool) -> Measurement:
        """Make the measurement, with a progress bar or without."""
        return measure(self.model, self.batches, self.config, loss_fn=self.loss_fn, progress=progress)


def report_measurement(trainer: Trainer, inputs: MeasureInputs, measurement: Measurement) -> OptimizabilityReport:
    """Return the report of one measurement."""
    train: Any = trainer.train_dataset
    validation: Any = trainer.eval_dataset
    report = provenance.new_report(inputs.model, train, validation, own_loss=False, config=inputs.config)
    report.data = replace(report.data, probe=provenance.describe_probe_set(inputs.batches, inputs.model))
    report.measurements = [measurement]
    report.created = provenance.timestamp()
    return report
