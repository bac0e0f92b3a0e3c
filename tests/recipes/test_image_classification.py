# SPDX-License-Identifier: Apache-2.0
"""The vision recipe from a folder of images to a report, with the carried MobileNetV2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import image_classification
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import BatchNorm2d
from transformers import AutoModelForImageClassification, ViTImageProcessor


CHECKPOINT = str(Path(__file__).parents[2] / "recipes/checkpoints/mobilenet_v2_1.0")
MNIST = str(Path(__file__).parents[2] / "recipes/data/mnist_5k")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Dark and light grey images, a folder a class."""
    generator = np.random.default_rng(0)
    for name, level in {"dark": 40, "light": 180}.items():
        for number in range(6):
            pixels = generator.integers(level, level + 40, (40, 36), dtype=np.uint8)
            path = tmp_path / "images" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def test_a_run_ends_with_checkpoint_metrics_card_and_report(
    folder: Path, run_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = run_recipe(
        image_classification,
        model_name_or_path=CHECKPOINT,
        train_dir=str(folder),
        validation_dir=str(folder),
        image_size=32,
        config_overrides="classifier_dropout_prob=0.25",
    )
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.id2label == {0: "dark", 1: "light"}
    assert model.config.classifier_dropout_prob == 0.25
    assert model.dtype == torch.float32
    assert json.loads((output / "preprocessor_config.json").read_text())["crop_size"] == {"height": 32, "width": 32}
    metrics = json.loads((output / "all_results.json").read_text())
    assert metrics.keys() >= {"train_loss", "eval_loss", "eval_accuracy", "eval_f1"}

    report = json.loads((output / "optimizability/report.json").read_text())
    assert [measurement["step"] for measurement in report["measurements"]] == [0, 2]
    assert not report["failures"]
    assert "- vision" in (output / "README.md").read_text()
    assert capsys.readouterr().out.endswith(f"Report: {output / 'optimizability/report.md'}\n")


def test_carried_checkpoint_is_loaded_in_float32_with_the_asked_batch_norm() -> None:
    args = image_classification.ModelArguments(model_name_or_path=CHECKPOINT, batch_norm_momentum=0.1)
    model, _ = image_classification.load_model(args, [str(digit) for digit in range(10)])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {module.momentum for module in model.modules() if isinstance(module, BatchNorm2d)} == {0.1}
    assert model.classifier.out_features == 10


def test_grey_images_become_normalized_rgb(tmp_path: Path) -> None:
    args = image_classification.DataArguments(dataset_name=MNIST)
    train, validation, names = image_classification.load_splits(args, seed=0, cache_dir=str(tmp_path), token=None)
    assert (len(train), len(validation), names) == (4000, 1000, [str(digit) for digit in range(10)])
    _, processor = image_classification.load_model(
        image_classification.ModelArguments(model_name_or_path=CHECKPOINT), names
    )
    image_classification.resize(processor, 28)  # the images' own size: nothing is interpolated

    fetched = image_classification.with_pixels(train, processor, args)[:3]
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
        image_classification.with_pixels(examples, None, args)


def test_two_sources_of_images_fail_by_name() -> None:
    with pytest.raises(ValueError, match="got train_file, train_dir"):
        image_classification.DataArguments(train_file="a.parquet", train_dir="images")
