# SPDX-License-Identifier: Apache-2.0
"""One training of one candidate, from flags to scores; a killed one resumes from its last checkpoint."""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..config import OptimizabilityConfig
from ..dynamics import compute_dynamics
from ..log_keys import PREFIX
from ..report import OptimizabilityReport
from ..tasks.checkpoint import CheckpointArguments
from ..tasks.datasets import LabelledDataArguments
from ..tasks.fine_tuning import Task, TrainerInputs, load
from ..training import provenance
from ..training.clock import StepTimer
from ..training.train_eval_gap import measure_gap
from ..training.trainer import OptimizabilityTrainer
from .results import Run, Scores


LOGGED_POINTS = 20
"""Points of a training's loss curve."""

EVALUATIONS = 4
"""Evaluations in a training, each at a point of the loss curve."""

TIMED_STEPS = 8
"""Steps from which the time of a step is estimated."""

WARM_UP_STEPS = 3
"""How many of them warm up and do not count."""

_SECONDS = f"{PREFIX}train_seconds"


class DivergedError(ValueError):
    """A training whose model has a loss that is not finite."""


@dataclass(frozen=True)
class Inputs:
    """What a training is made from, parsed.

    Attributes:
        task: What the checkpoint is trained for.
        model: Which checkpoint, and what of it is trained.
        data: Which data.
        config: What to measure.
        training: The Trainer's arguments.
        data_seed: Seed of the sample of the examples, the same for every training of a comparison.
    """

    task: Task
    model: CheckpointArguments
    data: LabelledDataArguments
    config: OptimizabilityConfig
    training: TrainingArguments
    data_seed: int

    @property
    def examples_per_step(self) -> int:
        """Examples that one optimizer step takes."""
        args = self.training
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def load(self) -> TrainerInputs:
        """Load checkpoint and data.

        Raises:
            ValueError: If something can't be loaded, or does not fit.
        """
        return load(self.task, self.model, self.data, self.training, split_seed=self.data_seed)


