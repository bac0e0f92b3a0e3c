# SPDX-License-Identifier: Apache-2.0
"""Uneven batches that hold more lengths than the number of examples: each example counts once, or it is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_optimizability import Measurement, OptimizabilityConfig, measure
from hf_optimizability.objective.layout import possible_layouts


CONFIG = OptimizabilityConfig(profile="light", max_hvps=16)
SIZES = (6, 3, 2)
Loss = Callable[[nn.Module, Any], Tensor]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def rows(number: int) -> tuple[Tensor, Tensor]:
    return torch.randn(number, 4, dtype=torch.float64), torch.randint(3, (number,))


def uneven(collate: Callable[[Tensor, Tensor], Any], sizes: Sequence[int] = SIZES) -> list[Any]:
    torch.manual_seed(1)
    return [collate(*rows(size)) for size in sizes]


def measured(batches: Sequence[Any], loss_fn: Loss) -> Measurement:
    return measure(model(), batches, CONFIG, loss_fn=loss_fn)


def mean_over(batches: Sequence[Any], loss_fn: Loss, counts: Sequence[int] = SIZES) -> float:
    losses = [float(loss_fn(model(), batch).detach()) for batch in batches]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def agreement(model: nn.Module, *views: Tensor) -> Tensor:
    return (model(views[0]) - model(views[1])).square().mean()


def in_time(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whose first dimension is time: a running sum over it is what a recurrent network has in its place."""
    return F.cross_entropy(model(x.cumsum(0))[-1], y)


ONES = torch.ones(3, dtype=torch.float64)

KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Loss]] = {
    "constant first, one value": (lambda x, y: (ONES, x), lambda m, b: (m(b[1]) * b[0]).square().mean()),
    "nested": (
        lambda x, y: {"w": ONES, "q": {"x": x}, "t": {"y": y}},
        lambda m, b: entropy(m, b["q"]["x"], b["t"]["y"]),
    ),
    "list of views": (
        lambda x, y: [[x, x + 1], y],
        lambda m, b: agreement(m, *b[0]) + entropy(m, b[0][0], b[1]),
    ),
    "tuple of views": (lambda x, y: ((x, x + 1), ONES), lambda m, b: agreement(m, *b[0])),
    "list of a tuple of views": (lambda x, y: [(x, x + 1)], lambda m, b: agreement(m, *b[0])),
    "list of example tensors": (lambda x, y: list(x), lambda m, b: m(torch.stack(b)).square().mean()),
    "list of ragged examples": (
        lambda x, y: [row.repeat(1 + index, 1) for index, row in enumerate(x)],
        lambda m, b: torch.stack([m(rows).square().mean() for rows in b]).mean(),
    ),
    "sequence first": (
        lambda x, y: {"x": x.expand(7, *x.shape) + torch.arange(7.0)[:, None, None], "y": y},
        lambda m, b: in_time(m, b["x"], b["y"]),
    ),
    "three constants": (lambda x, y: (ONES, ONES, ONES, x, y), lambda m, b: entropy(m, *b[3:])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_example_counts_once(kind: str):
    collate, loss_fn = KINDS[kind]
    batches = uneven(collate)
    found = measured(batches, loss_fn)
    assert found.loss == pytest.approx(mean_over(batches, loss_fn), rel=1e-10)
    assert found.num_items == sum(SIZES)
    assert found.self_check.can_cut and found.self_check.mean_error < 1e-6
    assert found.self_check.counted_by and not found.self_check.count_in_doubt


def test_ragged_examples_in_batches_of_one_size_count_alike():
    """Their lengths are no count: a batch of long ones weighs no more."""
    torch.manual_seed(1)
    batches = [[rows(length)[0] for length in lengths] for lengths in ((5, 7), (1, 2), (3, 9))]

    def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return torch.stack([model(x).square().mean() for x in batch]).mean()

    assert measured(batches, loss_fn).loss == pytest.approx(mean_over(batches, loss_fn, (1, 1, 1)), rel=1e-10)


@pytest.mark.parametrize("sizes", [SIZES, (3, 3, 3)])
def test_a_count_that_nothing_shows_is_said(sizes: tuple[int, ...]):
    """Patches of all images in one row, beside the images' targets: neither can be cut without the other."""
    torch.manual_seed(1)
    patches = [torch.randint(1, 5, (size,)) for size in sizes]
    batches = [{"pixel_values": rows(int(p.sum()))[0], "target": rows(len(p))[1]} for p in patches]

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        images = torch.stack([part.mean(0) for part in batch["pixel_values"].tensor_split(len(batch["target"]))])
        return entropy(model, images, batch["target"])

    found = measured(batches, loss_fn)
    assert found.self_check.unit == "batches" and not found.self_check.can_cut
    assert found.self_check.count_in_doubt and "which halves do not confirm" in str(found.self_check)
    if len(set(sizes)) > 1:
        assert found.loss == pytest.approx(mean_over(batches, loss_fn, sizes), rel=1e-10)
        assert found.self_check.counted_by == ("target",)


@pytest.mark.parametrize(
    "batches",
    [
        uneven(lambda x, y: {"x": x, "y": y}),
        uneven(lambda x, y: [x, y]),
        uneven(lambda x, y: (x, list(y))),
        uneven(lambda x, y: {"q": {"x": x}, "t": {"y": y}}),
        uneven(lambda x, y: {"x": x, "size": (32, 32)}),
        [{"x": torch.ones(4, length)} for length in (5, 7, 2)],  # padded to the longest
        uneven(lambda x, y: (ONES, x, y), (4, 4)),
        [torch.ones(3), torch.ones(2)],
    ],
)
def test_usual_batches_have_one_length(batches: list[Any]):
    assert possible_layouts(batches) == ()
