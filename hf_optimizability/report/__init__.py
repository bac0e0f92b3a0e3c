# SPDX-License-Identifier: Apache-2.0
"""The report: data, Markdown and plots. Nothing in here measures anything."""

from .report import SCHEMA_VERSION, OptimizabilityReport


__all__ = ["SCHEMA_VERSION", "OptimizabilityReport"]
