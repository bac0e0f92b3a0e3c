# SPDX-License-Identifier: Apache-2.0
"""From flags to a Trainer's inputs, and from a Trainer to a checkpoint with metrics, card and report."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, Protocol

from datasets import Dataset
from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments, set_seed

from ..training.trainer import OptimizabilityTrainer
from . import image_classification, text_classification
from .checkpoint import CheckpointArguments, own_config
from .datasets import LabelledDataArguments, load_splits, numbered_as_in
from .metrics import compute_metrics
from .peft_methods import with_frozen_features, with_lora


class Task(Protocol):
    """What a module of this package has for its task."""

    NAME: str
    """The task in the Hub's terms."""

    MODELS: Any
    """Transformers' mapping from the configurations that have a head for this task to that head."""

    ModelArguments: type[Any]
    DataArguments: type[Any]

    def load_model(self, args: Any, names: list[str], /) -> tuple[PreTrainedModel, Any]:
        """Loads the checkpoint with a head for the classes `names`, and its tokenizer or processor."""

    def prepare(self, examples: Dataset, processor: Any, args: Any, /) -> Dataset:
        """The examples as the model takes them."""


TASKS: tuple[Task, ...] = (text_classification, image_classification)


def made_for(args: CheckpointArguments) -> list[Task]:
    """The tasks that a checkpoint's architecture has a head for.

    Raises:
        ValueError: If its configuration can't be loaded.
    """
    config = own_config(args)
    return [task for task in TASKS if type(config) in task.MODELS]


class FlagParser(HfArgumentParser):
    """Raises where `HfArgumentParser` would print two pages of usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raises `ValueError`."""
        raise ValueError(message)


def parse_arguments(
    parser: HfArgumentParser,
    args: Sequence[str] | None = None,
    *,
    values: Mapping[str, Any] | None = None,
    partly: bool = False,
) -> tuple[Any, ...]:
    """Reads flags, or a JSON file of them and flags that overrule it.

    Args:
        parser: Of the dataclasses to fill.
        args: What came on the command line; by default, `sys.argv`.
        values: What the JSON file holds, if `args` names none.
        partly: Whether to leave out what the parser does not know.

    Returns:
        The dataclasses, in the parser's order.

    Raises:
        ValueError: If a flag is unknown or its value impossible.
        OSError: If there is no such file.
    """
    args = list(sys.argv[1:] if args is None else args)
    parser.allow_abbrev = False  # so that a misspelt flag is none
    known = [field.name for dataclass in parser.dataclass_types for field in fields(dataclass)]
    if values is None and args and args[0].endswith(".json"):
        values = json.loads(Path(args.pop(0)).read_text(encoding="utf-8"))
    if values:
        # Strings are parsed, which also fills what is required; the rest has its type already.
        ready = {name: value for name, value in values.items() if name in known and not isinstance(value, str)}
        parser.set_defaults(**ready)
        args = [f"--{name}={value}" for name, value in values.items() if name not in ready] + args
    *parsed, strange = parser.parse_args_into_dataclasses(
        args, return_remaining_strings=True, look_for_args_file=False
    )
    if strange and not partly:
        name = next((name for name in strange if name.startswith("--")), strange[0]).partition("=")[0]
        close = get_close_matches(name.removeprefix("--").replace("-", "_"), known, n=1)
        raise ValueError(f"There is no argument {name}." + "".join(f" Did you mean --{name}?" for name in close))
    return tuple(parsed)


def load(
    task: Task,
    model_args: CheckpointArguments,
    data_args: LabelledDataArguments,
    training_args: TrainingArguments,
    *,
    split_seed: int | None = None,
) -> dict[str, Any]:
    """Loads checkpoint and data.

    Where examples are made into inputs only when they are fetched, `training_args` is told to keep their columns.

    Args:
        task: What the checkpoint shall do.
        model_args: Which checkpoint, and what of it is trained.
        data_args: Which data.
        training_args: Its seed is that of a new head's weights.
        split_seed: Seed of the draw of the examples, if not that of `training_args`.

    Returns:
        What a Trainer takes by these names: model, data sets, tokenizer or processor, and metrics.

    Raises:
        ValueError: If something can't be loaded, or the data does not fit.
    """
    set_seed(training_args.seed)
    draw_seed = training_args.seed if split_seed is None else split_seed
    *splits, names = load_splits(data_args, seed=draw_seed, cache_dir=model_args.cache_dir, token=model_args.token)
    model, processor = task.load_model(model_args, names)
    splits = [numbered_as_in(model.config, split, data_args.label_column_name) for split in splits]
    train, validation = (task.prepare(split, processor, data_args) for split in splits)
    if train.format["type"] == "custom":
        training_args.remove_unused_columns = False
    return {
        "model": trained_part(model, model_args),
        "train_dataset": train,
        "eval_dataset": validation,
        "processing_class": processor,
        "compute_metrics": compute_metrics,
    }


def trained_part(model: PreTrainedModel, args: CheckpointArguments) -> Any:
    """The model with all frozen that `--method` does not train."""
    if args.method == "lora":
        return with_lora(model, args.lora_rank)
    return with_frozen_features(model) if args.method == "linear_probe" else model


def fine_tune(trainer: OptimizabilityTrainer, **card: Any) -> Path:
    """Trains and evaluates as the Trainer's arguments say, and saves checkpoint, metrics, state, card and report.

    Args:
        trainer: The Trainer.
        card: What the model card tells: `tasks`, `dataset`, `tags`.

    Returns:
        The folder of the report.
    """
    args = trainer.args
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if args.do_eval:
        scores = trainer.evaluate()
        trainer.log_metrics("eval", scores)
        trainer.save_metrics("eval", scores)
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    return trainer.optimizability_callback.config.report_folder(args.output_dir)
