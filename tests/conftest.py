# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests."""

from __future__ import annotations

import os

import pytest


# Nothing may reach a Hub but the tests that bring their own stub, in processes of their own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

LOOKED_AT = {"report", "report_data", "test_docs.py"}
"""Where under this folder the plots of reports are looked at."""


@pytest.fixture(autouse=True)
def plots_are_drawn_where_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if LOOKED_AT.isdisjoint(request.path.relative_to(request.config.rootpath).parts):
        from tests.support.blank_plots import leave_plots_undrawn  # loads the package, which reads the environment

        leave_plots_undrawn(monkeypatch)
