# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-optimizability[peft]"]
# ///
r"""Fine-tune a causal language model by LoRA on the texts of a data set, and write its optimizability report.

Any checkpoint and data set of the Hub with a column of texts, or local ones:

    python recipes/causal_language_modeling_lora.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name stanfordnlp/imdb --text_column_name text --max_train_samples 2000 --max_eval_samples 200 \
        --do_train --do_eval --learning_rate 1e-3 --num_train_epochs 1 --logging_steps 10 --output_dir out/imdb

    python recipes/causal_language_modeling_lora.py recipes/demo/causal_language_modeling_lora.json

The report is written to the folder `optimizability` inside `--output_dir`, unless `--report_dir` names another.
Each text is an example of its own, with an end-of-text token behind it; the loss ignores the padding after that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
from hf_optimizability.objective.objective import IGNORED_LABEL
from hf_optimizability.tasks.checkpoint import original_config
from hf_optimizability.tasks.datasets import DataSetArguments, load_data, subsample
from hf_optimizability.tasks.fine_tuning import fine_tune, parse_flags, print_report
from hf_optimizability.tasks.text_classification import ModelArguments


@dataclass
class CausalModelArguments(ModelArguments):
    """Which checkpoint to fine-tune."""

    method: Literal["lora", "full"] = field(  # type: ignore[assignment]  # there is no new head to probe
        default="lora", metadata={"help": "Train LoRA matrices in all linear layers below the head, or all weights."}
    )


@dataclass
class DataArguments(DataSetArguments):
    """Which texts to train and evaluate on."""

    text_column_name: str = field(default="text", metadata={"help": "Column of the text."})
    max_seq_length: int = field(default=128, metadata={"help": "Cut longer texts to this number of tokens."})


def prepare(examples: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> Dataset:
    """Convert texts to token numbers, which are the labels too; both are padded later, batch by batch.

    The labels are made here, as Transformers' collator for language models takes them off wherever the padding token
    stands: where that is the end-of-text token too, the model would not learn to stop.
    """
    if args.text_column_name not in examples.column_names:
        raise ValueError(
            f"There is no column {args.text_column_name!r}, only {', '.join(examples.column_names)}; pass "
            "--text_column_name."
        )
    length = min(args.max_seq_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = [text + tokenizer.eos_token for text in batch[args.text_column_name]]
        tokens = tokenizer(texts, truncation=True, max_length=length)
        return {**tokens, "labels": tokens["input_ids"]}

    return examples.map(encode, batched=True, remove_columns=examples.column_names, desc="Tokenizing")


def most_likely(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the predicted tokens in place of the logits, which would take much memory."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the share of next tokens that were predicted."""
    predicted, actual = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    return {"accuracy": float(np.mean((predicted == actual)[actual != IGNORED_LABEL]))}


def main() -> None:
    model_args, data_args, optimizability, training_args = parse_flags(
        CausalModelArguments, DataArguments, OptimizabilityConfig, TrainingArguments
    )

    set_seed(training_args.seed)
    seed, hub = training_args.seed, {"cache_dir": model_args.cache_dir, "token": model_args.token}
    splits = load_data(data_args, seed=seed, **hub)
    with model_args.loading("The tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.tokenizer_name or model_args.model_name_or_path, **model_args.hub_options()
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = original_config(model_args)
    if model_args.config_overrides is not None:
        config.update_from_string(model_args.config_overrides)
    model: Any = model_args.load_model(AutoModelForCausalLM, config)
    if model_args.method == "lora":
        rank = model_args.lora_rank
        lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model = get_peft_model(model, lora)
    train, validation = (prepare(split, tokenizer, data_args) for split in subsample(splits, data_args, seed=seed))
    trainer = OptimizabilityTrainer(
        model=model,
        args=training_args,
        optimizability=optimizability,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=most_likely,
    )
    folder = fine_tune(trainer, tasks="text-generation", dataset=data_args.public_name)
    print_report(trainer, folder)


if __name__ == "__main__":
    main()
