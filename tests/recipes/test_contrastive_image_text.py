# SPDX-License-Identifier: Apache-2.0
"""The recipe for images and captions, on encoders of a second: the loss is that of the batches that are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import contrastive_image_text
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch.nn import functional as F
from transformers import AutoModel, VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

from hf_optimizability.objective.probe_set import probe_indices
from tests.support import tiny_models, tiny_texts


CHECKPOINTS = Path(__file__).parents[2] / "recipes/checkpoints"


@pytest.fixture
def text_encoder(tmp_path: Path) -> str:
    return tiny_texts.save_checkpoint(tmp_path / "tiny-bert")


@pytest.fixture
def vision_encoder(tmp_path: Path) -> str:
    folder = tmp_path / "tiny-vit"
    tiny_models.vit(num_channels=3, hidden_size=16, intermediate_size=32).save_pretrained(folder)
    settings = json.loads((CHECKPOINTS / "vit_small_architecture/preprocessor_config.json").read_text())
    settings["size"] = {"height": 8, "width": 8}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture
def train_file(tmp_path: Path) -> str:
    generator = np.random.default_rng(0)
    rows = {
        "image": list(generator.integers(0, 256, (8, 9, 9, 3), dtype=np.uint8)),
        "caption": ["good film", "bad film", "a film", "the film", "very good", "very bad", "good", "bad"],
    }
    features = Features(image=Image(), caption=Value("string"))
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    return str(tmp_path / "train.parquet")


def test_the_loss_is_told_from_the_others_of_a_training_batch(
    text_encoder: str,
    vision_encoder: str,
    train_file: str,
    run_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
):
    output = run_recipe(
        contrastive_image_text,
        model_name_or_path=text_encoder,
        vision_model_name_or_path=vision_encoder,
        train_file=train_file,
        validation_file=train_file,
        per_device_eval_batch_size=4,
        probe_batch_size=4,
        probe_examples=8,
        learning_rate=1e-12,
        seed=3,
    )
    report = json.loads((output / "optimizability/report.json").read_text())
    assert not report["failures"]
    assert [measurement["step"] for measurement in report["measurements"]] == [0, 2]

    assert report["model"]["id"] == "tiny-bert + tiny-vit"

    model = VisionTextDualEncoderModel.from_pretrained(output).eval()
    pretrained = AutoModel.from_pretrained(text_encoder).state_dict()
    for name, weights in model.text_model.state_dict().items():
        torch.testing.assert_close(weights, pretrained[name], msg=name)
    processor = VisionTextDualEncoderProcessor.from_pretrained(output)
    rows = Dataset.from_parquet(train_file)
    losses = []
    for batch in np.split(np.array(probe_indices(8, 8, seed=0)), 2):
        chosen = rows.select(batch)
        inputs = processor(text=chosen["caption"][:], images=chosen["image"][:], padding=True, return_tensors="pt")
        with torch.no_grad():
            similarity = model(**inputs).logits_per_text.double()
        own = torch.arange(4)
        losses.append((F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2)
    assert report["measurements"][0]["loss"] == pytest.approx(float(sum(losses) / 2), rel=1e-5)
    assert capsys.readouterr().out.endswith(f"Report: {output / 'optimizability/report.md'}\n")


def test_other_batches_in_measuring_than_in_training_are_refused(
    text_encoder: str, train_file: str, run_recipe: Callable[..., Path]
):
    settings = {"model_name_or_path": text_encoder, "train_file": train_file, "per_device_eval_batch_size": 4}
    for other in ({"probe_batch_size": 2}, {"probe_batch_size": 4, "probe_examples": 6}):
        with pytest.raises(ValueError, match="lower, the fewer negatives"):
            run_recipe(contrastive_image_text, **{**settings, "probe_examples": 8, **other})


def test_captions_of_classes_are_made_of_their_names(text_encoder: str):
    features = Features(image=Image(), label=ClassLabel(names=["good", "bad"]))
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    examples = Dataset.from_dict({"image": [image, image], "label": [1, 0]}, features=features)
    args = contrastive_image_text.DataArguments(
        dataset_name="none", caption_column_name="label", caption_template="a very {} film"
    )
    tokenizer = tiny_texts.tokenizer()
    processor = contrastive_image_text.AutoImageProcessor.from_pretrained(CHECKPOINTS / "vit_small_architecture")
    prepared = contrastive_image_text.prepare(examples, tokenizer, processor, args)
    assert [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in prepared] == [
        "a very bad film",
        "a very good film",
    ]
    assert prepared[0]["pixel_values"].shape == (3, 32, 32)
