# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-optimizability[vision]"]
# ///
r"""Train an image and a text encoder to find each other's example in a batch, and write their optimizability report.

A CLIP of the Hub on images with captions; or, with `--vision_model_name_or_path`, two encoders with new projections:

    python recipes/contrastive_image_text.py --model_name_or_path openai/clip-vit-base-patch32 \
        --dataset_name jxie/flickr8k --caption_column_name caption_0 --max_train_samples 2048 --max_eval_samples 512 \
        --do_train --do_eval --per_device_train_batch_size 64 --per_device_eval_batch_size 64 --probe_batch_size 64 \
        --learning_rate 1e-5 --num_train_epochs 1 --logging_steps 4 --output_dir out/flickr8k

    python recipes/contrastive_image_text.py recipes/demo/contrastive_image_text.json

The report is written to the folder `optimizability` inside `--output_dir`, unless `--report_dir` names another.
The loss of an example depends on the others in its batch. So it is measured in batches of the size that is trained on,
and batches that are not full are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedTokenizerBase,
    TrainingArguments,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    set_seed,
)

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
from hf_optimizability.tasks.checkpoint import original_config
from hf_optimizability.tasks.datasets import DataSetArguments, load_data, subsample
from hf_optimizability.tasks.fine_tuning import fine_tune, parse_flags, print_report
from hf_optimizability.tasks.text_classification import ModelArguments


@dataclass
class EncoderArguments(ModelArguments):
    """Which checkpoint to fine-tune; all of its weights."""

    vision_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Image encoder to combine with --model_name_or_path, which is then a text encoder."},
    )
    random_vision_weights: bool = field(
        default=False, metadata={"help": "Take the image encoder's architecture only, with new random weights."}
    )


@dataclass
class DataArguments(DataSetArguments):
    """Which images and captions to train and evaluate on."""

    image_column_name: str = field(default="image", metadata={"help": "Column of the image."})
    caption_column_name: str = field(default="caption", metadata={"help": "Column of the caption, or of a class."})
    caption_template: str = field(
        default="a photo of {}", metadata={"help": "What a caption says if the column holds classes; {} is the name."}
    )
    max_seq_length: int = field(default=77, metadata={"help": "Cut longer captions to this number of tokens."})


def require_one_batch_size(args: TrainingArguments, config: OptimizabilityConfig) -> None:
    """Raise if the loss that is measured would differ from the one that is trained."""
    size, probe = args.per_device_train_batch_size, config.budget.probe_examples
    if config.probe_batch_size != size or args.per_device_eval_batch_size != size or probe % size:
        raise ValueError(
            f"Batches are of {size} examples in training, {args.per_device_eval_batch_size} in evaluation and "
            f"{config.probe_batch_size} in measuring, on {probe} examples. A contrastive loss is lower, the fewer "
            "negatives there are: give --per_device_train_batch_size, --per_device_eval_batch_size and "
            "--probe_batch_size one value, and --probe_examples a multiple of it."
        )


def load_model(args: EncoderArguments) -> Any:
    """Load a dual encoder, or two encoders as one with new projections between them."""
    if args.vision_model_name_or_path is None:
        return args.load_model(AutoModel, original_config(args))
    name, hub = args.vision_model_name_or_path, args.hub_options()
    with args.loading("The text or image encoder"):
        if args.random_vision_weights:
            vision = AutoModel.from_config(AutoConfig.from_pretrained(name, **hub))
        else:
            vision = AutoModel.from_pretrained(name, **hub)
    text = args.load_model(AutoModel, original_config(args))
    model = VisionTextDualEncoderModel(vision_model=vision, text_model=text)
    model.name_or_path = " + ".join(Path(part).name for part in (args.model_name_or_path, name))  # for the report
    return model


def prepare(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, processor: BaseImageProcessor, args: DataArguments
) -> Dataset:
    """Convert images and captions whenever examples are fetched, so that no processed image is stored."""
    for column in (args.image_column_name, args.caption_column_name):
        if column not in examples.column_names:
            raise ValueError(
                f"There is no column {column!r}, only {', '.join(examples.column_names)}; pass --image_column_name or "
                "--caption_column_name."
            )
    kind = examples.features[args.caption_column_name]

    def caption(value: Any) -> str:
        return args.caption_template.format(kind.int2str(value)) if isinstance(kind, ClassLabel) else value

    def process(batch: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[args.image_column_name]]
        captions = [caption(value) for value in batch[args.caption_column_name]]
        tokens = tokenizer(captions, truncation=True, max_length=args.max_seq_length)
        return {**processor(images, return_tensors="pt"), **tokens}

    return examples.with_transform(process)


def main() -> None:
    model_args, data_args, optimizability, training_args = parse_flags(
        EncoderArguments, DataArguments, OptimizabilityConfig, TrainingArguments
    )
    require_one_batch_size(training_args, optimizability)
    training_args.remove_unused_columns = False  # images and captions are made into inputs when they are fetched
    training_args.dataloader_drop_last = True

    set_seed(training_args.seed)
    hub = model_args.hub_options()
    splits = load_data(data_args, seed=training_args.seed, cache_dir=model_args.cache_dir, token=model_args.token)
    with model_args.loading("The tokenizer or the image processor"):
        text = model_args.tokenizer_name or model_args.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(text, **hub)
        vision = model_args.vision_model_name_or_path or model_args.model_name_or_path
        processor = AutoImageProcessor.from_pretrained(vision, **hub)
    model = load_model(model_args)
    train, validation = (
        prepare(split, tokenizer, processor, data_args)
        for split in subsample(splits, data_args, seed=training_args.seed)
    )

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        images = torch.stack([row["pixel_values"] for row in rows])
        captions = tokenizer.pad(
            [{name: value for name, value in row.items() if name != "pixel_values"} for row in rows],
            return_tensors="pt",
        )
        return {**captions, "pixel_values": images, "return_loss": True}

    trainer = OptimizabilityTrainer(
        model=model,
        args=training_args,
        optimizability=optimizability,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=VisionTextDualEncoderProcessor(processor, tokenizer),
        data_collator=collate,
    )
    folder = fine_tune(trainer, tasks="zero-shot-image-classification", tags=["vision"], dataset=data_args.public_name)
    print_report(trainer, folder)


if __name__ == "__main__":
    main()
