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

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import evaluate
import numpy as np
from datasets import Dataset, Image
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
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
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if not the checkpoint's own."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the configuration, for example classifier_dropout_prob=0.2."}
    )
    batch_norm_momentum: float | None = field(
        default=None,
        metadata={"help": "Weight of a new batch in BatchNorm's running statistics, if not the model's own."},
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
    """Which images to train and evaluate on."""

    SOURCES: ClassVar[tuple[str, ...]] = ("dataset_name", "train_file", "train_dir")

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with one folder of images a class, to train on."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    image_column_name: str = field(default="image", metadata={"help": "Column of the image."})
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width in pixels, if not the image processor's own."}
    )

    def loader(self) -> tuple[str, dict[str, str] | None]:
        """As before, and folders of images."""
        if self.train_dir is None:
            return super().loader()
        folders = {"train": self.train_dir}
        if self.validation_dir is not None:
            folders["validation"] = self.validation_dir
        return "imagefolder", {split: f"{folder}/**" for split, folder in folders.items()}


def main() -> None:
    arguments = (ModelArguments, DataArguments, OptimizabilityConfig, TrainingArguments)
    parser = HfArgumentParser(arguments)  # type: ignore[arg-type]  # its annotation fits no dataclass
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, optimizability, training_args = parser.parse_json_file(sys.argv[1])
    else:
        model_args, data_args, optimizability, training_args = parser.parse_args_into_dataclasses()
    # The image is turned into the model's input only when it is fetched: the Trainer must not drop its column.
    training_args.remove_unused_columns = False
    set_seed(training_args.seed)

    train, validation, names = load_splits(
        data_args, seed=training_args.seed, cache_dir=model_args.cache_dir, token=model_args.token
    )
    model, processor = load_model(model_args, names)
    if data_args.image_size is not None:
        resize(processor, data_args.image_size)

    metrics = evaluate.combine([str(METRICS / "accuracy.py"), str(METRICS / "f1.py")])

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return metrics.compute(predictions=np.argmax(logits, axis=1), references=prediction.label_ids)

    trainer = OptimizabilityTrainer(
        model=model,
        args=training_args,
        train_dataset=with_pixels(train, processor, data_args),
        eval_dataset=with_pixels(validation, processor, data_args),
        compute_metrics=compute_metrics,
        processing_class=processor,
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

    card = {"tasks": "image-classification", "tags": ["vision"], "dataset": data_args.public_name}
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def load_model(args: ModelArguments, names: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Loads the checkpoint with a head for the classes `names`, and its image processor."""
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
    model = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path,
        config=config,
        dtype=args.dtype,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        **hub,
    )
    if args.batch_norm_momentum is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = args.batch_norm_momentum
    return model, AutoImageProcessor.from_pretrained(args.image_processor_name or args.model_name_or_path, **hub)


def resize(processor: Any, pixels: int) -> None:
    """Makes the image processor give images of `pixels` × `pixels`, cropped where it crops."""
    square = {"height": pixels, "width": pixels}
    if "shortest_edge" in processor.size:
        processor.size = {"shortest_edge": pixels}
        processor.crop_size = square
    else:
        processor.size = square


def with_pixels(examples: Dataset, processor: BaseImageProcessor, args: DataArguments) -> Dataset:
    """Gives the model's inputs whenever examples are fetched, so that no processed image is stored."""
    if not isinstance(examples.features.get(args.image_column_name), Image):
        raise ValueError(
            f"Column {args.image_column_name!r} holds no images; pass one of {examples.column_names} that does as "
            "--image_column_name."
        )

    def process(batch: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[args.image_column_name]]
        return {**processor(images, return_tensors="pt"), "labels": batch[args.label_column_name]}

    return examples.with_transform(process)


if __name__ == "__main__":
    main()
