# SPDX-License-Identifier: Apache-2.0
"""What a Trainer would measure before its first step, without training."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from transformers import Trainer

from ..config import OptimizabilityConfig
from ..measurement.results import Measurement
from ..objective.probe_set import ProbeSpec, draw_probe_set
from ..report import OptimizabilityReport
from ..training import provenance
from ..training.trainer_loss import trainer_loss


def measure_inputs(trainer: Trainer, config: OptimizabilityConfig) -> dict[str, Any]:
    """What `measure` and `forecast` take by these names: the Trainer's model and loss, and the probe set.

    Raises:
        ValueError: If the training set is too small for the probe set, or tasks shall be told apart.
    """
    if config.task_column is not None:
        raise ValueError(
            "`task_column` is not offered here: the command leaves the model nothing but its inputs. Train with "
            "`OptimizabilityTrainer`, or call `hf_optimizability.measure`."
        )
    batches = draw_probe_set(trainer.get_train_dataloader(), ProbeSpec.from_config(config)).batches
    return {"model": trainer.model, "batches": batches, "config": config, "loss_fn": trainer_loss(trainer)}


def single_report(trainer: Trainer, measured: dict[str, Any], measurement: Measurement) -> OptimizabilityReport:
    """The report of one measurement."""
    model, batches = measured["model"], measured["batches"]
    train: Any = trainer.train_dataset
    validation: Any = trainer.eval_dataset
    return OptimizabilityReport(
        model=provenance.describe_model(model),
        task=provenance.describe_task(model, own_loss=False),
        data=provenance.describe_data(train, validation) | provenance.describe_probe_set(batches, model),
        config=provenance.describe_config(measured["config"]),
        versions=provenance.library_versions(),
        measurements=[measurement],
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
