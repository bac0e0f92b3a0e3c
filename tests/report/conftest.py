# SPDX-License-Identifier: Apache-2.0
"""A browser for the pages."""

from __future__ import annotations

from tests.support.browser import browser, show  # noqa: F401  (fixtures)
