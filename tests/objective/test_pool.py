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
        whole = torch.cat([batch["noise"] for batch in pool.batches(4)])
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


class Torn(Augmented):
    """Some rows can't be read."""

    def __getitem__(self, index: int) -> dict[str, float]:
        if index in (3, 4, 11):
            raise OSError("torn off")
        return super().__getitem__(index)


def test_rows_that_cannot_be_read_are_left_out_once_and_for_all(caplog: pytest.LogCaptureFixture):
    pool = Pool(DataLoader(Torn()), examples=99, seed=0)
    assert sum(len(batch["x"]) for batch in pool.random_batches(30, batch_size=8)) == 27
    passes = []
    for _ in range(2):
        with pool.reading():
            passes.append(torch.cat([batch["x"] for batch in pool.batches(2)]).tolist())
    assert passes[0] == passes[1] == pool.indices.tolist()
    assert sorted(passes[0]) == [i for i in range(30) if i not in (3, 4, 11)]
    assert len(pool) == pool.total == 27
    assert read(pool, [3, 9])["x"].tolist() == [passes[0][3], passes[0][9]]
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [
        "3 of 30 rows drawn for the pool can't be read and are left out; the first one: OSError: torn off."
    ]


def test_a_row_that_was_read_before_must_stay_readable():
    dataset = Augmented()
    pool = Pool(DataLoader(dataset), examples=99, seed=0)
    with pool.reading():
        assert len(list(pool.batches(8))) == 4
    dataset.__class__ = Torn
    with pytest.raises(MeasurementError, match="torn off"), pool.reading():
        list(pool.batches(8))


def test_streams_and_rows_that_fail_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield {"x": 1}

    class Broken(Augmented):
        def __getitem__(self, index: int) -> dict[str, float]:
            raise OSError("no such file")

    for loader, reason in ((DataLoader(Stream()), "rows that can be drawn by index"), (DataLoader([]), "is empty")):
        with pytest.raises(ValueError, match=reason):
            Pool(loader, examples=10, seed=0)
    broken = Pool(DataLoader(Broken()), examples=10, seed=0)
    for reading in (
        lambda: read(broken, [0]),
        lambda: broken.random_batches(4, batch_size=2),
        lambda: list(broken.batches(4)),
    ):
        with pytest.raises(MeasurementError, match="can't be read"):
            reading()
