# SPDX-License-Identifier: Apache-2.0
"""What is counted about the code, on small packages of known counts, and the prose check."""

from __future__ import annotations

from pathlib import Path

import house
import prose
import pytest


MEASURE = """
from .safety import pretrained
from .curvature.hessian import Hessian


def measure(model):
    '''Return nothing.'''
    pretrained(model)
    Hessian(loss, model=objective.model)
    Hessian(loss)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    package = tmp_path / "hf_optimizability"
    (package / "curvature").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "measure.py").write_text(MEASURE)
    (package / "safety.py").write_text("'''Guard.'''\n\n\ndef pretrained(model):\n    '''The trunk, built anew.'''\n")
    hessian = "from ..supported import check\n\n\nclass Hessian:\n    noise_scale = check(model)\n"
    (package / "curvature/hessian.py").write_text(hessian)
    (package / "supported.py").write_text("def check(model):\n    '''Raise.'''\n")
    return package


def test_calls_with_a_model_and_those_upwards(package: Path):
    calls = house.model_calls(package)
    assert [upwards for _, upwards in calls] == [True, False, False]
    assert calls[0][0] == "curvature.hessian:5 check"


def test_the_other_numbers(package: Path):
    numbers = house.numbers(package.parent)
    assert numbers["modules at the top level"] == "3" and numbers["imports of one module by another"] == "3"
    assert numbers["files that name `noise_scale`"] == "1"
    assert numbers["docstrings of functions in the imperative"] == "66.7% of 3"
    assert numbers["words that the prose check finds"] == "1"


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("hf_optimizability/a.py", 'anew = 1  # drawn\n# anew\nx = f"is\\n"\n', [2]),
        ("hf_optimizability/a.py", '"""Is\nhad.\n\n>>> anew\n"""\n', [1]),
        ("hf_optimizability/a.py", 'error(f"{anew} `anew` told by {x}")\n', [1]),
        ("hf_optimizability/a.jinja", "{{ anew }}\n<p class='dear'>Dear</p>", [2]),
        ("docs/a.md", "```python\nanew\n```\nA\n`anew` [page](told.md) goes\non", [5]),
        ("CHANGELOG.md", "## [Unreleased]\nAnew.\n\n## [0.1.0]\n\nTold.", [2]),
        ("docs/prediction.md", "Anew.", []),
    ],
)
def test_prose(name: str, text: str, lines: list[int], tmp_path: Path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    assert [int(line.split(":")[1]) for line in prose.findings(tmp_path)] == lines
