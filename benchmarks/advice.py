# SPDX-License-Identifier: Apache-2.0
"""Does the advice hold? What one measurement says about the learning rate and the batch size, against sweeps.

A case is a model, a data set and an optimizer. Short runs (warm-up, then linear decay to 0, gradients clipped at norm
1, as the Trainer has it) are made at learning rates a factor 2 apart until the best one is bracketed; what counts is
the loss on held-out examples, the geometric mean over seeds. Measured is what a report holds, at step 0 and after the
warm-up of a run at a sixteenth of the best rate and (small models) at the best and at four times it: a user who
needs advice does not know the best one. A learning-rate range test is compared too.

A factor per optimizer, from a measured quantity to the best rate, is fitted on some of the models and tested on the
others. The batch size advised, the gradient noise scale, is compared with the steps that runs at several batch sizes
(each at its best learning rate) take to the same loss.

    python benchmarks/advice.py [--text-checkpoint paraphrase-MiniLM-L3-v2] [--only NAME ...]

makes the cases that are not yet in `benchmarks/results/advice.json` and writes the table next to it again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from tables import table
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.optimization import Adafactor
from workloads import TEXT_DATA, vision

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer, measure
from hf_optimizability.files import write_atomically
from hf_optimizability.model_state.measuring import measuring
from hf_optimizability.objective.objective import Objective
from hf_optimizability.quantities.noise_scale import noise_scale


Columns = dict[str, Tensor]
OptimizerName = Literal["sgd", "momentum", "adamw", "adafactor"]

RESULTS = Path(__file__).parent / "results" / "advice.json"
OPTIMIZERS: dict[OptimizerName, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "momentum": lambda parameters, lr: SGD(parameters, lr=lr, momentum=0.9),
    "adamw": lambda parameters, lr: AdamW(parameters, lr=lr, weight_decay=0.0),
    # As the Trainer's `optim="adafactor"` makes it.
    "adafactor": lambda parameters, lr: Adafactor(parameters, lr=lr, scale_parameter=False, relative_step=False),
}
GOOD = 1.05
"""A rate is as good as the best if its loss is within this factor of the best loss."""
PROBES = 32
MAX_RATES = 16
CLIP = 1.0


@dataclass(frozen=True)
class Problem:
    """A model and its data, without an optimizer.

    Attributes:
        make: Makes the model as it is before training, from a seed.
        train: Columns of the training examples.
        held_out: Columns of those that the final loss is over.
        batch_size: Examples a step.
        steps: Optimizer steps of a run.
        seeds: Runs at each learning rate.
        starts: Where the sweep starts, for SGD and for the others; it widens by itself.
        optimizers: Which are tried.
        max_hvps: Most products of a measurement.
        fitted: Whether the factors are fitted on it; else they are tested on it.
    """

    make: Callable[[int], nn.Module]
    train: Columns
    held_out: Columns
    batch_size: int = 32
    steps: int = 120
    seeds: tuple[int, ...] = (0, 1)
    starts: tuple[float, float] = (0.128, 0.002)
    optimizers: tuple[OptimizerName, ...] = ("sgd", "momentum", "adamw", "adafactor")
    fitted: bool = False
    max_hvps: int = 32

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return self.steps // 8


class Perceptron(nn.Module):
    """Three layers with ReLU, with the interface of a Transformers model."""

    def __init__(self, inputs: int, labels: int, hidden: int = 64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.classifier = nn.Linear(hidden, labels)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Logits and mean cross-entropy."""
        logits = self.classifier(self.body(pixel_values))
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def vit(labels: int) -> nn.Module:
    """Build a ViT of two layers on 16 patches."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    images: dict[str, Any] = {"intermediate_size": 64, "image_size": 8, "patch_size": 2, "num_channels": 1}
    return ViTForImageClassification(ViTConfig(**sizes, **images, num_labels=labels))


def resnet(labels: int) -> nn.Module:
    """Build a ResNet of two stages, with BatchNorm."""
    sizes: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_channels=1, num_labels=labels))


def gpt2() -> nn.Module:
    """Build a GPT-2 of two layers over bytes."""
    sizes: dict[str, Any] = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, **sizes, bos_token_id=0, eos_token_id=0))


def mlp(labels: int) -> nn.Module:
    """Build a perceptron for the digits."""
    return Perceptron(64, labels)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model with a seed."""
    torch.manual_seed(seed)
    return make()


