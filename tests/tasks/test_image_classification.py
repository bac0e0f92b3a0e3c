# SPDX-License-Identifier: Apache-2.0
"""From images to pixels, with the carried MobileNetV2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import BatchNorm2d
from transformers import ViTImageProcessor

from hf_optimizability.tasks import image_classification
from hf_optimizability.tasks.datasets import load_splits


CHECKPOINT = str(Path(__file__).parents[2] / "recipes/checkpoints/mobilenet_v2_1.0")
MNIST = str(Path(__file__).parents[2] / "recipes/data/mnist_5k")


def test_carried_checkpoint_is_loaded_in_float32_with_the_asked_batch_norm() -> None:
    args = image_classification.ModelArguments(model_name_or_path=CHECKPOINT, batch_norm_momentum=0.1)
    model, _ = image_classification.load_model(args, [str(digit) for digit in range(10)])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {module.momentum for module in model.modules() if isinstance(module, BatchNorm2d)} == {0.1}
    assert model.classifier.out_features == 10


def test_grey_images_become_normalized_rgb(tmp_path: Path) -> None:
    args = image_classification.DataArguments(dataset_name=MNIST)
    train, validation, names = load_splits(args, seed=0, cache_dir=str(tmp_path), token=None)
    assert (len(train), len(validation), names) == (4000, 1000, [str(digit) for digit in range(10)])
    _, processor = image_classification.load_model(
        image_classification.ModelArguments(model_name_or_path=CHECKPOINT), names
    )
    image_classification.resize(processor, 28)  # the images' own size: nothing is interpolated

    fetched = image_classification.prepare(train, processor, args)[:3]
    grey = np.stack([np.asarray(image) for image in train[:3]["image"]])[:, None] / 255
    mean, deviation = (np.array(values).reshape(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    np.testing.assert_allclose(fetched["pixel_values"], (grey - mean) / deviation, atol=1e-5)
    assert fetched["labels"] == train[:3]["label"]


def test_resizing_a_processor_that_does_not_crop() -> None:
    processor = ViTImageProcessor()
    image_classification.resize(processor, 24)
    pixels = processor(Image.new("RGB", (50, 30)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 24, 24)


def test_a_column_without_images_fails_by_name() -> None:
    examples = Dataset.from_dict({"image": ["a.png"], "label": [0]})
    args = image_classification.DataArguments(train_file="a.csv")
    with pytest.raises(ValueError, match=r"'image' holds no images; pass one of \['image', 'label'\]"):
        image_classification.prepare(examples, None, args)


def test_two_sources_of_images_fail_by_name() -> None:
    with pytest.raises(ValueError, match="got train_file, train_dir"):
        image_classification.DataArguments(train_file="a.parquet", train_dir="images")
