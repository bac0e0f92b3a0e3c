# SPDX-License-Identifier: Apache-2.0
"""The probe set: fixed, seeded examples of a data set, collated once, on which every measurement is made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sized
from itertools import islice
from typing import Any, cast

import torch
from accelerate.data_loader import IterableDatasetShard
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .curvature.ranks import ALONE, Ranks
from .safety import preserved_rng


LEAST_EXAMPLES = 2


def num_examples(dataset: Dataset) -> int | None:
    """Size of a data set; `None` if it is streamed."""
    return len(dataset) if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset) else None


def probe_indices(total: int, examples: int, *, seed: int) -> list[int]:
    """`examples` different indices below `total`, ascending, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:examples].sort().values.tolist()


def probe_batches(
    dataloader: DataLoader,
    *,
    examples: int,
    batch_size: int,
    seed: int,
    required: bool = False,
    ranks: Ranks = ALONE,
) -> list[Any]:
    """Draws the probe set from a data loader's data set, without running the loader.

    Args:
        dataloader: Its data set and collator are used.
        examples: How many examples to draw. Of a streamed data set, the first ones are taken.
        batch_size: Examples to collate at a time.
        seed: Seed of the draw, and of whatever augmentation or masking does to the examples.
        required: Whether fewer examples are an error; otherwise all there are are taken.
        ranks: Processes that train together: the first one draws for all.

    Returns:
        The collated batches, on the CPU.

    Raises:
        ValueError: If the data set is empty or too small, or can be read only once.
    """
    with ranks.agreed():
        batches = _drawn(dataloader, examples, batch_size, seed, required) if ranks.index == 0 else []
    return ranks.gather(batches)


def _drawn(dataloader: DataLoader, examples: int, batch_size: int, seed: int, required: bool) -> list[Any]:
    dataset = dataloader.dataset
    if isinstance(dataset, IterableDatasetShard):
        dataset = dataset.dataset  # of all ranks
    with preserved_rng(seed):
        total = num_examples(dataset)
        if total is None:
            stream = cast(IterableDataset, dataset)
            if iter(stream) is iter(stream):
                raise ValueError(
                    "The training set is a stream that can be read once only: measuring would take its first examples "
                    "away from training. Pass one whose `__iter__` begins anew, as `datasets.IterableDataset` does."
                )
            rows = list(islice(stream, examples))
        else:
            rows = [dataset[index] for index in probe_indices(total, examples, seed=seed)]
        if len(rows) < (examples if required else LEAST_EXAMPLES):
            least = f"`probe_examples` is {examples}" if required else f"a probe set needs at least {LEAST_EXAMPLES}"
            raise ValueError(
                f"The data set to measure on has only {len(rows)} examples, but {least}. "
                "Pass a larger training set, or lower `probe_examples`."
            )
        return [dataloader.collate_fn(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def fingerprint(batches: Iterable[Any]) -> str:
    """SHA-256 (first 16 hex digits) of all tensors of all batches: the same probe set, the same fingerprint."""
    digest = hashlib.sha256()
    for batch in batches:
        items = sorted(batch.items()) if isinstance(batch, Mapping) else enumerate(batch)
        for name, value in items:
            if isinstance(value, Tensor):
                digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
