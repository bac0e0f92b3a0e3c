# SPDX-License-Identifier: Apache-2.0
"""Candidates: each is a name and the flags in which it differs from the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, count
from pathlib import Path
from typing import Any

from ..config import OptimizabilityConfig
from ..redaction import public_name
from ..training.provenance import public_id


Flag = str | int | float | bool

CHECKPOINT = "model_name_or_path"

_CHANGE = re.compile(r"([a-z][a-z0-9_]*)=(.*)", flags=re.DOTALL)


RECORDED_FLAGS = (
    CHECKPOINT, "model_revision", "config_overrides", "dtype", "attn_implementation", "random_weights", "method",
    "lora_rank", "ignore_mismatched_sizes", "dataset_name", "dataset_config_name", "train_split_name",
    "validation_split_name", "train_val_split", "label_column_name", "max_train_samples", "max_eval_samples",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "fp16", "seed",
    *(field.name for field in fields(OptimizabilityConfig) if field.name != "report_dir"),
)  # fmt: skip
"""Flags that a comparison's files show; of all others they have neither name nor value."""


@dataclass(frozen=True)
class Candidate:
    """A name, and the flags of `hf-optimizability run` that only this candidate has.

    Attributes:
        name: What the candidate is called on the page.
        changes: Values of flags by name, such as `{"model_name_or_path": "org/name", "learning_rate": 1e-3}`.
    """

    name: str
    changes: Mapping[str, Flag]

    @property
    def flags(self) -> list[str]:
        """The changes as on a command line."""
        return [f"--{name}={value}" for name, value in self.changes.items()]

    @property
    def public_changes(self) -> dict[str, Flag]:
        """The changes as they are published."""
        return public_flags(self.changes)


def public_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags as they are published: those of `RECORDED_FLAGS`, without folders and what looks like a secret.

    Example:
        >>> public_flags({"model_name_or_path": "/data/mine", "learning_rate": 1e-3, "hub_token": "hf_x"})
        {'model_name_or_path': 'mine', 'learning_rate': 0.001}
    """
    recorded = {name: value for name, value in values.items() if name in RECORDED_FLAGS}
    return {name: _public(value) for name, value in recorded.items() if not isinstance(value, Mapping)}


def _public(value: Any) -> Any:
    """Return a flag's value, or each of a list, as it is published."""
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    return public_name(public_id(value)) if isinstance(value, str) else value


def parse_candidates(given: Iterable[str | Mapping[str, Flag]]) -> tuple[Candidate, ...]:
    """Parse candidates.

    Args:
        given: Each a checkpoint (`"org/name"`, a local folder), flags (`"learning_rate=1e-3,optim=sgd"`) or both
            (`"org/name,method=lora"`); or a mapping of flags, with `name` for the candidate's name if it has a
            special one.

    Returns:
        The candidates. Names are made of what differs; equal names are numbered.

    Raises:
        ValueError: If there are fewer than two, or one of them can't be read.

    Example:
        >>> [candidate.name for candidate in parse_candidates(["org/a", "org/a,method=lora,lora_rank=4", "org/a"])]
        ['org/a', 'org/a, method=lora, lora_rank=4', 'org/a (2)']
        >>> parse_candidates(["learning_rate=1e-3", {"name": "slow", "learning_rate": 1e-4}])[1]
        Candidate(name='slow', changes={'learning_rate': 0.0001})
    """
    changes = [_from_text(candidate) if isinstance(candidate, str) else dict(candidate) for candidate in given]
    if len(changes) < 2:
        raise ValueError(
            f"There is nothing to compare: {len(changes)} candidates. Name at least two, such as `org/a org/b` or "
            "`learning_rate=1e-3 learning_rate=1e-4`."
        )
    names = [public_name(str(flags.pop("name", ""))) or _name(flags) for flags in changes]
    for flags in changes:
        for name, value in flags.items():
            if not isinstance(value, (str, int, float, bool)):
                raise ValueError(f"{name} of a candidate is {value!r}; it must be a number, a string or a switch.")
    return tuple(Candidate(*pair) for pair in zip(_number_duplicates(names), changes, strict=True))


def _from_text(text: str) -> dict[str, Flag]:
    """Parse `org/name,flag=value,flag=value`, of which either part may be missing."""
    checkpoint, *parts = text.split(",")
    changes: dict[str, Flag] = {}
    if not _CHANGE.fullmatch(checkpoint):
        changes[CHECKPOINT] = checkpoint
    else:
        parts = [checkpoint, *parts]
    for part in parts:
        change = _CHANGE.fullmatch(part.strip())
        if change is None:
            raise ValueError(
                f"{part!r} in the candidate {text!r} does not change a flag. Write a candidate as "
                "CHECKPOINT,flag=value,flag=value; one with commas in its values goes into a JSON file."
            )
        changes[change[1]] = change[2]
    if changes.get(CHECKPOINT) == "":
        raise ValueError(f"The candidate {text!r} names no checkpoint.")
    return changes


def _name(changes: Mapping[str, Flag]) -> str:
    """Return the checkpoint, without its folders, and all other changes, as they are published."""
    shown = {name: public_flags({name: value}).get(name, "…") for name, value in changes.items()}
    parts = [str(value) if name == CHECKPOINT else f"{name}={value}" for name, value in shown.items()]
    return ", ".join(parts) or "as is"


def _number_duplicates(names: Sequence[str]) -> list[str]:
    """Append a number to equal names, from the second on."""
    unique: list[str] = []
    for name in names:
        numbered = (f"{name} ({number})" for number in count(2))
        unique.append(next(free for free in chain([name], numbered) if free not in unique))
    return unique


def folder_name(candidate: Candidate, digest: str) -> Path:
    """Return a readable, unique folder name for a candidate."""
    plain = re.sub(r"[^A-Za-z0-9.=-]+", "-", candidate.name).strip("-.")[:48]
    return Path(f"{plain or 'candidate'}-{digest}")
