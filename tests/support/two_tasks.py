# SPDX-License-Identifier: Apache-2.0
"""A model of two tasks and data for both."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Heads(nn.Module):
    """A trunk with a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 5, dtype=torch.float64)
        self.heads = nn.ModuleList(nn.Linear(5, 3, dtype=torch.float64) for _ in range(2))

    def forward(self, pixels: Tensor, task: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(pixels).tanh()
        logits = torch.stack([head(hidden) for head in self.heads], dim=1)[torch.arange(len(task)), task]
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(number: int = 21, *, seed: int = 1) -> dict[str, Tensor]:
    """Two thirds of the examples belong to task 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixels": torch.randn(number, 4, generator=generator, dtype=torch.float64) + 0.5,
        "labels": torch.arange(number) % 3 % 2,
        "task": (torch.arange(number) % 3 == 1).long(),
    }


def cut(whole: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    pieces = zip(*(value.split(size) for value in whole.values()), strict=True)
    return [dict(zip(whole, piece, strict=True)) for piece in pieces]


def of_task(whole: dict[str, Tensor], task: int) -> dict[str, Tensor]:
    chosen = whole["task"] == task
    return {key: value[chosen] for key, value in whole.items()}
