# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest


# Last: a benchmark has the name of the package `coverage`, which pytest-cov imports.
sys.path.append(os.path.join(os.path.dirname(__file__), "..", "benchmarks"))
# Nothing may reach a Hub but the tests that bring their own stub, in processes of their own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# trackio chooses its folder when it is first imported, whoever does it.
os.environ["TRACKIO_DIR"] = os.path.join(tempfile.gettempdir(), f"trackio-of-tests-{os.getpid()}")

LOOKED_AT = {"report", "report_data", "test_docs.py", "test_quantities_table.py"}
"""Where under this folder the plots of reports are looked at."""

EXEMPT: set[str] = set()
"""Modules that are exempt from garbage collection."""


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)


def pytest_runtest_setup() -> None:
    """Exempts what was imported from garbage collection: each Trainer collects, which takes longer than its steps."""
    if len(sys.modules) > len(EXEMPT) + 20:
        EXEMPT.update(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def plots_are_drawn_where_looked_at(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if LOOKED_AT.isdisjoint(request.path.relative_to(request.config.rootpath).parts):
            from tests.support.blank_plots import leave_plots_undrawn  # loads the package, which reads the environment

            leave_plots_undrawn(patch)
        yield


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trainings measure loss and gradient alone after the first measurement of their kind."""
    from tests.support.quick_measurements import measure_quickly  # loads the package, which reads the environment

    measure_quickly(monkeypatch)
