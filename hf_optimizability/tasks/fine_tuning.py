# SPDX-License-Identifier: Apache-2.0
"""From flags to a Trainer's inputs, and from a Trainer to a checkpoint with metrics, card and report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, Protocol

from datasets import Dataset
from transformers import EvalPrediction, HfArgumentParser, PreTrainedModel, TrainingArguments, set_seed

from ..training.trainer import OptimizabilityTrainer
from . import image_classification, text_classification
from .checkpoint import CheckpointArguments, original_config
from .datasets import LabelledDataArguments, align_labels, load_splits
from .metrics import compute_metrics
from .peft_methods import with_frozen_features, with_lora


class Task(Protocol):
    """What a module of this package provides for its task."""

    NAME: str
    """The task in the Hub's terms."""

    MODELS: Any
    """Transformers' mapping from the configurations that have a head for this task to that head."""

    ModelArguments: type[Any]
    DataArguments: type[Any]

    def load_model(self, args: Any, names: list[str], /) -> tuple[PreTrainedModel, Any]:
        """Load the checkpoint with a head for the classes `names`, and its tokenizer or processor."""

    def prepare(self, examples: Dataset, processor: Any, args: Any, /) -> Dataset:
        """Return the examples as the model takes them."""


TASKS: tuple[Task, ...] = (text_classification, image_classification)


class UndecidedTaskError(ValueError):
    """A checkpoint whose architecture has a head for no task of this package, or for several."""


def task_named(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: If there is none.
    """
    for task in TASKS:
        if name == task.NAME:
            return task
    raise ValueError(f"There is no task {name!r}; choose one of {', '.join(task.NAME for task in TASKS)}.")


def task_of_checkpoint(args: CheckpointArguments) -> Task:
    """Return the task that a checkpoint's architecture has a head for.

    Raises:
        UndecidedTaskError: If there is not exactly one.
        ValueError: If its configuration can't be loaded.
    """
    config = original_config(args)
    tasks = [task for task in TASKS if type(config) in task.MODELS]
    if len(tasks) != 1:
        fitting = " and ".join(task.NAME for task in tasks) or "no task of this command"
        raise UndecidedTaskError(f"{args.model_name_or_path!r} is made for {fitting}. Choose one by --task.")
    return tasks[0]


class FlagParser(HfArgumentParser):
    """Raises where `HfArgumentParser` would print two pages of usage and exit.

    Args:
        dataclass_types: The dataclasses whose fields are the flags.
        options: Further options of `argparse.ArgumentParser`.
    """

    def __init__(self, *dataclass_types: type[Any], **options: Any):
        types: Any = dataclass_types  # the annotation of Transformers fits no dataclass
        super().__init__(types, **options)

    def error(self, message: str) -> NoReturn:
        """Raise `ValueError`."""
        raise ValueError(message)


def checkpoint_arguments(args: Sequence[str], *, values: Mapping[str, Any] | None = None) -> CheckpointArguments:
    """Read the flags that name a checkpoint, and ignore all others; for the arguments, see `parse_arguments`."""
    (checkpoint,), _ = _parse(FlagParser(CheckpointArguments), args, values)
    return checkpoint


def parse_arguments(
    parser: HfArgumentParser, args: Sequence[str] | None = None, *, values: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """Read flags, or a JSON file of them and flags that override it.

    Args:
        parser: Of the dataclasses to fill.
        args: The command line; by default, `sys.argv`.
        values: What the JSON file holds, if `args` names none.

    Returns:
        The dataclasses, in the parser's order.

    Raises:
        ValueError: If a flag is unknown or its value impossible.
        OSError: If there is no such file.
    """
    parsed, unknown = _parse(parser, args, values)
    if unknown:
        name = next((name for name in unknown if name.startswith("--")), unknown[0]).partition("=")[0]
        close = get_close_matches(name.removeprefix("--").replace("-", "_"), _flag_names(parser), n=1)
        raise ValueError(f"There is no argument {name}." + "".join(f" Did you mean --{name}?" for name in close))
    return parsed


def parse_flags(*dataclass_types: type[Any]) -> tuple[Any, ...]:
    """Read the flags of a recipe from the command line, as Transformers' example scripts do; see `parse_arguments`."""
    types: Any = dataclass_types  # the annotation of Transformers fits no dataclass
    return parse_arguments(HfArgumentParser(types))


def _parse(
    parser: HfArgumentParser, args: Sequence[str] | None, values: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], list[str]]:
    """Return the dataclasses, and the words that the parser does not know."""
    args = list(sys.argv[1:] if args is None else args)
    parser.allow_abbrev = False  # so that a misspelt flag is refused
    if values is None and args and args[0].endswith(".json"):
        values = json.loads(Path(args.pop(0)).read_text(encoding="utf-8"))
    if values:
        # Strings are parsed, which also fills what is required; the other values have their types already.
        names = _flag_names(parser)
        typed = {name: value for name, value in values.items() if name in names and not isinstance(value, str)}
        parser.set_defaults(**typed)
        args = [f"--{name}={value}" for name, value in values.items() if name not in typed] + args
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args, return_remaining_strings=True, look_for_args_file=False
    )
    return tuple(parsed), unknown


