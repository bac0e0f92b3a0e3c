# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-optimizability[vision]"]
# ///
r"""Track the top eigenvalue of the Hessian on the full training set, epoch by epoch, with its residual bound.

    python recipes/top_eigenvalue.py recipes/demo/top_eigenvalue.json

trains a small ViT on 2,000 digits that come with this project. `--beside_pyhessian True` asks PyHessian at the same
weights and on the same examples as well; install it without its dependencies (it asks for torchvision, and uses
nothing of it):

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
from transformers import HfArgumentParser, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_optimizability import Measurement, OptimizabilityConfig, OptimizabilityTrainer
from hf_optimizability.files import write_atomically
from hf_optimizability.report.figures import BLUE, GREY, VERMILLION
from hf_optimizability.tasks import image_classification
from hf_optimizability.tasks.fine_tuning import fine_tune, load, parse_arguments


@dataclass
class PeerArguments:
    """Whom to ask as well."""

    beside_pyhessian: bool = field(
        default=False, metadata={"help": "Ask PyHessian for the same eigenvalue, with its default settings."}
    )


@dataclass(frozen=True)
class Asked:
    """PyHessian's answer at one step: its eigenvalue, and what it took."""

    lambda_max: float
    hvps: int
    seconds: float


class Logits(nn.Module):
    """The model as PyHessian takes it: one tensor in, logits out."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits, `(examples, classes)`."""
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits


class PyHessian(TrainerCallback):
    """Asks PyHessian before the training and after each epoch, on a copy of the model, so that training goes on as is.

    Args:
        dataset: Examples with `pixel_values` and `labels`.
        batch_size: Examples per forward pass.

    Attributes:
        answers: By step.
    """

    def __init__(self, dataset: Any, batch_size: int):
        self.answers: dict[int, Asked] = {}
        self._dataset, self._batch_size = dataset, batch_size

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first answer."""
        self._ask(state, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One more."""
        self._ask(state, kwargs["model"])

    def _ask(self, state: TrainerState, model: Any) -> None:
        from pyhessian import hessian

        model = copy.deepcopy(model)
        model.set_attn_implementation("eager")  # it fails on the default attention
        device, starts = model.device, range(0, len(self._dataset), self._batch_size)
        pieces = [self._dataset[start : start + self._batch_size] for start in starts]
        batches = [(_stacked(piece["pixel_values"], device), _stacked(piece["labels"], device)) for piece in pieces]
        started = time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            asked = hessian(Logits(model), cross_entropy, dataloader=batches, cuda=device.type == "cuda")
            hvps = _counted(asked)
            values, _ = asked.eigenvalues()
        self.answers[state.global_step] = Asked(values[0], len(hvps), time.perf_counter() - started)


def _stacked(values: Any, device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(value) for value in values]).to(device)


def _counted(asked: Any) -> list[None]:
    """A list that grows with each product over all batches."""
    products: list[None] = []
    multiply = asked.dataloader_hv_product

    def counted(vector: Any) -> Any:
        products.append(None)
        return multiply(vector)

    asked.dataloader_hv_product = counted
    return products


def table(measurements: Sequence[Measurement], answers: dict[int, Asked]) -> str:
    """All epochs as Markdown."""
    head = ["step", "loss", "λ_max", "within", "products"]
    rows = []
    for one in measurements:
        top = one.hessian.lambda_max
        row = [f"{one.step}", f"{one.loss:.4g}", f"{top.value:.5g}", f"± {top.residual:.2g}", f"{top.hvps}"]
        if one.step in answers:
            asked = answers[one.step]
            row += [f"{asked.lambda_max:.5g}", f"{asked.hvps}"]
        rows.append(row)
    if answers:
        head += ["PyHessian", "products"]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["--:"] * len(head), *rows))


def plot(measurements: Sequence[Measurement], answers: dict[int, Asked]) -> Figure:
    """The top eigenvalue over the steps, with its residual bound, and the sharpness above which SGD can't settle."""
    figure = Figure(figsize=(6, 3.4), layout="constrained", dpi=100)
    axes = figure.subplots()
    tops = [one.hessian.lambda_max for one in measurements]
    errors = [[top.value - top.low for top in tops], [top.high - top.value for top in tops]]
    steps = [one.step for one in measurements]
    axes.errorbar(
        steps, [top.value for top in tops], yerr=errors, color=BLUE, marker="o", ms=4, capsize=3, label="λ_max"
    )
    if answers:
        held = [asked.lambda_max for asked in answers.values()]
        axes.plot(list(answers), held, "x", color=VERMILLION, ms=7, label="PyHessian")
    limits = [(one.step, one.optimizer_stability.limit) for one in measurements if one.optimizer_stability is not None]
    if limits:
        axes.plot(*zip(*limits, strict=True), color=GREY, ls="--", lw=1, label="limit at the learning rate in use")
    axes.set(xlabel="optimizer step", ylabel="top eigenvalue", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def main() -> None:
    arguments = (
        image_classification.ModelArguments,
        image_classification.DataArguments,
        OptimizabilityConfig,
        PeerArguments,
        TrainingArguments,
    )
    parser = HfArgumentParser(arguments)  # type: ignore[arg-type]  # its annotation fits no dataclass
    model_args, data_args, optimizability, peer_args, training_args = parse_arguments(parser)

    inputs = load(image_classification, model_args, data_args, training_args)
    dataset = inputs.train_dataset
    optimizability = replace(optimizability, probe_examples=len(dataset))
    trainer = OptimizabilityTrainer(args=training_args, optimizability=optimizability, **inputs.as_kwargs())
    peer = PyHessian(dataset, optimizability.probe_batch_size)
    if peer_args.beside_pyhessian:
        trainer.add_callback(peer)
    folder = fine_tune(trainer, tasks="image-classification", tags=["vision"], dataset=data_args.public_name)
    if not trainer.is_world_process_zero():
        return
    report = trainer.optimizability_report()
    measured = report.measurements
    found = [
        {"step": one.step, "lambda_max": asdict(one.hessian.lambda_max), **_answer(peer.answers, one.step)}
        for one in measured
    ]
    write_atomically(folder / "top_eigenvalue.json", json.dumps(found, indent=1).encode())
    picture = io.BytesIO()
    plot(measured, peer.answers).savefig(picture)
    write_atomically(folder / "top_eigenvalue.png", picture.getvalue())
    print(f"\n{report.summary()}\n\n{table(measured, peer.answers)}\n\nReport: {folder / 'report.md'}")


def _answer(answers: dict[int, Asked], step: int) -> dict[str, Any]:
    return {"pyhessian": asdict(answers[step])} if step in answers else {}


if __name__ == "__main__":
    main()
