# SPDX-License-Identifier: Apache-2.0
"""One training of one candidate, from flags to scores; a killed one goes on from its last checkpoint."""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from torch.utils.data import Subset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..config import OptimizabilityConfig
from ..dynamics import compute_dynamics
from ..log_keys import PREFIX
from ..objective.probe_set import probe_indices
from ..redaction import anonymize, map_strings
from ..report import OptimizabilityReport
from ..tasks.checkpoint import CheckpointArguments
from ..tasks.datasets import LabelledDataArguments
from ..tasks.fine_tuning import Task, load
from ..training import provenance
from ..training.train_eval_gap import GAP_EXAMPLES
from ..training.trainer import OptimizabilityTrainer
from .results import Run, Scores


LOGGED = 20
"""Points of a training's loss curve."""

EVALUATED = 4
"""Evaluations in a training, each at a point of the loss curve."""

TIMED_STEPS = 8
"""Steps that tell how long a step takes; the first three of them warm up and do not count."""

_SECONDS = f"{PREFIX}train_seconds"


@dataclass(frozen=True)
class Inputs:
    """What a training is made from, parsed.

    Attributes:
        task: What the checkpoint shall do.
        model: Which checkpoint, and what of it is trained.
        data: Which data.
        config: What to measure.
        training: The Trainer's arguments.
        data_seed: Seed of the draw of the examples, the same for every training of a comparison.
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

    def loaded(self) -> dict[str, Any]:
        """What a Trainer takes.

        Raises:
            ValueError: If something can't be loaded, or does not fit.
        """
        return load(self.task, self.model, self.data, self.training, split_seed=self.data_seed)


def training_flags(steps: int, seed: int) -> dict[str, Any]:
    """The Trainer's arguments that the comparison settles.

    The loss is logged at the same steps in a training that goes on from a checkpoint: those are made at such steps.
    """
    logging_steps = max(1, steps // LOGGED)
    evaluated = max(1, steps // (EVALUATED * logging_steps)) * logging_steps
    return {
        "max_steps": steps, "seed": seed, "data_seed": seed, "logging_strategy": "steps",
        "logging_steps": logging_steps, "eval_strategy": "steps", "eval_steps": evaluated, "save_strategy": "no",
        "save_total_limit": 2, "measure_steps": max(1, -(-steps // 2)),
    }  # fmt: skip


def train(inputs: Inputs, *, measured: bool, save_seconds: float) -> Run:
    """Trains, goes on from the last whole checkpoint if there is one, and scores the result.

    Args:
        inputs: From what; the checkpoints are in the Trainer's `output_dir`.
        measured: Whether curvature is measured on the way.
        save_seconds: Seconds between two checkpoints.

    Raises:
        ValueError: If something can't be loaded or does not fit, or the trained model's loss is not finite.
        Exception: Whatever the training raises.
    """
    args = inputs.training
    stopwatch = Stopwatch(save_seconds)
    _free_memory(args)
    options = {"args": args, "callbacks": [stopwatch], **inputs.loaded()}
    trainer = OptimizabilityTrainer(optimizability=inputs.config, **options) if measured else Trainer(**options)
    trainer.add_callback(GoOn(stopwatch))  # after all others
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=whole_checkpoint(Path(str(args.output_dir))))
    peak = _peak(args)
    scores, predict_seconds = score(trainer, trainer.eval_dataset)
    if not np.isfinite(scores.losses).all():
        raise ValueError(
            "The loss of the trained model is not finite: the training diverged. Lower the learning rate, or use a "
            "wider precision."
        )
    return Run(
        seed=args.seed,
        report=_report(trainer, scores, inputs.config),
        scores=scores,
        train_seconds=stopwatch.seconds,
        predict_seconds=predict_seconds,
        peak_bytes=peak,
    )


def score(trainer: Trainer, dataset: Any) -> tuple[Scores, float]:
    """Loss and correctness of each example in eval mode, and the seconds that an example took."""
    started = time.perf_counter()
    found = trainer.predict(dataset)
    seconds = (time.perf_counter() - started) / len(dataset)
    logits = np.asarray(found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions)
    labels: Any = found.label_ids
    logs = log_softmax(logits.astype(np.float64), axis=1)
    return Scores(-logs[np.arange(len(labels)), labels], logits.argmax(axis=1) == labels), seconds


def step_seconds(inputs: Inputs) -> float:
    """Times a few steps of a training that is thrown away.

    Raises:
        ValueError: If something can't be loaded or does not fit.
        Exception: Whatever the training raises.
    """
    stopwatch = Stopwatch(math.inf)
    trainer = Trainer(args=inputs.training, callbacks=[stopwatch], **inputs.loaded())
    trainer.add_callback(GoOn(stopwatch))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return float(np.median(stopwatch.steps[3:]))


class Stopwatch(TrainerCallback):
    """Times the steps of a training, its killed parts included, and asks for checkpoints.

    It must come before the callbacks that measure; a `GoOn` after them starts it again.

    Args:
        save_seconds: Seconds between two checkpoints.

    Attributes:
        seconds: Of all steps so far, data loading included.
        steps: Seconds of each step of this process.
    """

    def __init__(self, save_seconds: float):
        self.seconds = 0.0
        self.steps: list[float] = []
        self._save_seconds = save_seconds
        self._since = self._saved = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes up the time that a killed part of this training took."""
        self.seconds = max((entry[_SECONDS] for entry in state.log_history if _SECONDS in entry), default=0.0)
        self._saved = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops, and asks for a checkpoint if it is time for one and the loss is logged at this step."""
        now = time.perf_counter()
        self.steps.append(now - self._since)
        self.seconds += self.steps[-1]
        if now - self._saved >= self._save_seconds and state.global_step % state.logging_steps == 0:
            control.should_save = state.global_step < state.max_steps
            self._saved = now

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the time into the log, and so into the checkpoint."""
        if "loss" in kwargs["logs"]:
            state.log_history.append({_SECONDS: self.seconds, "step": state.global_step})

    def go_on(self) -> None:
        """Starts: whatever was done since the last step is no part of the training."""
        self._since = time.perf_counter()


