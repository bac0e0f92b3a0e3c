# SPDX-License-Identifier: Apache-2.0
"""Scores of real architectures: the features are what the head takes, and the model is left as it was."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2ForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from hf_optimizability.reasons import Reason
from hf_optimizability.scoring.checkpoint import CheckpointScores, score_checkpoint
from hf_optimizability.scoring.features import head_features
from hf_optimizability.scoring.score import Score
from hf_optimizability.serialization import structure
from hf_optimizability.tasks.peft_methods import with_lora
from tests.support import tiny_models


def batches(name: str, number: int = 24) -> list[dict[str, Any]]:
    rows = tiny_models.examples(name, number, dtype=torch.float32)
    return tiny_models.cut(rows, 8)


@pytest.mark.parametrize(("name", "head"), [("bert", "classifier"), ("vit", "classifier"), ("resnet", "classifier.1")])
def test_features_are_what_the_head_takes(name: str, head: str):
    model = tiny_models.make(name, dtype=torch.float32)
    model.train()
    held = batches(name)
    features, labels = head_features(model, held)
    assert labels.tolist() == torch.cat([batch["labels"] for batch in held]).tolist()
    linear = model.get_submodule(head)
    logits = torch.from_numpy(features).float() @ linear.weight.T + linear.bias
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model(**batch).logits for batch in held])
    torch.testing.assert_close(logits, expected)


def test_of_a_decoder_the_last_token_counts():
    config = tiny_models.make("gpt2").config
    config.num_labels, config.pad_token_id = 3, 0
    model = GPT2ForSequenceClassification(config).eval()
    tokens = torch.tensor([[5, 6, 7, 0], [5, 6, 0, 0]])
    features, _ = head_features(model, [{"input_ids": tokens, "labels": torch.tensor([0, 1])}])
    with torch.no_grad():
        hidden = model.transformer(tokens).last_hidden_state
    np.testing.assert_allclose(
        features, torch.stack([hidden[0, 2], hidden[1, 1]]).double().numpy(), rtol=1e-4, atol=1e-6
    )


def test_of_a_head_of_two_layers_the_last_one_counts_and_lora_changes_nothing():
    config = RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = RobertaForSequenceClassification(config).eval()
    batch = {"input_ids": torch.arange(4, 16).view(4, 3), "labels": torch.arange(4) % 2}
    features, _ = head_features(model, [batch])
    logits = model.classifier.out_proj(torch.from_numpy(features).float())
    torch.testing.assert_close(logits, model(**batch).logits)
    with_matrices, _ = head_features(with_lora(model, 2), [batch])
    np.testing.assert_allclose(with_matrices, features, rtol=1e-5, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model = tiny_models.make("resnet", dtype=torch.float32)
    model.train()
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    scores = score_checkpoint(model, batches("resnet"), gradient_examples=16)
    assert scores.alignment is not None and scores.alignment.examples == 16 and not scores.notes.get("alignment")
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_scores_go_through_json_and_tell_their_cost():
    scores = score_checkpoint(tiny_models.make("bert", dtype=torch.float32), batches("bert", 40), gradient_examples=16)
    assert structure(CheckpointScores, json.loads(json.dumps(scores.to_dict()))) == scores
    assert scores.linear_probe.passes == 1 and scores.alignment.passes == 4
    assert 0 < scores.logme.seconds <= scores.linear_probe.seconds < scores.seconds
    few = CheckpointScores(logme=Score(-1.234, -1.31, -1.1, 0.05, 40), alignment=Score(0.3, -0.2, 0.8, 0.2, 40))
    assert few.result == "logme -1.23 (-1.31 to -1.10), alignment between -0.2 and 0.8"


def test_one_seed_one_answer():
    model, held = tiny_models.make("bert", dtype=torch.float32), batches("bert", 40)
    first, second = (score_checkpoint(model, held, gradient_examples=16, seed=3) for _ in range(2))
    for name in ("logme", "linear_probe", "alignment"):
        assert first.of(name).value == second.of(name).value and first.of(name).std_error == second.of(name).std_error


class NoLinearEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(x).tanh()
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def test_what_cant_be_had_is_told_and_the_rest_is_there():
    batch = {"x": torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(24) % 2}
    scores = score_checkpoint(NoLinearEnd(), [batch], gradient_examples=24)
    assert scores.logme is None and scores.notes["logme"] == Reason("score_failed", error="ValueError")
    assert scores.alignment is not None
    few = score_checkpoint(tiny_models.make("bert", dtype=torch.float32), batches("bert", 8), gradient_examples=0)
    assert few.alignment is None and few.result == "not scored: The score can't be computed (ValueError)."


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.zeros(2, 3)}, "has no labels"),
        ({"x": torch.zeros(2, 3), "labels": torch.zeros(2)}, "one class an example"),
        (torch.zeros(2, 3), "has no labels"),
    ],
)
def test_batches_without_classes_are_told(batch: Any, message: str):
    with pytest.raises(ValueError, match=message):
        head_features(NoLinearEnd(), [batch])
    with pytest.raises(ValueError, match="empty"):
        head_features(NoLinearEnd(), [])
