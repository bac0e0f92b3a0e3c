# SPDX-License-Identifier: Apache-2.0
"""Blocks of real architectures, from their parameter names."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_optimizability.objective.parameter_blocks import name_blocks
from hf_optimizability.redaction import public_name
from tests.support import tiny_models, tiny_training


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=4, d_kv=2, d_ff=4, num_layers=2, num_heads=2))


def swin() -> PreTrainedModel:
    return SwinForImageClassification(
        SwinConfig(image_size=8, patch_size=2, window_size=2, embed_dim=4, depths=[1, 2], num_heads=[2, 2])
    )


def convnext() -> PreTrainedModel:
    return ConvNextForImageClassification(ConvNextConfig(num_stages=2, hidden_sizes=[4, 4], depths=[2, 1]))


def distilbert() -> PreTrainedModel:
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=9, dim=4, hidden_dim=4, n_layers=2, n_heads=2, max_position_embeddings=4)
    )


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    return peft.get_peft_model(two_layers("bert"), config)


def two_layers(name: str) -> PreTrainedModel:
    return tiny_models.MODELS[name](**tiny_models.TWO_LAYERS[name])


LAYERS = ["embeddings", "layer.0", "layer.1", "head"]


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        *((partial(two_layers, name), LAYERS) for name in ("bert", "vit", "gpt2", "llama")),
        (distilbert, LAYERS),
        (tiny_models.bert, ["embeddings", "layer.0", "head"]),
        (lambda: torch.compile(two_layers("bert")), LAYERS),
        (lora, ["layer.0", "layer.1", "head"]),
        (tiny_training.mobilenet, ["embeddings", *[f"layer.{i}" for i in range(16)], "head"]),
        (partial(two_layers, "resnet"), ["embeddings", "stage.0.layer.0", "stage.1.layer.0", "head"]),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)), ["layer.0", "layer.2"]),
        (lambda: nn.Linear(2, 1), ["model"]),
        (
            t5,
            [
                *["embeddings", "encoder.layer.0", "encoder.layer.1", "encoder.final_layer_norm"],
                *["decoder.layer.0", "decoder.layer.1", "head"],
            ],
        ),
    ],
)
def test_names(make, blocks: list[str]):
    model = make()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = name_blocks(names)
    assert sorted(index for indices in found.values() for index in indices) == list(range(len(names)))
    assert list(found) == blocks


def test_slashes_are_dots_in_names_but_not_in_paths():
    """Keras joins names by slashes; a module that is called by a path has to look like one, or a report shows it."""
    names = ["model/dense/kernel", "model/dense/bias", "tasks./data/ada/x.weight", "tasks.~/y.weight", "z.org/name.w"]
    blocks = name_blocks(names)
    assert list(blocks) == ["model.dense", "tasks./data.ada.x", "tasks.~/y", "z.org.name"]
    hashed = [name for name in blocks if public_name(name) != name]
    assert hashed == ["tasks./data.ada.x", "tasks.~/y"]


def test_two_towers_are_told_apart():
    towers = ["text_model.encoder.layers", "vision_model.encoder.layers"]
    names = [f"{tower}.{number}.weight" for tower in towers for number in range(2)]
    found = ["text_model.encoder.layer.0", "text_model.encoder.layer.1"]
    assert list(name_blocks(names)) == [*found, *(name.replace("text", "vision") for name in found)]


def test_stages_are_split_into_layers():
    names = {make: list(name_blocks([n for n, _ in make().named_parameters()])) for make in (swin, convnext)}
    assert {"stage.0.layer.0", "stage.1.layer.0", "stage.1.layer.1"} <= set(names[swin])
    assert {"stage.0.layer.0", "stage.0.layer.1", "stage.1.layer.0"} <= set(names[convnext])
