# SPDX-License-Identifier: Apache-2.0
"""Drawing the probe set takes nothing from the data set, its stream or its collator, and changes nothing in them."""

from __future__ import annotations

import csv
import io
import itertools
import multiprocessing
import os
import queue
import random
import socket
import sqlite3
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_optimizability.errors import MeasurementError
from hf_optimizability.objective.probe_set import ProbeSpec, draw_probe_set


PROBE = ProbeSpec(6, batch_size=3, seed=0)

GLOBAL_GENERATOR = np.random.default_rng(0)
GLOBAL_COUNT = 0


class RowPartition(Dataset):
    """What `draw` gives, row by row."""

    def __init__(self, draw: Callable[[int], float]):
        self.draw = draw

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(self.draw(index)))


class Counting:
    """State in attributes, in containers, in a class, in slots, in arrays."""

    served: ClassVar[int] = 0
    __slots__ = ("array", "cache", "count", "flags", "nested", "numbers", "order", "recent", "tensor", "values")

    def __init__(self) -> None:
        Counting.served = 0
        self.count, self.values, self.recent = 0, [0], deque([1, 2, 3], maxlen=3)
        self.nested, self.order = {"deep": [{"count": 0}]}, OrderedDict.fromkeys("abc", 0)
        self.array, self.tensor, self.cache = np.zeros(2), torch.zeros(2), set()
        self.flags, self.numbers = bytearray(1), array("i", [0])

    def __call__(self, index: int) -> float:
        Counting.served += 1
        self.count += 1
        self.values.append(index)
        self.recent.append(index)
        self.nested["deep"][0]["count"] += 1
        self.order.move_to_end("a" if self.count % 2 else "b")
        self.array += 1
        self.tensor.add_(1)
        self.cache.add(index)
        self.flags[0] += 1
        self.numbers.append(1)
        order = sum(place * ord(name) for place, name in enumerate(self.order))
        return (
            Counting.served + self.count + len(self.values) + sum(self.recent) + order + len(self.cache)
            + self.nested["deep"][0]["count"] + self.array.sum() + float(self.tensor.sum())
            + self.flags[0] + len(self.numbers)
        )  # fmt: skip


def global_generator() -> Callable[[int], float]:
    global GLOBAL_GENERATOR, GLOBAL_COUNT
    GLOBAL_GENERATOR, GLOBAL_COUNT = np.random.default_rng(0), 0

    def draw(index: int) -> float:
        global GLOBAL_COUNT
        GLOBAL_COUNT += 1
        return GLOBAL_GENERATOR.normal() + GLOBAL_COUNT

    return draw


def default_argument() -> Callable[[int], float]:
    def draw(index: int, seen: list[int] = [], calls: dict[str, int] = {"n": 0}) -> float:  # noqa: B006
        seen.append(index)
        calls["n"] += 1
        return len(seen) + calls["n"]

    return draw


def function_attribute() -> Callable[[int], float]:
    def draw(index: int) -> float:
        draw.calls += 1  # type: ignore[attr-defined]
        return draw.calls  # type: ignore[attr-defined]

    draw.calls = 0  # type: ignore[attr-defined]
    return draw


def shared_count() -> Callable[[int], float]:
    value = multiprocessing.Value("i", 0)

    def draw(index: int) -> float:
        value.value += 1
        return value.value

    return draw


def handed_out_once() -> Callable[[int], float]:
    values = queue.Queue()
    for value in range(50):
        values.put(value)
    return lambda index: values.get_nowait()


def held(value: Any, draw: Callable[[Any], float]) -> Callable[[int], float]:
    return lambda index: draw(value)


