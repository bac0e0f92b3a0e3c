# SPDX-License-Identifier: Apache-2.0
"""Batches in any container that a collator returns: number of examples and items, copies and pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)

from ..model_state.measuring import pretrained
from .layout import Layout, like, take
from .self_check import Unit


Batch = Any


IGNORED_LABEL = -100


def batch_size(batch: Batch, layout: Layout | None = None) -> int:
    """Return the number of examples: the length that most tensors and lists have, else most tensors inside; else 1.

    Most, since a batch may also hold class weights, or the patches of all its images in one row. Where other batches
    show more, a layout knows better.

    Example:
        >>> import torch
        >>> batch_size({"class_weights": torch.ones(3), "x": torch.ones(4, 2), "target": torch.ones(4)})
        4
        >>> batch_size({"query": {"input_ids": torch.ones(3, 5)}}), batch_size({"text": "one"})
        (3, 1)
        >>> batch_size([{"x": torch.ones(5)}, {"x": torch.ones(5)}])  # a list of examples
        2
    """
    if layout is not None:
        return layout.count(batch)
    if isinstance(batch, list) and batch and all(isinstance(value, (Mapping, tuple)) for value in batch):
        return len(batch)  # a list of examples
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    lengths = [*_own_lengths(values)] or [*_own_lengths(_leaves(batch))]
    if lengths:
        filled = [length for length in lengths if length] or lengths
        return Counter(filled).most_common(1)[0][0]  # the first of those that are as frequent
    return next((len(value) for value in (batch, *values) if isinstance(value, (list, tuple))), 1)


def _own_lengths(values: Iterable[Any]) -> Iterator[int]:
    """Yield the length of each tensor and list."""
    for value in values:
        if isinstance(value, Tensor) and value.ndim > 0:
            yield value.size(0)  # ragged tensors have no shape
        elif isinstance(value, list):  # a tuple is rather the size of an image
            yield len(value)


def batch_elements(batch: Batch) -> int:
    """Return the number of entries of all tensors of a batch, at any depth."""
    return sum(value.numel() for value in _leaves(batch) if isinstance(value, Tensor))


def count_items(model: nn.Module, batch: Batch, layout: Layout | None = None) -> int:
    """Return the number of items that the mean loss of a batch is over, according to its labels.

    Items are integer labels other than -100 (after the shift of a causal language model; the index that semantic
    segmentation ignores), entries of real labels, or examples if labels are not a tensor or the loss is CTC's, a
    mean over examples.
    """
    labels = _labels(batch)
    if not isinstance(labels, Tensor) or not counts_labels(model, batch):
        return batch_size(batch, layout)
    if labels.is_floating_point():
        return labels.numel()
    if "shift_labels" not in batch and _shifts_labels(model):
        labels = labels[..., 1:]
    return int((labels != _ignored_label(model)).sum())


def counts_labels(model: nn.Module, batch: Batch) -> bool:
    """Return whether labels say what the mean loss of a batch is over, and not the number of examples."""
    return isinstance(_labels(batch), Tensor) and not _is_any_of(model, MODEL_FOR_CTC_MAPPING_NAMES)


def count_units(model: nn.Module, batch: Batch, unit: Unit, layout: Layout | None = None) -> int | None:
    """Return how many units the mean loss of a batch is over, or `None` if the batch does not say."""
    if unit == "items":
        return count_items(model, batch, layout)
    if unit == "attended tokens":
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return int(mask.sum()) if isinstance(mask, Tensor) else None
    if unit == "pairs":
        pairs, odd = divmod(batch_size(batch, layout), 2)
        return None if odd else pairs
    return batch_size(batch, layout)


def copy_batch(batch: Batch) -> Batch:
    """Return the batch with its tensors cloned and its containers new, so that a forward pass may write to it.

    Example:
        >>> import torch
        >>> batch = {"x": torch.zeros(1)}
        >>> copy_batch(batch)["x"].add_(1), batch["x"]
        (tensor([1.]), tensor([0.]))
    """
    return _map(batch, lambda tensor: tensor.clone())


def cut_batch(batch: Batch, size: int, *, unit: Unit = "items", layout: Layout | None = None) -> list[Batch]:
    """Return a batch in pieces of at most `size` examples, each of the batch's own type.

    Tensors and lists with one entry per example are sliced, at any depth; values without a length (`None`, numbers,
    switches, 0-d tensors) and strings go into each piece as they are.

    Args:
        batch: The batch.
        size: Maximum number of examples in a piece.
        unit: `"pairs"` keeps the second half of each pair with its first; a piece has one pair at least.
        layout: Where the examples lie, if values have different lengths; those without examples go into each piece.

    Raises:
        ValueError: If the values have different lengths, or `unit` is `"batches"`.

    Example:
        >>> import torch
        >>> cut_batch({"x": torch.arange(3), "return_dict": True}, 2)
        [{'x': tensor([0, 1]), 'return_dict': True}, {'x': tensor([2]), 'return_dict': True}]
        >>> cut_batch({"chosen_then_rejected": torch.arange(4)}, 2, unit="pairs")
        [{'chosen_then_rejected': tensor([0, 2])}, {'chosen_then_rejected': tensor([1, 3])}]
    """
    if unit == "batches":
        raise ValueError("A batch can't be cut, because its loss is not a mean over countable items.")
    length = _common_length(batch) if layout is None else layout.count(batch)
    number = length // 2 if unit == "pairs" else length
    step = max(1, size // 2) if unit == "pairs" else size

    def piece(start: int) -> Batch:
        chosen = list(range(start, min(start + step, number)))
        if unit == "pairs":
            chosen += [index + number for index in chosen]
        return _slice(batch, partial(take, chosen)) if layout is None else layout.take(batch, chosen)

    return [piece(start) for start in range(0, number, step)]


def _labels(batch: Batch) -> Any:
    if not isinstance(batch, Mapping):
        return None
    return batch["shift_labels"] if "shift_labels" in batch else batch.get("labels")


def _common_length(batch: Batch) -> int:
    """Return the number of examples, if all values of a batch agree on it."""
    lengths = dict(_lengths(batch, ""))
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"A batch can't be cut into smaller ones, because its values have the lengths {lengths}. "
            "The first dimension of each tensor must be the batch."
        )
    return next(iter(lengths.values()))


def _lengths(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """Yield the path and the length of each value that contains examples."""
    if isinstance(value, Tensor):
        if value.ndim > 0:
            yield name, value.size(0)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _lengths(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        if name:
            yield name, len(value)
        else:  # the batch itself: a container of values, not of examples
            for index, inner in enumerate(value):
                yield from _lengths(inner, str(index))


def _slice(value: Any, chosen: Callable[[Any], Any], *, top: bool = True) -> Any:
    if isinstance(value, Tensor):
        return chosen(value) if value.ndim > 0 else value
    if isinstance(value, Mapping):
        return like(value, {key: _slice(inner, chosen, top=False) for key, inner in value.items()})
    if isinstance(value, (list, tuple)):
        if not top:
            return like(value, chosen(value))
        return like(value, [_slice(inner, chosen, top=False) for inner in value])
    return value


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return like(value, {key: _map(inner, change) for key, inner in value.items()})
    if isinstance(value, (list, tuple)):
        return like(value, [_map(inner, change) for inner in value])
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _ignored_label(model: nn.Module) -> int:
    inner = pretrained(model)
    if inner is None or not _is_any_of(model, MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES):
        return IGNORED_LABEL
    return inner.config.to_dict().get("semantic_loss_ignore_index", IGNORED_LABEL)


def _is_any_of(model: nn.Module, names: Mapping[str, Any]) -> bool:
    """Return whether the Transformers model inside `model` is of a class in an auto mapping."""
    inner = pretrained(model)
    listed = {name for entry in names.values() for name in ([entry] if isinstance(entry, str) else entry)}
    # `fully_shard` puts a class of its own before the model's.
    return inner is not None and any(kind.__name__ in listed for kind in type(inner).__mro__)


def _shifts_labels(model: nn.Module) -> bool:
    """Return whether the model predicts each label from the tokens before it, so that the first label is unused."""
    inner = pretrained(model)
    if inner is None or inner.config.is_encoder_decoder:
        return False
    causal = _is_any_of(model, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return causal or LOSS_MAPPING.get(inner.loss_type) is ForCausalLMLoss


def listed(names: Iterable[str]) -> str:
    """Return names in backticks, for a message."""
    return ", ".join(f"`{name}`" for name in names)
