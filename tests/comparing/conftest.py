# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint and its data, to compare on in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_texts
from tests.support.browser import browser, show  # noqa: F401  (fixtures)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and a data set of sixteen sentences."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_texts.save_checkpoint(folder / "tiny-bert")
    tiny_texts.save_data(folder / "data.parquet")
    return folder


@pytest.fixture
def flags(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What candidates share; a training takes some tenths of a second."""
    monkeypatch.setattr("hf_optimizability.report.figures.plot_all", lambda report: {})  # which takes seconds
    data = str(inputs / "data.parquet")
    return {
        "model_name_or_path": str(inputs / "tiny-bert"), "train_file": data, "validation_file": data,
        "text_column_name": ["sentence"], "ignore_mismatched_sizes": True, "cache_dir": str(inputs / "cache"),
        "output_dir": str(tmp_path / "out"), "budget_steps": 4, "seeds": 2, "measured_seeds": 0,
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "probe_examples": 4, "max_hvps": 16,
        "dataloader_pin_memory": False,
    }  # fmt: skip