def digits(first: int, last: int, *, noise: float = 0.0) -> tuple[Columns, Columns]:
    """Two thirds of scikit-learn's digits between two, and the rest; labels wrong at random with a probability."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    kept = rng.permutation(np.flatnonzero((labels >= first) & (labels <= last)))
    pixels = torch.tensor(images[kept] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    targets = labels[kept] - first
    wrong = rng.random(len(targets)) < noise
    targets[wrong] = rng.integers(0, last - first + 1, wrong.sum())
    return split({"pixel_values": pixels, "labels": torch.tensor(targets)})


def cancer() -> tuple[Columns, Columns]:
    """scikit-learn's breast cancer data, standardized."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    return split({"pixel_values": torch.tensor(scaled[order]).float(), "labels": torch.tensor(labels[order])})


def sentences() -> list[str]:
    """Sentences of movie reviews with their labels as last character, mixed."""
    import pandas

    table = pandas.read_csv(TEXT_DATA / "train.csv.gz").sample(frac=1, random_state=0)
    return [f"{text}\t{label}" for text, label in zip(table["sentence"], table["label"], strict=True)]


def characters() -> tuple[Columns, Columns]:
    """Pieces of 32 bytes of the sentences."""
    text = " ".join(line.split("\t")[0] for line in sentences())[: 32 * 3000]
    tokens = torch.tensor(list(text.encode("ascii", "replace"))).view(-1, 32)
    return split({"input_ids": tokens, "labels": tokens})


def reviews(checkpoint: Path) -> tuple[Columns, Columns]:
    """Sentences of 24 tokens with their labels."""
    lines = [line.split("\t") for line in sentences()[:1200]]
    tokens = AutoTokenizer.from_pretrained(checkpoint)(
        [line[0] for line in lines], padding="max_length", truncation=True, max_length=24, return_tensors="pt"
    )
    return split({**tokens, "labels": torch.tensor([int(line[1]) for line in lines])}, share=5 / 6)


def split(columns: Columns, *, share: float = 2 / 3) -> tuple[Columns, Columns]:
    """Split off the first rows."""
    number = round(len(columns["labels"]) * share)
    return rows(columns, slice(number)), rows(columns, slice(number, None))


def rows(columns: Columns, index: Any) -> Columns:
    """Select rows of every column."""
    return {key: column[index] for key, column in columns.items()}


def transferred(make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """Train a model on the digits 0 to 4; return it with new heads, drawn with a seed, for the others."""
    columns, _ = digits(0, 4)
    problem = Problem(lambda seed: seeded(lambda: make(5), seed), columns, columns, steps=200)

    @cache
    def body() -> nn.Module:
        model = problem.make(0)
        for _ in training(model, AdamW(model.parameters(), lr=2e-3, weight_decay=0.0), problem, 2e-3, seed=0):
            pass
        return model

    def renewed(seed: int) -> nn.Module:
        model = copy.deepcopy(body())
        torch.manual_seed(seed)
        for layer in model.classifier.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        return model

    return renewed


def mobilenet() -> Problem:
    """Set up the carried MobileNetV2 on MNIST at 64 pixels."""
    torch.manual_seed(0)
    model, batches = vision(60)
    columns = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    train, held_out = split(columns, share=0.8)
    return Problem(
        lambda seed: copy.deepcopy(model), train, held_out, batch_size=16, steps=40, seeds=(0,), starts=(0.032, 0.001),
        optimizers=("adamw", "momentum"), max_hvps=16,
    )  # fmt: skip


def minilm(checkpoint: Path) -> Problem:
    """Set up a MiniLM of three layers on sentences of movie reviews."""

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2, dtype="float32")

    return Problem(
        make, *reviews(checkpoint), batch_size=16, steps=40, seeds=(0,), starts=(0.032, 0.00025),
        optimizers=("adamw", "momentum", "adafactor"), max_hvps=16,
    )  # fmt: skip


