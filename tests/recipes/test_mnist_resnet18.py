# SPDX-License-Identifier: Apache-2.0
"""The walk-through on a small ResNet: small blocks' Hessians in full, against a closed form and the estimates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mnist_resnet18
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.objective.objective import Objective


ROOT = Path(__file__).parents[2]
SMALL = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}


def test_the_eigenvalues_of_the_classifier_are_those_of_its_closed_form():
    """Of a softmax over Wx + b it is the mean of (diag(p) − ppᵀ) ⊗ (x, 1)(x, 1)ᵀ."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**SMALL, num_labels=3)).eval()
    batch = {"pixel_values": torch.randn(5, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 0, 1])}
    block = Objective(model, [batch]).block(["classifier.1.weight", "classifier.1.bias"])
    found = mnist_resnet18.exact_eigenvalues(HessianOperator(block))

    with torch.no_grad():
        output = model.resnet(batch["pixel_values"])
        features = torch.cat([output.pooler_output.flatten(1), torch.ones(5, 1)], dim=1).double()
        shares = model(**batch).logits.double().softmax(-1)
    mean = sum(
        torch.kron(torch.diag(share) - torch.outer(share, share), torch.outer(feature, feature))
        for share, feature in zip(shares, features, strict=True)
    )
    expected = np.linalg.eigvalsh((mean / 5).numpy())
    np.testing.assert_allclose(found, expected, atol=1e-6 * expected[-1])


@pytest.fixture
def architecture(tmp_path: Path) -> Path:
    """A configuration without weights."""
    folder = tmp_path / "architecture"
    ResNetConfig(**SMALL).save_pretrained(folder)
    source = ROOT / "recipes/checkpoints/resnet18_architecture/preprocessor_config.json"
    (folder / source.name).write_text(source.read_text())
    return folder


@pytest.mark.slow  # tests/oracle shows the same of smaller models
def test_estimates_hold_what_the_whole_matrix_has(architecture: Path, run_recipe: Callable[..., Path]):
    settings = json.loads((ROOT / "recipes/demo/mnist_resnet18.json").read_text())
    del settings["output_dir"], settings["max_hvps"], settings["num_train_epochs"]
    settings |= {
        "model_name_or_path": str(architecture),
        "dataset_name": str(ROOT / "recipes/data/mnist_5k"),
        "image_size": 16,
        "max_train_samples": 16,
        "max_eval_samples": 20,
        "per_device_train_batch_size": 16,
        "blocks": ["*.embedder.normalization.*", "classifier.*"],
        "exact_parameters": 140,
    }
    output = run_recipe(mnist_resnet18, **settings)
    folder = output / "optimizability"
    rows = json.loads((folder / "exact.json").read_text())
    assert {row["block"] for row in rows} == {"*.embedder.normalization.*", "classifier.*"}
    assert len(rows) == 12
    for row in rows:
        slack = 0.5 * (row["high"] - row["low"]) + 1e-6 * abs(row["exact"])  # of 12 intervals of 95 %
        assert row["low"] - slack <= row["exact"] <= row["high"] + slack, row
    assert (folder / "exact.png").read_bytes().startswith(b"\x89PNG")
    assert AutoModelForImageClassification.from_pretrained(output).config.hidden_sizes == [8, 12]
