# SPDX-License-Identifier: Apache-2.0
"""Short trainings of tiny models, for the tests of what happens inside a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from tests.support import tiny_models


TRAINER_OPTIONS = (
    "callbacks", "optimizability", "compute_metrics", "eval_dataset", "compute_loss_func", "train_dataset",
    "data_collator",
)  # fmt: skip


def mobilenet() -> MobileNetV2ForImageClassification:
    """Depthwise convolutions, BatchNorm and dropout, as in the real one."""
    settings = {"num_channels": 1, "image_size": 32, "depth_multiplier": 0.1, "min_depth": 4, "num_labels": 3}
    return MobileNetV2ForImageClassification(MobileNetV2Config(**settings))


def model(name: str, *, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return mobilenet() if name == "mobilenet" else tiny_models.MODELS[name]()


def dataset(name: str, number: int = 24) -> list[dict[str, Any]]:
    """Rows as a data set has them: Python numbers for labels."""
    if name == "mobilenet":
        generator = torch.Generator().manual_seed(1)
        return [{"pixel_values": torch.randn(1, 32, 32, generator=generator), "labels": i % 3} for i in range(number)]
    rows = tiny_models.examples(name, number, dtype=torch.float32)
    return [{**row, "labels": row["labels"].tolist()} for row in rows]


def arguments(folder: Path, cls: type[TrainingArguments] = TrainingArguments, **options: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 6,
        "logging_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return cls(**{**settings, **options})


def trainer(
    folder: Path,
    name: str = "bert",
    cls: type[Trainer] = Trainer,
    *,
    own: PreTrainedModel | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer on a tiny model, or one's own; options unknown to it go to `TrainingArguments`."""
    settings = {key: options.pop(key) for key in list(options) if key in TRAINER_OPTIONS}
    settings = {"train_dataset": dataset(name), **settings}
    return cls(model=own or model(name), args=arguments(folder, **options), **settings)


QUICK = {"profile": "light", "probe_examples": 4, "max_hvps": 16, "pool_examples": 0}
"""Options of the cheapest measurement. With a pool it would be of six batches at least."""


IN_TWO_BATCHES = {**QUICK, "probe_batch_size": 2}


CONFIG = {**QUICK, "measure_strategy": "steps", "measure_steps": 2}


FEW_STEPS = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1}


def sentences(label: Callable[[int], Any] = lambda index: index % 3) -> list[dict[str, Any]]:
    tokens = [row["input_ids"] for row in tiny_models.examples("bert", 16)]
    return [{"input_ids": row, "labels": label(index)} for index, row in enumerate(tokens)]
