# SPDX-License-Identifier: Apache-2.0
"""When the callback measures, what it logs, and what it writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalPrediction

from hf_optimizability import (
    OptimizabilityCallback,
    OptimizabilityConfig,
    OptimizabilityReport,
    OptimizabilityTrainer,
    measure,
)
from hf_optimizability.report import SCHEMA_VERSION
from tests.support import tiny_models, tiny_training


QUICK = tiny_training.QUICK


def run(
    folder: Path, cls: type[Trainer] = OptimizabilityTrainer, *, config: dict[str, Any] | None = None, **options: Any
):
    config = OptimizabilityConfig(**{**QUICK, **(config or {})})
    if cls is Trainer:
        callback = OptimizabilityCallback(config)
        trainer = tiny_training.trainer(folder, callbacks=[callback], **options)
        trainer.train()
        return trainer, callback.report
    trainer = tiny_training.trainer(folder, cls=cls, optimizability=config, **options)
    trainer.train()
    return trainer, trainer.optimizability_report()


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    ("config", "options", "steps"),
    [
        ({"measure_strategy": "no"}, {}, [0, 6]),
        ({"measure_strategy": "steps", "measure_steps": 2}, {}, [0, 2, 4, 6]),
        ({"measure_strategy": "steps", "measure_steps": 4}, {}, [0, 4, 6]),
        (
            {"measure_strategy": "epoch"},
            {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2},
            [0, 3, 6],
        ),
    ],
)
def test_when(tmp_path: Path, config: dict[str, Any], options: dict[str, Any], steps: list[int]):
    _, report = run(tmp_path, config=config, **options)
    assert [measurement.step for measurement in report.measurements] == steps
    assert not report.failures


@pytest.mark.usefixtures("quickly")
def test_best_checkpoint_is_what_is_measured_at_the_end(tmp_path: Path):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    options |= {"load_best_model_at_end": True, "eval_dataset": tiny_training.dataset("bert", 4), "learning_rate": 0.5}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # so that it is not the last
    trainer, report = run(tmp_path, config={"measure_strategy": "no"}, **options)
    best = trainer.state.best_global_step
    assert best < 6 and [measurement.step for measurement in report.measurements] == [0, best]


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("cls", [Trainer, OptimizabilityTrainer])
def test_the_reports_log_holds_the_measurements_and_all_of_the_trainers_own_entries(
    tmp_path: Path, cls: type[Trainer]
):
    _, report = run(tmp_path, cls, config={"measure_strategy": "steps", "measure_steps": 2})
    log = report.log_history
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 4, 6]
    measured = [entry for entry in log if "optimizability/hessian_trace" in entry]
    for entry, measurement in zip(measured, report.measurements, strict=True):
        assert entry["step"] == measurement.step and entry["epoch"] == pytest.approx(measurement.step / 6)
        assert entry["optimizability/loss"] == measurement.loss
        assert entry["optimizability/grad_norm"] == measurement.grad_norm
        assert entry["optimizability/hessian_lambda_max"] == measurement.hessian.lambda_max.value
        assert entry["optimizability/hessian_lambda_min"] == measurement.hessian.lambda_min.value
        assert entry["optimizability/hessian_trace_std_error"] == measurement.hessian.trace.std_error
        assert 4 <= entry["optimizability/hvps"] == measurement.hvps <= 16
    json.dumps(log, allow_nan=False)


@pytest.mark.usefixtures("quickly")
def test_trackers_get_the_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    _, report = run(tmp_path, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    scalars = events.Scalars("train/optimizability/hessian_trace")
    assert [scalar.step for scalar in scalars] == [0, 6]
    traces = [measurement.hessian.trace.value for measurement in report.measurements]
    assert [scalar.value for scalar in scalars] == pytest.approx(traces, rel=1e-6)


@pytest.mark.usefixtures("quickly")
def test_gradient_norms_by_block_are_those_before_clipping(tmp_path: Path):
    options = {"max_grad_norm": 1e-3, "logging_steps": 1, "gradient_accumulation_steps": 2, "max_steps": 3}
    trainer, _ = run(tmp_path, **options)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        blocks = [v for k, v in entry.items() if k.startswith("optimizability/train_grad_norm/")]
        assert len(blocks) == 3
        assert np.linalg.norm(blocks) == pytest.approx(entry["grad_norm"], rel=1e-5)
        assert entry["grad_norm"] > 1e-2


class DoubledLoss(OptimizabilityTrainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().compute_loss(model, inputs, *args, **kwargs)


def halved_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch / 2


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    ("cls", "options", "factor"),
    [
        pytest.param(OptimizabilityTrainer, {}, 1.0, marks=pytest.mark.slow),
        (DoubledLoss, {}, 2.0),
        (OptimizabilityTrainer, {"compute_loss_func": halved_loss}, 0.5),
        (OptimizabilityTrainer, {"gradient_accumulation_steps": 3}, 1.0),
    ],
)
def test_the_trainers_loss_is_measured(tmp_path: Path, cls: type[Trainer], options: dict[str, Any], factor: float):
    config = {"probe_examples": 24, "probe_batch_size": 24, "measure_strategy": "no"}
    _, report = run(tmp_path, cls, config=config, max_steps=1, **options)
    [whole] = tiny_models.cut(tiny_models.examples("bert", 24, dtype=torch.float32), 24)
    truth = float(tiny_training.model("bert").eval()(**whole).loss.detach())
    assert report.measurements[0].loss == pytest.approx(factor * truth, rel=1e-5)


@pytest.mark.usefixtures("quickly")
def test_label_smoothing_is_measured(tmp_path: Path):
    config = {"probe_examples": 24, "probe_batch_size": 24, "measure_strategy": "no"}
    _, report = run(tmp_path, config=config, max_steps=1, label_smoothing_factor=0.3)
    [whole] = tiny_models.cut(tiny_models.examples("bert", 24, dtype=torch.float32), 24)
    logits = tiny_training.model("bert").eval()(**whole).logits
    truth = nn.functional.cross_entropy(logits, whole["labels"], label_smoothing=0.3)
    assert report.measurements[0].loss == pytest.approx(float(truth.detach()), rel=1e-5)


def test_without_a_trainer_the_models_own_loss_is_measured(tmp_path: Path):
    config = {"probe_examples": 8, "max_hvps": 64, "eigen_tolerance": 1e-3}
    options = {"train_dataset": tiny_training.dataset("bert", 8), "label_smoothing_factor": 0.3, "max_steps": 1}
    _, report = run(tmp_path, Trainer, config=config, **options)
    [whole] = tiny_models.cut(tiny_models.examples("bert", 8, dtype=torch.float32), 8)
    own = measure(tiny_training.model("bert"), [whole], OptimizabilityConfig(**{**QUICK, **config}))
    assert report.measurements[0].loss == pytest.approx(own.loss, rel=1e-6)
    assert report.measurements[0].hessian.lambda_max.value == pytest.approx(own.hessian.lambda_max.value, rel=1e-4)
    assert report.task.loss == "the model's own"


class OnceDifferentiableLoss(OptimizabilityTrainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return tiny_models.OnceDifferentiable.apply(super().compute_loss(model, inputs, *args, **kwargs)) ** 2


class NotFinite(OptimizabilityTrainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return super().compute_loss(model, inputs, *args, **kwargs) * (1 if model.training else torch.inf)


@pytest.mark.parametrize(
    ("cls", "reason", "remedy"),
    [
        (OnceDifferentiableLoss, "can't be differentiated twice", "custom autograd functions"),
        (NotFinite, "The loss on the probe set is inf", "learning rate"),
    ],
)
def test_a_measurement_that_cannot_be_made_is_one_warning_and_a_record(
    tmp_path: Path, cls: type[Trainer], reason: str, remedy: str, caplog: pytest.LogCaptureFixture
):
    logging.getLogger("transformers").propagate = True  # so that caplog sees it
    logging.getLogger("hf_optimizability").propagate = True
    config = {"measure_strategy": "steps", "measure_steps": 2, "engine": "double_backward"}
    trainer, report = run(tmp_path, cls, config=config)
    assert trainer.state.global_step == 6
    assert [failure.step for failure in report.failures] == [0, 2, 4, 6] and not report.measurements
    assert all(reason in failure.reason and remedy in failure.remedy for failure in report.failures)
    warnings = [
        record.getMessage() for record in caplog.records if "No optimizability measurement" in record.getMessage()
    ]
    assert len(warnings) == 1 and all(part in warnings[0] for part in (reason, remedy, "Training continues"))
    loaded = OptimizabilityReport.load(tmp_path / "optimizability")
    assert loaded.failures == report.failures
    assert reason in (tmp_path / "optimizability" / "report.md").read_text()


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_the_report_is_complete(tmp_path: Path):
    rows = tiny_training.dataset("bert", 40)
    trainer, report = run(
        tmp_path / "run",
        config={
            **{"report_dir": str(tmp_path / "report"), "measure_strategy": "steps", "measure_steps": 3},
            **{"probe_examples": 6, "probe_batch_size": 4},
        },
        train_dataset=rows[:24],
        eval_dataset=rows[24:],
        eval_strategy="steps",
        eval_steps=3,
        compute_metrics=accuracy,
        optim="sgd",
        optim_args="momentum=0.9",
    )
    loaded = OptimizabilityReport.load(tmp_path / "report" / "report.json")
    assert loaded.to_dict() == report.to_dict()
    assert loaded.measurements == report.measurements and len(loaded.measurements) == 3
    assert loaded.schema_version == SCHEMA_VERSION and loaded.created.startswith("20")
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert loaded.model.class_name == "BertForSequenceClassification"
    assert loaded.model.parameters == loaded.model.trainable_parameters == parameters
    assert (loaded.task.task, loaded.task.loss) == ("text-classification", "the Trainer's")
    assert loaded.data.train_examples == 24 and loaded.data.eval_examples == 16
    assert loaded.data.probe.examples == loaded.data.probe.items == 6 and loaded.data.probe.batches == 2
    assert len(loaded.data.probe.fingerprint) == 16
    assert loaded.training["optimizer"] == "SGD" and loaded.training["optimizer_settings"]["momentum"] == 0.9
    assert loaded.training["learning_rate"] == 0.01 and loaded.training["lr_scheduler_type"] == "linear"
    assert loaded.config["probe_seed"] == 0 and loaded.config["max_hvps"] == 16
    assert loaded.versions["torch"] == torch.__version__
    assert set(loaded.dynamics) == {"convergence_speed", "stability", "generalization_gap"}
    assert loaded.dynamics["generalization_gap"]["measured_alike"]
    assert [entry for entry in loaded.log_history if entry in trainer.state.log_history] == trainer.state.log_history
    files = {path.name for path in (tmp_path / "report").iterdir()}
    curves = {"loss", "stability_margin", "gradient_norm", "curvature"}  # two batches are too few for a noise scale
    plots = {f"{name}.{kind}" for name in curves | {"density", "ritz_values", "blocks"} for kind in ("png", "svg")}
    assert files == {"report.json", "report.md", "report.html", *plots}


@pytest.mark.usefixtures("quickly")
def test_the_gap_is_that_of_equal_samples_in_eval_mode(tmp_path: Path):
    rows = tiny_training.dataset("bert", 32)
    trainer, report = run(tmp_path, train_dataset=rows[:16], eval_dataset=rows[16:], compute_metrics=accuracy)
    [gap] = [entry for entry in report.log_history if "optimizability/gap_examples" in entry]
    assert gap["optimizability/gap_examples"] == 16
    for split, part in {"train": rows[:16], "eval": rows[16:]}.items():
        scores = trainer.evaluate(part)
        assert gap[f"optimizability/{split}_loss"] == pytest.approx(scores["eval_loss"], rel=1e-5)
        assert gap[f"optimizability/{split}_accuracy"] == pytest.approx(scores["eval_accuracy"])
        assert 0 < gap[f"optimizability/{split}_loss_std_error"] < 1


@pytest.mark.usefixtures("quickly")
def test_progress_bar_leaves_the_trainers_bar_alone(tmp_path: Path, capfd: pytest.CaptureFixture):
    run(tmp_path, disable_tqdm=False)
    screen = capfd.readouterr().err
    assert screen.count("Measuring curvature:   0%") == 2 and "0/6" in screen
    last = [line for line in map(visible, screen.split("\n")) if line][-1]
    assert last.startswith("100%") and "6/6" in last and "Measuring" not in last


def visible(line: str) -> str:
    """What a terminal shows of a line that was written over and over."""
    shown = ""
    for text in line.split("\r"):
        shown = text + shown[len(text) :]
    return shown.rstrip()
