# SPDX-License-Identifier: Apache-2.0
"""The vision recipe from a folder of images to a report, with a narrow MobileNetV2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import image_classification
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, MobileNetV2Config, MobileNetV2Model


CARRIED = Path(__file__).parents[2] / "recipes/checkpoints/mobilenet_v2_1.0"


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """In half precision and without a head, as the carried checkpoint, whose processor it has."""
    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.1, min_depth=4)
    MobileNetV2Model(config).half().save_pretrained(tmp_path / "narrow")
    shutil.copy(CARRIED / "preprocessor_config.json", tmp_path / "narrow")
    return str(tmp_path / "narrow")


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


@pytest.mark.slow  # test_text_recipe.py shows the same of text
def test_a_run_ends_with_checkpoint_metrics_card_and_report(
    checkpoint: str, folder: Path, run_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = run_recipe(
        image_classification,
        model_name_or_path=checkpoint,
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