def problems(text_checkpoint: Path | None) -> dict[str, Callable[[], Problem]]:
    """All problems by name, cheap ones first."""
    return {
        "MLP, new digits": lambda: Problem(transferred(mlp), *digits(5, 9), fitted=True),
        "ViT, from scratch": lambda: Problem(lambda seed: seeded(lambda: vit(10), seed), *digits(0, 9), fitted=True),
        "GPT-2, from scratch": lambda: Problem(
            lambda seed: seeded(gpt2, seed), *characters(), batch_size=16, fitted=True
        ),
        "ViT, new digits": lambda: Problem(transferred(vit), *digits(5, 9)),
        "ResNet, new digits": lambda: Problem(transferred(resnet), *digits(5, 9)),
        "MLP, noisy labels": lambda: Problem(
            lambda seed: seeded(lambda: mlp(10), seed), *digits(0, 9, noise=0.3), batch_size=64
        ),
        "MLP, breast cancer": lambda: Problem(
            lambda seed: seeded(lambda: Perceptron(30, 2), seed), *cancer(), batch_size=16
        ),
        "MLP of 256, digits": lambda: Problem(
            lambda seed: seeded(lambda: Perceptron(64, 10, 256), seed), *digits(0, 9), fitted=True
        ),
        "MLP, half the labels": lambda: Problem(
            lambda seed: seeded(lambda: mlp(10), seed), *digits(0, 9, noise=0.5), batch_size=16, fitted=True
        ),
        **({} if text_checkpoint is None else {"MiniLM-L3, reviews": lambda: minilm(text_checkpoint)}),
        "MobileNetV2, MNIST": mobilenet,
    }


def training(
    model: nn.Module, optimizer: Optimizer, problem: Problem, rate: float, *, seed: int, constant: bool = False
) -> Iterator[float]:
    """Trains; gives the gradient norm after each step. Stops where the loss is not finite."""
    torch.manual_seed(seed)
    parameters = list(model.parameters())
    for step, batch in enumerate(drawn(problem, seed, problem.steps)):
        model.train()
        for group in optimizer.param_groups:
            warming, cooling = (step + 1) / problem.warmup, (problem.steps - step) / (problem.steps - problem.warmup)
            group["lr"] = rate * (min(1, (step + 1) / 10) if constant else min(warming, cooling))
        optimizer.zero_grad()
        loss = model(**batch).loss
        if not torch.isfinite(loss):
            return
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, CLIP))
        optimizer.step()
        yield norm


