# SPDX-License-Identifier: Apache-2.0
"""`help(OptimizabilityConfig)` and `--flags` describe the same options in the same words."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pool_examples": 48}, "64 examples are to be measured"),
        ({"pool_examples": 99, "task_column": "t"}, "one loss"),
    ],
)
def test_a_pool_is_for_one_loss_and_larger_than_the_sample(options: dict[str, object], says: str):
    with pytest.raises(ValueError, match=says):
        OptimizabilityConfig(**options)
