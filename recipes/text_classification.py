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

from transformers import TrainingArguments

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
from hf_optimizability.tasks import text_classification
from hf_optimizability.tasks.fine_tuning import fine_tune, load, parse_flags, print_report


def main() -> None:
    model_args, data_args, optimizability, training_args = parse_flags(
        text_classification.ModelArguments, text_classification.DataArguments, OptimizabilityConfig, TrainingArguments
    )

    inputs = load(text_classification, model_args, data_args, training_args)
    trainer = OptimizabilityTrainer(args=training_args, optimizability=optimizability, **inputs.as_kwargs())
    folder = fine_tune(trainer, tasks="text-classification", dataset=data_args.public_name)
    print_report(trainer, folder)


if __name__ == "__main__":
    main()