def drawn(problem: Problem, seed: int, steps: int) -> Iterator[Columns]:
    """Batches of a shuffle after the other."""
    generator = torch.Generator().manual_seed(seed)
    number = len(problem.train["labels"])
    order = torch.cat([
        torch.randperm(number, generator=generator) for _ in range(1 + steps * problem.batch_size // number)
    ])  # fmt: skip
    for step in range(steps):
        yield rows(problem.train, order[step * problem.batch_size :][: problem.batch_size])


@torch.no_grad()
def mean_loss(model: nn.Module, columns: Columns) -> float:
    """Mean loss over all rows, in eval mode."""
    model.eval()
    number = len(columns["labels"])
    parts = [rows(columns, slice(start, start + 64)) for start in range(0, number, 64)]
    return sum(float(model(**part).loss) * len(part["labels"]) for part in parts) / number


def final_loss(problem: Problem, optimizer: OptimizerName, rate: float, seed: int) -> tuple[float, float]:
    """Train; return the held-out loss, infinite for a run that broke off, and seconds per step."""
    model = problem.make(seed)
    started = time.perf_counter()
    made = OPTIMIZERS[optimizer](model.parameters(), lr=rate)
    steps = sum(1 for _ in training(model, made, problem, rate, seed=seed))
    seconds = (time.perf_counter() - started) / max(steps, 1)
    loss = mean_loss(model, problem.held_out) if steps == problem.steps else math.inf
    return (loss if math.isfinite(loss) else math.inf), seconds


def sweep(problem: Problem, optimizer: OptimizerName) -> dict[str, Any]:
    """Losses by rate: from the start outward by factors of 2, until both ends are worse than the best by 5 %."""
    start = problem.starts[0 if optimizer == "sgd" else 1] * (8 if optimizer == "momentum" else 1)
    losses: dict[int, float] = {}
    seconds: list[float] = []

    def run(power: int) -> None:
        results = [final_loss(problem, optimizer, start * 2.0**power, seed) for seed in problem.seeds]
        losses[power] = math.exp(sum(math.log(max(loss, 1e-12)) for loss, _ in results) / len(results))
        seconds.extend(second for _, second in results)

    for power in (0, -1, 1):
        run(power)
    while len(losses) < MAX_RATES:
        best, low, high = min(losses, key=losses.__getitem__), min(losses), max(losses)
        open_ends = [
            end + side
            for end, side in ((low, -1), (high, 1))
            if losses[end] <= GOOD * losses[best] or abs(end - best) < 2
        ]
        if not open_ends:
            break
        run(min(open_ends, key=abs))
    finite = {start * 2.0**power: losses[power] for power in sorted(losses)}
    return {
        "rates": list(finite),
        "losses": [loss if math.isfinite(loss) else None for loss in finite.values()],
        "step_seconds": float(np.median(seconds)),
    }


def probes(problem: Problem) -> list[Columns]:
    """Training examples to measure on, in batches of 8."""
    chosen = torch.randperm(len(problem.train["labels"]), generator=torch.Generator().manual_seed(7))[:PROBES]
    return [rows(problem.train, part) for part in chosen.split(8)]


def measured(problem: Problem, optimizer: OptimizerName, rate: float, *, steps: int) -> dict[str, Any]:
    """Return what a report says about the step size, after some steps of a run at a rate."""
    model = problem.make(0)
    made = OPTIMIZERS[optimizer](model.parameters(), lr=rate)
    norms = []
    if steps:
        for done, norm in enumerate(training(model, made, problem, rate, seed=0), 1):
            norms.append(norm)
            if done == steps:
                break
    found = measure(
        model, probes(problem), OptimizabilityConfig(profile="light", max_hvps=problem.max_hvps), optimizer=made
    )
    step, quadratic, noise = found.optimizer_stability, found.quadratic_model, found.noise_scale
    assert step is not None and quadratic is not None and noise is not None
    return {
        "rate": rate,
        "steps": steps,
        "sharpness": step.sharpness.value,
        "limit": step.limit * step.learning_rate / step.sharpness.value,
        "critical": step.critical.value,
        "best_step": quadratic.best_step,
        "grad_norm": found.grad_norm,
        "batch_grad_norm": float(np.median(norms)) if norms else None,
        "noise_scale": noise.value if math.isfinite(noise.value) else None,
        "items": found.num_items,
        "loss": found.loss,
        "lambda_max": found.hessian.lambda_max.value,
        "hvps": found.hvps,
        "seconds": found.seconds,
    }


def range_test(problem: Problem, optimizer: OptimizerName) -> dict[str, Any]:
    """Run the learning-rate range test of fastai, Lightning and torch-lr-finder, with their defaults.

    The rate grows from 1e-7 to 10 over 100 steps; the loss is smoothed (0.98, debiased), and the test stops where it
    is 4 times its least. Without the first ten and the last five values, suggested is the rate where the loss falls
    steepest (Lightning, torch-lr-finder), or the one halfway down the longest fall (fastai's `valley`).
    """
    model = problem.make(0)
    made = OPTIMIZERS[optimizer](model.parameters(), lr=1e-7)
    torch.manual_seed(0)
    model.train()
    rates, losses, average = [], [], 0.0
    for step, batch in enumerate(drawn(problem, 0, 100)):
        for group in made.param_groups:
            group["lr"] = 1e-7 * (10 / 1e-7) ** (step / 99)
        made.zero_grad()
        loss = model(**batch).loss
        average = 0.98 * average + 0.02 * loss.item()
        smooth = average / (1 - 0.98 ** (step + 1))
        if not math.isfinite(smooth) or smooth > 4 * min([*losses, smooth]):
            break
        rates.append(made.param_groups[0]["lr"])
        losses.append(smooth)
        loss.backward()
        made.step()
    kept, curve = rates[10:-5], np.array(losses[10:-5])
    return {
        "steepest": kept[int(np.argmin(np.gradient(curve)))],
        "valley": kept[valley(curve)],
        "steps": len(rates),
    }


def valley(losses: np.ndarray) -> int:
    """Fastai's `valley`: halfway into the longest strictly falling subsequence."""
    number = len(losses)
    longest = [1] * number
    best, end = 0, 0
    for i in range(1, number):
        for j in range(i):
            if losses[i] < losses[j] and longest[i] < longest[j] + 1:
                longest[i] = longest[j] + 1
            if longest[best] < longest[i]:
                best, end = i, longest[i]
    third = end / 3
    return max(0, min(number - 1, int(best - end) + int(third) + int(third / 2)))


def learning_rate_case(problem: Problem, optimizer: OptimizerName) -> dict[str, Any]:
    """Run the sweep, the measurements and the range test of one case."""
    swept = sweep(problem, optimizer)
    losses = [math.inf if loss is None else loss for loss in swept["losses"]]
    best = swept["rates"][int(np.argmin(losses))]
    users = [best / 16] if len(problem.seeds) == 1 else [best / 16, best, best * 4]
    return {
        "fitted": problem.fitted,
        "batch_size": problem.batch_size,
        "sweep": swept,
        "best": best,
        "measured": [
            measured(problem, optimizer, best, steps=0),
            *(measured(problem, optimizer, rate, steps=problem.warmup) for rate in users),
        ],
        "range_test": range_test(problem, optimizer),
    }


TIMES = (1 / 16, 1.0, 8.0)
"""Learning rates over the best one, at which a report's findings are looked at."""

IN_TRAINER: dict[OptimizerName, dict[str, str]] = {
    "sgd": {"optim": "sgd"},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "adamw": {"optim": "adamw_torch"},
    "adafactor": {"optim": "adafactor"},
}


def findings_case(problem: Problem, optimizer: OptimizerName, best: float) -> dict[str, list[str]]:
    """Return the findings of a Trainer's run, by learning rate over the best."""
    examples = [rows(problem.train, index) for index in range(len(problem.train["labels"]))]
    found = {}
    for times in TIMES:
        with TemporaryDirectory() as folder, patch("hf_optimizability.report.figures.plot_all", return_value={}):
            config = OptimizabilityConfig(
                "light", "steps", measure_steps=40, max_hvps=16, probe_examples=PROBES, probe_batch_size=8
            )
            arguments = TrainingArguments(
                output_dir=folder, use_cpu=True, max_steps=problem.steps, warmup_steps=problem.warmup,
                per_device_train_batch_size=problem.batch_size, learning_rate=best * times, logging_steps=4,
                save_strategy="no", disable_tqdm=True, report_to="none", **IN_TRAINER[optimizer],
            )  # fmt: skip
            trainer = OptimizabilityTrainer(
                problem.make(0), arguments, train_dataset=examples, optimizability=config, callbacks=[]
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            found[f"{times:g}"] = [finding.name for finding in trainer.optimizability_report().findings]
    return found


def batch_size_case(problem: Problem, optimizer: OptimizerName) -> dict[str, Any]:
    """Measure steps to a loss by batch size, each at its best rate, and the noise scale during training.

    The loss to reach is the best that 60 steps of the middle batch size give. Every batch size is tried at 6 rates a
    factor 2 apart, at a constant rate after 10 steps of warm-up. S = S_min(1 + B_crit/B) is fitted to the steps, in
    logarithms (McCandlish et al., arXiv 1812.06162); B_crit is what the noise scale forecasts.
    """
    start = problem.starts[0 if optimizer == "sgd" else 1]
    rates = [start * 2.0**power for power in range(-1, 5)]
    middle = [(min(curve(problem, optimizer, rate, 64, steps=60)), rate) for rate in rates]
    target, best_rate = min(middle)
    steps: dict[int, int | None] = {}
    for size in BATCH_SIZES:
        steps[size] = None
        for rate in rates:
            most = steps[size] or MAX_STEPS
            losses = curve(problem, optimizer, rate, size, steps=most, until=target)
            if losses[-1] <= target:
                steps[size] = EVERY * len(losses)
    reached = {size: number for size, number in steps.items() if number is not None}
    scales = noise_on_the_way(problem, optimizer, best_rate, steps[64] or 60)
    return {"target": target, "steps": steps, "critical": critical_batch_size(reached), "noise_scales": scales}


BATCH_SIZES = (4, 16, 64, 256)
MAX_STEPS = 1000
EVERY = 3
"""Steps between two looks at the loss."""


def curve(
    problem: Problem, optimizer: OptimizerName, rate: float, size: int, *, steps: int, until: float = -math.inf
) -> list[float]:
    """Compute the loss over all training examples every few steps of a run, until it is low enough."""
    resized = dataclasses.replace(problem, batch_size=size, steps=steps)
    model = problem.make(0)
    made = OPTIMIZERS[optimizer](model.parameters(), lr=rate)
    losses = [math.inf]
    for step, _ in enumerate(training(model, made, resized, rate, seed=0, constant=True), 1):
        if step % EVERY == 0:
            losses.append(mean_loss(model, problem.train))
            if not losses[-1] > until or math.isnan(losses[-1]):
                break
    return losses[1:] or losses


def noise_on_the_way(problem: Problem, optimizer: OptimizerName, rate: float, steps: int) -> list[float | None]:
    """Measure the noise scale on 256 examples in batches of 8, at four points of a run at batch size 64."""
    resized = dataclasses.replace(problem, batch_size=64, steps=steps)
    model = problem.make(0)
    made = OPTIMIZERS[optimizer](model.parameters(), lr=rate)
    chosen = torch.randperm(len(problem.train["labels"]), generator=torch.Generator().manual_seed(7))[:256]
    batches = [rows(problem.train, part) for part in chosen.split(8)]
    scales: list[float | None] = []
    for step, _ in enumerate(training(model, made, resized, rate, seed=0, constant=True), 1):
        if step % max(1, steps // 4) == 0:
            with measuring(model, seed=0):
                value = noise_scale(Objective(model, batches)).noise_scale.value
            scales.append(value if math.isfinite(value) else None)
    return scales


def critical_batch_size(steps: dict[int, int]) -> float | None:
    """B_crit of S_min(1 + B_crit/B), by least squares in logarithms; `None` from fewer than three batch sizes."""
    if len(steps) < 3:
        return None
    sizes, spent = (np.array(list(values), dtype=float) for values in (steps, steps.values()))
    grid = np.geomspace(0.1, 1e5, 601)
    excess = np.log(spent) - np.log1p(grid[:, None] / sizes)
    return float(grid[np.argmin(excess.var(axis=1))])


@dataclass(frozen=True)
class Rule:
    """Where to take the learning rate from.

    Attributes:
        basis: Name of a measured quantity.
        when: `0`: before the first step; else after the warm-up of a run at a sixteenth of the best rate.
    """

    basis: Literal["limit", "critical", "best_step", "none"]
    when: Literal["before", "warmed up"]

    def value(self, case: dict[str, Any]) -> float | None:
        """Return the quantity; 1 for a rule without one, which is the same rate for all."""
        if self.basis == "none":
            return 1.0
        value = case["measured"][0 if self.when == "before" else 1][self.basis]
        return None if value is None else float(value)


RULES = (
    Rule("limit", "before"),
    Rule("limit", "warmed up"),
    Rule("critical", "before"),
    Rule("critical", "warmed up"),
    Rule("best_step", "before"),
    Rule("best_step", "warmed up"),
    Rule("none", "before"),
)
WITHIN: dict[OptimizerName, float] = {"adamw": 2.0, "sgd": 3.0, "momentum": 3.0, "adafactor": 3.0}
LEARNT = 0.97
"""Best loss over the starting loss below which a case has learnt something, and has a best rate to speak of."""


def good_rates(case: dict[str, Any]) -> list[float]:
    """Rates whose loss is within 5 % of the best."""
    rates, losses = _sweep(case)
    return [rate for rate, loss in zip(rates, losses, strict=True) if loss <= GOOD * min(losses)]


def of(results: dict[str, Any], optimizer: OptimizerName, *, fitted: bool | None = None) -> dict[str, dict[str, Any]]:
    """Return the cases in which an optimizer reduced the loss, by name of the problem."""
    return {
        name.split(";")[0]: case
        for name, case in results["learning_rate"].items()
        if name.endswith(f"; {optimizer}")
        and fitted in (None, case["fitted"])
        and min(loss for loss in case["sweep"]["losses"] if loss is not None) < LEARNT * case["measured"][0]["loss"]
    }


def factor(rule: Rule, cases: dict[str, dict[str, Any]]) -> float | None:
    """Geometric mean of the best rate over the quantity."""
    ratios = [math.log(case["best"] / value) for case in cases.values() if (value := rule.value(case))]
    return math.exp(sum(ratios) / len(ratios)) if ratios else None


def off(rate: float | None, goal: float | list[float]) -> float:
    """Return the factor between a rate and another, or the nearest of several."""
    if rate is None:
        return math.inf
    goals = goal if isinstance(goal, list) else [goal]
    return math.exp(min(abs(math.log(rate / other)) for other in goals))


def to_markdown(results: dict[str, Any]) -> str:
    """All tables."""
    return "\n".join(
        [HEAD, *_rules(results), *_limits(results), *_findings(results), *_cases(results), *_batch_sizes(results)]
    )


HEAD = """# Does the advice hold?

Made by `benchmarks/advice.py`; its first lines say how. Best: the rate of the least held-out loss among rates a factor
2 apart. Good: rates whose loss is within 5 % of that. Fitted factors are geometric means over the problems marked
*fit*; hits are counted on the others.
"""


def _rules(results: dict[str, Any]) -> Iterator[str]:
    """Each rule's hits on the cases that it was not fitted on."""
    yield "## Learning rate: one measured quantity times one factor\n"
    yield (
        "A hit is a best rate within a factor 2 (AdamW) or 3 (others) of the rule's; in brackets, with the nearest "
        "good rate in place of the best. One rate for all: no measurement. Range tests are taken as they are; a dash: "
        "no factor could be fitted.\n"
    )
    lines = []
    for optimizer, within in WITHIN.items():
        fit, test = of(results, optimizer, fitted=True), of(results, optimizer, fitted=False)
        for rule in RULES:
            known = factor(rule, fit)
            name = "one rate for all" if rule.basis == "none" else f"{rule.basis}, {rule.when}"
            rates = {
                problem: None if known is None or value is None else known * value
                for problem, case in test.items()
                for value in [rule.value(case)]
            }
            lines.append([optimizer, name, "–" if known is None else f"{known:.2g}", *_hits(rates, test, within)])
        for kind in ("steepest", "valley"):
            rates = {problem: case["range_test"][kind] for problem, case in test.items()}
            lines.append([optimizer, f"range test, {kind}", "1", *_hits(rates, test, within)])
    yield from table(["optimizer", "rule", "factor", "hits", "median factor off", "worst"], lines)


def _hits(rates: dict[str, float | None], cases: dict[str, dict[str, Any]], within: float) -> list[str]:
    if not cases:
        return ["–"] * 3
    strict = [off(rates[problem], case["best"]) for problem, case in cases.items()]
    lenient = [off(rates[problem], good_rates(case)) for problem, case in cases.items()]
    hits = [sum(value <= within * 1.001 for value in values) for values in (strict, lenient)]
    return [f"{hits[0]} ({hits[1]}) of {len(cases)}", f"{np.median(strict):.2g}", f"{max(strict):.2g}"]


STABLE_SHARES = (0.1, 0.9)


def spans(results: dict[str, Any], optimizer: OptimizerName, *, fitted: bool) -> list[tuple[float, float]]:
    """Lowest and highest good rate over the limit, for every case and every measurement but that before the start."""
    return [
        (min(good_rates(case)) / found["limit"], max(good_rates(case)) / found["limit"])
        for case in of(results, optimizer, fitted=fitted).values()
        for found in case["measured"][1:]
    ]


def _limits(results: dict[str, Any]) -> Iterator[str]:
    """Compare good rates with the textbook limit."""
    yield "\n## Good rates relative to the textbook limit, measured after the warm-up of a run at whatever rate\n"
    lines = []
    for optimizer in WITHIN:
        for fitted in (True, False):
            found = spans(results, optimizer, fitted=fitted)
            if found:
                low, high = zip(*found, strict=True)
                lines.append([optimizer, "fit" if fitted else "test", str(len(found)), _span(low), _span(high)])
    yield from table(
        ["optimizer", "cases", "measurements", "lowest good rate / limit", "highest good rate / limit"], lines
    )


def _span(values: tuple[float, ...]) -> str:
    return f"{np.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def _findings(results: dict[str, Any]) -> Iterator[str]:
    """Yield what the reports said at rates that are known to be too low, right and too high."""
    yield "\n## What a report finds about the learning rate, at rates known to be too low, best and too high\n"
    yield "In brackets: the loss of the sweep at that rate over the best. A dash: nothing."
    yield (
        "`learning_rate_near_limit` distinguished 8 × the best rate from the best one no better than a coin does: it "
        "was dropped, and is listed here as the reason.\n"
    )
    lines = []
    for name, found in results["findings"].items():
        case = results["learning_rate"][name]
        swept = {f"{rate / case['best']:g}": loss for rate, loss in zip(*_sweep(case), strict=True)}
        cells = []
        for times, names in found.items():
            told = [name for name in names if name.startswith(("learning_rate", "training_unstable"))]
            loss = swept.get(times, math.nan)
            cells.append(f"{', '.join(told) or '–'}{_relative(loss / swept['1'])}")
        lines.append([*name.split("; "), *cells])
    yield from table(["problem", "optimizer", *(f"{times:g} × best" for times in TIMES)], lines)


def _relative(loss: float) -> str:
    return "" if math.isnan(loss) else f" ({loss:.2g})"


def _sweep(case: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Rates, and losses with those that broke off as infinite."""
    return case["sweep"]["rates"], [math.inf if loss is None else loss for loss in case["sweep"]["losses"]]


def _cases(results: dict[str, Any]) -> Iterator[str]:
    """All cases."""
    yield "\n## All cases\n"
    lines = []
    for name, case in results["learning_rate"].items():
        problem, optimizer = name.split("; ")
        known = problem in of(results, optimizer)  # type: ignore[arg-type]
        good = good_rates(case)
        before, warm = case["measured"][:2]
        price = case["sweep"]["step_seconds"]
        lines.append([
            problem + (" (fit)" if case["fitted"] else ""), optimizer,
            f"{case['best']:.2g} ({good[0]:.2g} to {good[-1]:.2g})" if known else "learnt nothing",
            *(f"{found[key]:.2g}" for key in ("limit", "critical") for found in (before, warm)),
            f"{warm['seconds'] / price:.0f}",
            *(f"{case['range_test'][key]:.2g}" for key in ("steepest", "valley")),
            f"{case['range_test']['steps']}",
        ])  # fmt: skip
    yield from table(
        [
            "problem", "optimizer", "best rate (good ones)", "limit, before", "warmed up", "critical, before",
            "warmed up", "price, steps", "range test, steepest", "valley", "price, steps",
        ],
        lines,
    )  # fmt: skip


def _batch_sizes(results: dict[str, Any]) -> Iterator[str]:
    """Noise scale against critical batch size."""
    yield "\n## Batch size: the gradient noise scale against the steps to a loss\n"
    yield (
        "B_crit: fitted to the steps. Noise scale: at four points on the way; a dash: not distinguished from "
        "infinite.\n"
    )
    lines = []
    for name, case in results["batch_size"].items():
        scales = [scale for scale in case["noise_scales"] if scale is not None]
        middle = math.exp(sum(map(math.log, scales)) / len(scales)) if scales else None
        critical = case["critical"]
        lines.append([
            *name.split("; "),
            ", ".join(f"{size}: {steps or 'not reached'}" for size, steps in case["steps"].items()),
            "–" if critical is None else f"{critical:.3g}",
            ", ".join("–" if scale is None else f"{scale:.3g}" for scale in case["noise_scales"]),
            "–" if middle is None or critical is None else f"{middle / critical:.2g}",
        ])  # fmt: skip
    yield from table(["problem", "optimizer", "steps by batch size", "B_crit", "noise scale", "mean / B_crit"], lines)


def timed(case: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a case and print its duration."""
    started = time.perf_counter()
    made = make()
    print(f"{case}: {time.perf_counter() - started:.0f} s", flush=True)
    return made


def save(results: dict[str, Any]) -> None:
    """Write the results as JSON, and the tables next to them."""
    write_atomically(RESULTS, json.dumps(results, indent=1, allow_nan=False).encode())
    write_atomically(RESULTS.with_suffix(".md"), to_markdown(results).encode())


FINDINGS_CASES: tuple[tuple[str, OptimizerName], ...] = tuple(
    (name, optimizer)
    for name in ("MLP, new digits", "MLP, noisy labels", "MLP, breast cancer", "ViT, new digits")
    for optimizer in OPTIMIZERS
)
BATCH_SIZE_CASES: tuple[tuple[str, OptimizerName], ...] = (
    ("MLP, noisy labels", "adamw"),
    ("MLP, noisy labels", "sgd"),
    ("MLP, new digits", "adamw"),
    ("MLP of 256, digits", "sgd"),
    ("MLP, breast cancer", "adamw"),
    ("MLP, half the labels", "adamw"),
    ("ViT, new digits", "adamw"),
)


def main() -> None:
    """Run the missing cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text-checkpoint", type=Path, help="folder of paraphrase-MiniLM-L3-v2")
    parser.add_argument("--only", nargs="*", help="names of problems")
    parser.add_argument("--optimizer", nargs="*", choices=OPTIMIZERS, help="optimizers to try")
    arguments = parser.parse_args()
    results = (
        json.loads(RESULTS.read_text())
        if RESULTS.exists()
        else {"learning_rate": {}, "findings": {}, "batch_size": {}}
    )
    makers = problems(arguments.text_checkpoint)
    for name, make in makers.items():
        if arguments.only and name not in arguments.only:
            continue
        problem = make()
        for optimizer in problem.optimizers:
            case = f"{name}; {optimizer}"
            if case in results["learning_rate"] or (arguments.optimizer and optimizer not in arguments.optimizer):
                continue
            results["learning_rate"][case] = timed(case, partial(learning_rate_case, problem, optimizer))
            save(results)
    for name, optimizer in FINDINGS_CASES:
        case = f"{name}; {optimizer}"
        if case not in results["findings"] and not arguments.only:
            best = results["learning_rate"][case]["best"]
            results["findings"][case] = timed(case, partial(findings_case, makers[name](), optimizer, best))
            save(results)
    for name, optimizer in BATCH_SIZE_CASES:
        case = f"{name}; {optimizer}"
        if case not in results["batch_size"] and not arguments.only:
            results["batch_size"][case] = timed(case, partial(batch_size_case, makers[name](), optimizer))
            save(results)
    save(results)


if __name__ == "__main__":
    main()
