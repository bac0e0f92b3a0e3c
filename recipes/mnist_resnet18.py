# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-optimizability[vision]"]
# ///
r"""ResNet-18 on MNIST by SGD with momentum, measured after each epoch; then small blocks' Hessians in full.

The version of a few minutes takes a thousand digits that come with this project, and random weights; the real one
fine-tunes the checkpoint of the Hub on the whole of MNIST, for 10 epochs:

    python recipes/mnist_resnet18.py recipes/demo/mnist_resnet18.json

    python recipes/mnist_resnet18.py recipes/demo/mnist_resnet18.json --model_name_or_path microsoft/resnet-18 \
        --random_weights False --dataset_name ylecun/mnist --max_train_samples 60000 --max_eval_samples 10000

The Hessian of all 11 million parameters has 10¹⁴ entries, half a petabyte: it is known by its products alone. The
classifier's own block, of 5130 parameters, fits into memory. So does that of the first BatchNorm. Of each block with
at most `--exact_parameters` parameters the whole matrix is made after training, with all its eigenvalues, and compared
with what is estimated from a few products with it, on the same examples: a table, `exact.json` and `exact.png` in the
report's folder.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import TrainingArguments

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.files import write_atomically
from hf_optimizability.linalg.density import Density, density
from hf_optimizability.linalg.estimate import Estimate
from hf_optimizability.linalg.lanczos import lanczos
from hf_optimizability.linalg.trace import hutchinson
from hf_optimizability.model_state.measuring import measuring
from hf_optimizability.objective.objective import Objective
from hf_optimizability.objective.parameter_blocks import block_indices
from hf_optimizability.objective.probe_set import ProbeSpec, draw_probe_set
from hf_optimizability.report.figures import BLUE, VERMILLION
from hf_optimizability.tasks import image_classification
from hf_optimizability.tasks.fine_tuning import fine_tune, load, parse_flags


@dataclass
class ExactArguments:
    """Which Hessians to make in full."""

    exact_parameters: int = field(
        default=6000,
        metadata={"help": "Most parameters of a block whose Hessian is made in full; it takes the square of that."},
    )


@dataclass(frozen=True)
class Row:
    """A quantity of a block's Hessian, estimated and exact."""

    block: str
    quantity: str
    estimate: float
    low: float
    high: float
    hvps: int
    exact: float


def exact_eigenvalues(operator: HessianOperator) -> np.ndarray:
    """Return all eigenvalues of a small operator, ascending, from one product per row."""
    matrix = operator.matmat(torch.eye(operator.size, dtype=operator.dtype, device=operator.device)).double().cpu()
    return np.linalg.eigvalsh(((matrix + matrix.T) / 2).numpy())


def estimates(operator: HessianOperator, seed: int) -> tuple[dict[str, Estimate], Density]:
    """Estimate the same quantities from a few products with the operator."""
    budget: dict[str, Any] = {"max_hvps": 60, "seed": seed}
    run = lanczos(operator, tolerance=0.01, starts=2, **budget)
    spread = density(run.nodes, run.weights, run.residuals, size=operator.size, hvps=run.hvps, tolerance=0.1)
    found = {
        "trace": hutchinson(operator, [[slice(0, operator.size)]], tolerance=0.05, **budget).total,
        "λ_max": run.lambda_max,
        "λ_min": run.lambda_min,
        "‖H‖_F": spread.frobenius_norm,
        "effective rank": spread.effective_rank,
        "negative share": spread.negative_mass,
    }
    return found, spread


def exact_values(eigenvalues: np.ndarray) -> dict[str, float]:
    """Compute the quantities from all eigenvalues; what is 0 to the rounding of float32 is not negative."""
    total, square = float(eigenvalues.sum()), float(np.square(eigenvalues).sum())
    rounding = len(eigenvalues) * np.finfo(np.float32).eps * np.abs(eigenvalues).max()
    return {
        "trace": total,
        "λ_max": float(eigenvalues[-1]),
        "λ_min": float(eigenvalues[0]),
        "‖H‖_F": square**0.5,
        "effective rank": total**2 / square,
        "negative share": float((eigenvalues < -rounding).mean()),
    }


