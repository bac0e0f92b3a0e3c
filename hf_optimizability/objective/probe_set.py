# SPDX-License-Identifier: Apache-2.0
"""The probe set: fixed, seeded examples of a data set, collated once, on which every measurement is made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard, SeedableRandomSampler
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from ..config import OptimizabilityConfig
from ..errors import MeasurementError
from ..linalg.communicator import SINGLE_PROCESS, ProcessGroup
from ..model_state.measuring import preserved_rng
from ..redaction import redact_secrets
from .batches import batch_size as examples_in
from .data_state import DataState, preserved_data
from .task_labels import require_several, smaller_batches, tasks_of_rows


logger = logging.get_logger(__name__)

MIN_EXAMPLES = 2

EVEN_SAMPLERS = (LengthGroupedSampler, RandomSampler, SeedableRandomSampler, SequentialSampler)
"""Samplers that draw every row equally often."""


def dataset_of(dataloader: Any) -> Dataset | None:
    """Return a loader's data set, of all ranks; `None` if the loader is an iterable of batches without one."""
    try:
        dataset = dataloader.dataset
    except AttributeError:
        return None
    return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset


def num_examples(dataset: Dataset | None) -> int | None:
    """Return the size of a data set; `None` if it is streamed."""
    return len(dataset) if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset) else None


def probe_indices(total: int, examples: int, *, seed: int) -> list[int]:
    """Return `examples` different indices below `total`, in random order, the same ones for the same seed.

    In the order of the data set, which is often that of the classes, batches would differ more than training's.
    """
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:examples].tolist()


def uneven_sampler(dataloader: DataLoader) -> Any:
    """Return the sampler that weights, groups or leaves out rows; `None` if every row is drawn equally often."""
    batches: Any = dataloader.batch_sampler
    batches = batches.batch_sampler if isinstance(batches, BatchSamplerShard) else batches
    if type(batches) is not BatchSampler:
        return batches or dataloader.sampler
    return None if type(batches.sampler) in EVEN_SAMPLERS else batches.sampler


@dataclass(frozen=True)
class ProbeSpec:
    """How to draw a probe set.

    Attributes:
        examples: How many examples to draw; somewhat more where whole batches are drawn.
        batch_size: Examples to collate at a time. Where the collator refuses that, as many as training does; with
            tasks, fewer where a task would have too few batches to show a spread.
        seed: Seed of the draw, and of whatever augmentation or masking does to the examples.
        required: Whether fewer examples are an error; otherwise all available ones are taken.
        task_column: The column that holds the tasks, if the examples of each task are collated by themselves.
        group: Processes that train together: the first one draws for all.
    """

    examples: int
    batch_size: int
    seed: int
    required: bool = False
    task_column: str | None = None
    group: ProcessGroup = SINGLE_PROCESS

    @classmethod
    def from_config(cls, config: OptimizabilityConfig, *, group: ProcessGroup = SINGLE_PROCESS) -> ProbeSpec:
        """Return the specification of a configuration."""
        return cls(
            examples=config.budget.probe_examples,
            batch_size=config.probe_batch_size,
            seed=config.probe_seed,
            required=config.probe_examples is not None,
            task_column=config.task_column,
            group=group,
        )


@dataclass(frozen=True)
class ProbeSet:
    """The examples that every measurement is made on.

    Attributes:
        batches: The examples, collated, on the CPU.
        tasks: The task of each batch; `None` where tasks are not distinguished.
    """

    batches: list[Any]
    tasks: list[str] | None = None


def draw_probe_set(dataloader: DataLoader, spec: ProbeSpec, *, rows: Dataset | None = None) -> ProbeSet:
    """Draw the probe set from a data loader's data set, without running the loader.

    Rows are drawn at random, or by the loader's sampler where that weights them. A batch sampler other than torch's
    own decides which rows may share a batch, so its first batches are taken; of a stream the first rows; and where the
    items of the data set are whole batches, such items.

    Args:
        dataloader: Its data set, collator and batch sampler are used.
        spec: How many examples to draw, and how to collate them.
        rows: With `task_column`, the loader's data set before columns were removed.

    Raises:
        ValueError: If there are fewer examples than required, no column of that name, or only one task or too many.
        MeasurementError: If no probe set can be drawn; the message says what to do.
    """
    with spec.group.propagate_errors():
        found = []
        if spec.group.rank == 0:
            with preserved_rng(spec.seed), preserved_loader(dataloader) as state:
                found = _sample(dataloader, spec, rows, state)
    found = spec.group.all_gather_interleaved(found)
    batches = [batch for batch, _ in found]
    return ProbeSet(batches, None if spec.task_column is None else [task for _, task in found])


