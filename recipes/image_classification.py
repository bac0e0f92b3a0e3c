# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-optimizability[vision]"]
# ///
r"""Fine-tune a vision checkpoint to classify images, and write its optimizability report.

Any checkpoint and data set of the Hub, or local ones:

    python recipes/image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name ethz/food101 --max_train_samples 4000 --max_eval_samples 1000 --do_train --do_eval \
        --learning_rate 5e-5 --num_train_epochs 1 --logging_steps 10 --output_dir out/food101

    python recipes/image_classification.py recipes/demo/vision.json

The report is written to the folder `optimizability` inside `--output_dir`, unless `--report_dir` names another.
Images go through the checkpoint's own image processor, in training as in evaluation; there is no augmentation.
"""

from __future__ import annotations

from transformers import TrainingArguments

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
from hf_optimizability.tasks import image_classification
from hf_optimizability.tasks.fine_tuning import fine_tune, load, parse_flags, print_report


def main() -> None:
    model_args, data_args, optimizability, training_args = parse_flags(
        image_classification.ModelArguments,
        image_classification.DataArguments,
        OptimizabilityConfig,
        TrainingArguments,
    )

    inputs = load(image_classification, model_args, data_args, training_args)
    trainer = OptimizabilityTrainer(args=training_args, optimizability=optimizability, **inputs.as_kwargs())
    folder = fine_tune(trainer, tasks="image-classification", tags=["vision"], dataset=data_args.public_name)
    print_report(trainer, folder)


if __name__ == "__main__":
    main()