def plot(spectra: dict[str, tuple[np.ndarray, Density]]) -> Figure:
    """Plot eigenvalues by rank: all of them, and the nodes that represent them in the quadrature."""
    figure = Figure(figsize=(4.5 * len(spectra), 3.2), layout="constrained", dpi=100)
    panels = figure.subplots(1, len(spectra), squeeze=False)[0]
    for axes, (block, (eigenvalues, spread)) in zip(panels, spectra.items(), strict=True):
        size, weights = len(eigenvalues), np.array(spread.weights[::-1])
        group = np.maximum(size * (np.cumsum(weights) - weights / 2), 1)
        least = 1e-4 * np.abs(eigenvalues).max()
        axes.plot(np.arange(1, size + 1), eigenvalues[::-1], color=BLUE, label="exact")
        axes.plot(group, spread.nodes[::-1], "o", color=VERMILLION, ms=4, mfc="none", label="from a few products")
        axes.set(xscale="log", xlabel="rank of the eigenvalue", ylabel="eigenvalue", title=f"{block}: {size} × {size}")
        axes.set_yscale("symlog", linthresh=least)
        axes.set_ylim(bottom=min(1.1 * eigenvalues[0], -least / 2))
        axes.legend(frameon=False)
    return figure


def compare_blocks(
    trainer: OptimizabilityTrainer, config: OptimizabilityConfig, most: int
) -> tuple[list[Row], dict[str, tuple[np.ndarray, Density]]]:
    """Compare small blocks' Hessians with their estimates, on the examples that the callback measures on."""
    batches = draw_probe_set(trainer.get_train_dataloader(), ProbeSpec.from_config(config)).batches
    model: Any = trainer.model
    objective = Objective(model, batches)
    rows, spectra = [], {}
    for block, indices in block_indices(objective.names, config).items():
        if sum(objective.sizes[index] for index in indices) > most:
            continue
        with measuring(model, seed=config.probe_seed):
            operator = HessianOperator(objective.block([objective.names[index] for index in indices]))
            found, spread = estimates(operator, config.probe_seed)
            eigenvalues = exact_eigenvalues(operator)
        spectra[block] = eigenvalues, spread
        exact = exact_values(eigenvalues)
        rows += [Row(block, name, e.value, e.low, e.high, e.hvps, exact[name]) for name, e in found.items()]
    return rows, spectra


def table(rows: list[Row]) -> str:
    """Format the rows as Markdown."""
    lines = ["| block | quantity | estimate | 95 % interval | products | exact |", "|:--|:--|--:|--:|--:|--:|"]
    lines += [
        f"| {row.block} | {row.quantity} | {row.estimate:.4g} | {row.low:.4g} – {row.high:.4g} | {row.hvps} "
        f"| {row.exact:.4g} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    model_args, data_args, optimizability, exact_args, training_args = parse_flags(
        image_classification.ModelArguments,
        image_classification.DataArguments,
        OptimizabilityConfig,
        ExactArguments,
        TrainingArguments,
    )

    inputs = load(image_classification, model_args, data_args, training_args)
    trainer = OptimizabilityTrainer(args=training_args, optimizability=optimizability, **inputs.as_kwargs())
    folder = fine_tune(trainer, tasks="image-classification", tags=["vision"], dataset=data_args.public_name)
    if not trainer.is_world_process_zero():
        return
    rows, spectra = compare_blocks(trainer, optimizability, exact_args.exact_parameters)
    write_atomically(folder / "exact.json", json.dumps([asdict(row) for row in rows], indent=1).encode())
    if spectra:
        picture = io.BytesIO()
        plot(spectra).savefig(picture)
        write_atomically(folder / "exact.png", picture.getvalue())
    print(f"\n{trainer.optimizability_report().summary()}\n\n{table(rows)}\n\nReport: {folder / 'report.md'}")


if __name__ == "__main__":
    main()
