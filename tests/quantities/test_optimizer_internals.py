# SPDX-License-Identifier: Apache-2.0
"""Canaries: an optimizer made by `__setstate__` alone lacks nothing that its constructor would set for `step`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from transformers.optimization import Adafactor

from hf_optimizability.quantities.preconditioner import SUPPORTED


OPTIONS: dict[type[Optimizer], dict[str, Any]] = {
    SGD: {"momentum": 0.9},
    Adam: {"amsgrad": True},
    AdamW: {},
    Adafactor: {"relative_step": False, "scale_parameter": False},
}


def test_each_supported_class_has_a_canary():
    assert set(OPTIONS) == set(SUPPORTED)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_setstate_sets_what_the_constructor_sets(kind: type[Optimizer]):
    """A new attribute here means that torch has changed: see whether `step` reads it."""
    built = kind([nn.Parameter(torch.ones(2, 2))], lr=0.1, **OPTIONS[kind])
    copied: Optimizer = object.__new__(kind)
    copied.__setstate__({"defaults": built.defaults, "param_groups": built.param_groups, "state": built.state})
    assert set(vars(built)) - set(vars(copied)) <= {"_warned_capturable_if_run_uncaptured"}
