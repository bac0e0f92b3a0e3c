# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-optimizability[vision]"]
# ///
r"""Track the top eigenvalue of the Hessian on the full training set, epoch by epoch, with its interval.

    python recipes/top_eigenvalue.py recipes/demo/top_eigenvalue.json

trains a small ViT on 2,000 digits that come with this project. `--compare_pyhessian True` runs PyHessian at the same
weights and on the same examples as well; install it without its dependencies (it requires torchvision but does not use
it):

    pip install --no-deps pyhessian

The table is printed, and written to the report's folder as `top_eigenvalue.json` with a picture.
"""

from __future__ import annotations

import copy
import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_optimizability import Measurement, OptimizabilityConfig, OptimizabilityTrainer
from hf_optimizability.files import write_atomically
from hf_optimizability.number_format import format_estimate
from hf_optimizability.report.figures import BLUE, GREY, VERMILLION
from hf_optimizability.tasks import image_classification
from hf_optimizability.tasks.fine_tuning import fine_tune, load, parse_flags


@dataclass
class ComparisonArguments:
    """What to compare with."""

    compare_pyhessian: bool = field(
        default=False,
        metadata={"help": "Compute the same eigenvalue with PyHessian as well, with its default settings."},
    )


@dataclass(frozen=True)
class PyHessianResult:
    """The eigenvalue by PyHessian at one step, and its cost."""

    lambda_max: float
    hvps: int
    seconds: float


class Logits(nn.Module):
    """The model as PyHessian takes it: one tensor in, logits out."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits of shape (examples, classes)."""
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits


class PyHessian(TrainerCallback):
    """Runs PyHessian before training and after each epoch, on a copy of the model, so that training is unchanged.

    Args:
        dataset: Examples with `pixel_values` and `labels`.
        batch_size: Examples per forward pass.

    Attributes:
        results: By step.
    """

    def __init__(self, dataset: Any, batch_size: int):
        self.results: dict[int, PyHessianResult] = {}
        self._dataset, self._batch_size = dataset, batch_size

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run it before the first step."""
        self._run(state, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run it after an epoch."""
        self._run(state, kwargs["model"])

    def _run(self, state: TrainerState, model: Any) -> None:
        from pyhessian import hessian

        model = copy.deepcopy(model)
        model.set_attn_implementation("eager")  # it fails on the default attention
        device, starts = model.device, range(0, len(self._dataset), self._batch_size)
        pieces = [self._dataset[start : start + self._batch_size] for start in starts]
        batches = [(_stacked(piece["pixel_values"], device), _stacked(piece["labels"], device)) for piece in pieces]
        started = time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            computation = hessian(Logits(model), cross_entropy, dataloader=batches, cuda=device.type == "cuda")
            hvps = _count_products(computation)
            values, _ = computation.eigenvalues()
        self.results[state.global_step] = PyHessianResult(values[0], len(hvps), time.perf_counter() - started)


def _stacked(values: Any, device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(value) for value in values]).to(device)


def _count_products(computation: Any) -> list[None]:
    """Return a list that grows with each product over all batches."""
    products: list[None] = []
    multiply = computation.dataloader_hv_product

    def counted(vector: Any) -> Any:
        products.append(None)
        return multiply(vector)

    computation.dataloader_hv_product = counted
    return products


def table(measurements: Sequence[Measurement], results: dict[int, PyHessianResult]) -> str:
    """Format all epochs as Markdown."""
    head = ["step", "loss", "λ_max", "products"]
    rows = []
    for one in measurements:
        top = one.hessian.lambda_max
        row = [f"{one.step}", f"{one.loss:.4g}", format_estimate(top), f"{top.hvps}"]
        if one.step in results:
            result = results[one.step]
            row += [f"{result.lambda_max:.5g}", f"{result.hvps}"]
        rows.append(row)
    if results:
        head += ["PyHessian", "products"]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["--:"] * len(head), *rows))


def plot(measurements: Sequence[Measurement], results: dict[int, PyHessianResult]) -> Figure:
    """Plot the top eigenvalue over the steps, with its residual bound, and the limit of stable SGD."""
    figure = Figure(figsize=(6, 3.4), layout="constrained", dpi=100)
    axes = figure.subplots()
    tops = [one.hessian.lambda_max for one in measurements]
    errors = [[top.value - top.low for top in tops], [top.high - top.value for top in tops]]
    steps = [one.step for one in measurements]
    axes.errorbar(
        steps, [top.value for top in tops], yerr=errors, color=BLUE, marker="o", ms=4, capsize=3, label="λ_max"
    )
    if results:
        values = [result.lambda_max for result in results.values()]
        axes.plot(list(results), values, "x", color=VERMILLION, ms=7, label="PyHessian")
    limits = [(one.step, one.optimizer_stability.limit) for one in measurements if one.optimizer_stability is not None]
    if limits:
        axes.plot(*zip(*limits, strict=True), color=GREY, ls="--", lw=1, label="limit at the learning rate in use")
    axes.set(xlabel="optimizer step", ylabel="top eigenvalue", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def main() -> None:
    model_args, data_args, optimizability, comparison_args, training_args = parse_flags(
        image_classification.ModelArguments,
        image_classification.DataArguments,
        OptimizabilityConfig,
        ComparisonArguments,
        TrainingArguments,
    )

    inputs = load(image_classification, model_args, data_args, training_args)
    dataset = inputs.train_dataset
    optimizability = replace(optimizability, probe_examples=len(dataset))
    trainer = OptimizabilityTrainer(args=training_args, optimizability=optimizability, **inputs.as_kwargs())
    peer = PyHessian(dataset, optimizability.probe_batch_size)
    if comparison_args.compare_pyhessian:
        trainer.add_callback(peer)
    folder = fine_tune(trainer, tasks="image-classification", tags=["vision"], dataset=data_args.public_name)
    if not trainer.is_world_process_zero():
        return
    report = trainer.optimizability_report()
    measured = report.measurements
    found = [
        {"step": one.step, "lambda_max": asdict(one.hessian.lambda_max), **_result_at(peer.results, one.step)}
        for one in measured
    ]
    write_atomically(folder / "top_eigenvalue.json", json.dumps(found, indent=1).encode())
    picture = io.BytesIO()
    plot(measured, peer.results).savefig(picture)
    write_atomically(folder / "top_eigenvalue.png", picture.getvalue())
    print(f"\n{report.summary()}\n\n{table(measured, peer.results)}\n\nReport: {folder / 'report.md'}")


def _result_at(results: dict[int, PyHessianResult], step: int) -> dict[str, Any]:
    return {"pyhessian": asdict(results[step])} if step in results else {}


if __name__ == "__main__":
    main()
