# SPDX-License-Identifier: Apache-2.0
"""What is measured: one mean loss over fixed probe batches, the loss that the Trainer minimizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import find_labels

from .safety import measuring, pretrained


if TYPE_CHECKING:
    from transformers import Trainer

Batch = Any
LossFunction = Callable[[nn.Module, Batch], "Tensor | tuple[Tensor, int]"]

IGNORED_LABEL = -100


class Objective:
    """A mean loss over probe batches, as a function of the model's trainable parameters.

    Each batch's mean is weighted by the number of items it is over (examples, or labels other than -100), so that the
    objective is one mean over all items, however they are cut into batches.

    Args:
        model: The model; its parameters with `requires_grad` are the variables.
        batches: What the model takes, batch by batch; moved to the model's device.
        loss_fn: `loss_fn(model, batch)` returns the batch's mean loss, or the pair (sum of losses, number of items).
            By default the model's own loss.

    Raises:
        ValueError: If there is nothing to differentiate by, no batch, or no item that counts.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch], *, loss_fn: LossFunction | None = None):
        named = trainable_parameters(model)
        self.model = model
        self.names = list(named)
        self.parameters = list(named.values())
        self.batches = [send_to_device(batch, self.parameters[0].device) for batch in batches]
        self._loss_fn = loss_fn or model_loss
        if not self.batches:
            raise ValueError("`batches` is empty, so there is nothing to measure on. Pass at least one batch.")

    def losses(self) -> Iterator[tuple[Tensor, int]]:
        """Yields each batch's sum of losses, with its graph, and the number of items it sums over."""
        for batch in self.batches:
            items = count_items(self.model, batch)
            if items == 0:  # the mean of nothing is NaN
                continue
            loss = self._loss_fn(self.model, batch)
            if isinstance(loss, tuple):
                yield loss[0], int(loss[1])
            else:
                yield loss * items, items

    def check(self, *, seed: int) -> None:
        """Tries the loss on one batch, so that a wrong argument shows before any training.

        Args:
            seed: Seed for whatever the model draws.

        Raises:
            ValueError: If labels are missing, no item counts, or the loss is no scalar that depends on the parameters.
        """
        with measuring(self.model, seed=seed):
            loss, _ = next(self.losses(), (None, 0))
        if loss is None:
            raise ValueError(
                f"All labels of the probe set are {IGNORED_LABEL}, which the loss ignores. "
                "Check the labels and the data collator, or raise `probe_examples`."
            )
        if loss.numel() != 1:
            raise ValueError(
                f"The loss has shape {tuple(loss.shape)}; it must be a scalar. Return the mean over the batch, "
                "or the pair (sum of losses, number of items)."
            )
        if not loss.requires_grad:
            raise ValueError(
                "The loss does not depend on the trainable parameters: it has no gradient. "
                "Check that `loss_fn` neither detaches the model's output nor runs under `torch.no_grad`."
            )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name; a tied one stands under its first name only.

    Raises:
        ValueError: If there is none.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        raise ValueError(
            "`model` has no trainable parameter, so there is no gradient to measure. "
            "Set `requires_grad` on the parameters that training shall change."
        )
    return named


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a Transformers model returns for a batch with labels.

    Raises:
        ValueError: If the batch is no mapping, has no labels, or the model returns no loss.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"A batch is a {type(batch).__name__}, but the model's own loss needs a dict of the model's inputs with "
            "labels. Pass such dicts, or a `loss_fn` that takes this batch."
        )
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if loss is not None:
        return loss
    labels = find_labels(type(pretrained(model) or model))
    if labels and not any(name in batch for name in labels):
        raise ValueError(
            f"The batch has no labels: its keys are {_listed(batch)}, but {type(model).__name__} computes a loss only "
            f"from {_listed(labels)}. Add the labels to the data set, or pass a `loss_fn`."
        )
    raise ValueError(
        f"{type(model).__name__} returned no loss for a batch with the keys {_listed(batch)}. "
        "Use a model with a task head (a `*For…` class), or pass a `loss_fn`."
    )


def trainer_loss(trainer: Trainer) -> LossFunction:
    """The loss that a Trainer minimizes, as the plain mean over each batch.

    Includes label smoothing, `compute_loss_func` and an overridden `compute_loss`; leaves out the factors that
    gradient accumulation and several processes put on it.
    """

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        inputs = dict(batch)  # `compute_loss` pops the labels
        loss: Any
        if trainer.compute_loss_func is None:
            loss = trainer.compute_loss(model, inputs)
            return loss
        # Such functions are promised the number of items; one that divides by it then gives the mean of this batch.
        items = torch.tensor(count_items(model, batch))
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
        scaled = trainer.args.average_tokens_across_devices
        return loss / trainer.accelerator.num_processes if scaled else loss

    return loss_fn


def count_items(model: nn.Module, batch: Batch) -> int:
    """What a batch's mean loss is over: labels other than -100 (after the shift of a causal LM), else examples."""
    if not isinstance(batch, Mapping):
        return batch_size(batch)
    if "shift_labels" in batch:
        return int((batch["shift_labels"] != IGNORED_LABEL).sum())
    if "labels" in batch:
        labels = batch["labels"][..., 1:] if _shifts_labels(model) else batch["labels"]
        return int((labels != IGNORED_LABEL).sum())
    return batch_size(batch)


def batch_size(batch: Batch) -> int:
    """Number of examples in a batch: the length of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    return len(next(value for value in values if isinstance(value, Tensor)))


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model predicts each label from the tokens before it, so that the first label is not used."""
    inner = pretrained(model)
    if inner is None or inner.config.is_encoder_decoder:
        return False
    causal = type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return causal or LOSS_MAPPING.get(inner.loss_type) is ForCausalLMLoss


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
