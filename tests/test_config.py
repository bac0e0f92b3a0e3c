# SPDX-License-Identifier: Apache-2.0
"""`help(OptimizabilityConfig)` and `--flags` describe the same options in the same words."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

from hf_optimizability import OptimizabilityConfig


def test_the_docstring_describes_every_option_as_the_help_of_its_flag_does():
    docstring = inspect.getdoc(OptimizabilityConfig)
    arguments = re.search(r"^Args:\n(.*?)\n\n", docstring, flags=re.DOTALL | re.MULTILINE)[1]
    described = dict(re.findall(r"^    (\w+): (.*?)(?=\n    \w|\Z)", arguments, flags=re.DOTALL | re.MULTILINE))
    described = {name: " ".join(text.split()) for name, text in described.items()}
    assert described == {field.name: field.metadata["help"] for field in fields(OptimizabilityConfig)}


def test_the_report_goes_into_the_output_folder_by_default():
    assert OptimizabilityConfig().report_folder("out/run") == Path("out/run/optimizability")
    assert OptimizabilityConfig(report_dir="elsewhere").report_folder("out/run") == Path("elsewhere")
