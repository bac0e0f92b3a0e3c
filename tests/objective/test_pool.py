# SPDX-License-Identifier: Apache-2.0
"""The pool: which rows, collated how, and what stays as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_optimizability import MeasurementError
from hf_optimizability.objective.pool import Pool


class Augmented(Dataset):
    """Rows with noise from each library's generator."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> dict[str, float]:
        return {"x": index, "noise": random.random() + float(np.random.rand()) + float(torch.rand(()))}


def read(pool: Pool, positions: list[int]) -> dict[str, Any]:
    with pool.reading():
        return pool.collate(positions)


def test_a_row_is_the_same_in_whatever_batch():
    pool = Pool(DataLoader(Augmented()), examples=10, seed=0)
    with pool.reading():
        whole = torch.cat([pool.collate(chunk)["noise"] for chunk in pool.chunks(4)])
    assert len(whole) == len(pool) == 10 and pool.total == 30
    assert len(set(whole.tolist())) == 10
    assert read(pool, [7, 2])["noise"].tolist() == [whole[7], whole[2]]


def test_random_states_come_back():
    states = random.getstate(), torch.get_rng_state()
    read(Pool(DataLoader(Augmented()), examples=10, seed=0), [0, 1])
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_other_seeds_have_other_rows():
    indices = [Pool(DataLoader(Augmented()), examples=10, seed=seed).indices for seed in (0, 0, 1)]
    assert indices[0].tolist() == indices[1].tolist() != indices[2].tolist()
    everything = Pool(DataLoader(Augmented()), examples=99, seed=0).indices.tolist()
    assert sorted(everything) == list(range(30)) != everything  # neighbours are no batch of training


def test_streams_and_rows_that_fail_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield {"x": 1}

    class Broken(Augmented):
        def __getitem__(self, index: int) -> dict[str, float]:
            raise OSError("no such file")

    for loader in (DataLoader(Stream()), DataLoader([])):
        with pytest.raises(ValueError, match="a stream, or has no rows that can be drawn by index"):
            Pool(loader, examples=10, seed=0)
    with pytest.raises(MeasurementError, match="can't be read"):
        read(Pool(DataLoader(Broken()), examples=10, seed=0), [0])
