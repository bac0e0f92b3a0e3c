# SPDX-License-Identifier: Apache-2.0
"""Several classification tasks at once: one trunk with a head for each, and one data set of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


TASK_COLUMN = "task"
"""Column of the data set and input of the model: the number of an example's task."""

_NO_CLASS = -1e4
"""Logit of a class that the task does not have: its probability is 0, and so are all derivatives by it."""


class MultiTaskConfig(PreTrainedConfig):
    """A trunk and its heads.

    Args:
        trunk: The trunk's configuration.
        heads: The number of classes of each task, in the order of the tasks' numbers.
    """

    model_type = "hf-optimizability-multi-task"

    def __init__(self, trunk: dict[str, Any] | None = None, heads: dict[str, int] | None = None, **kwargs: Any):
        self.trunk = dict(trunk or {})
        self.heads = dict(heads or {})
        super().__init__(**kwargs)


class MultiTaskModel(PreTrainedModel):
    """One trunk, and a linear head on its pooled output for each task. It saves and loads like any checkpoint.

    Args:
        config: Trunk and heads; the weights are random.

    Example:
        >>> from transformers import BertConfig
        >>> small = BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6)
        >>> model = MultiTaskModel(MultiTaskConfig(trunk=small.to_dict(), heads={"polarity": 2, "topic": 5}))
        >>> tokens = torch.tensor([[5, 6], [7, 8]])
        >>> model(tokens, task=torch.tensor([0, 1])).logits.shape
        torch.Size([2, 5])
    """

    config_class = MultiTaskConfig
    base_model_prefix = "trunk"
    _supports_sdpa = True

    def __init__(self, config: MultiTaskConfig):
        super().__init__(config)
        settings = dict(config.trunk)
        trunk = AutoConfig.for_model(settings.pop("model_type"), **settings)
        self.trunk = AutoModel.from_config(trunk)
        size = self.trunk.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(size, classes) for name, classes in config.heads.items()})
        self.post_init()

    @classmethod
    def on_checkpoint(cls, name_or_path: str, heads: Mapping[str, int]) -> MultiTaskModel:
        """Put new heads on a pretrained trunk.

        Args:
            name_or_path: A checkpoint on the Hub, or a local folder.
            heads: The number of classes of each task.
        """
        trunk = AutoModel.from_pretrained(name_or_path)
        model = cls(MultiTaskConfig(trunk=trunk.config.to_dict(), heads=dict(heads)))
        model.trunk = trunk
        model.name_or_path = name_or_path
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        task: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classify each example by the head of its task.

        Args:
            input_ids: Of texts, of shape (batch, tokens).
            attention_mask: Likewise.
            token_type_ids: Likewise.
            pixel_values: Of images, of shape (batch, channels, height, width).
            task: Number of each example's task, of shape (batch,).
            labels: Class of each example within its task, of shape (batch,).

        Returns:
            The mean cross-entropy, and logits of shape (batch, most classes of a task).
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
        }
        pooled = self.trunk(**{name: value for name, value in inputs.items() if value is not None}).pooler_output
        pooled = pooled.flatten(1)
        widest = max(self.config.heads.values())
        of_heads = [
            nn.functional.pad(head(pooled), (0, widest - head.out_features), value=_NO_CLASS)
            for head in self.heads.values()
        ]
        logits = torch.stack(of_heads, dim=1)[torch.arange(len(pooled), device=pooled.device), task]
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def combine_tasks(sets: Mapping[str, Dataset]) -> Dataset:
    """Concatenate data sets, with the task of each row; shuffle the result before training, as a Trainer does.

    Args:
        sets: By task, with the same columns.

    Returns:
        All rows, with the column `task`, whose classes are the names of the tasks.

    Raises:
        ValueError: If a set has the column `task` already.

    Example:
        >>> rows = combine_tasks({"a": Dataset.from_dict({"x": [1]}), "b": Dataset.from_dict({"x": [2, 3]})})
        >>> rows["task"][:], rows.features["task"].names
        ([0, 1, 1], ['a', 'b'])
    """
    taken = [name for name, rows in sets.items() if TASK_COLUMN in rows.column_names]
    if taken:
        raise ValueError(f"The data set of {taken[0]!r} has a column {TASK_COLUMN!r} already; rename that.")
    kind = ClassLabel(names=list(sets))
    numbered = [
        rows.add_column(TASK_COLUMN, [number] * len(rows)).cast_column(TASK_COLUMN, kind)
        for number, rows in enumerate(sets.values())
    ]
    return concatenate_datasets(numbered)
