# SPDX-License-Identifier: Apache-2.0
"""What a report says about the model, the task and the data it is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..reasons import Reason


if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model.

    Attributes:
        id: Its name on the Hub, or of its folder; empty if it has none.
        class_name: Its class; `class` in JSON.
        batch_norm: Whether it has BatchNorm; `None` if unknown.
        classes: Classes that its loss chooses among: labels of a classifier, tokens of a language model; `None` if
            unknown.
        parameters: Number of its parameters.
        trainable_parameters: Number of those that are trained.
    """

    id: str = ""
    class_name: str = ""
    batch_norm: bool | None = None
    classes: int | None = None
    parameters: int | None = None
    trainable_parameters: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by their names in JSON."""
        return {"class" if name == "class_name" else name: value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict`, or from a part of it."""
        known = {"class_name" if name == "class" else name: value for name, value in data.items()}
        return cls(**{name: known[name] for name in cls.__dataclass_fields__ if name in known})


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """The task.

    Attributes:
        task: The task of the model's head in the Hub's terms; empty if it has none.
        loss: Whose loss was measured.
    """

    task: str = ""
    loss: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from a dict, or from a part of it."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


@dataclass(frozen=True, kw_only=True)
class ProbeSetInfo:
    """The probe set.

    Attributes:
        examples: Number of its examples.
        items: Items that its loss is the mean over: examples, or labels other than -100.
        batches: Number of its batches.
        fingerprint: Hash of its content.
    """

    examples: int | None = None
    items: int | None = None
    batches: int | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """The data.

    Attributes:
        dataset: Name of the data set; empty if unknown.
        train_examples: Number of training examples; `None` if they are streamed, or absent.
        eval_examples: Number of evaluation examples; likewise.
        majority_share: Share of evaluation examples that have the most frequent label; `None` if unknown.
        probe: The probe set; `None` if there is none. In JSON its fields are among the others, as `probe_examples` and
            so on.
        no_pool: Why examples were not drawn from the whole training set; `None` if they were, or that was not asked
            for.
    """

    dataset: str | None = ""
    train_examples: int | None = None
    eval_examples: int | None = None
    majority_share: float | None = None
    probe: ProbeSetInfo | None = None
    no_pool: Reason | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by their names in JSON."""
        data = {name: value for name, value in vars(self).items() if name not in ("probe", "no_pool")}
        data["no_pool"] = None if self.no_pool is None else asdict(self.no_pool)
        probe = {} if self.probe is None else asdict(self.probe)
        return {**data, **{f"probe_{name}": value for name, value in probe.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict`, or from a part of it."""
        probe = {name: data[f"probe_{name}"] for name in ProbeSetInfo.__dataclass_fields__ if f"probe_{name}" in data}
        simple = [name for name in cls.__dataclass_fields__ if name not in ("probe", "no_pool")]
        why = data.get("no_pool")
        return cls(
            **{name: data[name] for name in simple if name in data},
            probe=ProbeSetInfo(**probe) if probe else None,
            no_pool=None if why is None else Reason.from_dict(why),
        )
