# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around a measurement: training ends as it would have, and what was measured before is kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.samplers import RandomSampler
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_optimizability import OptimizabilityCallback, OptimizabilityConfig, OptimizabilityReport, OptimizabilityTrainer
from tests.support import tiny_models, tiny_training
from tests.support.tiny_training import CONFIG, FEW_STEPS, sentences
from tests.support.training_outcome import assert_equal, run


def make(folder: Path, cls: type[Trainer] = Trainer, **options: Any) -> Trainer:
    settings = {"train_dataset": sentences(), **FEW_STEPS, **options}
    return tiny_training.trainer(folder, cls=cls, **settings)


class BreakAt(TrainerCallback):
    """Makes the model return something else in eval mode, from one step to the next."""

    def __init__(self, step: int, value: float):
        self.step, self.value = step, value

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.hook = model.classifier.register_forward_hook(
                lambda module, inputs, output: output if module.training else output * self.value
            )
        elif state.global_step == self.step:
            self.hook.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_at_one_measurement(tmp_path: Path, value: float):
    plain = run(make(tmp_path / "plain"))
    callback = OptimizabilityCallback(OptimizabilityConfig(**CONFIG))
    assert_equal(run(make(tmp_path / "run", callbacks=[BreakAt(2, value), callback])), plain)
    report = OptimizabilityReport.load(tmp_path / "run" / "optimizability")
    assert [measurement.step for measurement in report.measurements] == [0, 4]
    [failure] = report.failures
    assert failure.step == 2 and "The loss on the probe set is nan" in failure.reason


def test_labels_out_of_range_in_the_probe_set(tmp_path: Path):
    """As training meets them, so does the probe set; here training is lucky."""

    class Sloppy(OptimizabilityTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            if model.training:
                inputs = {**inputs, "labels": inputs["labels"].clamp(max=2)}
            return super().compute_loss(model, inputs, *args, **kwargs)

    rows = sentences(lambda index: index % 3 if index else 7)
    config = OptimizabilityConfig(**{**CONFIG, "probe_examples": 16})
    trainer = make(tmp_path, Sloppy, train_dataset=rows, optimizability=config)
    trainer.train()
    assert trainer.state.global_step == 4
    assert all("(IndexError)" in failure.reason for failure in trainer.optimizability_report().failures)
    assert len(trainer.optimizability_report().failures) == 3


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "file", ["report.json", *(pytest.param(f, marks=pytest.mark.slow) for f in ("report.md", "loss.png"))]
)
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str):
    """From the second measurement on. What was written before stays whole."""
    plain = run(make(tmp_path / "plain"))
    right = os.replace
    written: list[str] = []

    def full(source: Any, target: Any) -> None:
        written.append(Path(target).name)
        if Path(target).name == file and (file != "report.json" or written.count(file) > 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        right(source, target)

    callback = OptimizabilityCallback(OptimizabilityConfig(**CONFIG))
    monkeypatch.setattr("hf_optimizability.files.os.replace", full)
    assert_equal(run(make(tmp_path / "run", callbacks=[callback])), plain)
    monkeypatch.undo()
    report = OptimizabilityReport.load(tmp_path / "run" / "optimizability")
    assert len(report.measurements) == (1 if file == "report.json" else 3)
    assert len(callback.report.measurements) == 3


@pytest.mark.usefixtures("quickly")
def test_a_folder_that_vanishes_or_is_closed_on_the_way(tmp_path: Path):
    class Close(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                folder = tmp_path / "run" / "optimizability"
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
                folder.write_text("a file in its place")

    plain = run(make(tmp_path / "plain"))
    callback = OptimizabilityCallback(OptimizabilityConfig(**CONFIG))
    assert_equal(run(make(tmp_path / "run", callbacks=[Close(), callback])), plain)
    assert len(callback.report.measurements) == 3


@pytest.mark.usefixtures("quickly")
def test_an_earlier_report_that_is_corrupt_is_kept_aside(tmp_path: Path):
    folder = tmp_path / "optimizability"
    folder.mkdir()
    (folder / "report.json").write_text('{"measurements": [tor')
    make(tmp_path, callbacks=[OptimizabilityCallback(OptimizabilityConfig(**CONFIG))]).train()
    assert (folder / "report-1.json").read_text() == '{"measurements": [tor'
    assert len(OptimizabilityReport.load(folder).measurements) == 3


@pytest.mark.usefixtures("quickly")
def test_a_probe_set_that_is_smaller_than_a_batch(tmp_path: Path):
    config = OptimizabilityConfig(**{**CONFIG, "probe_examples": 2, "probe_batch_size": 16})
    callback = OptimizabilityCallback(config)
    make(tmp_path, callbacks=[callback], train_dataset=sentences()[:3], max_steps=2).train()
    assert [measurement.num_items for measurement in callback.report.measurements] == [2, 2]


@pytest.mark.usefixtures("quickly")
def test_without_an_evaluation_set_there_is_no_gap(tmp_path: Path):
    trainer = make(tmp_path, OptimizabilityTrainer, optimizability=OptimizabilityConfig(**CONFIG))
    trainer.train()
    report = trainer.optimizability_report()
    assert not report.failures and report.dynamics["generalization_gap"]["loss_gap"] is None


@pytest.mark.usefixtures("quickly")
@pytest.mark.slow
def test_hyperparameter_search(tmp_path: Path):
    """Each trial has a model of its own, and the report is that of the last."""

    def trainer(**more: Any) -> Trainer:
        def model_init() -> nn.Module:
            torch.manual_seed(0)
            return tiny_models.bert()

        args = tiny_training.arguments(tmp_path, **{**FEW_STEPS, "eval_strategy": "steps", "eval_steps": 4})
        return (OptimizabilityTrainer if more else Trainer)(
            args=args, model_init=model_init, train_dataset=sentences(), eval_dataset=sentences()[:4], **more
        )

    def search(trainer: Trainer) -> tuple[Any, ...]:
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1)},
            n_trials=2, sampler=RandomSampler(seed=0),
        )  # fmt: skip
        return best.objective, best.hyperparameters

    measured = trainer(optimizability=OptimizabilityConfig(**CONFIG))
    assert search(measured) == search(trainer())
    report = measured.optimizability_report()
    assert [measurement.step for measurement in report.measurements] == [0, 2, 4] and not report.failures
