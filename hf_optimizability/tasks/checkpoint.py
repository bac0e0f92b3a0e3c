# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint, and its configuration for the classes of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, Literal

from datasets.exceptions import DatasetGenerationError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel


class LoadingError(ValueError):
    """A checkpoint or data that can't be loaded; the cause says why."""


@dataclass
class CheckpointArguments:
    """Which checkpoint to fine-tune, with flags named as in Transformers' example scripts."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint on the Hub, or a local folder."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration, if not the checkpoint's own."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the configuration, for example hidden_dropout_prob=0.2."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep what is downloaded from the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub, if not the one you logged in with."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the checkpoint."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of the weights, whatever the checkpoint was saved in."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Accept a checkpoint whose head has another number of classes."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "How attention is computed, such as eager or sdpa, if not the model's default."},
    )
    random_weights: bool = field(
        default=False, metadata={"help": "Take the checkpoint's architecture only, with new random weights."}
    )
    method: Literal["full", "lora", "linear_probe"] = field(
        default="full",
        metadata={"help": "Train all weights; LoRA matrices and the head; or the head alone, on frozen features."},
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the LoRA matrices, whose alpha is twice that."})

    def hub_options(self) -> dict[str, Any]:
        """Return what every `from_pretrained` of this checkpoint takes."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }

    def load_model(self, auto_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
        """Return the checkpoint's model with the head of `auto_class`, or with random weights.

        Raises:
            ValueError: If it can't be loaded.
        """
        options = {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
        with self.loading("The model"):
            if self.random_weights:
                return auto_class.from_config(config, trust_remote_code=self.trust_remote_code, **options)
            return auto_class.from_pretrained(
                self.model_name_or_path,
                config=config,
                ignore_mismatched_sizes=self.ignore_mismatched_sizes,
                **options,
                **self.hub_options(),
            )

    def loading(self, what: str) -> AbstractContextManager[None]:
        """Return a context in which an error in loading a part of the checkpoint says what to do."""
        return loading(
            f"{what} of {self.model_name_or_path!r}",
            "Check --model_name_or_path: it takes the name of a checkpoint on the Hub (private and gated ones after "
            "`hf auth login`), or a local folder made by `save_pretrained`, which needs no network.",
        )


def original_config(args: CheckpointArguments) -> PreTrainedConfig:
    """Return the checkpoint's configuration as it is."""
    with args.loading("The configuration"):
        return AutoConfig.from_pretrained(args.config_name or args.model_name_or_path, **args.hub_options())


def load_config(args: CheckpointArguments, names: list[str]) -> PreTrainedConfig:
    """Return the checkpoint's configuration, with the classes `names`.

    A checkpoint that already has exactly these classes keeps their order, which its head was trained with.

    Raises:
        ValueError: If it can't be loaded, or an override does not fit.
    """
    config = original_config(args)
    if not same_classes(label2id(config), names):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    if args.config_overrides is not None:
        config.update_from_string(args.config_overrides)
    return config


def label2id(config: PreTrainedConfig) -> dict[str, int]:
    """Return a checkpoint's classes and their numbers."""
    return {str(name): int(number) for name, number in (config.label2id or {}).items()}


def same_classes(of_checkpoint: Iterable[str], of_data: Iterable[str]) -> bool:
    """Return whether the names are the same up to order and case.

    Example:
        >>> same_classes(["NEGATIVE", "POSITIVE"], ["positive", "negative"]), same_classes(["a", "A"], ["a"])
        (True, False)
    """
    mine, theirs = (sorted(name.lower() for name in names) for names in (of_checkpoint, of_data))
    return mine == theirs and len(set(mine)) == len(mine)


@contextmanager
def loading(what: str, remedy: str) -> Iterator[None]:
    """Raise an error that names what could not be loaded, why, and what to do.

    Raises:
        LoadingError: In place of any exception raised inside, which is its cause.

    Example:
        >>> with loading("The list", "Count."):
        ...     [][1]
        Traceback (most recent call last):
        hf_optimizability.tasks.checkpoint.LoadingError: The list can't be loaded: list index out of range. Count.
    """
    try:
        yield
    except Exception as error:
        hidden = isinstance(error, DatasetGenerationError) and error.__cause__
        reason = shorten(str(hidden or error), 300, placeholder=" …").rstrip(".")
        raise LoadingError(f"{what} can't be loaded: {reason}. {remedy}") from error
