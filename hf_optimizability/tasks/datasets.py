# SPDX-License-Identifier: Apache-2.0
"""From a data set's name, files or folders to training and validation splits with numbered classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from transformers import PreTrainedConfig

from .checkpoint import label2id, loading, same_classes


FILE_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Names in `datasets` of the formats of local files, by suffix; a compressed file has one more (`.csv.gz`)."""


@dataclass
class DataSetArguments:
    """Which examples to train and evaluate on, with flags named as in Transformers' example scripts.

    Raises:
        ValueError: If the training data has no source or two, a file's format is unknown, or a number is impossible.
    """

    SOURCES: ClassVar[tuple[str, ...]] = ("dataset_name", "train_file")

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, or a local folder laid out like one."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(
        default=None, metadata={"help": "Local csv, json, jsonl or parquet file to train on; may be compressed (.gz)."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Local file to evaluate on."})
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split_name: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on. By default validation, else test, else a share of the training split."
        },
    )
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training split to evaluate on where there is no other split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many random examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many random examples."})

    def __post_init__(self) -> None:
        given = [name for name in self.SOURCES if vars(self)[name] is not None]
        if len(given) != 1:
            flags = ", ".join(f"--{name}" for name in self.SOURCES)
            raise ValueError(f"Pass exactly one of {flags}; got {', '.join(given) or 'none'}.")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split is {self.train_val_split}; it must lie between 0 and 1.")
        for name in ("max_train_samples", "max_eval_samples"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise ValueError(
                    f"--{name} is {vars(self)[name]}; it must be at least 1, or left out for all examples."
                )
        self.loader()

    @property
    def source(self) -> str:
        """The name, file or folder of the training data."""
        return next(vars(self)[name] for name in self.SOURCES if vars(self)[name] is not None)

    @property
    def public_name(self) -> str:
        """What a model card may call the data: its name on the Hub, or the last part of a local path."""
        on_the_hub = self.source == self.dataset_name and not Path(self.source).exists()
        return self.source if on_the_hub else Path(self.source).name

    def loader(self) -> tuple[str, dict[str, str] | None]:
        """Return what to call `datasets.load_dataset` with: a name or format, and the files by split if local."""
        if self.train_file is None:
            return str(self.dataset_name), None
        files = {"train": self.train_file}
        if self.validation_file is not None:
            files["validation"] = self.validation_file
        formats = {file_format(file) for file in files.values()}
        if len(formats) > 1:
            raise ValueError("--train_file and --validation_file have different formats; convert one of them.")
        return formats.pop(), files


@dataclass
class LabelledDataArguments(DataSetArguments):
    """Which examples of a class each to train and evaluate on."""

    label_column_name: str = field(default="label", metadata={"help": "Column of the class, a number or a name."})


def file_format(file: str) -> str:
    """Return the format of a local file by its name: `"csv"`, `"json"` or `"parquet"`.

    Raises:
        ValueError: If the name ends in none of `FILE_FORMATS`.

    Example:
        >>> file_format("reviews.csv.gz")
        'csv'
    """
    for suffix in Path(file).suffixes[-2:]:
        if suffix in FILE_FORMATS:
            return FILE_FORMATS[suffix]
    raise ValueError(f"The format of {file!r} is unknown; its name must end in one of {', '.join(FILE_FORMATS)}.")


def load_splits(
    args: LabelledDataArguments, *, seed: int, cache_dir: str | None, token: str | None
) -> tuple[Dataset, Dataset, list[str]]:
    """Load the data, encode the labels and sample the requested number of examples.

    Args:
        args: Which data.
        seed: Seed of the split and of the sample.
        cache_dir: Where `datasets` keeps what it downloads.
        token: Token for the Hub.

    Returns:
        The training split, the validation split, and the names of the classes in the order of their numbers.

    Raises:
        ValueError: If the data can't be loaded, a split or the label column is missing, or the labels are not classes.
    """
    splits = load_data(args, seed=seed, cache_dir=cache_dir, token=token)
    splits, names = encode_labels(splits, args.label_column_name)
    return *subsample(splits, args, seed=seed), names


def load_data(args: DataSetArguments, *, seed: int, cache_dir: str | None, token: str | None) -> DatasetDict:
    """Load the data as it is, with the splits `train` and `validation`.

    Raises:
        ValueError: If the data can't be loaded, or a split is missing.
    """
    name_or_format, files = args.loader()
    with loading(
        f"The data set {args.source!r}",
        "Check the path if it is local; the name of a data set on the Hub (private and gated ones after `hf auth "
        "login`) needs network, or an earlier download.",
    ):
        data = load_dataset(
            name_or_format, args.dataset_config_name, data_files=files, cache_dir=cache_dir, token=token
        )
    return choose_splits(data, args, seed=seed)


def choose_splits(data: DatasetDict, args: DataSetArguments, *, seed: int) -> DatasetDict:
    """Return the splits of the given names; split the training data where there is only that."""
    wanted = args.validation_split_name
    validation = next((name for name in ("validation", "test") if name in data), None) if wanted is None else wanted
    for name in filter(None, (args.train_split_name, validation)):
        if name not in data:
            raise ValueError(
                f"The data has no split {name!r}, only {', '.join(data)}; pass --train_split_name or "
                "--validation_split_name."
            )
    train = data[args.train_split_name]
    if validation is None:
        halves = train.train_test_split(args.train_val_split, seed=seed)
        return DatasetDict(train=halves["train"], validation=halves["test"])
    return DatasetDict(train=train, validation=data[validation])


def encode_labels(splits: DatasetDict, column: str) -> tuple[DatasetDict, list[str]]:
    """Convert the labels of all splits into class numbers, by the classes of the training split."""
    features = splits["train"].features
    if column not in features:
        raise ValueError(f"There is no column {column!r}, only {', '.join(features)}; pass --label_column_name.")
    if isinstance(features[column], ClassLabel):
        # Some data sets mark examples without a label by -1.
        return splits.filter(lambda label: label >= 0, input_columns=column), features[column].names
    for split in splits.values():
        require_complete(split, column, "class")
    kind = features[column].dtype
    if not kind.startswith(("int", "uint", "bool", "string", "large_string")):
        raise ValueError(f"Column {column!r} holds {kind} values, not classes; pass another --label_column_name.")
    splits = splits.cast_column(column, Value("string"))
    names = sorted(splits["train"].unique(column), key=int if "int" in kind else None)
    unknown = set(splits["validation"].unique(column)) - set(names)
    if unknown:
        raise ValueError(f"Classes {sorted(unknown)} of column {column!r} occur in the validation split only.")
    return splits.cast_column(column, ClassLabel(names=names)), names


def require_complete(examples: Dataset, column: str, what: str) -> None:
    """Raise if cells of a column are empty.

    Raises:
        ValueError: If some are; it says how many.
    """
    missing = sum(value is None for value in examples[column])
    if missing:
        raise ValueError(
            f"{missing} of {len(examples)} rows have no {what} in column {column!r}: their cells are empty. Fill them "
            "in, or remove these rows."
        )


def subsample(splits: DatasetDict, args: DataSetArguments, *, seed: int) -> tuple[Dataset, Dataset]:
    """Return as many random examples of the training and the validation split as `args` asks for."""
    train, validation = splits["train"], splits["validation"]
    return _subsample(train, args.max_train_samples, seed), _subsample(validation, args.max_eval_samples, seed)


def _subsample(examples: Dataset, count: int | None, seed: int) -> Dataset:
    """Return `count` random examples, since files are often sorted by class; all of them if it is `None`."""
    return examples if count is None else examples.shuffle(seed=seed).select(range(min(count, len(examples))))


def align_labels(config: PreTrainedConfig, examples: Dataset, column: str) -> Dataset:
    """Renumber the examples' classes as the checkpoint numbers them, where it has the same ones in another order."""
    in_checkpoint, in_data = list(label2id(config)), examples.features[column].names
    if in_checkpoint == in_data or not same_classes(in_checkpoint, in_data):
        return examples
    return examples.align_labels_with_mapping(label2id(config), column)
