# SPDX-License-Identifier: Apache-2.0
"""Runs a recipe as its command would, but in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


TINY_RUN = {
    "do_train": True,
    "do_eval": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "profile": "light",
    "probe_examples": 4,
    "max_hvps": 16,
    "pool_examples": 0,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}


@pytest.fixture
def run_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Calls a recipe's `main` with a `.json` file of arguments; gives back its output folder."""

    def run(recipe: ModuleType, **arguments: Any) -> Path:
        output = tmp_path / "out"
        file = tmp_path / "arguments.json"
        defaults = {**TINY_RUN, "output_dir": str(output), "cache_dir": str(tmp_path / "cache")}
        file.write_text(json.dumps({**defaults, **arguments}))
        monkeypatch.setattr(sys, "argv", [recipe.__name__, str(file)])
        recipe.main()
        return output

    return run