def _flag_names(parser: HfArgumentParser) -> list[str]:
    return [field.name for dataclass in parser.dataclass_types for field in fields(dataclass)]


@dataclass(frozen=True)
class TrainerInputs:
    """What a Trainer takes by these names.

    Attributes:
        model: The checkpoint, with all frozen that is not trained.
        train_dataset: The training split.
        eval_dataset: The validation split.
        processing_class: Tokenizer or processor.
        compute_metrics: Accuracy and macro F1.
    """

    model: Any
    train_dataset: Dataset
    eval_dataset: Dataset
    processing_class: Any
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] = compute_metrics

    def as_kwargs(self) -> dict[str, Any]:
        """Return them as keyword arguments of a Trainer."""
        return dict(vars(self))


def load(
    task: Task,
    model_args: CheckpointArguments,
    data_args: LabelledDataArguments,
    training_args: TrainingArguments,
    *,
    split_seed: int | None = None,
) -> TrainerInputs:
    """Load checkpoint and data.

    Where examples are converted only when they are fetched, `remove_unused_columns` is switched off in
    `training_args`.

    Args:
        task: What the checkpoint is trained for.
        model_args: Which checkpoint, and what of it is trained.
        data_args: Which data.
        training_args: Its seed is that of a new head's weights.
        split_seed: Seed of the sample of the examples, if not that of `training_args`.

    Raises:
        ValueError: If something can't be loaded, or the data does not fit.
    """
    set_seed(training_args.seed)
    data_seed = training_args.seed if split_seed is None else split_seed
    *splits, names = load_splits(data_args, seed=data_seed, cache_dir=model_args.cache_dir, token=model_args.token)
    model, processor = task.load_model(model_args, names)
    splits = [align_labels(model.config, split, data_args.label_column_name) for split in splits]
    train, validation = (task.prepare(split, processor, data_args) for split in splits)
    if train.format["type"] == "custom":
        training_args.remove_unused_columns = False
    return TrainerInputs(freeze_untrained(model, model_args), train, validation, processor)


def freeze_untrained(model: PreTrainedModel, args: CheckpointArguments) -> Any:
    """Return the model with all frozen that `--method` does not train."""
    if args.method == "lora":
        return with_lora(model, args.lora_rank)
    return with_frozen_features(model) if args.method == "linear_probe" else model


def fine_tune(trainer: OptimizabilityTrainer, **card: Any) -> Path:
    """Train and evaluate as the Trainer's arguments say, and save checkpoint, metrics, state, card and report.

    Args:
        trainer: The Trainer.
        card: For the model card: `tasks`, `dataset`, `tags`.

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


def print_report(trainer: OptimizabilityTrainer, folder: Path) -> None:
    """Print the summary of a training's report and its path; nothing if nothing was trained, or on other processes."""
    if trainer.args.do_train and trainer.is_world_process_zero():
        print(f"\n{trainer.optimizability_report().summary()}\n\nReport: {folder / 'report.md'}")
