# SPDX-License-Identifier: Apache-2.0
"""The models and probe batches that the benchmarks run on: two real checkpoints after a few steps, and a decoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)


WorkloadName = Literal["text", "vision", "decoder"]
Batch = dict[str, Tensor]

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "out" / "benchmarks"
TEXT_CHECKPOINT = ROOT / ".venv" / "all-MiniLM-L6-v2"
TEXT_DATA = ROOT / "recipes" / "data" / "movie_review_sentences"
VISION_CHECKPOINT = ROOT / "recipes" / "checkpoints" / "mobilenet_v2_1.0"
VISION_DATA = ROOT / "recipes" / "data" / "mnist_5k"

TITLES: dict[WorkloadName, str] = {
    "text": "MiniLM-L6 on sentences of 48 tokens, after 25 steps of AdamW",
    "vision": "MobileNetV2 on MNIST at 64 px, after 25 steps of AdamW",
    "decoder": "GPT-2 small with random weights, on 64 tokens",
}
MODEL_CLASSES: dict[WorkloadName, Any] = {
    "text": AutoModelForSequenceClassification,
    "vision": AutoModelForImageClassification,
    "decoder": GPT2LMHeadModel,
}

BATCH_SIZE = 16
PROBE_BATCHES = 2
STEPS = 25
SEED = 0


@dataclass(frozen=True)
class Workload:
    """A model in eval mode and the batches of its probe set, each of them a dict with labels.

    Attributes:
        name: Which one.
        model: Float32, as `from_pretrained` gives it.
        batches: The probe set.
    """

    name: WorkloadName
    model: PreTrainedModel
    batches: list[Batch]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is differentiated by."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def size(self) -> int:
        """The number of parameters, n."""
        return sum(parameter.numel() for parameter in self.parameters)

    def gradient(self) -> None:
        """One gradient over the probe set, thrown away: what all costs are compared with."""
        for batch in self.batches:
            torch.autograd.grad(self.model(**batch).loss, self.parameters, materialize_grads=True)


def load(name: WorkloadName, *, attention: Literal["eager"] | None = None, batches: int = PROBE_BATCHES) -> Workload:
    """Load a workload; create it first if it does not exist.

    Args:
        name: Which one.
        attention: Attention implementation, if not the one that Transformers takes by default.
        batches: How many batches of the probe set to give, at most.

    Returns:
        The workload.
    """
    folder = CACHE / name
    if not (folder / "batches.pt").exists():
        make(name, folder)
    model = MODEL_CLASSES[name].from_pretrained(folder, attn_implementation=attention, dtype="float32")
    return Workload(name, model.eval(), torch.load(folder / "batches.pt")[:batches])


def make(name: WorkloadName, folder: Path) -> None:
    """Create the model and the probe batches, and write them to `folder`."""
    torch.manual_seed(SEED)
    model, batches = {"text": _text, "vision": _vision, "decoder": _decoder}[name]()
    model.save_pretrained(folder)
    torch.save(batches, folder / "batches.pt")


def text(number: int, *, tokens: int = 48) -> tuple[PreTrainedModel, list[Batch]]:
    """MiniLM-L6 with a new head for two classes, and batches of sentences from movie reviews."""
    tokenizer = AutoTokenizer.from_pretrained(TEXT_CHECKPOINT)
    model = AutoModelForSequenceClassification.from_pretrained(TEXT_CHECKPOINT, num_labels=2, dtype="float32")
    rows = text_rows(number)
    columns = tokenizer(
        rows["sentence"], padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
    )
    return model, _cut({**columns, "labels": torch.tensor(rows["label"])})


def vision(number: int, *, pixels: int = 64) -> tuple[PreTrainedModel, list[Batch]]:
    """MobileNetV2 with a new head for ten classes, and batches of digits."""
    processor = AutoImageProcessor.from_pretrained(VISION_CHECKPOINT)
    processor.size, processor.crop_size = {"shortest_edge": pixels}, {"height": pixels, "width": pixels}
    model = AutoModelForImageClassification.from_pretrained(VISION_CHECKPOINT, num_labels=10, dtype="float32")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # the checkpoint's own lets the running statistics stand still
    rows = _rows(VISION_DATA, number)
    images = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")["pixel_values"]
    return model, _cut({"pixel_values": images, "labels": torch.tensor(rows["label"])})


def text_rows(number: int) -> dict[str, list[Any]]:
    """Sentences and their labels, for that many batches, drawn at random."""
    return _rows(TEXT_DATA, number)


def _text() -> tuple[PreTrainedModel, list[Batch]]:
    model, batches = text(PROBE_BATCHES + STEPS)
    return _fine_tune(model, batches[PROBE_BATCHES:], learning_rate=5e-5), batches[:PROBE_BATCHES]


def _vision() -> tuple[PreTrainedModel, list[Batch]]:
    model, batches = vision(PROBE_BATCHES + STEPS)
    return _fine_tune(model, batches[PROBE_BATCHES:], learning_rate=1e-3), batches[:PROBE_BATCHES]


def _decoder() -> tuple[PreTrainedModel, list[Batch]]:
    model = GPT2LMHeadModel(GPT2Config())
    tokens = torch.randint(model.config.vocab_size, (1, 64))
    return model, [{"input_ids": tokens, "labels": tokens}]


def _rows(data: Path, batches: int) -> dict[str, list[Any]]:
    """Training examples for that many batches, drawn at random."""
    from datasets import load_dataset

    return load_dataset(str(data), split="train").shuffle(seed=SEED)[: batches * BATCH_SIZE]


def _cut(columns: Batch) -> list[Batch]:
    number = len(columns["labels"])
    return [{key: column[i : i + BATCH_SIZE] for key, column in columns.items()} for i in range(0, number, BATCH_SIZE)]


def _fine_tune(model: PreTrainedModel, batches: Iterable[Batch], *, learning_rate: float) -> PreTrainedModel:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


WORKLOADS: tuple[WorkloadName, ...] = get_args(WorkloadName)