def preserved_loader(dataloader: Any) -> AbstractContextManager[DataState]:
    """Return a context that restores the state of everything that is read through a data loader."""
    dataset = dataset_of(dataloader)
    stream = num_examples(dataset) is None
    if dataset is None:
        return preserved_data(dataloader, stream=stream)
    return preserved_data(dataset, dataloader.collate_fn, dataloader.sampler, dataloader.batch_sampler, stream=stream)


def _sample(
    dataloader: DataLoader, spec: ProbeSpec, rows_with_tasks: Dataset | None, state: DataState
) -> list[tuple[Any, str]]:
    """Return batches, each with its task, which is empty if tasks are not distinguished."""
    dataset = dataset_of(dataloader)
    total = num_examples(dataset)
    by_task = spec.task_column is not None
    whole = _whole_batches(dataloader, dataset, total, spec.seed, state, by_task=by_task)
    if whole is not None:
        return [(batch, "") for batch in _collect_batches(whole, spec.examples, spec.required)]
    if total is None:
        rows = list(islice(_rows(dataset, state), spec.examples))
        indices = list(range(len(rows)))
        _require_enough(len(rows), spec.examples, spec.required)
    else:
        drawn = _drawn_rows(dataloader, total, spec)
        _require_enough(len(drawn), spec.examples, spec.required)
        indices, rows = _readable_rows(dataset, drawn)
    if spec.task_column is None:
        return [(batch, "") for batch in _collated(dataloader, rows, spec.batch_size)]
    return [
        (batch, task)
        for task, members in _members(rows_with_tasks, spec.task_column, indices, total).items()
        for batch in _collated(
            dataloader, [rows[member] for member in members], smaller_batches(len(members), spec.batch_size)
        )
    ]


def _drawn_rows(dataloader: DataLoader, total: int, spec: ProbeSpec) -> list[int]:
    """Return the indices of rows, each as likely as in training; with tasks, all alike."""
    sampler = uneven_sampler(dataloader)
    if sampler is None or spec.task_column is not None:
        return probe_indices(total, spec.examples, seed=spec.seed)
    with _explained("no_batches"):
        return [int(index) for index in islice(sampler, spec.examples)]


def _members(rows: Dataset | None, column: str, indices: list[int], total: int | None) -> dict[str, list[int]]:
    """Return, for each task, the positions in `indices` of its rows."""
    task_of = tasks_of_rows(rows, column, rows=total)
    names = [task_of(index) for index in indices]
    require_several(names, column)
    return {name: [i for i, other in enumerate(names) if other == name] for name in sorted(set(names))}


def _whole_batches(
    dataloader: DataLoader, dataset: Any, total: int | None, seed: int, state: DataState, *, by_task: bool
) -> Iterator[Any] | None:
    """Return the batches one by one if rows can't be combined freely, else `None`."""
    if dataset is None:
        return _rows(dataloader, state)
    collate = dataloader.collate_fn
    if total is None:
        return map(collate, _rows(dataset, state)) if dataloader.batch_size is None else None
    if dataloader.batch_sampler is not None:
        sampler: Any = dataloader.batch_sampler
        sampler = sampler.batch_sampler if isinstance(sampler, BatchSamplerShard) else sampler
        if type(sampler) is BatchSampler or by_task:
            return None
        return (collate(copied_row([dataset[index] for index in indices])) for indices in sampler)
    if by_task:
        raise ValueError(
            "The items of the training set are whole batches; `task_column` needs rows. Leave it unset, or collate "
            "rows in the data loader."
        )
    return (collate(dataset[index]) for index in _item_indices(dataloader.sampler, total, seed))


def _item_indices(sampler: Iterable[Any], total: int, seed: int) -> Iterable[Any]:
    """Return indices into a data set of whole batches: the sampler's lists of rows, or items in random order."""
    if isinstance(next(iter(sampler), None), (list, tuple)):
        return sampler
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()


def _collect_batches(batches: Iterator[Any], examples: int, required: bool) -> list[Any]:
    """Return as many batches as it takes for that many examples."""
    collected: list[Any] = []
    number = 0
    with _explained("no_batches"):
        while number < examples and len(collected) < examples:
            batch = next(batches, None)
            if batch is None:
                break
            collected.append(batch)
            number += examples_in(batch)
    _require_enough(number, examples, required)
    return collected


