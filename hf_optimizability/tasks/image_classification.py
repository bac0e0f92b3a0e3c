# SPDX-License-Identifier: Apache-2.0
"""Images to classify. They go through the checkpoint's own image processor; there is no augmentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset, Image
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)

from .checkpoint import CheckpointArguments, load_config
from .datasets import LabelledDataArguments


NAME = "image-classification"
MODELS = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


@dataclass
class ModelArguments(CheckpointArguments):
    """Which checkpoint to fine-tune."""

    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if not the checkpoint's own."}
    )
    batch_norm_momentum: float | None = field(
        default=None,
        metadata={"help": "Weight of a new batch in BatchNorm's running statistics, if not the model's own."},
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
        """Return what to call `datasets.load_dataset` with, which may be a folder of images."""
        if self.train_dir is None:
            return super().loader()
        folders = {"train": self.train_dir}
        if self.validation_dir is not None:
            folders["validation"] = self.validation_dir
        return "imagefolder", {split: f"{folder}/**" for split, folder in folders.items()}


def load_model(args: ModelArguments, names: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load the checkpoint with a head for the classes `names`, and its image processor."""
    config = load_config(args, names)
    model = args.load_model(AutoModelForImageClassification, config)
    if args.batch_norm_momentum is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = args.batch_norm_momentum
    with args.loading("The image processor"):
        name = args.image_processor_name or args.model_name_or_path
        return model, AutoImageProcessor.from_pretrained(name, **args.hub_options())


def prepare(examples: Dataset, processor: BaseImageProcessor, args: DataArguments) -> Dataset:
    """Convert images to inputs whenever examples are fetched, so that no processed image is stored."""
    if args.image_size is not None:
        resize(processor, args.image_size)
    if not isinstance(examples.features.get(args.image_column_name), Image):
        raise ValueError(
            f"Column {args.image_column_name!r} holds no images; pass one of {examples.column_names} that does as "
            "--image_column_name."
        )

    def process(batch: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[args.image_column_name]]
        return {**processor(images, return_tensors="pt"), "labels": batch[args.label_column_name]}

    return examples.with_transform(process)


def resize(processor: Any, pixels: int) -> None:
    """Make the image processor output images of `pixels` × `pixels`, cropped where it crops."""
    square = {"height": pixels, "width": pixels}
    if "shortest_edge" in processor.size:
        processor.size = {"shortest_edge": pixels}
        processor.crop_size = square
    else:
        processor.size = square
