# SPDX-License-Identifier: Apache-2.0
"""Batches of one optimizer step: which rows, cut how, and what stays as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

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


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from ROWS


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (DataLoader(Stream(), batch_size=2), "stream"),
        (DataLoader(ROWS, batch_sampler=type("Own", (BatchSampler,), {})(SequentialSampler(ROWS), 2, False)), "share"),
        (DataLoader(ROWS, sampler=WeightedRandomSampler([1.0] * 50, 50), batch_size=2), "WeightedRandomSampler"),
    ],
)
def test_what_training_draws_in_another_way_is_refused(loader: DataLoader, reason: str):
    with pytest.raises(ValueError, match=reason):
        StepBatches(loader, seed=0)
