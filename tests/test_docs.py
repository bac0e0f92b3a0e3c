# SPDX-License-Identifier: Apache-2.0
"""Every Python snippet of the documents runs, in the order in which it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PLACES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [path for path in PLACES if "```python" in path.read_text()]
SHOWN = {
    "README.md": ["λ_max =", "converged: ", "out/readme/optimizability/report.md"],
    "compare.md": ["rank", "random weights", "out/comparison/comparison.html"],
}
"""What the snippets print, and at the end a file that they write."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_snippets_run(document: Path, tmp_path: Path):
    snippets = re.findall(r"^```python\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"),
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *printed, file = SHOWN[document.name]
    assert all(text in done.stdout for text in printed)
    assert (tmp_path / file).exists()
