# SPDX-License-Identifier: Apache-2.0
"""Reports with one white pixel for each plot, where no test looks at them: to draw them takes half of a tiny run."""

from __future__ import annotations

import pytest

from hf_optimizability.report import figures
from hf_optimizability.report_data.data import ReportData


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8ffff3f0005fe02fe0def46b80000000049454e44ae426082"
)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'


def leave_plots_undrawn(patch: pytest.MonkeyPatch) -> None:
    """Makes files of the names that most drawn plots would have, until the patch is undone."""

    def plot_all(report: ReportData) -> dict[str, dict[str, bytes]]:
        names = ["loss"] if report.log_history else []
        names += ["gradient_norm", "curvature", "density", "ritz_values", "blocks"] if report.measurements else []
        names += ["stability_margin"] if any(m.optimizer_stability for m in report.measurements) else []
        return {name: {"png": PNG, "svg": SVG} for name in names}

    patch.setattr(figures, "plot_all", plot_all)
