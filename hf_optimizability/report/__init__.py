# SPDX-License-Identifier: Apache-2.0
"""The report: Markdown, page, figures. Nothing in here measures anything."""

from ..report_data.schema import SCHEMA_VERSION
from .optimizability_report import OptimizabilityReport


__all__ = ["SCHEMA_VERSION", "OptimizabilityReport"]
