# SPDX-License-Identifier: Apache-2.0
"""The measurement that a Trainer would make before its first step, without training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from ..config import OptimizabilityConfig
from ..errors import MeasurementError, UnmeasurableError
from ..measurement.forecast import Forecast, forecast
from ..measurement.measure import POOL_FAILURES, measure
from ..measurement.results import Measurement
from ..objective.batches import batch_size
from ..objective.objective import LossFunction
from ..objective.pool import Pool
from ..objective.probe_set import ProbeSpec, draw_probe_set
from ..reasons import Reason
from ..report import OptimizabilityReport
from ..training import provenance
from ..training.trainer_loss import trainer_loss


@dataclass(frozen=True)
class MeasureInputs:
    """What `measure` and `forecast` take.

    Attributes:
        model: The Trainer's model.
        batches: The probe set.
        dataset: The whole training set; `None` where examples can't be drawn from it by their curvature, or the probe
            set is all of it.
        no_pool: Why they can't.
        config: What to measure.
        loss_fn: The Trainer's loss.
    """

    model: nn.Module
    batches: list[Any]
    dataset: DataLoader | None
    no_pool: Reason | None
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
        loader = trainer.get_train_dataloader()
        batches = draw_probe_set(loader, ProbeSpec.from_config(config)).batches
        assert isinstance(trainer.model, nn.Module)
        dataset, no_pool = None, None
        if config.pool_size:
            try:
                pool = Pool(loader, examples=config.pool_size, seed=config.probe_seed)
                dataset = loader if pool.total > sum(map(batch_size, batches)) else None
            except UnmeasurableError as error:
                no_pool = error.why
        return cls(trainer.model, batches, dataset, no_pool, config, trainer_loss(trainer))

    def forecast(self) -> Forecast:
        """Return what the measurement will take at most."""
        return forecast(self.model, self._batches, self.config, dataset=self.dataset, loss_fn=self.loss_fn)

    def measured(self, *, progress: bool) -> tuple[MeasureInputs, Measurement]:
        """Make the measurement, on the probe set where examples can't be drawn, and return what it was made on."""
        try:
            return self, measure(
                self.model, self._batches, self.config, dataset=self.dataset, loss_fn=self.loss_fn, progress=progress
            )
        except MeasurementError as error:
            if self.dataset is None or error.why.code not in POOL_FAILURES:
                raise
            return replace(self, dataset=None, no_pool=error.why).measured(progress=progress)

    @property
    def _batches(self) -> list[Any] | None:
        return self.batches if self.dataset is None else None


def report_measurement(trainer: Trainer, inputs: MeasureInputs, measurement: Measurement) -> OptimizabilityReport:
    """Return the report of one measurement."""
    train: Any = trainer.train_dataset
    validation: Any = trainer.eval_dataset
    report = provenance.new_report(inputs.model, train, validation, own_loss=False, config=inputs.config)
    probe = provenance.describe_probe_set(inputs.batches, inputs.model)
    report.data = replace(report.data, probe=probe, no_pool=inputs.no_pool)
    report.measurements = [measurement]
    report.created = provenance.timestamp()
    return report