STATES: dict[str, Callable[[], Callable[[int], float]]] = {
    "numpy generator": lambda: held(np.random.default_rng(0), lambda rng: rng.normal()),
    "numpy random state": lambda: held(np.random.RandomState(0), lambda rng: rng.normal()),
    "python generator": lambda: held(random.Random(0), lambda rng: rng.gauss(0, 1)),
    "bound method": lambda: held(random.Random(0).gauss, lambda gauss: gauss(0, 1)),
    "torch generator": lambda: partial(
        lambda index, generator: torch.randn((), generator=generator), generator=torch.Generator().manual_seed(0)
    ),
    "global generator and count": global_generator,
    "everything an object holds": Counting,
    "default argument": default_argument,
    "function attribute": function_attribute,
    "number shared by processes": shared_count,
    "queue": handed_out_once,
    "iterators": lambda: held(
        [itertools.count(), itertools.cycle([1, 2, 5]), iter(range(9, 99))], lambda held: sum(map(next, held))
    ),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("part", ["data set", "collator"])
def test_what_rows_and_collators_draw_from_comes_back(name: str, part: str):
    def loader() -> DataLoader:
        draw = STATES[name]()
        if part == "data set":
            return DataLoader(RowPartition(draw), batch_size=4)
        return DataLoader(
            RowPartition(float), batch_size=4, collate_fn=lambda rows: torch.stack(rows) + float(draw(0))
        )

    untouched = list(loader())
    drawn_from = loader()
    first, again = (draw_probe_set(drawn_from, PROBE).batches for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.testing.assert_close(list(drawn_from), untouched, rtol=0, atol=0)


class Stream(IterableDataset):
    """A generator over one open source."""

    def __init__(self, source: Any):
        self.source = source

    def __iter__(self) -> Iterator[Tensor]:
        for item in self.source:
            yield torch.tensor(float(item[0] if isinstance(item, (list, tuple)) else item))


class Countdown:
    """An iterator written in Python."""

    def __init__(self) -> None:
        self.left = 20

    def __iter__(self) -> Countdown:
        return self

    def __next__(self) -> int:
        if not self.left:
            raise StopIteration
        self.left -= 1
        return self.left


LINES = "".join(f"{number}\n" for number in range(20))


def file(folder: Path) -> Path:
    (folder / "lines.txt").write_text(LINES)
    return folder / "lines.txt"


@pytest.mark.parametrize(
    "source",
    [
        lambda folder: file(folder).open(),
        lambda folder: file(folder).open("rb"),
        lambda folder: io.StringIO(LINES),
        lambda folder: iter(list(range(20))),
        lambda folder: zip(range(20), iter(range(20)), file(folder).open()),  # noqa: B905
        lambda folder: map(int, itertools.chain(file(folder).open(), [3, 4])),
        lambda folder: Countdown(),
        lambda folder: deque(range(20)),
    ],
)
def test_a_stream_over_an_open_source_loses_no_row(tmp_path: Path, source: Callable[[Path], Any]):
    stream = Stream(source(tmp_path))
    rows = iter(stream)
    skipped = [next(rows)] if isinstance(stream.source, Countdown) else []  # read in part already
    batches = draw_probe_set(DataLoader(stream, batch_size=4), PROBE).batches
    left = [float(row) for row in rows] if skipped else [float(row) for row in stream]
    assert [len(batch) for batch in batches] == [3, 3]
    assert torch.cat(batches).tolist() == left[:6] and len(left) == (19 if skipped else 22 if len(left) > 20 else 20)


class Handed(IterableDataset):
    def __init__(self, rows: Any):
        self.rows = rows

    def __iter__(self) -> Any:
        return self.rows


def test_a_stream_that_hands_out_its_only_iterator_loses_no_row():
    stream = Handed(iter([torch.tensor(float(n)) for n in range(20)]))
    assert torch.cat(draw_probe_set(DataLoader(stream, batch_size=4), PROBE).batches).tolist() == [0, 1, 2, 3, 4, 5]
    assert len(list(stream)) == 20


def test_a_stream_of_datasets_loses_no_row(tmp_path: Path):
    opened = file(tmp_path).open()

    def rows() -> Iterator[dict[str, float]]:
        for line in opened:
            yield {"x": float(line)}

    def stream() -> datasets.IterableDataset:
        return datasets.IterableDataset.from_generator(rows).shuffle(seed=0, buffer_size=4)

    drawn_from = stream()
    draw_probe_set(DataLoader(drawn_from, batch_size=4), PROBE)
    left = [row["x"] for row in drawn_from]
    opened.seek(0)
    assert left == [row["x"] for row in stream()] and sorted(left) == list(range(20))


def pipe() -> Any:
    reading, writing = os.pipe()
    os.write(writing, LINES.encode())
    os.close(writing)
    return os.fdopen(reading)


def cursor() -> sqlite3.Cursor:
    connection = sqlite3.connect(":memory:")
    return connection.execute(
        "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n LIMIT 20) SELECT i FROM n"
    )


def reading() -> Iterator[int]:
    yield from range(20)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (pipe, "TextIOWrapper"),
        (cursor, "Cursor"),
        (reading, "generator"),
        (lambda: csv.reader(io.StringIO(LINES)), "reader"),
        (lambda: zip(reading(), range(20), strict=True), "zip"),
    ],
)
def test_a_stream_that_cannot_be_set_back_is_refused_unread(source: Callable[[], Any], kind: str):
    stream = Stream(source())
    with pytest.raises(MeasurementError, match=rf"the position of Stream.source \({kind}\) can't be restored.*Pass a"):
        draw_probe_set(DataLoader(stream, batch_size=4), PROBE)
    assert len(list(stream)) == 20


def test_channels_are_refused_unread():
    ends = socket.socketpair()
    for channel in (ends[0], queue.SimpleQueue(), multiprocessing.Pipe()[0]):
        with pytest.raises(MeasurementError, match="can't be restored"):
            draw_probe_set(DataLoader(Stream([channel]), batch_size=4), PROBE)


def test_a_stream_with_a_state_of_its_own_is_set_back():
    class Numbered(Stream):
        position = 0

        def __iter__(self) -> Iterator[Tensor]:
            for item in self.source:
                self.position += 1
                yield torch.tensor(float(item))

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state_dict: dict[str, int]) -> None:
            self.source, self.position = itertools.islice(reading(), state_dict["position"], None), 0

    stream = Numbered(reading())
    assert torch.cat(draw_probe_set(DataLoader(stream, batch_size=4), PROBE).batches).tolist() == [0, 1, 2, 3, 4, 5]
    assert len(list(stream)) == 20


def test_a_generator_that_rows_come_from_is_refused_in_any_data_set():
    numbers = reading()
    with pytest.raises(MeasurementError, match="generator"):
        draw_probe_set(DataLoader(RowPartition(lambda index: next(numbers)), batch_size=4), PROBE)
    assert len(list(numbers)) == 20


def test_large_data_is_neither_copied_nor_walked_through():
    class Large(RowPartition):
        def __init__(self) -> None:
            super().__init__(float)
            self.rows = [{"n": [index]} for index in range(300_000)]
            self.table = torch.zeros(30_000_000)

    dataset = Large()
    started = time.process_time()
    draw_probe_set(DataLoader(dataset, batch_size=4), PROBE)
    assert time.process_time() - started < 1 and len(dataset.rows) == 300_000


def test_state_comes_back_where_the_collator_raises():
    generator = np.random.default_rng(0)

    def refuse(rows: list[Tensor]) -> Tensor:
        raise KeyError(generator.normal())

    with pytest.raises(MeasurementError, match="refused rows"):
        draw_probe_set(DataLoader(RowPartition(float), batch_size=4, collate_fn=refuse), PROBE)
    assert generator.normal() == np.random.default_rng(0).normal()
