# SPDX-License-Identifier: Apache-2.0
"""What the self-check costs, in gradients and as a share of a standard measurement.

    python benchmarks/self_check.py

measures two fine-tuned checkpoints and small models with the profile `standard`, counts the floating-point operations
of each part of the self-check, and divides them by those of a gradient of the same examples as Transformers computes
it. Operations do not depend on the machine or on what else it does. Writes `benchmarks/results/self_check.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    OPTConfig,
    OPTForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from workloads import TITLES, load

from hf_optimizability import OptimizabilityConfig, measure
from hf_optimizability.measurement import curvature_pass
from hf_optimizability.measurement import measure as measure_module


RESULTS = Path(__file__).parent / "results" / "self_check.md"
EXAMPLES, BATCH_SIZE, STEPS = 64, 16, 20
TARGET = 0.08
PARTS: dict[str, tuple[ModuleType, str]] = {
    "check_mean": (measure_module, "loss twice, halves"),
    "slope_errors": (measure_module, "slopes"),
    "check_along_eigenvectors": (curvature_pass, "eigenvalues"),
}
"""The parts of the self-check, by their functions: where these are called from, and what they check."""

Batch = dict[str, Tensor]


def checkpoints() -> dict[str, tuple[nn.Module, list[Batch]]]:
    """Return fine-tuned checkpoints, each with its batches."""
    workloads = {TITLES[name]: load(name) for name in ("text", "vision")}
    return {title: (workload.model, workload.batches) for title, workload in workloads.items()}


def small_models() -> dict[str, tuple[nn.Module, list[Batch]]]:
    """Return small models of usual kinds, smooth ones and ones with kinks, a little trained, each with its batches."""
    models = _small_models()
    for model, batch in models.values():
        train(model, batch)
    return {
        name: (
            model,
            [{key: value[i : i + BATCH_SIZE] for key, value in batch.items()} for i in range(0, EXAMPLES, BATCH_SIZE)],
        )
        for name, (model, batch) in models.items()
    }


def _small_models() -> dict[str, tuple[nn.Module, Batch]]:
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = torch.randint(5, 100, (EXAMPLES, 24))
    labels = torch.randint(4, (EXAMPLES,))
    images = {"pixel_values": torch.randn(EXAMPLES, 3, 32, 32), "labels": labels}
    bert = BertForSequenceClassification(BertConfig(vocab_size=100, intermediate_size=64, num_labels=4, **size))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=24))
    opt = OPTForCausalLM(OPTConfig(vocab_size=100, ffn_dim=64, max_position_embeddings=24, **size))
    vit = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, intermediate_size=64, num_labels=4, **size))
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    )
    mobilenet = MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=4)
    )
    perceptron = Perceptron()
    return {
        "BERT, classification": (bert, {"input_ids": tokens, "labels": labels}),
        "GPT-2, language modelling": (gpt2, {"input_ids": tokens, "labels": tokens}),
        "OPT (ReLU), language modelling": (opt, {"input_ids": tokens, "labels": tokens}),
        "ViT, classification": (vit, images),
        "ResNet (ReLU), classification": (resnet, images),
        "MobileNetV2 (ReLU6), classification": (mobilenet, images),
        "three ReLU layers, regression": (perceptron, {"x": torch.randn(EXAMPLES, 8), "labels": labels}),
    }


class Perceptron(nn.Module):
    """A network of ReLUs, with the loss of a Transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean squared error."""
        return {"loss": F.mse_loss(self.layers(x)[:, 0], labels.to(x))}


def train(model: nn.Module, batch: Batch) -> None:
    """Take some steps, so that the model is neither at its start nor at its end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()


@contextmanager
def counted(counts: dict[str, int], flops: FlopCounterMode) -> Iterator[None]:
    """Add up the operations of each part of the self-check inside."""

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = flops.get_total_flops()
            try:
                return function(*args, **kwargs)
            finally:
                counts[name] += flops.get_total_flops() - before

        return run

    with ExitStack() as stack:
        for name, (module, _) in PARTS.items():
            stack.enter_context(mock.patch.object(module, name, counting(name, getattr(module, name))))
        yield


def row(name: str, model: nn.Module, batches: list[Batch]) -> tuple[str, float]:
    """Return a line of the table, and the self-check's share of a measurement that spends all its products."""
    with FlopCounterMode(display=False) as flops:
        for batch in batches:
            model.eval()(**batch)["loss"].backward()
    gradient = flops.get_total_flops()
    model.zero_grad()
    counts = dict.fromkeys(PARTS, 0)
    config = OptimizabilityConfig(profile="standard")
    with FlopCounterMode(display=False) as flops, counted(counts, flops):
        found = measure(model.train(), batches, config)
    whole = flops.get_total_flops() / gradient
    parts = [counts[name] / gradient for name in PARTS]
    checks = sum(parts)
    full = checks + (whole - checks) * config.budget.max_hvps / found.hvps
    figures = " | ".join(f"{part:.1f}" for part in parts)
    return (
        f"| {name} | {found.hvps} | {whole:.0f} | {figures} | {checks / whole:.1%} | {checks / full:.1%} |",
        checks / full,
    )


def main() -> None:
    """Measure all models and write the table."""
    rows = []
    for name, (model, batches) in {**checkpoints(), **small_models()}.items():
        rows.append(row(name, model, batches))
        print(rows[-1][0], flush=True)
    share = max(share for _, share in rows)
    products = OptimizabilityConfig(profile="standard").budget.max_hvps
    head = [
        "model",
        "products",
        "measurement",
        *(what for _, what in PARTS.values()),
        "share",
        f"of {products} products",
    ]
    lines = [
        "# The price of the self-check",
        "",
        f"Floating-point operations of a first measurement with the profile `standard`, in gradients of the same "
        f"examples: 32 of the two checkpoints, {EXAMPLES} of small models after {STEPS} steps of training. Of a "
        f"measurement that spends all its {products} products, the self-check is {share:.1%} at most (target: "
        f"{TARGET:.0%}); the share is larger where both ends converge early, as in small networks. The first two "
        "parts are made before the first measurement of a training alone.",
        "",
        f"| {' | '.join(head)} |",
        "|:--|" + "--:|" * (len(head) - 1),
        *(line for line, _ in rows),
        "",
        "Made by `benchmarks/self_check.py`.",
        "",
    ]
    RESULTS.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
