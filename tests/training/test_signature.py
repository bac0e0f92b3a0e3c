# SPDX-License-Identifier: Apache-2.0
"""What an editor shows of `OptimizabilityTrainer(...)` is what it takes."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from transformers import Trainer

import hf_optimizability
from hf_optimizability.training import trainer


def test_the_written_signature_is_that_of_the_installed_trainer():
    """Names and defaults; the annotations are Transformers' own, shortened."""
    source = ast.parse(inspect.getsource(trainer))
    cls = next(node for node in ast.walk(source) if isinstance(node, ast.ClassDef) and node.name[-7:] == "Trainer")
    written = next(
        node for node in ast.walk(cls) if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ).args
    names = [argument.arg for argument in written.args]
    defaults = dict(zip(names[1:], map(ast.literal_eval, written.defaults), strict=True))
    theirs = inspect.signature(Trainer.__init__).parameters
    assert names == list(theirs)
    assert defaults == {name: parameter.default for name, parameter in theirs.items() if name != "self"}
    assert [argument.arg for argument in written.kwonlyargs] == ["optimizability"]


def test_the_package_is_marked_as_typed():
    assert Path(hf_optimizability.__file__).with_name("py.typed").exists()