def training_flags(steps: int, seed: int) -> dict[str, Any]:
    """Return the Trainer's arguments that the comparison sets.

    The loss is logged at the same steps in a training resumed from a checkpoint: those are saved at such steps.
    """
    logging_steps = max(1, steps // LOGGED_POINTS)
    eval_steps = max(1, steps // (EVALUATIONS * logging_steps)) * logging_steps
    return {
        "max_steps": steps, "seed": seed, "data_seed": seed, "logging_strategy": "steps",
        "logging_steps": logging_steps, "eval_strategy": "steps", "eval_steps": eval_steps, "save_strategy": "no",
        "save_total_limit": 2, "measure_steps": max(1, -(-steps // 2)),
    }  # fmt: skip


def train(inputs: Inputs, *, measured: bool, save_seconds: float) -> Run:
    """Train, from the last complete checkpoint if there is one, and score the result.

    Args:
        inputs: Model, data and settings; the checkpoints are in the Trainer's `output_dir`.
        measured: Whether to measure curvature while training.
        save_seconds: Seconds between two checkpoints.

    Raises:
        ValueError: If something can't be loaded or does not fit.
        DivergedError: If the trained model's loss is not finite.
        Exception: Whatever the training raises.
    """
    args = inputs.training
    stopwatch = Stopwatch(save_seconds)
    _free_memory(args)
    options = {"args": args, "callbacks": [stopwatch], **inputs.load().as_kwargs()}
    trainer = OptimizabilityTrainer(optimizability=inputs.config, **options) if measured else Trainer(**options)
    trainer.add_callback(StopwatchRestart(stopwatch))  # after all others
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(Path(str(args.output_dir))))
    peak = _peak_memory(args)
    scores, predict_seconds = score(trainer, trainer.eval_dataset)
    if not np.isfinite(scores.losses).all():
        raise DivergedError("The loss of the trained model is not finite: the training diverged.")
    return Run(
        seed=args.seed,
        report=_report(trainer, inputs.config),
        scores=scores,
        train_seconds=stopwatch.seconds,
        predict_seconds=predict_seconds,
        peak_bytes=peak,
    )


def score(trainer: Trainer, dataset: Any) -> tuple[Scores, float]:
    """Return loss and correctness of each example in eval mode, and the seconds that an example took."""
    started = time.perf_counter()
    output = trainer.predict(dataset)
    seconds = (time.perf_counter() - started) / len(dataset)
    logits = np.asarray(output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions)
    labels: Any = output.label_ids
    logs = log_softmax(logits.astype(np.float64), axis=1)
    return Scores(-logs[np.arange(len(labels)), labels], logits.argmax(axis=1) == labels), seconds


def step_seconds(inputs: Inputs) -> float:
    """Return the time of a step, from a few steps of a training that is thrown away.

    Raises:
        ValueError: If something can't be loaded or does not fit.
        Exception: Whatever the training raises.
    """
    stopwatch = Stopwatch(math.inf)
    trainer = Trainer(args=inputs.training, callbacks=[stopwatch], **inputs.load().as_kwargs())
    trainer.add_callback(StopwatchRestart(stopwatch))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return float(np.median(list(stopwatch.timer.recent)[WARM_UP_STEPS:]))


class Stopwatch(TrainerCallback):
    """Times the steps of a training, including those before it was killed, and asks for checkpoints.

    It must come before the callbacks that measure, and a `StopwatchRestart` after all others.

    Args:
        save_seconds: Seconds between two checkpoints.

    Attributes:
        timer: Times the steps of this process.
    """

    def __init__(self, save_seconds: float):
        self.timer = StepTimer()
        self._seconds_before = 0.0
        self._save_seconds = save_seconds
        self._saved = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time of all steps so far."""
        return self._seconds_before + self.timer.seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read from the log how long the training took before it was killed."""
        self._seconds_before = max((entry[_SECONDS] for entry in state.log_history if _SECONDS in entry), default=0.0)
        self._saved = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop, and ask for a checkpoint if it is time for one and the loss is logged at this step."""
        self.timer.step_ended()
        now = time.perf_counter()
        if now - self._saved >= self._save_seconds and state.global_step % state.logging_steps == 0:
            control.should_save = state.global_step < state.max_steps
            self._saved = now

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the time to the log, and so to the checkpoint."""
        if "loss" in kwargs["logs"]:
            state.log_history.append({_SECONDS: self.seconds, "step": state.global_step})


class StopwatchRestart(TrainerCallback):
    """Restarts a `Stopwatch` after all other callbacks, an evaluation or a checkpoint.

    Args:
        stopwatch: What to restart.
    """

    def __init__(self, stopwatch: Stopwatch):
        self._timer = stopwatch.timer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Restart the timer: the next step begins."""
        self._timer.restart()

    on_train_begin = on_evaluate = on_save = on_step_end


def last_complete_checkpoint(folder: Path) -> str | None:
    """Return the last checkpoint that was written completely; remove those that were not.

    The Trainer writes `trainer_state.json` last.
    """
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))):
        try:
            json.loads(Path(last, "trainer_state.json").read_bytes())
            return last
        except (OSError, ValueError):
            shutil.rmtree(last)
    return None


def _report(trainer: Trainer, config: OptimizabilityConfig) -> OptimizabilityReport:
    """Return the report of a measured training; otherwise, one of all that needs no measurement."""
    if isinstance(trainer, OptimizabilityTrainer):
        return trainer.optimizability_report()
    state, optimizer, model = trainer.state, trainer.optimizer, trainer.model
    assert optimizer is not None and isinstance(model, torch.nn.Module)
    train: Any = trainer.train_dataset
    evaluation: Any = trainer.eval_dataset
    report = provenance.new_report(model, train, evaluation, own_loss=False)
    report.data = replace(report.data, probe=provenance.describe_probe_set([], model))
    report.training = provenance.describe_training(trainer.args, optimizer, state.max_steps)
    gap = {**measure_gap(trainer, config), "step": state.global_step}
    report.log_history = [*state.log_history, gap]
    report.dynamics = compute_dynamics(report.log_history, seed=config.probe_seed)
    report.created = provenance.timestamp()
    return report


def _free_memory(args: TrainingArguments) -> None:
    """Free the memory of the Trainer before: it and its callbacks reference each other."""
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)


def _peak_memory(args: TrainingArguments) -> int | None:
    return torch.cuda.max_memory_allocated(args.device) if args.device.type == "cuda" else None
