# SPDX-License-Identifier: Apache-2.0
"""Tests are laid out like the package, and share code through `tests/support` only."""

from __future__ import annotations

import ast
from pathlib import Path

import hf_optimizability


TESTS = Path(__file__).parent
ACROSS_ROOMS = {"integration", "oracle", "recipes", "benchmarks", "support"}
"""Folders for what no single room does: whole trainings, the public API against known Hessians, scripts, helpers."""


def test_every_folder_is_named_for_a_room():
    rooms = {path.parent.name for path in Path(hf_optimizability.__file__).parent.glob("*/__init__.py")}
    assert {path.parent.name for path in TESTS.glob("*/*.py")} <= rooms | ACROSS_ROOMS


def test_no_test_imports_a_test():
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for name in (*names, *module.split(".")):
                assert not name.rpartition(".")[2].startswith("test_"), f"{path.relative_to(TESTS)} imports {name}"
