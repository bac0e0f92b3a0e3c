# SPDX-License-Identifier: Apache-2.0
"""Where a report's numbers come from: model, task, data, training settings, versions."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import TrainingArguments

from ..config import OptimizabilityConfig
from ..distributed.tensors import class_name
from ..model_state.measuring import pretrained
from ..objective.batches import batch_size, count_items
from ..objective.probe_set import fingerprint, num_examples
from ..report import OptimizabilityReport
from ..report_data.provenance import DataInfo, ModelInfo, ProbeSetInfo, TaskInfo


_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_grad_norm", "label_smoothing_factor", "num_train_epochs", "bf16", "fp16", "seed",
)  # fmt: skip
"""Training arguments that a reader needs to repeat or to judge the run."""

_CLASSIFICATION_TASKS = (
    "text-classification", "image-classification", "token-classification", "audio-classification",
)  # fmt: skip
"""Tasks whose loss chooses among the labels of the head."""

_LANGUAGE_TASKS = ("text-generation", "fill-mask", "text2text-generation")
"""Tasks whose loss chooses among the tokens of the vocabulary."""

_LABEL_COLUMNS = ("labels", "label")
"""Columns that hold the label of a row; collators rename the second to the first."""


def new_report(
    model: nn.Module,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | None,
    *,
    own_loss: bool,
    config: OptimizabilityConfig | None = None,
) -> OptimizabilityReport:
    """Return a report of where its numbers come from, without any numbers.

    Args:
        model: The model.
        train_dataset: The data trained on.
        eval_dataset: The data evaluated on.
        own_loss: Whether the loss is the model's own, not a Trainer's.
        config: What is measured, if anything is.
    """
    return OptimizabilityReport(
        model=describe_model(model),
        task=describe_task(model, own_loss=own_loss),
        data=describe_data(train_dataset, eval_dataset),
        config={} if config is None else describe_config(config),
        versions=library_versions(),
    )


def timestamp() -> str:
    """Return the time in UTC, to the second, by ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def describe_model(model: nn.Module) -> ModelInfo:
    """Return model id (of a local checkpoint, its folder's name), class, sizes, and whether it has BatchNorm."""
    inner = pretrained(model)
    parameters = list(model.parameters())
    return ModelInfo(
        id=public_id(str(inner.name_or_path) if inner is not None else ""),
        class_name=class_name(inner or model),
        batch_norm=any(isinstance(module, _BatchNorm) for module in model.modules()),
        classes=_count_classes(model),
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    )


def _count_classes(model: nn.Module) -> int | None:
    """Return among how many classes the loss of a model's own head chooses, if its task has classes."""
    inner, task = pretrained(model), describe_task(model, own_loss=True).task
    if inner is None:
        return None
    config = inner.config
    if task in _CLASSIFICATION_TASKS and config.problem_type in (None, "single_label_classification"):
        classes = config.num_labels
    else:
        classes = config.to_dict().get("vocab_size") if task in _LANGUAGE_TASKS else None
    return classes if classes and classes > 1 else None


def public_id(identifier: str) -> str:
    """Return the name of a checkpoint on the Hub as it is; of a local path, which reveals folders, the last part.

    Example:
        >>> public_id("org/name"), public_id("/data/models/mine/"), public_id("./mine")
        ('org/name', 'mine', 'mine')
    """
    local = Path(identifier).exists() or re.match(r"[\\/.~]|[A-Za-z]:", identifier) or identifier.count("/") > 1
    return re.split(r"[\\/]", identifier.rstrip("\\/"))[-1] if local else identifier


def describe_task(model: nn.Module, *, own_loss: bool) -> TaskInfo:
    """Return the task in the Hub's terms, and whose loss was measured."""
    from transformers.modelcard import TASK_MAPPING

    name = class_name(pretrained(model) or model)
    tasks: dict[str, Any] = TASK_MAPPING
    task = next((task for task, classes in tasks.items() if name in classes.values()), "")
    return TaskInfo(task=task, loss="the model's own" if own_loss else "the Trainer's")


def describe_data(train_dataset: Dataset | None, eval_dataset: Dataset | None) -> DataInfo:
    """Return name and sizes of the data (`None`: streamed or absent)."""
    return DataInfo(
        dataset=_dataset_name(train_dataset),
        train_examples=num_examples(train_dataset),
        eval_examples=num_examples(eval_dataset),
        majority_share=_majority_share(eval_dataset),
    )


def _majority_share(dataset: Dataset | None) -> float | None:
    """Return the share of the most frequent label, where labels are integers that can be read without the rows."""
    import datasets

    if isinstance(dataset, datasets.Dataset):
        name = next((name for name in _LABEL_COLUMNS if name in dataset.column_names), None)
        if name is None or not len(dataset):
            return None
        column: Any = dataset.select_columns(name).with_format("arrow")[:][name]
        if not str(column.type).startswith(("int", "uint")):
            return None
        return float(max(column.value_counts().field("counts").to_pylist()) / len(column))
    rows: Sequence[Any] = dataset if isinstance(dataset, list) else ()
    labels = [row[name] for row in rows for name in _LABEL_COLUMNS if isinstance(row, dict) and name in row]
    if not labels or not all(isinstance(label, int) for label in labels):
        return None
    return max(Counter(labels).values()) / len(labels)


def describe_probe_set(batches: list[Any], model: nn.Module) -> ProbeSetInfo:
    """Return size and fingerprint of the probe set."""
    return ProbeSetInfo(
        examples=sum(batch_size(batch) for batch in batches),
        items=sum(count_items(model, batch) for batch in batches),
        batches=len(batches),
        fingerprint=fingerprint(batches),
    )


def _dataset_name(dataset: Dataset | None) -> str:
    """Return what `load_dataset` called it; nothing for data sets from elsewhere."""
    import datasets

    return (dataset.info.dataset_name or "") if isinstance(dataset, datasets.Dataset) else ""


def describe_config(config: OptimizabilityConfig) -> dict[str, Any]:
    """Return the options, with those the profile fills in, without the folder, which reveals the user's paths."""
    options = asdict(config) | asdict(config.budget)
    return {name: value for name, value in options.items() if name != "report_dir"}


def describe_training(args: TrainingArguments, optimizer: Optimizer, max_steps: int) -> dict[str, Any]:
    """Return the optimizer with its settings, and the arguments that shape the run."""
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    group = inner.param_groups[0]
    settings = {name: value for name, value in group.items() if isinstance(value, (bool, int, float, tuple))}
    if "initial_lr" in settings:  # before the scheduler, which may be anywhere: in a warm-up, or in a resumed run
        settings["lr"] = settings.pop("initial_lr")
    arguments = {name: value for name, value in args.to_dict().items() if name in _ARGUMENTS}
    sizes = {
        "examples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "max_steps": max_steps,
    }
    return {"optimizer": type(inner).__name__, "optimizer_settings": settings, **arguments, **sizes}


def library_versions() -> dict[str, str]:
    """Return the versions of everything that can change a number."""
    from .. import __version__

    packages = ("torch", "transformers", "accelerate", "numpy", "scipy")
    return {
        "hf-optimizability": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
