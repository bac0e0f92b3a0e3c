# SPDX-License-Identifier: Apache-2.0
"""Losses of sentence-transformers that cache gradients: in one graph, against the same losses without a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertModel

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainerMixin
from hf_optimizability.training.trainer_loss import trainer_loss
from tests.support import tiny_training, tiny_trl


ROWS = [
    {"anchor": " ".join("abcdefghij"[i : i + 1 + i % 3]), "positive": " ".join("jihgfedcba"[i : i + 2])}
    for i in range(6)
]
SIZES = {
    "vocab_size": len(tiny_trl.WORDS), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 16, "pad_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bert")
    model = BertModel(BertConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(path)
    tiny_trl.tokenizer().save_pretrained(path)
    return path


def encoder(folder: Path) -> SentenceTransformer:
    transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(8)], device="cpu").double().eval()


def matryoshka(inner: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda model, **more: losses.MatryoshkaLoss(model, inner(model, **more), matryoshka_dims=[8, 4])


def symmetric(inner: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda model, **more: inner(model, directions=("query_to_doc", "doc_to_query"), **more)


def gist(inner: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda model, **more: inner(model, guide=model, **more)


CACHED: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "ranking": (losses.CachedMultipleNegativesRankingLoss, losses.MultipleNegativesRankingLoss),
    "symmetric": tuple(
        map(symmetric, (losses.CachedMultipleNegativesRankingLoss, losses.MultipleNegativesRankingLoss))
    ),
    "GIST": tuple(map(gist, (losses.CachedGISTEmbedLoss, losses.GISTEmbedLoss))),
    "Matryoshka": tuple(
        map(matryoshka, (losses.CachedMultipleNegativesRankingLoss, losses.MultipleNegativesRankingLoss))
    ),
}


def trainer(folder: Path, model: SentenceTransformer, loss: nn.Module, **more: Any) -> SentenceTransformerTrainer:
    cls = SentenceTransformerTrainer
    if more:
        cls = type("Measuring", (OptimizabilityTrainerMixin, cls), {})
    args = tiny_training.arguments(
        folder, SentenceTransformerTrainingArguments, max_steps=1, per_device_train_batch_size=6
    )
    return cls(model=model, args=args, train_dataset=Dataset.from_list(ROWS), loss=loss, **more)


def gradient(loss: Tensor, model: nn.Module, *, create_graph: bool = False) -> Tensor:
    pieces = torch.autograd.grad(
        loss, list(model.parameters()), create_graph=create_graph, materialize_grads=True, allow_unused=True
    )
    return torch.cat([piece.flatten() for piece in pieces])


@pytest.mark.parametrize("name", CACHED)
def test_a_cached_loss_is_the_one_without_a_cache(folder: Path, tmp_path: Path, name: str):
    model, found = encoder(folder), []
    for cls, options in zip(CACHED[name], ({"mini_batch_size": 2}, {}), strict=True):
        made = trainer(tmp_path, model, cls(model, **options))
        batch = made.data_collator(ROWS)
        if options:
            model.zero_grad()
            made.compute_loss(model, dict(batch)).backward()  # as it trains
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            cached = torch.cat([grad.flatten() for grad in grads])
            model.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            loss = trainer_loss(made)(model, batch)
            first = gradient(loss, model, create_graph=True)
            direction = torch.randn(len(first), generator=torch.Generator().manual_seed(0), dtype=first.dtype)
            found.append((loss.detach(), first.detach(), gradient(first @ direction, model)))
        assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(cached, found[0][1], rtol=1e-6, atol=1e-9)
    for plain, expected in zip(*found, strict=True):
        torch.testing.assert_close(plain, expected, rtol=1e-6, atol=1e-9)


def test_a_cached_loss_is_measured_and_trains_as_without(folder: Path, tmp_path: Path):
    weights = []
    config = OptimizabilityConfig(profile="light", max_hvps=16, measure_strategy="no", probe_examples=6)
    for more in ({}, {"optimizability": config}):
        model = encoder(folder).float()
        made = trainer(tmp_path, model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), **more)
        made.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)
    [first, _] = made.optimizability_report().measurements
    assert first.engine == "double_backward" and first.grad_norm > 0 and first.hessian.lambda_max.value > 0
