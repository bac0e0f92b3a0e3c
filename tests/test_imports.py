# SPDX-License-Identifier: Apache-2.0
"""What importing the package loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hf_optimizability


def test_core_import_leaves_heavy_packages_alone():
    script = "import sys, hf_optimizability; print(*(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded and "hf_optimizability" in loaded
    assert not {"datasets", "evaluate", "matplotlib", "pandas", "sklearn"} & set(loaded)


def test_public_names_are_there():
    for name in hf_optimizability.__all__:
        assert getattr(hf_optimizability, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'compare_nothing'"):
        hf_optimizability.compare_nothing  # noqa: B018
