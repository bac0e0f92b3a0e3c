# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-optimizability"]
# ///
r"""Fine-tune a text checkpoint to label each word of a sentence, and write its optimizability report.

Any checkpoint and data set of the Hub with a list of words and a list of their tags, or local ones:

    python recipes/token_classification.py --model_name_or_path distilbert/distilbert-base-cased \
        --dataset_name lhoestq/conll2003 --max_train_samples 4000 --do_train --do_eval \
        --learning_rate 5e-5 --num_train_epochs 1 --logging_steps 10 --output_dir out/conll2003

    python recipes/token_classification.py recipes/demo/token_classification.json

The report is written to the folder `optimizability` inside `--output_dir`, unless `--report_dir` names another.
The first token of a word bears its tag; the loss ignores the others, special tokens and padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
from hf_optimizability.objective.objective import IGNORED_LABEL
from hf_optimizability.tasks.checkpoint import label2id, load_config
from hf_optimizability.tasks.datasets import DataSetArguments, load_data, subsample
from hf_optimizability.tasks.fine_tuning import fine_tune, freeze_untrained, parse_flags, print_report
from hf_optimizability.tasks.text_classification import ModelArguments


@dataclass
class DataArguments(DataSetArguments):
    """Which sentences to train and evaluate on."""

    text_column_name: str = field(default="tokens", metadata={"help": "Column of the lists of words."})
    label_column_name: str = field(default="ner_tags", metadata={"help": "Column of the lists of tags."})
    max_seq_length: int = field(default=128, metadata={"help": "Cut longer sentences to this number of tokens."})
    label_all_tokens: bool = field(
        default=False, metadata={"help": "Give a word's tag to each of its tokens, not to the first alone."}
    )


def tag_names(splits: DatasetDict, column: str) -> list[str]:
    """Return the names of the tags in the order of their numbers; sorted, where the data holds names."""
    features = splits["train"].features
    kind = getattr(features.get(column), "feature", None)
    if isinstance(kind, ClassLabel):
        return kind.names
    if kind is None or kind.dtype != "string":
        raise ValueError(
            f"Column {column!r} holds no lists of tags; pass one of {', '.join(features)} that does as "
            "--label_column_name."
        )
    return sorted({tag for split in splits.values() for tags in split[column] for tag in tags})


def numbers_in(config: PreTrainedConfig, names: Sequence[str]) -> dict[int | str, int]:
    """Return the checkpoint's number of each tag, by its number and by its name in the data."""
    own = label2id(config)
    whatever_case = {name.lower(): number for name, number in own.items()} | own
    found = [whatever_case.get(name, whatever_case[name.lower()]) for name in names]
    return {**dict(enumerate(found)), **dict(zip(names, found, strict=True))}


def align(words: Sequence[int | None], tags: Sequence[int], *, label_all_tokens: bool) -> list[int]:
    """Return the label of each token.

    Args:
        words: For each token the number of its word; `None` for special tokens.
        tags: The tag of each word.
        label_all_tokens: Whether all tokens of a word bear its tag, not the first alone.
    """
    return [
        tags[word] if word is not None and (label_all_tokens or word != before) else IGNORED_LABEL
        for before, word in zip([None, *words], words, strict=False)
    ]


def prepare(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments, numbers: dict[int | str, int]
) -> Dataset:
    """Convert words to token numbers and their tags to labels; both are padded later, batch by batch."""
    length = min(args.max_seq_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        tokens = tokenizer(batch[args.text_column_name], is_split_into_words=True, truncation=True, max_length=length)
        labels = [
            align(tokens.word_ids(row), [numbers[tag] for tag in tags], label_all_tokens=args.label_all_tokens)
            for row, tags in enumerate(batch[args.label_column_name])
        ]
        return {**tokens, "labels": labels}

    return examples.map(encode, batched=True, remove_columns=examples.column_names, desc="Tokenizing")


def compute_metrics(prediction: EvalPrediction, names: Sequence[str]) -> dict[str, float]:
    """Compute accuracy over the labelled tokens, F1 of each tag that occurs, and their mean."""
    labelled = prediction.label_ids != IGNORED_LABEL
    predicted, actual = np.argmax(prediction.predictions, axis=-1)[labelled], prediction.label_ids[labelled]
    scores = {}
    for number, name in enumerate(names):
        # A tag's predictions and references together count its hits twice and each of its errors once.
        together = np.sum(predicted == number) + np.sum(actual == number)
        if together:
            scores[f"f1_{name}"] = float(2 * np.sum((predicted == number) & (actual == number)) / together)
    return {"accuracy": float(np.mean(predicted == actual)), "f1": float(np.mean([*scores.values()])), **scores}


def main() -> None:
    model_args, data_args, optimizability, training_args = parse_flags(
        ModelArguments, DataArguments, OptimizabilityConfig, TrainingArguments
    )

    set_seed(training_args.seed)
    seed, hub = training_args.seed, {"cache_dir": model_args.cache_dir, "token": model_args.token}
    splits = load_data(data_args, seed=seed, **hub)
    names = tag_names(splits, data_args.label_column_name)
    config = load_config(model_args, names)
    with model_args.loading("The tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.tokenizer_name or model_args.model_name_or_path,
            # Byte-level tokenizers take a list of words only if each begins as within a sentence.
            **({"add_prefix_space": True} if config.model_type in ("bloom", "deberta", "gpt2", "roberta") else {}),
            **model_args.hub_options(),
        )
    model = freeze_untrained(model_args.load_model(AutoModelForTokenClassification, config), model_args)
    numbers = numbers_in(config, names)
    train, validation = (
        prepare(split, tokenizer, data_args, numbers) for split in subsample(splits, data_args, seed=seed)
    )
    trainer = OptimizabilityTrainer(
        model=model,
        args=training_args,
        optimizability=optimizability,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=partial(compute_metrics, names=sorted(label2id(config), key=label2id(config).__getitem__)),
    )
    folder = fine_tune(trainer, tasks="token-classification", dataset=data_args.public_name)
    print_report(trainer, folder)


if __name__ == "__main__":
    main()
