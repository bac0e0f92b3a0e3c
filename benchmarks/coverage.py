# SPDX-License-Identifier: Apache-2.0
"""How often intervals hold the value of the loss over the whole training set.

    python benchmarks/coverage.py                        # all draws that the results lack
    python benchmarks/coverage.py --only perceptron --draws 10  # some
    python benchmarks/coverage.py --table                # the table alone

In each situation the truth is measured once, on all examples, to tolerances below the widths of the intervals. Then
each draw measures with a seed of its own for pool, sample, starts and probes. Results are added one by one to
`benchmarks/results/coverage.json`, so that the recording can be stopped at any time and resumed. The table is
`benchmarks/results/coverage.md`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, ViTConfig, ViTForImageClassification
from workloads import TEXT_CHECKPOINT, Batch, text_rows, vision

from hf_optimizability import Measurement, OptimizabilityConfig, measure
from hf_optimizability.linalg.estimate import Estimate


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
TABLE = RESULTS.with_suffix(".md")
SHARED_TEXT_CHECKPOINT = "paraphrase-MiniLM-L3-v2"

DRAWS = 40
BATCH_SIZE = 16
TRUTH = OptimizabilityConfig(
    max_hvps=100, eigen_tolerance=1e-3, trace_tolerance=0.02, probe_examples=64, probe_batch_size=64
)

QUANTITIES: dict[str, Callable[[Measurement], Estimate | None]] = {
    "loss": lambda found: found.population and found.population.loss,
    "grad_norm": lambda found: found.population and found.population.grad_norm,
    "trace": lambda found: found.hessian.trace,
    "lambda_max": lambda found: found.hessian.lambda_max,
    "lambda_min": lambda found: found.hessian.lambda_min,
}


@dataclass(frozen=True)
class Situation:
    """A model at some point of its training, with the whole training set.

    Attributes:
        make: Return the model and the examples, by seed 0.
        steps: Steps of AdamW before it is measured.
        learning_rate: Of these.
        pool_examples: Examples that the draws look at.
    """

    make: Callable[[], tuple[nn.Module, Batch]]
    steps: int
    learning_rate: float
    pool_examples: int = 2560


def digits() -> tuple[nn.Module, Batch]:
    """MobileNetV2 with a new head on 1,024 digits at 32 px."""
    model, batches = vision(64, pixels=32)
    return model, _joined(batches)


def sentences(checkpoint: Path) -> tuple[nn.Module, Batch]:
    """MiniLM-L3 with a new head on 480 sentences of 24 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TEXT_CHECKPOINT)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2, dtype="float32")
    rows = text_rows(30)
    columns = tokenizer(rows["sentence"], padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    return model, {**columns, "labels": torch.tensor(rows["label"])}


def small_vit() -> tuple[nn.Module, Batch]:
    """Return a small ViT with random weights, and 1,024 digits at 32 px."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config), digits()[1]


class Perceptron(nn.Module):
    """Two hidden layers of tanh, with the loss of a Transformers model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean cross-entropy."""
        return {"loss": nn.functional.cross_entropy(self.layers(pixels), labels)}


def overfitted() -> tuple[nn.Module, Batch]:
    """Return a perceptron, and 600 small digits that it soon knows by heart."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return Perceptron(), {
        "pixels": torch.tensor(pixels[:600], dtype=torch.float32) / 16,
        "labels": torch.tensor(labels[:600]),
    }


def situations(checkpoint: Path) -> dict[str, Situation]:
    """Return all situations by name."""
    return {
        "perceptron, 400 steps": Situation(overfitted, 400, 3e-3),
        "ViT from scratch, 60 steps": Situation(small_vit, 60, 1e-3),
        **{f"MobileNetV2, {steps} steps": Situation(digits, steps, 1e-3) for steps in (0, 40, 80)},
        **{f"MiniLM-L3, {steps} steps": Situation(lambda: sentences(checkpoint), steps, 5e-5) for steps in (0, 60)},
        "MiniLM-L3, 60 steps, pool of 120": Situation(lambda: sentences(checkpoint), 60, 5e-5, 120),
    }


def _joined(batches: list[Batch]) -> Batch:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def _cut(columns: Batch, size: int) -> list[Batch]:
    number = len(columns["labels"])
    return [{key: column[i : i + size] for key, column in columns.items()} for i in range(0, number, size)]


