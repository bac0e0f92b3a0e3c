# SPDX-License-Identifier: Apache-2.0
"""What importing the package loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hf_optimizability


def loaded_by(script: str) -> set[str]:
    script = f"import sys, hf_optimizability; {script}; print(*(m for m in sys.modules if '.' not in m))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_the_package_alone_loads_next_to_nothing():
    loaded = loaded_by("import hf_optimizability.cli")
    assert "hf_optimizability" in loaded and "typer" in loaded
    assert not {"torch", "transformers", "numpy", "rich"} & loaded


def test_core_import_leaves_heavy_packages_alone():
    names = [name for name in hf_optimizability.__all__ if "Trainer" not in name]
    loaded = loaded_by(f"from hf_optimizability import {', '.join(names)}")
    assert "torch" in loaded and "hf_optimizability" in loaded
    assert not {"datasets", "evaluate", "matplotlib", "pandas", "sklearn"} & loaded


def test_rendering_a_report_leaves_training_alone():
    loaded = loaded_by("from hf_optimizability import OptimizabilityReport; OptimizabilityReport().to_html()")
    assert "jinja2" in loaded
    assert not {"accelerate", "datasets", "matplotlib", "peft"} & loaded


def test_a_function_is_not_hidden_by_the_module_of_its_name():
    script = "import hf_optimizability.measurement.forecast; from hf_optimizability import forecast, measure"
    assert loaded_by(f"{script}; assert callable(forecast) and callable(measure)")


def test_public_names_are_there():
    for name in hf_optimizability.__all__:
        assert getattr(hf_optimizability, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'compare_nothing'"):
        hf_optimizability.compare_nothing  # noqa: B018
