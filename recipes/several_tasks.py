# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-optimizability"]
# ///
r"""Two tasks on one trunk, measured together: do they conflict, and which of them dominates?

    python recipes/several_tasks.py recipes/demo/several_tasks.json

Sentences of movie reviews come with a score from -4 to 4. The first task is its sign, positive or negative; the second
one, on other sentences, is by `--second_task`

- `intensity`: whether the score is far from 0, whatever its sign;
- `negated`: the sign again with its classes the wrong way round, through the first task's own head: no weights can do
  both, and the report should say so.

Any checkpoint whose model gives a pooled output can be the trunk. The report is written to the folder `optimizability`
inside `--output_dir`, unless `--report_dir` names another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
from hf_optimizability.tasks.fine_tuning import fine_tune, parse_flags, print_report
from hf_optimizability.tasks.metrics import compute_metrics
from hf_optimizability.tasks.multitask_model import TASK_COLUMN, MultiTaskModel, combine_tasks


@dataclass
class SeveralTasksArguments:
    """Which trunk, which sentences, which second task."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint on the Hub, or a local folder."})
    dataset_name: str = field(
        default="recipes/data/movie_review_sentences", metadata={"help": "Data with the columns sentence and score."}
    )
    second_task: Literal["intensity", "negated"] = field(
        default="intensity", metadata={"help": "What is learnt in addition to the sign of the score."}
    )
    max_train_samples: int = field(default=960, metadata={"help": "Sentences to train on, of both tasks together."})
    max_eval_samples: int = field(default=400, metadata={"help": "Sentences to evaluate on, of both together."})
    max_seq_length: int = field(default=48, metadata={"help": "Cut longer sentences to this number of tokens."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep what is downloaded."})


def labelled(rows: Dataset, task: str, *, median: float) -> Dataset:
    """Return the sentences with the classes of a task."""

    def label(score: float) -> dict[str, int]:
        positive, strong = int(score > 0), int(abs(score) > median)
        return {"labels": {"polarity": positive, "intensity": strong, "negated": 1 - positive}[task]}

    return rows.map(label, input_columns="score")


def load_tasks(args: SeveralTasksArguments, tokenizer: Any, *, seed: int) -> tuple[Dataset, dict[str, Dataset]]:
    """Return the training set of both tasks, and an evaluation set of each; no sentence is in two of them."""
    data = load_dataset(args.dataset_name, cache_dir=args.cache_dir)
    median = float(np.median(np.abs(data["train"]["score"])))

    def encoded(split: str, number: int) -> dict[str, Dataset]:
        rows = data[split].shuffle(seed=seed).select(range(number))
        halves = {
            "polarity": rows.select(range(number // 2)),
            args.second_task: rows.select(range(number // 2, number)),
        }
        return {
            task: labelled(half, task, median=median).map(
                lambda row: tokenizer(row["sentence"], truncation=True, max_length=args.max_seq_length),
                remove_columns=half.column_names,
            )
            for task, half in halves.items()
        }

    test = encoded("test", args.max_eval_samples)
    whole = combine_tasks(test)
    return combine_tasks(encoded("train", args.max_train_samples)), {
        name: whole.filter(lambda task, number=number: task == number, input_columns=TASK_COLUMN)
        for number, name in enumerate(test)
    }


def main() -> None:
    args, optimizability, training_args = parse_flags(SeveralTasksArguments, OptimizabilityConfig, TrainingArguments)
    optimizability.task_column = optimizability.task_column or TASK_COLUMN
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    train, validation = load_tasks(args, tokenizer, seed=training_args.seed)
    model: PreTrainedModel
    if args.second_task == "negated":  # one head with contradictory labels: the model does not know its tasks
        model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, num_labels=2)
    else:
        model = MultiTaskModel.on_checkpoint(args.model_name_or_path, dict.fromkeys(validation, 2))
    trainer = OptimizabilityTrainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        optimizability=optimizability,
    )
    folder = fine_tune(trainer, tasks="text-classification")
    print_report(trainer, folder)


if __name__ == "__main__":
    main()