class GoOn(TrainerCallback):
    """Starts a `Stopwatch` when all other callbacks, an evaluation or a checkpoint are through."""

    def __init__(self, stopwatch: Stopwatch):
        self._stopwatch = stopwatch

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts it."""
        self._stopwatch.go_on()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Starts it after a measurement."""
        self._stopwatch.go_on()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Starts it after an evaluation."""
        self._stopwatch.go_on()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Starts it after a checkpoint."""
        self._stopwatch.go_on()


def whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to the end; those that were not are removed.

    The Trainer writes `trainer_state.json` last.
    """
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))):
        try:
            json.loads(Path(last, "trainer_state.json").read_bytes())
            return last
        except (OSError, ValueError):
            shutil.rmtree(last)
    return None


def _report(trainer: Trainer, scores: Scores, config: OptimizabilityConfig) -> OptimizabilityReport:
    """What there is to report: the report of a measured training, or all of it that needs no measurement."""
    if isinstance(trainer, OptimizabilityTrainer):
        return trainer.optimizability_report()
    state, optimizer, model = trainer.state, trainer.optimizer, trainer.model
    assert optimizer is not None and isinstance(model, torch.nn.Module)
    state.log_history.append({**_gap(trainer, scores, config), "step": state.global_step})
    log = map_strings(state.log_history, anonymize)
    train: Any = trainer.train_dataset
    evaluation: Any = trainer.eval_dataset
    report = provenance.new_report(model, train, evaluation, own_loss=False)
    report.data |= provenance.describe_probe_set([], model)
    report.training = provenance.describe_training(trainer.args, optimizer, state.max_steps)
    report.log_history = log
    report.dynamics = compute_dynamics(log, seed=config.probe_seed)
    report.created = provenance.timestamp()
    return report


def _gap(trainer: Trainer, scores: Scores, config: OptimizabilityConfig) -> dict[str, float]:
    """What a measured training logs about train and eval loss: means over equally many examples of both."""
    train: Any = trainer.train_dataset
    number = min(GAP_EXAMPLES, len(train), len(scores.losses))
    trained, _ = score(trainer, Subset(train, probe_indices(len(train), number, seed=config.probe_seed)))
    kept = probe_indices(len(scores.losses), number, seed=config.probe_seed)
    evaluated = Scores(scores.losses[kept], scores.correct[kept])
    numbers: dict[str, float] = {f"{PREFIX}gap_examples": number}
    for split, held in {"train": trained, "eval": evaluated}.items():
        numbers[f"{PREFIX}{split}_loss"] = float(held.losses.mean())
        numbers[f"{PREFIX}{split}_accuracy"] = float(held.correct.mean())
        if number > 1:
            numbers[f"{PREFIX}{split}_loss_std_error"] = float(held.losses.std(ddof=1)) / math.sqrt(number)
    return numbers


def _free_memory(args: TrainingArguments) -> None:
    """Frees what the Trainer before held: it and its callbacks hold each other."""
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)


def _peak(args: TrainingArguments) -> int | None:
    return torch.cuda.max_memory_allocated(args.device) if args.device.type == "cuda" else None
