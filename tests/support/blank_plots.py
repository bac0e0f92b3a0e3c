# SPDX-License-Identifier: Apache-2.0
"""Reports with one white pixel for each plot, where no test looks at them: to draw them takes half of a tiny run."""

from __future__ import annotations

import pytest

from hf_optimizability.report import figures as plots


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8ffff3f0005fe02fe0def46b80000000049454e44ae426082"
)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'


def leave_plots_undrawn(patch: pytest.MonkeyPatch) -> None:
    """Makes files of the names that drawn plots would have, until the patch is undone."""
    patch.setattr(plots, "_png", lambda figure: PNG)
    patch.setattr(plots, "_svg", lambda figure: SVG)