def trained(situation: Situation) -> tuple[nn.Module, Batch]:
    """Return the model after its steps, and all examples."""
    torch.manual_seed(0)
    model, columns = situation.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=situation.learning_rate)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(situation.steps):
        chosen = torch.randint(len(columns["labels"]), (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        model(**{key: column[chosen] for key, column in columns.items()})["loss"].backward()
        optimizer.step()
    return model.eval(), columns


def truth(model: nn.Module, columns: Batch) -> dict[str, Any]:
    """Return what a measurement of all examples finds."""
    started = time.perf_counter()
    found = measure(model, _cut(columns, TRUTH.probe_batch_size), TRUTH)
    hessian = found.hessian
    assert hessian.lambda_min is not None
    values = {
        "loss": (found.loss, 0.0),
        "grad_norm": (found.grad_norm, 0.0),
        "trace": (hessian.trace.value, hessian.trace.error),
        "lambda_max": (hessian.lambda_max.value, hessian.lambda_max.error),
        "lambda_min": (hessian.lambda_min.value, hessian.lambda_min.error),
    }
    blocks = {
        name: (block.trace.value, block.trace.error) for name, block in found.blocks.items() if block.trace is not None
    }
    return {"values": values, "blocks": blocks, "hvps": found.hvps, "seconds": time.perf_counter() - started}


def draw(model: nn.Module, columns: Batch, pool_examples: int, seed: int) -> dict[str, Any]:
    """Return the intervals of one draw."""
    rows = [{key: column[i] for key, column in columns.items()} for i in range(len(columns["labels"]))]
    started = time.perf_counter()
    config = OptimizabilityConfig(probe_seed=seed, pool_examples=pool_examples)
    found = measure(model, dataset=DataLoader(rows, batch_size=BATCH_SIZE), config=config)
    seconds = time.perf_counter() - started
    numbers = {name: get(found) for name, get in QUANTITIES.items()}
    blocks = {name: block.trace for name, block in found.blocks.items() if block.trace is not None}
    return {
        "values": {name: _ends(estimate) for name, estimate in numbers.items() if estimate is not None},
        "blocks": {name: _ends(estimate) for name, estimate in blocks.items()},
        "hvps": found.hvps,
        "seconds": seconds,
    }


def _ends(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def record(name: str, situation: Situation, draws: int) -> None:
    """Add what the results lack of one situation."""
    results = _load()
    entry = results.setdefault(name, {"truth": None, "draws": {}})
    lacking = [seed for seed in range(draws) if str(seed) not in entry["draws"]]
    if entry["truth"] is not None and not lacking:
        return
    model, columns = trained(situation)
    if entry["truth"] is None:
        entry["truth"] = truth(model, columns)
        _save(results)
    for seed in lacking:
        entry["draws"][str(seed)] = draw(model, columns, situation.pool_examples, seed)
        _save(results)
        print(
            name, seed, {key: [f"{x:.4g}" for x in ends] for key, ends in entry["draws"][str(seed)]["values"].items()}
        )


def _load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def _save(results: Mapping[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1))
    TABLE.write_text(table(results))


def _holds(ends: list[float], true: list[float]) -> bool:
    """Return whether an interval holds the truth, which is itself known to an error."""
    return ends[1] - true[1] <= true[0] <= ends[2] + true[1]


def table(results: Mapping[str, Any]) -> str:
    """Return the table in Markdown."""
    lines = [
        "# How often intervals hold",
        "",
        "Of 95 % intervals for the loss over the whole training set: how many hold its value; the median error of the "
        "printed number; the median of upper over lower end, where both have one sign. Block traces: the share of "
        "blocks whose interval holds, averaged over draws. Profile `standard`.",
        "",
        "| situation | quantity | truth | draws | hold | median error | upper/lower |",
        "|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for name, entry in results.items():
        draws = list(entry["draws"].values())
        if not draws:
            continue
        for quantity, true in entry["truth"]["values"].items():
            found = [one["values"][quantity] for one in draws]
            held = sum(_holds(ends, true) for ends in found)
            error = median(abs(ends[0] - true[0]) for ends in found) / (abs(true[0]) or 1.0)
            ratios = [ends[2] / ends[1] for ends in found if ends[1] > 0]
            ratio = f"{median(ratios):.2f}" if len(ratios) > len(found) / 2 else "–"
            lines.append(f"| {name} | {quantity} | {true[0]:.4g} | {len(found)} | {held} | {error:.1%} | {ratio} |")
        shares = [
            sum(_holds(ends, entry["truth"]["blocks"][block]) for block, ends in one["blocks"].items())
            / len(one["blocks"])
            for one in draws
        ]
        lines.append(f"| {name} | block traces | – | {len(draws)} | {sum(shares):.1f} | – | – |")
    return "\n".join([*lines, "", "Made by `benchmarks/coverage.py`.", ""])


def main() -> None:
    """Record what is lacking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the situations to record")
    parser.add_argument("--draws", type=int, default=DRAWS, help="draws in each situation")
    parser.add_argument("--text-checkpoint", type=Path, default=Path(SHARED_TEXT_CHECKPOINT), help="MiniLM-L3")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    args = parser.parse_args()
    if args.table:
        TABLE.write_text(table(_load()))
        return
    for name, situation in situations(args.text_checkpoint).items():
        if args.only in name:
            record(name, situation, args.draws)


if __name__ == "__main__":
    main()
