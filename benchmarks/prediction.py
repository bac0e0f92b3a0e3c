# SPDX-License-Identifier: Apache-2.0
"""Is it known early how well a candidate will do? Rank correlation of what is known by a tenth of the budget.

Twenty candidates on each of four tasks are scored before training, trained for a short budget with two seeds, and
looked at once after a tenth of its steps; in addition each is trained for a tenth of the steps with a whole schedule.
What is known then is set against the accuracy on the evaluation set at the end, in the mean over the seeds. How well
one seed's end predicts the other's says how well anything could.

    python benchmarks/prediction.py [--only TASK ...] [--seeds N ...] [--steps N]
                                    [--text-checkpoint FOLDER] [--fashion-mnist FOLDER]

continues where it was killed, and writes `benchmarks/results/prediction.json` and the page next to it, whose tables
are in `docs/prediction.md`. The second checkpoint for text is paraphrase-MiniLM-L3-v2; Fashion-MNIST's four idx files
are those of the Debian package dataset-fashion-mnist; the digits come with scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparing import to_parquet
from prediction_page import page
from torch.utils.data import Subset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from workloads import CACHE, ROOT, TEXT_CHECKPOINT, TEXT_DATA, VISION_CHECKPOINT, VISION_DATA

from hf_optimizability import OptimizabilityConfig, measure
from hf_optimizability.comparing.training import Stopwatch, StopwatchRestart, score
from hf_optimizability.dynamics.convergence_speed import fit_convergence
from hf_optimizability.errors import MeasurementError
from hf_optimizability.files import finite, write_atomically
from hf_optimizability.measurement.results import Measurement
from hf_optimizability.objective.probe_set import ProbeSpec, draw_probe_set, probe_indices
from hf_optimizability.scoring.checkpoint import NAMES, score_checkpoint
from hf_optimizability.tasks.fine_tuning import TASKS, FlagParser, load, parse_arguments
from hf_optimizability.training.trainer_loss import trainer_loss


RESULTS = Path(__file__).parent / "results" / "prediction.json"
SEEDS = (42, 43)
"""Of the head, the order of the data and dropout. Scores and curvature are from the first only."""

EARLY = 0.1
"""Share of the steps after which a training is looked at."""

SEEN = ("evaluation", "gap", "measurement")
"""What is done at that look, and timed."""

SCORED, GRADIENTS, PROBED = 256, 32, 16
"""Examples that features, gradients of the scores, and curvature are from."""

Flags = dict[str, Any]

COMMON: Flags = {
    "dataloader_pin_memory": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
    "save_strategy": "no", "per_device_eval_batch_size": 100, "warmup_steps": 4, "max_eval_samples": 1000,
    "per_device_train_batch_size": 16,
}  # fmt: skip
TEXT: Flags = {"dataset_name": str(TEXT_DATA), "text_column_name": ["sentence"], "max_seq_length": 16}
VISION: Flags = {"image_size": 32}

RESNET = ROOT / "recipes" / "checkpoints" / "resnet18_architecture"
NEW: Flags = {"random_weights": True}
MOBILENET: Flags = {
    "model_name_or_path": str(VISION_CHECKPOINT), "config_overrides": "classifier_dropout_prob=0.2",
    "batch_norm_momentum": 0.1,
}  # fmt: skip


def adamw(rate: float) -> Flags:
    """AdamW, the Trainer's default."""
    return {"learning_rate": rate}