def _rows(stream: Any, state: DataState) -> Iterator[Any]:
    """Yield the rows of a stream, or its batches."""
    with _explained("stream_unreadable"):
        rows = iter(stream)
        if rows is iter(stream) and not state.knows(rows):
            raise MeasurementError("stream_read_once")
        yield from rows


def _readable_rows(dataset: Any, indices: Sequence[int]) -> tuple[list[int], list[Any]]:
    """Return the rows that can be read, and their indices; training may never read the others."""
    rows, failures = readable_rows(lambda index: dataset[index], indices)
    readable = [index for index in indices if index in rows]  # a weighted row may be drawn more than once
    require_readable(readable, failures, drawn_for="the probe set")
    return readable, [rows[index] for index in readable]


def readable_rows(read: Callable[[int], Any], indices: Iterable[int]) -> tuple[dict[int, Any], list[Exception]]:
    """Return the rows that can be read, by index, and the errors of the others."""
    rows: dict[int, Any] = {}
    failures: list[Exception] = []
    for index in indices:
        try:
            rows[index] = read(index)
        except Exception as error:
            failures.append(error)
    return rows, failures


def require_readable(readable: Collection[int], failures: Sequence[Exception], *, drawn_for: str) -> None:
    """Warn if some rows can't be read.

    Raises:
        MeasurementError: If there are too few others.
    """
    if failures and len(set(readable)) < MIN_EXAMPLES:
        raise MeasurementError("rows_unreadable", error=failures[0]) from failures[0]
    if failures:
        logger.warning_once(
            f"{len(failures):,} of {len(readable) + len(failures):,} rows drawn for {drawn_for} can't be read and are "
            f"left out; the first one: {redact_secrets(f'{type(failures[0]).__name__}: {failures[0]}')}."
        )


def _collated(dataloader: DataLoader, rows: list[Any], size: int) -> list[Any]:
    """Return the rows in batches of `size`, or of training's size if the collator refuses others."""

    def batches(size: int) -> list[Any]:
        return [dataloader.collate_fn(copied_row(rows[start : start + size])) for start in range(0, len(rows), size)]

    sampler = dataloader.batch_sampler
    training_size = sampler.batch_size if isinstance(sampler, BatchSampler) else dataloader.batch_size or size
    try:
        return batches(size)
    except Exception:
        if training_size >= min(size, len(rows)):
            with _explained("rows_refused"):
                raise
    with _explained("rows_refused"):
        return batches(training_size)


def copied_row(value: Any) -> Any:
    """Return copies of a row or of rows, with their containers and arrays: a collator may modify its inputs."""
    if type(value) is dict:
        return {key: copied_row(item) for key, item in value.items()}
    if type(value) is list:
        return [copied_row(item) for item in value]
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return value.clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _require_enough(number: int, examples: int, required: bool) -> None:
    """Raise if there are too few examples."""
    if required and number < examples:
        raise ValueError(
            f"The data set to measure on has only {number} examples, but `probe_examples` is {examples}. Pass a "
            "larger training set, or lower `probe_examples`."
        )
    if number < MIN_EXAMPLES:
        raise MeasurementError("too_few_examples", number=number, least=MIN_EXAMPLES)


@contextmanager
def _explained(code: str) -> Iterator[None]:
    """Turn any error of the user's data set, sampler or collator into a `MeasurementError`."""
    try:
        yield
    except MeasurementError:
        raise
    except Exception as error:
        raise MeasurementError(code, error=error) from error


def fingerprint(batches: Iterable[Any]) -> str:
    """Return the SHA-256 (first 16 hex digits) of all tensors of all batches: equal for equal probe sets."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in tensors_in(batch):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the dense tensors in nested containers, and the parts of others, by name, in a fixed order."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from tensors_in(value[key], f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{name}.{index}" if name else str(index))
    elif isinstance(value, Tensor) and value.is_nested:
        yield from tensors_in(list(value.unbind()), name)
    elif isinstance(value, Tensor) and value.layout is torch.sparse_coo:
        yield from tensors_in([value.coalesce().indices(), value.coalesce().values()], name)
    elif isinstance(value, Tensor):
        yield name, value if value.layout is torch.strided else value.to_dense()
