# SPDX-License-Identifier: Apache-2.0
"""Which weights a training moves."""

from __future__ import annotations

import sys

import pytest
import torch

from hf_optimizability.tasks.peft_methods import with_frozen_features, with_lora
from tests.support import tiny_models, tiny_training


def moved(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters and buffers that a step in training mode changes."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # LoRA's second matrix is zero at first, which stills the first one for a step
        model(**batch).loss.backward()
        optimizer.step()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", ["bert", "vit", "resnet", "mobilenet"])
def test_a_linear_probe_moves_the_head_alone(name: str):
    """Not even BatchNorm's running statistics move."""
    model = with_frozen_features(tiny_training.model(name))
    rows = tiny_training.dataset(name, 4)
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    changed = moved(model, batch)
    assert changed and all(key.startswith("classifier") for key in changed)
    assert not any(module.training for module in model.base_model.modules())


@pytest.mark.parametrize(("name", "head"), [("bert", "classifier"), ("vit", "classifier")])
def test_lora_moves_its_matrices_and_the_head(name: str, head: str):
    model = with_lora(tiny_training.model(name), rank=2)
    rows = tiny_training.dataset(name, 4)
    changed = moved(model, {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]})
    assert all("lora_" in key or f"{head}.modules_to_save" in key for key in changed)
    assert any(f"{head}.modules_to_save" in key for key in changed)
    assert any("lora_A" in key for key in changed) and any("lora_B" in key for key in changed)
    group = {value.shape[0] for key, value in model.state_dict().items() if "lora_A" in key}
    assert group == {2}


def test_lora_needs_linear_layers_a_rank_and_peft(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="no linear layer below its head"):
        with_lora(tiny_training.mobilenet(), rank=2)
    with pytest.raises(ValueError, match="--lora_rank is 0"):
        with_lora(tiny_models.bert(), rank=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install"):
        with_lora(tiny_models.bert(), rank=2)


def test_a_model_without_a_head_has_no_probe():
    with pytest.raises(ValueError, match="no head apart from its base"):
        with_frozen_features(tiny_models.bert().bert)
