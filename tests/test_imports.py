# SPDX-License-Identifier: Apache-2.0
"""What importing the package loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hf_optimizability


STAGES = {
    "command": "import hf_optimizability.cli",
    "page": "from hf_optimizability import OptimizabilityReport; OptimizabilityReport().to_html()",
    "core": (
        "import hf_optimizability.measurement.measure; from hf_optimizability import {core}; assert callable(measure)"
    ),
    "plots": (
        "from hf_optimizability.report.figures import plot_all; "
        "assert list(plot_all(OptimizabilityReport(log_history=[dict(loss=1.0, step=1)]))) == ['loss']"
    ),
}
"""What one process does, each after the others."""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Modules that are loaded after each stage."""
    core = ", ".join(name for name in hf_optimizability.__all__ if "Trainer" not in name)
    lines = ["import sys"]
    for stage in STAGES.values():
        lines += [stage.replace("{core}", core), "print(*sys.modules)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return {stage: set(line.split()) for stage, line in zip(STAGES, done.stdout.splitlines(), strict=True)}


def test_the_command_loads_next_to_nothing(loaded: dict[str, set[str]]):
    assert {"hf_optimizability", "typer"} <= loaded["command"]
    assert not {"torch", "transformers", "numpy", "rich"} & loaded["command"]


def test_rendering_a_report_leaves_training_alone(loaded: dict[str, set[str]]):
    assert "jinja2" in loaded["page"]
    assert not {"accelerate", "datasets", "matplotlib", "peft"} & loaded["page"]


def test_core_import_leaves_heavy_packages_alone(loaded: dict[str, set[str]]):
    assert "torch" in loaded["core"]
    assert not {"datasets", "evaluate", "matplotlib", "pandas", "sklearn"} & loaded["core"]


def test_plots_leave_pyplot_alone(loaded: dict[str, set[str]]):
    assert "matplotlib" in loaded["plots"] and "matplotlib.pyplot" not in loaded["plots"]


def test_public_names_are_there():
    for name in hf_optimizability.__all__:
        assert getattr(hf_optimizability, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'compare_nothing'"):
        hf_optimizability.compare_nothing  # noqa: B018