def sgd(rate: float) -> Flags:
    """SGD with momentum."""
    return {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": rate}


def text_candidates(second: str) -> dict[str, Flags]:
    """MiniLM-L6, also cut to fewer layers, and -L3: pretrained or not, by every method and at several rates."""
    six, three = {"model_name_or_path": str(TEXT_CHECKPOINT)}, {"model_name_or_path": second}
    lora, probe = {"method": "lora"}, {"method": "linear_probe"}
    cut = {layers: {"config_overrides": f"num_hidden_layers={layers}"} for layers in (1, 2, 4)}
    return {
        **{f"L6, AdamW {rate:g}": six | adamw(rate) for rate in (1e-5, 1e-4, 5e-4, 2e-3)},
        **{f"L6, SGD {rate:g}": six | sgd(rate) for rate in (1e-3, 1e-2)},
        "L6, Adafactor 1e-4": six | adamw(1e-4) | {"optim": "adafactor"},
        **{f"L6, LoRA, AdamW {rate:g}": six | lora | adamw(rate) for rate in (1e-4, 2e-3)},
        **{f"L6, linear probe, AdamW {rate:g}": six | probe | adamw(rate) for rate in (1e-3, 1e-2)},
        **{f"L6 cut to {layers}, AdamW 1e-4": six | flags | adamw(1e-4) for layers, flags in cut.items()},
        **{f"L3, AdamW {rate:g}": three | adamw(rate) for rate in (1e-5, 1e-4)},
        "L3, LoRA, AdamW 0.002": three | lora | adamw(2e-3),
        "L3, linear probe, AdamW 0.01": three | probe | adamw(1e-2),
        "L6, new, AdamW 1e-4": six | NEW | adamw(1e-4),
        "L3, new, AdamW 5e-4": three | NEW | adamw(5e-4),
    }


def vision_candidates() -> dict[str, Flags]:
    """MobileNetV2, pretrained or not, and ResNet-18 with random weights, by every method and at several rates."""
    resnet = {"model_name_or_path": str(RESNET), **NEW}
    probe = {"method": "linear_probe"}
    return {
        **{f"MobileNetV2, AdamW {rate:g}": MOBILENET | adamw(rate) for rate in (1e-5, 1e-4, 1e-3, 3e-3, 1e-2)},
        **{f"MobileNetV2, SGD {rate:g}": MOBILENET | sgd(rate) for rate in (1e-3, 1e-2, 1e-1)},
        "MobileNetV2, Adafactor 0.001": MOBILENET | adamw(1e-3) | {"optim": "adafactor"},
        **{f"MobileNetV2, linear probe, AdamW {rate:g}": MOBILENET | probe | adamw(rate) for rate in (1e-3, 1e-2)},
        "MobileNetV2, dropout 0.8, AdamW 0.001": MOBILENET | {"config_overrides": None} | adamw(1e-3),
        "MobileNetV2, its BatchNorm, AdamW 0.001": MOBILENET | {"batch_norm_momentum": None} | adamw(1e-3),
        **{f"MobileNetV2, new, AdamW {rate:g}": MOBILENET | NEW | adamw(rate) for rate in (1e-3, 1e-2)},
        **{f"ResNet-18, new, AdamW {rate:g}": resnet | adamw(rate) for rate in (1e-4, 1e-3)},
        **{f"ResNet-18, new, SGD {rate:g}": resnet | sgd(rate) for rate in (1e-3, 1e-2)},
        "ResNet-18, new, linear probe, AdamW 0.01": resnet | probe | adamw(1e-2),
    }


def fashion_mnist(args: argparse.Namespace) -> str:
    """Return a folder with Fashion-MNIST as Parquet."""
    folder = CACHE / "comparing" / "fashion_mnist_data"
    if not (folder / "test.parquet").exists():
        to_parquet(Path(args.fashion_mnist), folder)
    return str(folder)


def digits(args: argparse.Namespace) -> str:
    """Return a folder with scikit-learn's digits, 8 × 8 pixels, as Parquet."""
    from datasets import ClassLabel, Dataset, Features, Image
    from sklearn.datasets import load_digits

    folder = CACHE / "digits"
    if not (folder / "train.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        held = load_digits()
        columns = {"image": list((held.images * 15).astype(np.uint8)), "label": held.target.tolist()}
        features = Features(image=Image(), label=ClassLabel(num_classes=10))
        both = Dataset.from_dict(columns, features=features).train_test_split(450, seed=0)
        for split, rows in both.items():
            rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


TASK_DATA: dict[str, Callable[[argparse.Namespace], Flags]] = {
    "movie sentences": lambda args: TEXT,
    "MNIST": lambda args: {**VISION, "dataset_name": str(VISION_DATA)},
    "Fashion-MNIST": lambda args: {**VISION, "dataset_name": fashion_mnist(args)},
    "digits": lambda args: {**VISION, "dataset_name": digits(args)},
}


class LookOnce(TrainerCallback):
    """Looks at a training after a tenth of its steps, and leaves it as it was.

    Args:
        trainer: Whose training.
        step: When.
        curvature: Whether curvature is measured as well.

    Attributes:
        known: What was seen.
        seconds: What it took, by part.
    """

    def __init__(self, trainer: Trainer, step: int, *, curvature: bool):
        self._trainer, self._step, self._curvature = trainer, step, curvature
        self.known: dict[str, float | None] = {}
        self.seconds: dict[str, float] = {}

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate and measure, once."""
        if state.global_step == self._step:
            self._evaluate()
            if self._curvature:
                self._measure(kwargs["optimizer"])

    def _evaluate(self) -> None:
        trainer, started = self._trainer, time.perf_counter()
        evaluated, _ = score(trainer, trainer.eval_dataset)
        middle = time.perf_counter()
        train: Any = trainer.train_dataset
        trained, _ = score(trainer, Subset(train, probe_indices(len(train), len(evaluated.losses), seed=0)))
        self.seconds["evaluation"], self.seconds["gap"] = middle - started, time.perf_counter() - started
        self.known["eval_loss"] = float(evaluated.losses.mean())
        self.known["eval_accuracy"] = float(evaluated.correct.mean())
        self.known["gap"] = float(evaluated.losses.mean() - trained.losses.mean())

    def _measure(self, optimizer: Any) -> None:
        trainer, started = self._trainer, time.perf_counter()
        config = OptimizabilityConfig(max_hvps=16, eigen_tolerance=0.2, trace_tolerance=0.4, probe_seed=0)
        batches = draw_probe_set(trainer.get_train_dataloader(), ProbeSpec(PROBED, batch_size=4, seed=0)).batches
        inner = getattr(optimizer, "optimizer", optimizer)
        try:
            found = measure(trainer.model, batches, config, loss_fn=trainer_loss(trainer), optimizer=inner)
            self.known |= quantities(found)
        except MeasurementError as error:
            print(error, flush=True)
        self.seconds["measurement"] = time.perf_counter() - started


def quantities(found: Measurement) -> dict[str, float | None]:
    """Our quantities, of one measurement."""
    hessian, step, noise = found.hessian, found.optimizer_stability, found.noise_scale
    limit = None if step is None else step.limit
    return {
        "grad_norm": found.grad_norm,
        "trace": hessian.trace.value,
        "lambda_max": hessian.lambda_max.value,
        "sharpness": step.sharpness.value / limit if step is not None and limit else None,
        "critical_rate": step.critical.value / step.learning_rate if step is not None and step.learning_rate else None,
        "decrease": found.quadratic_model.predicted_decrease,
        "noise_scale": None if noise is None else noise.value,
    }


def prepared(flags: Flags, folder: Path) -> tuple[Trainer, Stopwatch]:
    """Return a candidate's Trainer, and a stopwatch that excludes evaluations and measurements."""
    task = TASKS[0] if flags["dataset_name"] == str(TEXT_DATA) else TASKS[1]
    parser = FlagParser(task.ModelArguments, task.DataArguments, TrainingArguments)
    held = {**COMMON, **flags, "output_dir": str(folder / "training")}
    model_args, data_args, training_args = parse_arguments(parser, [], values=held)
    inputs = load(task, model_args, data_args, training_args)
    stopwatch = Stopwatch(math.inf)
    trainer = Trainer(args=training_args, callbacks=[stopwatch], **inputs.as_kwargs())
    trainer.remove_callback(PrinterCallback)
    return trainer, stopwatch


def ended(trainer: Trainer) -> dict[str, Any]:
    """Trains to the end; what that gave."""
    trainer.train()
    final, _ = score(trainer, trainer.eval_dataset)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"final": {"accuracy": float(final.correct.mean()), "loss": float(final.losses.mean())}, "losses": losses}


def made(flags: Flags, folder: Path, *, whole: bool) -> dict[str, Any]:
    """Trains one candidate and looks at it; where `whole`, also scores it and measures its curvature."""
    trainer, stopwatch = prepared(flags, folder)
    scores = scored(trainer) if whole else {}
    look = LookOnce(trainer, round(EARLY * trainer.args.max_steps), curvature=whole)
    trainer.add_callback(look)
    trainer.add_callback(StopwatchRestart(stopwatch))
    end = ended(trainer)
    return finite(
        {
            **end,
            "scores": scores,
            "known": look.known,
            "seconds": {"training": stopwatch.seconds, **look.seconds},
        }
    )


def made_short(flags: Flags, folder: Path) -> dict[str, Any]:
    """Trains one candidate for a tenth of the steps, in which its learning rate rises and falls as in all of them."""
    steps, warm_up = round(EARLY * flags["max_steps"]), max(1, round(EARLY * COMMON["warmup_steps"]))
    trainer, stopwatch = prepared(flags | {"max_steps": steps, "warmup_steps": warm_up}, folder)
    trainer.add_callback(StopwatchRestart(stopwatch))
    end = ended(trainer)
    return finite({**end, "seconds": stopwatch.seconds})


def scored(trainer: Trainer) -> dict[str, Any]:
    """Return the scores of a checkpoint before its training."""
    batches = draw_probe_set(trainer.get_train_dataloader(), ProbeSpec(SCORED, batch_size=64, seed=0)).batches
    loss_fn = trainer_loss(trainer)
    return score_checkpoint(trainer.model, batches, loss_fn=loss_fn, gradient_examples=GRADIENTS).to_dict()


def known_early(run: dict[str, Any], short: dict[str, Any]) -> dict[str, float | None]:
    """All that is known of one training by a tenth of its steps, and from a short one in place of those."""
    steps = len(run["losses"])
    losses = run["losses"][: round(EARLY * steps)]
    speed = fit_convergence(list(range(1, len(losses) + 1)), losses)
    scores = {name: held["value"] for name, held in run["scores"].items() if name in NAMES and held}
    known = {**scores, "half_life": speed["half_life"], **run["known"]}
    known |= {f"short_{name}": value for name, value in short["final"].items()}
    if None in losses:
        return known | {"early_loss": None, "loss_drop": None, "extrapolated": None}
    third = max(1, len(losses) // 3)
    late = float(np.median(losses[-third:]))
    slope, level = np.polyfit(np.log(np.arange(1, len(losses) + 1)), losses, 1)
    ahead = float(level + slope * math.log(steps))
    return known | {"early_loss": late, "loss_drop": float(np.median(losses[:third])) - late, "extrapolated": ahead}


def folder_of(steps: int) -> Path:
    """Where trainings of so many steps are kept."""
    return CACHE / "prediction" / f"{steps} steps"


def collected(steps: int) -> dict[str, Any]:
    """All candidates that were made with every seed, without their curves."""
    found: dict[str, Any] = {}
    for task in TASK_DATA:
        for folder in sorted((folder_of(steps) / task).glob("*")):
            files = [folder / f"seed {seed}" / name for name in ("run.json", "short.json") for seed in SEEDS]
            if all(file.exists() for file in files):
                held = [json.loads(file.read_bytes()) for file in files]
                found.setdefault(task, {})[folder.name] = over_seeds(held[: len(SEEDS)], held[len(SEEDS) :])
    return {"steps": steps, "look": round(EARLY * steps), "tasks": found}


def over_seeds(runs: list[dict[str, Any]], shorts: list[dict[str, Any]]) -> dict[str, Any]:
    """Average a candidate over its trainings; a value that is missing or not finite in one of them is missing."""
    final = {name: mean([run["final"][name] for run in runs]) for name in runs[0]["final"]}
    early = [known_early(run, short) for run, short in zip(runs, shorts, strict=True)]
    return {
        "final": {**final, "accuracy_by_seed": [run["final"]["accuracy"] for run in runs]},
        "known": {name: mean([known[name] for known in early if name in known]) for name in early[0]},
        "cost": {**cost(runs[0]), "short": shorts[0]["seconds"] / runs[0]["seconds"]["training"]},
        "notes": runs[0]["scores"]["notes"],
    }


def mean(values: list[float | None]) -> float | None:
    """Return the mean; `None` if a value is missing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def cost(run: dict[str, Any]) -> dict[str, float]:
    """Return the cost of each group of quantities, as a share of the training's time."""
    seconds, scores = run["seconds"], run["scores"]
    shares = {"early": EARLY * seconds["training"], **{name: seconds.get(name, 0.0) for name in SEEN}}
    shares |= {name: scores[name]["seconds"] if scores[name] else 0.0 for name in NAMES}
    return {name: share / seconds["training"] for name, share in shares.items()}


def main() -> None:
    """Train the missing candidates, and write all results so far."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(TASK_DATA), default=list(TASK_DATA))
    parser.add_argument("--steps", type=int, default=300, help="Of each training.")
    parser.add_argument("--text-checkpoint", default="paraphrase-MiniLM-L3-v2")
    parser.add_argument("--fashion-mnist", default=str(CACHE / "fashion-mnist"))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, task, seed, flags in in_turn(args):
        folder = folder_of(args.steps) / task / name / f"seed {seed}"
        seeded = {**flags, "seed": seed, "data_seed": seed}
        kept(folder / "run.json", partial(made, seeded, folder, whole=seed == SEEDS[0]))
        kept(folder / "short.json", partial(made_short, seeded, folder))
    results = collected(args.steps)
    write_atomically(RESULTS, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(RESULTS.with_suffix(".md"), page(results).encode())


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> None:
    """Train a candidate and save the result, unless that has been done."""
    if not file.exists():
        started = time.perf_counter()
        run = make()
        write_atomically(file, json.dumps(run, allow_nan=False).encode())
        print(f"{file.relative_to(CACHE)}: {run['final']}, {time.perf_counter() - started:.0f} s", flush=True)


def in_turn(args: argparse.Namespace) -> list[tuple[str, str, int, Flags]]:
    """Every candidate of every task, in random order, a task after the other: what is done first is a fair sample."""
    queues = []
    for task in args.only:
        shared = {**TASK_DATA[task](args), "max_steps": args.steps, "max_train_samples": 16 * args.steps}
        candidates = text_candidates(args.text_checkpoint) if task == "movie sentences" else vision_candidates()
        queue = [
            (name, task, seed, _given(shared | flags)) for name, flags in candidates.items() for seed in args.seeds
        ]
        random.Random(0).shuffle(queue)
        queues.append(queue)
    return [one for turn in zip(*queues, strict=True) for one in turn]


def _given(flags: Flags) -> Flags:
    return {flag: value for flag, value in flags.items() if value is not None}


if __name__ == "__main__":
    main()
