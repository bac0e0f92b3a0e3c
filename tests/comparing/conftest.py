# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint and its data, to compare on in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_optimizability.comparing.results import Run
from hf_optimizability.comparing.training import Inputs
from tests.support import tiny_texts
from tests.support.browser import browser, show  # noqa: F401  (fixtures)
from tests.support.tiny_comparison import flags_of, trained


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and a data set of sixteen sentences."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_texts.save_checkpoint(folder / "tiny-bert")
    tiny_texts.save_data(folder / "data.parquet")
    return folder


@pytest.fixture
def flags(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("hf_optimizability.report.figures.plot_all", lambda report: {})  # which takes seconds
    return flags_of(inputs, tmp_path / "out")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int, int]]:
    """Replaces training: the learning rate is the quality. Learning rate, seed and steps of each training made."""
    calls: list[tuple[float, int, int]] = []

    def train(inputs: Inputs, **options: object) -> Run:
        args = inputs.training
        calls.append((args.learning_rate, args.seed, args.max_steps))
        return trained(inputs, quality=args.learning_rate)

    monkeypatch.setattr("hf_optimizability.comparing.training.train", train)
    return calls
