# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-optimizability"]
# ///
r"""Fine-tune a text checkpoint to classify sentences or pairs of sentences, and write its optimizability report.

Any checkpoint and data set of the Hub, or local ones:

    python recipes/text_classification.py --model_name_or_path distilbert/distilbert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --max_train_samples 4000 --do_train --do_eval \
        --learning_rate 3e-5 --num_train_epochs 1 --logging_steps 10 --output_dir out/sst2

    python recipes/text_classification.py recipes/demo/text.json

The report is written to the folder `optimizability` inside `--output_dir`, unless `--report_dir` names another.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import evaluate
import numpy as np
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer

from labelled_data import LabelledDataArguments, load_splits


METRICS = Path(__file__).parent / "metrics"


@dataclass
class ModelArguments:
    """Which checkpoint to fine-tune."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint on the Hub, or a local folder."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration, if not the checkpoint's own."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the checkpoint's own."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the configuration, for example hidden_dropout_prob=0.2,num_labels=2."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep what is downloaded from the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub, if not the one you logged in with."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the checkpoint."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of the weights, whatever the checkpoint was saved in."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Accept a checkpoint whose head has another number of classes."}
    )


@dataclass
class DataArguments(LabelledDataArguments):
    """Which sentences to train and evaluate on."""

    text_column_name: list[str] | None = field(
        default=None, metadata={"help": "Column of the text, or two of a pair. By default all that hold text."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Cut longer texts to this number of tokens."})


def main() -> None:
    arguments = (ModelArguments, DataArguments, OptimizabilityConfig, TrainingArguments)
    parser = HfArgumentParser(arguments)  # type: ignore[arg-type]  # its annotation fits no dataclass
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, optimizability, training_args = parser.parse_json_file(sys.argv[1])
    else:
        model_args, data_args, optimizability, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    train, validation, names = load_splits(
        data_args, seed=training_args.seed, cache_dir=model_args.cache_dir, token=model_args.token
    )
    model, tokenizer = load_model(model_args, names)
    columns = text_columns(train, data_args)
    train = tokenize(train, tokenizer, columns, data_args)
    validation = tokenize(validation, tokenizer, columns, data_args)

    metrics = evaluate.combine([str(METRICS / "accuracy.py"), str(METRICS / "f1.py")])

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return metrics.compute(predictions=np.argmax(logits, axis=1), references=prediction.label_ids)

    trainer = OptimizabilityTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        optimizability=optimizability,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        scores = trainer.evaluate()
        trainer.log_metrics("eval", scores)
        trainer.save_metrics("eval", scores)

    if training_args.do_train and trainer.is_world_process_zero():
        folder = Path(optimizability.report_dir or Path(training_args.output_dir) / "optimizability")
        print(f"\n{trainer.optimizability_report().summary()}\n\nReport: {folder / 'report.md'}")

    card = {"tasks": "text-classification", "dataset": data_args.public_name}
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def load_model(args: ModelArguments, names: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the checkpoint with a head for the classes `names`, and its tokenizer."""
    hub = {
        "cache_dir": args.cache_dir,
        "revision": args.model_revision,
        "token": args.token,
        "trust_remote_code": args.trust_remote_code,
    }
    config = AutoConfig.from_pretrained(
        args.config_name or args.model_name_or_path,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        **hub,
    )
    if args.config_overrides is not None:
        config.update_from_string(args.config_overrides)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path, **hub)
    if tokenizer.pad_token is None:  # decoders
        tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path,
        config=config,
        dtype=args.dtype,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        **hub,
    )
    return model, tokenizer


def text_columns(examples: Dataset, args: DataArguments) -> list[str]:
    """The one or two columns that hold the text."""
    if args.text_column_name is None:
        columns = [name for name, kind in examples.features.items() if kind.dtype in ("string", "large_string")]
    else:
        columns = args.text_column_name
    if len(columns) not in (1, 2) or not set(columns) <= set(examples.column_names):
        raise ValueError(
            f"Can't tell the text by {columns}; pass one or two of {examples.column_names} as --text_column_name."
        )
    return columns


def tokenize(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, columns: list[str], args: DataArguments
) -> Dataset:
    """Turns texts into token numbers; they are padded later, batch by batch."""
    length = min(args.max_seq_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        tokens = tokenizer(*(batch[column] for column in columns), truncation=True, max_length=length)
        return {**tokens, "labels": batch[args.label_column_name]}

    return examples.map(encode, batched=True, remove_columns=examples.column_names, desc="Tokenizing")


if __name__ == "__main__":
    main()
