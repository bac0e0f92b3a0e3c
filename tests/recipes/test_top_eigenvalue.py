# SPDX-License-Identifier: Apache-2.0
"""The top eigenvalue over a run: on all training examples, and beside SciPy's and PyHessian's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import top_eigenvalue
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from transformers import AutoModelForImageClassification, TrainingArguments

from hf_optimizability.report import OptimizabilityReport
from hf_optimizability.tasks import image_classification
from hf_optimizability.tasks.fine_tuning import load


ROOT = Path(__file__).parents[2]
EXAMPLES = 24


def scipys_top_eigenvalue(checkpoint: Path, settings: dict[str, object], tmp_path: Path) -> float:
    """By ARPACK, on a Hessian in float64 of all examples in one batch."""
    names = ("dataset_name", "image_size", "max_train_samples", "max_eval_samples")
    model = AutoModelForImageClassification.from_pretrained(checkpoint, attn_implementation="eager").double().eval()
    examples = load(
        image_classification,
        image_classification.ModelArguments(model_name_or_path=str(checkpoint)),
        image_classification.DataArguments(**{name: settings[name] for name in names}),
        TrainingArguments(output_dir=str(tmp_path)),
    ).train_dataset[:EXAMPLES]
    pixels = torch.stack([torch.as_tensor(image) for image in examples["pixel_values"]]).double()
    loss = model(pixel_values=pixels, labels=torch.tensor(examples["labels"])).loss
    parameters = list(model.parameters())
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, create_graph=True)])

    def product(vector: np.ndarray) -> np.ndarray:
        parts = torch.autograd.grad(
            gradient, parameters, torch.from_numpy(vector.ravel().copy()), retain_graph=True, materialize_grads=True
        )
        return torch.cat([part.flatten() for part in parts]).numpy()

    operator = LinearOperator((len(gradient),) * 2, matvec=product, dtype=np.float64)
    return float(eigsh(operator, k=1, which="LA", tol=1e-8, return_eigenvectors=False)[0])


@pytest.mark.slow
def test_it_is_that_of_the_full_training_set(run_recipe: Callable[..., Path], tmp_path: Path):
    settings = json.loads((ROOT / "recipes/demo/top_eigenvalue.json").read_text())
    del settings["output_dir"]
    settings |= {
        "model_name_or_path": str(ROOT / settings["model_name_or_path"]),
        "dataset_name": str(ROOT / settings["dataset_name"]),
        "config_overrides": "hidden_size=8,intermediate_size=12,num_hidden_layers=1,image_size=28,patch_size=7",
        "max_train_samples": EXAMPLES,
        "max_eval_samples": 20,
        "max_steps": -1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 12,
        "probe_batch_size": 12,
        "max_hvps": 60,
        "eigen_tolerance": 1e-3,
        "compare_pyhessian": True,
    }
    output = run_recipe(top_eigenvalue, **settings)

    folder = output / "optimizability"
    rows = json.loads((folder / "top_eigenvalue.json").read_text())
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert [one.num_items for one in OptimizabilityReport.load(folder).measurements] == [EXAMPLES] * 3
    top = rows[-1]["lambda_max"]
    truth = scipys_top_eigenvalue(output, settings, tmp_path)
    assert abs(top["value"] - truth) <= top["residual"] + 1e-4 * truth
    for row in rows:
        assert row["pyhessian"]["lambda_max"] == pytest.approx(row["lambda_max"]["value"], rel=0.1)
        assert row["pyhessian"]["hvps"] > 1
    assert (folder / "top_eigenvalue.png").read_bytes().startswith(b"\x89PNG")
