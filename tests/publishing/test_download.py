# SPDX-License-Identifier: Apache-2.0
"""A recipe that downloads and pushes: the real client, in a process of its own, against a loopback Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.support.hub_stub import COMMIT, WRITER, serve


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_recipe_downloads_checkpoint_and_data_and_pushes_what_it_made(tmp_path: Path) -> None:
    repositories = {
        "org/mobilenet": ROOT / "recipes/checkpoints/mobilenet_v2_1.0",
        "datasets/org/digits": ROOT / "recipes/data/mnist_5k",
    }
    arguments = {
        "model_name_or_path": "org/mobilenet", "dataset_name": "org/digits", "image_size": 32, "do_train": True,
        "max_train_samples": 32, "max_eval_samples": 8, "max_steps": 2, "per_device_train_batch_size": 4,
        "profile": "light", "probe_examples": 8, "max_hvps": 16, "output_dir": str(tmp_path / "out"),
        "push_to_hub": True, "hub_model_id": "ada/tuned",
    }  # fmt: skip
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    with serve(repositories) as hub:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {
            **inherited,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": WRITER,
            "NO_PROXY": "127.0.0.1",
        }
        run = subprocess.run(
            [sys.executable, ROOT / "recipes/image_classification.py", tmp_path / "arguments.json"],
            env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert f"GET /org/mobilenet/resolve/{COMMIT}/{file}" in hub.requests
    assert f"GET /datasets/org/digits/resolve/{COMMIT}/train.parquet" in hub.requests

    report = json.loads((tmp_path / "out/optimizability/report.json").read_text())
    assert report["model"]["id"] == "org/mobilenet"
    assert [measurement["step"] for measurement in report["measurements"]] == [0, 2]
    assert "base_model: org/mobilenet" in (tmp_path / "out/README.md").read_text()
    pushed = hub.repositories["ada/tuned"]
    assert [commit.summary for commit in pushed.commits[-2:]] == ["Model save", "End of training"]
    assert b"## Optimizability" in pushed.commits[-2].files["README.md"]  # with the model, not after it
    assert pushed.files.keys() >= {
        "model.safetensors",
        "README.md",
        "optimizability/report.md",
        "optimizability/loss.png",
    }
    assert pushed.files["optimizability/report.json"] == (tmp_path / "out/optimizability/report.json").read_bytes()
    card = ModelCard(pushed.files["README.md"].decode())
    assert set(card.data.tags) == {"generated_from_trainer", "optimizability", "vision"}
    assert "optimizability_hessian_trace" in {result.metric_type for result in card.data.eval_results}
    assert "## Optimizability" in card.text
