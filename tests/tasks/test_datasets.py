# SPDX-License-Identifier: Apache-2.0
"""From files in all formats to labelled splits, and what is said of data that can't be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_optimizability.tasks.datasets import LabelledDataArguments, load_splits


TEXTS = [f"text {number}" for number in range(12)]


def load(tmp_path: Path, **options: Any) -> tuple[Dataset, Dataset, list[str]]:
    return load_splits(LabelledDataArguments(**options), seed=0, cache_dir=str(tmp_path / "cache"), token=None)


def write_csv(path: Path, labels: list[Any]) -> str:
    rows = "".join(f"{text},{label}\n" for text, label in zip(TEXTS, labels, strict=False))
    content = f"text,label\n{rows}".encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def write_json(path: Path, labels: list[Any]) -> str:
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(TEXTS, labels, strict=False)]
    path.write_text("\n".join(rows))
    return str(path)


def write_parquet(path: Path, labels: list[Any]) -> str:
    Dataset.from_dict({"text": TEXTS[: len(labels)], "label": labels}).to_parquet(path)
    return str(path)


WRITERS = {"csv": write_csv, "csv.gz": write_csv, "json": write_json, "jsonl": write_json, "parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_file_format_gives_the_same_splits(suffix: str, tmp_path: Path) -> None:
    write = WRITERS[suffix]
    train, validation, names = load(
        tmp_path,
        train_file=write(tmp_path / f"a.{suffix}", ["good", "bad", "so-so", "bad"]),
        validation_file=write(tmp_path / f"b.{suffix}", ["so-so", "good"]),
    )
    assert names == ["bad", "good", "so-so"]
    assert (train["text"][:], train["label"][:]) == (TEXTS[:4], [1, 0, 2, 0])
    assert (validation["text"][:], validation["label"][:]) == (TEXTS[:2], [2, 1])


def test_numbers_as_labels_are_classes_in_their_order(tmp_path: Path) -> None:
    train, _, names = load(tmp_path, train_file=write_csv(tmp_path / "a.csv", [10, 2, 30, 10, 2, 30, 2, 10]))
    assert names == ["2", "10", "30"]
    numbers = {TEXTS.index(text): label for text, label in zip(train["text"], train["label"], strict=True)}
    assert numbers == {row: [1, 0, 2, 1, 0, 2, 0, 1][row] for row in numbers}


def test_without_validation_data_a_share_of_the_training_data_is_held_out(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", ["x", "y"] * 6)
    train, validation, _ = load(tmp_path, train_file=file, train_val_split=0.25)
    assert (len(train), len(validation)) == (9, 3)
    assert set(train["text"]) | set(validation["text"]) == set(TEXTS)


def test_classes_keep_their_names_and_unlabelled_examples_are_left_out(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    folder = tmp_path / "data"
    for split, labels in {"train": [1, -1, 0], "validation": [0, -1]}.items():
        examples = Dataset.from_dict({"text": TEXTS[: len(labels)], "label": labels}, features=features)
        examples.to_parquet(folder / f"{split}.parquet")
    train, validation, names = load(tmp_path, dataset_name=str(folder))
    assert names == ["no", "yes"]
    assert (train["label"][:], validation["label"][:]) == ([1, 0], [0])


def test_samples_are_drawn_from_the_whole_file(tmp_path: Path) -> None:
    train, validation, _ = load(
        tmp_path,
        train_file=write_csv(tmp_path / "a.csv", ["x"] * 6 + ["y"] * 6),
        validation_file=write_csv(tmp_path / "b.csv", ["x"] * 6 + ["y"] * 6),
        max_train_samples=6,
        max_eval_samples=99,
    )
    assert (len(train), len(validation)) == (6, 12)
    assert set(train["label"]) == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of --dataset_name, --train_file; got none"),
        ({"dataset_name": "a", "train_file": "b.csv"}, "got dataset_name, train_file"),
        ({"train_file": "reviews.xlsx"}, "'reviews.xlsx' is unknown"),
        ({"train_file": "a.csv", "validation_file": "b.json"}, "different formats"),
        ({"train_file": "a.csv", "train_val_split": 15.0}, "--train_val_split is 15.0"),
        ({"train_file": "a.csv", "max_train_samples": 0}, "--max_train_samples is 0"),
    ],
)
def test_wrong_arguments_fail_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelledDataArguments(**options)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["x", "y"], {"label_column_name": "class"}, "no column 'class', only text, label; pass --label_column_name"),
        (["x", "y"], {"train_split_name": "training"}, "no split 'training', only train"),
        (["x", "y"], {"validation_split_name": "dev"}, "no split 'dev', only train"),
        ([0.5, 1.5], {}, "holds float64 values, not classes"),
        ([1, None, 0, 1], {}, r"\d of \d+ rows have no class in column 'label': their cells are empty"),
    ],
)
def test_unusable_data_fails_by_name(labels: list[Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, train_file=write_csv(tmp_path / "a.csv", labels * 3), **options)


def test_a_class_that_was_never_trained_fails_by_name(tmp_path: Path) -> None:
    files = {"train_file": ["x", "y"], "validation_file": ["x", "z"]}
    with pytest.raises(ValueError, match=r"Classes \['z'\]"):
        load(tmp_path, **{name: write_csv(tmp_path / f"{name}.csv", labels) for name, labels in files.items()})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dataset_name": "org/digits"}, "org/digits"),
        ({"train_file": "/home/ada/secret/reviews.csv"}, "reviews.csv"),
        ({"dataset_name": str(Path(__file__).parent)}, "tasks"),
    ],
)
def test_a_card_names_no_folder_of_the_user(options: dict[str, str], name: str):
    assert LabelledDataArguments(**options).public_name == name
