# SPDX-License-Identifier: Apache-2.0
"""Batches of one optimizer step: which rows, cut how, and what stays as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hf_optimizability.objective.step_batches import StepBatches


ROWS = [{"x": float(index)} for index in range(50)]


def masked(rows: list[dict[str, float]]) -> dict[str, torch.Tensor]:
    """A collator that draws."""
    return {"x": torch.tensor([row["x"] for row in rows]), "mask": torch.rand(len(rows))}


def read(steps: StepBatches) -> list[list[dict[str, Any]]]:
    with steps.reading():
        return list(steps)


def test_rows_are_drawn_once_each_and_the_same_each_time():
    state = random.getstate(), torch.get_rng_state()
    loader = DataLoader(ROWS, batch_size=4, shuffle=True, collate_fn=masked)
    steps = StepBatches(loader, parts=3, seed=0)
    first, again = read(steps), read(steps)
    assert len(steps) == len(first) == 4 and steps.examples == 12  # 48 of 50 rows
    assert [[len(part["x"]) for part in parts] for parts in first] == [[4] * 3] * 4
    drawn = torch.cat([part["x"] for parts in first for part in parts])
    assert len(set(drawn.tolist())) == 48 and drawn.tolist() != sorted(drawn.tolist())
    masks = torch.cat([part["mask"] for parts in first for part in parts])
    assert len(set(masks.tolist())) == 48  # each batch has its own draw
    for parts, others in zip(first, again, strict=True):
        for part, other in zip(parts, others, strict=True):
            assert part["x"].equal(other["x"]) and part["mask"].equal(other["mask"])
    assert random.getstate() == state[0] and torch.get_rng_state().equal(state[1])
    other = read(StepBatches(loader, parts=3, seed=1))
    assert not first[0][0]["x"].equal(other[0][0]["x"])


def test_no_more_than_asked_for():
    assert len(StepBatches(DataLoader(ROWS, batch_size=1), number=7, seed=0)) == 7


def drawn(sampler: Sampler, *, number: int = 30, size: int = 4) -> torch.Tensor:
    """The rows of each step, of shape (steps, size)."""
    state = torch.get_rng_state()
    steps = StepBatches(DataLoader(ROWS, sampler=sampler, batch_size=size), number=number, seed=0)
    first, again = (torch.stack([parts[0]["x"] for parts in read(steps)]) for _ in range(2))
    assert torch.get_rng_state().equal(state) and first.equal(again)
    return first.long()


def distinct(rows: torch.Tensor) -> int:
    return len(rows.unique())


def test_rows_are_drawn_as_the_sampler_draws_them():
    """With replacement, fewer than there are, of a subset; and the sampler's own generator does not move."""
    own = torch.Generator().manual_seed(5)
    before = own.get_state()
    again = drawn(RandomSampler(ROWS, replacement=True, num_samples=50, generator=own), number=200, size=8)
    assert len(again) == 200 and min(map(distinct, again)) < 8
    counts = again.flatten().bincount(minlength=50)
    assert counts.min() > 10 and counts.max() < 60  # 32 in the mean
    few = drawn(RandomSampler(ROWS, num_samples=13, generator=own))
    assert len(few) == 3 and distinct(few) == 12
    subset = drawn(SubsetRandomSampler(range(20, 31), generator=own))
    assert len(subset) == 2 and distinct(subset) == 8 and subset.min() >= 20 and subset.max() <= 30
    assert own.get_state().equal(before)


def test_weights_are_those_of_the_sampler():
    weights = [0.0] * 25 + [1.0] * 24 + [26.0]
    again = drawn(WeightedRandomSampler(weights, 12), number=100)
    assert len(again) == 100 and again.min() >= 25
    assert float((again == 49).double().mean()) == pytest.approx(0.52, abs=0.1)
    once = drawn(WeightedRandomSampler(weights, 23, replacement=False))
    assert len(once) == 5 and distinct(once) == 20 and once.min() >= 25


def test_in_order_steps_are_as_they_are_in_an_epoch():
    steps = drawn(SequentialSampler(ROWS), number=6)
    assert steps.equal(steps[:, :1] + torch.arange(4)) and distinct(steps) == 24
    assert (steps[:, 0] % 4 == 0).all() and steps.max() > 24


class Own(RandomSampler):
    """Draws in another way."""

    def __iter__(self) -> Iterator[int]:
        yield from [0] * 50


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from ROWS


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (DataLoader(Stream(), batch_size=2), "stream"),
        (DataLoader(ROWS, batch_sampler=type("Own", (BatchSampler,), {})(SequentialSampler(ROWS), 2, False)), "share"),
        (DataLoader(ROWS, sampler=Own(ROWS), batch_size=2), "How `Own` draws rows is not known"),
    ],
)
def test_what_training_draws_in_another_way_is_refused(loader: DataLoader, reason: str):
    with pytest.raises(ValueError, match=reason):
        StepBatches(loader, seed=0)
