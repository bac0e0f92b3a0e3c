# SPDX-License-Identifier: Apache-2.0
"""The table of kernels holds, and what is put in a kernel's place while measuring comes back."""

from __future__ import annotations

from pathlib import Path

import fused_kernels
import pytest
import torch
from torch import nn

from hf_optimizability import MeasurementError
from hf_optimizability.model_state.measuring import measuring
from hf_optimizability.model_state.plain_layers import plain_layers


PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "kernels.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("case", fused_kernels.CASES, ids=lambda case: case.kernel)
def test_the_page_says_what_happens(case: fused_kernels.Case):
    assert fused_kernels.row(case) in PAGE


def test_the_page_has_no_other_rows():
    lines = [line for line in PAGE if line.startswith("|")]
    assert lines[0] == f"| {' | '.join(fused_kernels.HEADER)} |"
    assert len(lines) == 2 + len(fused_kernels.CASES)


@pytest.mark.parametrize("change", [fused_kernels.flash_attention, fused_kernels.attention("flex_attention")])
def test_attention_comes_back(change):
    model = fused_kernels.model()
    change(model)
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), measuring(model, seed=0):
        assert model.config._attn_implementation == "sdpa"
        raise ZeroDivisionError
    assert model.config._attn_implementation == before


def test_eight_bit_layers_multiply_in_full_precision_inside_alone():
    torch.manual_seed(0)
    model = fused_kernels.model()
    plain = nn.Linear(8, 4)
    rounded = nn.Linear(8, 4)
    rounded.load_state_dict(plain.state_dict())
    model.model.added = rounded
    fused_kernels.other_linears("torchao.float8.float8_linear")(model)
    x = torch.randn(3, 8)
    trained = rounded(x)
    assert not torch.equal(trained, plain(x))
    with pytest.raises(ZeroDivisionError), plain_layers(model):
        assert torch.equal(rounded(x), plain(x))
        raise ZeroDivisionError
    assert torch.equal(rounded(x), trained) and "forward" not in vars(rounded)


def test_layers_of_transformer_engine_are_refused_by_name():
    model = fused_kernels.model()
    fused_kernels.other_linears("transformer_engine.pytorch")(model)
    with pytest.raises(MeasurementError, match="q_proj` is a layer of Transformer Engine"), measuring(model, seed=0):
        pass
