# SPDX-License-Identifier: Apache-2.0
"""Where plain SGD settles: batch sharpness and the largest eigenvalue of the full loss, relative to 2/η.

A small tanh network learns random labels of Gaussian inputs by heart, with SGD without momentum at a constant rate,
until its training loss has come to rest. Batch sharpness of 30 random batches and λ_max of the loss over all examples
are measured thirty times on the way; reported are means over the last third of the steps.

    python benchmarks/batch_sharpness.py [--only "squared error, 8"] [--redo]

adds each cell to `benchmarks/results/batch_sharpness.json`, and writes the table next to it again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.linalg.lanczos import lanczos
from hf_optimizability.objective.objective import Objective
from hf_optimizability.quantities.batch_sharpness import batch_sharpness


RESULTS = Path(__file__).parent / "results" / "batch_sharpness.json"
INPUTS, CLASSES, WIDTH = 32, 10, 32
BATCHES = 30
MEASUREMENTS = 30
REST = 0.01
"""Share of the first loss by which the loss may still fall in the last third."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        loss: `"squared error"`, half the squared distance to the one-hot label, or `"cross-entropy"`, with labels
            smoothed by 0.1, so that the loss has a minimum.
        batch: Examples in a batch.
        rate: The learning rate η.
        steps: Steps of SGD.
        examples: Examples in the training set.
    """

    loss: str
    batch: int
    rate: float
    steps: int
    examples: int

    @property
    def name(self) -> str:
        """Name of the cell."""
        return f"{self.loss}, {self.batch}"


CELLS = [
    Cell("squared error", 8, 0.5, 15_000, 256),
    Cell("squared error", 32, 0.4, 15_000, 256),
    Cell("squared error", 128, 0.8, 24_000, 512),
    Cell("cross-entropy", 8, 1.4, 15_000, 256),
    Cell("cross-entropy", 32, 1.6, 15_000, 256),
    Cell("cross-entropy", 128, 3.2, 15_000, 256),
]


@dataclass(frozen=True)
class Point:
    """One measurement, both numbers times η/2.

    Attributes:
        step: Steps taken.
        loss: Loss over all examples.
        batch_sharpness: Of 30 batches.
        low: Lower end of its 95 % interval.
        high: Upper end.
        lambda_max: Of the loss over all examples.
    """

    step: int
    loss: float
    batch_sharpness: float
    low: float
    high: float
    lambda_max: float


def train(cell: Cell) -> Iterator[Point]:
    """Train, and measure on the way."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(cell.examples, INPUTS), torch.randint(CLASSES, (cell.examples,))
    layers = [nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)]
    model = nn.Sequential(*layers)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if cell.loss == "cross-entropy":
            return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)
        targets = nn.functional.one_hot(batch[1], CLASSES).float()
        return (model(batch[0]) - targets).square().sum(1).mean() / 2

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(cell.examples, generator=generator)
            for rows in order[: cell.examples // cell.batch * cell.batch].split(cell.batch):
                yield inputs[rows], labels[rows]

    optimizer = torch.optim.SGD(model.parameters(), lr=cell.rate)
    training, drawn = batches(0), batches(1)
    whole = Objective(model, [(inputs, labels)], loss_fn=loss_fn)
    for step in range(cell.steps + 1):
        if step % (cell.steps // MEASUREMENTS) == 0:
            found = batch_sharpness(Objective(model, [next(drawn)], loss_fn=loss_fn) for _ in range(BATCHES)).sharpness
            top = lanczos(HessianOperator(whole), tolerance=0.01, max_hvps=60, seed=0).lambda_max.value
            scale = cell.rate / 2
            loss = float(loss_fn(model, (inputs, labels)).detach())
            yield Point(step, loss, found.value * scale, found.low * scale, found.high * scale, top * scale)
        optimizer.zero_grad()
        loss_fn(model, next(training)).backward()
        optimizer.step()


def row(cell: Cell, points: list[Point]) -> str:
    """Return a cell's row of the table."""
    last = [point for point in points if point.step > cell.steps * 2 / 3]
    before = next(point for point in points if point.step >= cell.steps * 2 / 3)
    falls = " (still falls)" if before.loss - last[-1].loss > REST * points[0].loss else ""
    each = [point.batch_sharpness for point in last]
    columns = [
        cell.loss,
        cell.batch,
        f"{cell.rate:g}",
        cell.examples,
        f"{cell.steps:,}",
        f"{points[0].loss:.2f} → {before.loss:.3g} → {last[-1].loss:.3g}{falls}",
        f"{sum(each) / len(each):.2f} ({min(each):.2f} to {max(each):.2f})",
        f"{sum(point.lambda_max for point in last) / len(last):.2f}",
    ]
    return f"| {' | '.join(map(str, columns))} |"


def markdown(results: dict[str, dict]) -> str:
    """Return the page."""
    rows = [
        row(cell, [Point(**point) for point in results[cell.name]["points"]]) for cell in CELLS if cell.name in results
    ]
    return "\n".join([PAGE, *rows, "", TRIED])


PAGE = """# Batch sharpness and 2/η

Written by `python benchmarks/batch_sharpness.py`, on one thread. A tanh network (32 – 32 – 32 – 10) learns random
labels of Gaussian inputs by heart, with SGD without momentum at a constant rate η. The loss is half the squared
distance to the one-hot label, or cross-entropy with labels smoothed by 0.1. Training loss: over all examples at the
start → after two thirds of the steps → at the end; it "still falls" where the last third takes more than 1 % of the
first loss.

Batch sharpness (30 batches) and λ_max of the loss over all examples are times η/2, so that 1 stands for 2/η: means
over the last third, with the range of the ten measurements in it.

| loss | batch | η | examples | steps | training loss | batch sharpness · η/2 | λ_max · η/2 |
|:--|--:|--:|--:|--:|:--|:--|--:|"""

TRIED = """Rates and numbers of examples were chosen in shorter trials of the same kind, so that training comes to the
edge and to rest in minutes. The trials are not repeated by this script; in them:

- At lower rates batch sharpness stayed below 2/η, as labels are learned before the curvature has grown that far. At
  η = 0.4, it came to 0.87 in the first cell and to 0.48 in the third (λ_max 0.85). With the true labels of 1,024
  digits (squared error, batch 32, η = 0.3) it came to 0.63, λ_max to 0.79.
- Where labels are wrong and not learned (half of those of 512 digits, squared error, batch 8 and 32, η ≤ 0.15), it
  came to 0.32 to 0.56, below λ_max at 0.42 to 0.84: most of the gradient is noise in flat directions.
- With inputs that are not centered (random labels of 256 digits, squared error, batch 32, η = 0.3) it came to 1.09,
  λ_max to 1.04: all examples have a steep direction in common, so that λ_max of a batch is hardly above that of all.
- With cross-entropy, at rest in the minimum of the smoothed loss (0.501), it came to 1.32 (0.95 to 1.65) at batch 32
  and η = 2, and to 1.28 (1.02 to 1.53; λ_max 0.93) at batch 128 and η = 4: gradients are nearly 0 there, and the ratio
  is unsteady. At batch 128 and η = 2, it rested at 0.11, before the edge; no rate tried brought it within 25 % of 2/η.
- With cross-entropy without smoothed labels (batch 8 and 32, η = 0.3) both came to 0.00 to 0.03: once the labels are
  learned, curvature goes to 0 with the loss.
"""


def main() -> None:
    """Train the cells that have no results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[cell.name for cell in CELLS], help="one cell")
    parser.add_argument("--redo", action="store_true", help="again, where there are results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for cell in CELLS:
        if args.only not in (None, cell.name) or (cell.name in results and not args.redo):
            continue
        started = time.perf_counter()
        points = [asdict(point) for point in train(cell)]
        results[cell.name] = {"seconds": round(time.perf_counter() - started), "points": points}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(markdown(results))
        print(row(cell, [Point(**point) for point in points]), flush=True)


if __name__ == "__main__":
    main()
