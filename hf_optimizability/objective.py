# SPDX-License-Identifier: Apache-2.0
"""What is measured: one mean loss over fixed probe batches, the loss that the Trainer minimizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.func import functional_call
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import find_labels

from .curvature.ranks import ALONE, Ranks
from .curvature.rows import Rows
from .model_state import ModelState
from .safety import measuring, pretrained, quantization


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
        tasks: The task of each batch, where there are several.

    Attributes:
        ranks: The processes that share the batches; one alone, unless `shared` made it.
        batches: Those of this rank.

    Raises:
        ValueError: If there is nothing to differentiate by, no batch, or no item that counts.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        loss_fn: LossFunction | None = None,
        tasks: Sequence[str] | None = None,
    ):
        named = trainable_parameters(model)
        self.model = model
        self.names = list(named)
        self.batches = [send_to_device(batch, self.parameters[0].device) for batch in batches]
        self.ranks = ALONE
        self.state = ModelState(model)
        self._whole = self.batches
        self._tasks = None if tasks is None else list(tasks)
        self._loss_fn = loss_fn or model_loss
        if not self.batches:
            raise ValueError("`batches` is empty, so there is nothing to measure on. Pass at least one batch.")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The variables as the model holds them now: inside `full_precision` they are the float32 copies."""
        return [self.model.get_parameter(name) for name in self.names]

    @property
    def sizes(self) -> list[int]:
        """The number of entries of each variable, wherever they are."""
        return [self.model.get_parameter(name).numel() for name in self.names]

    @property
    def rows(self) -> Rows:
        """How vectors over the variables lie: each rank holds them whole."""
        return Rows.whole(sum(parameter.numel() for parameter in self.parameters))

    @property
    def quantized(self) -> str | None:
        """Why exact second derivatives can't be had of this model's quantized weights; `None` if it has none."""
        method = quantization(self.model)
        if method is None:
            return None
        return (
            f"The weights are quantized ({method}), and the backward passes of quantized kernels can't be relied on "
            "to be differentiated again (bitsandbytes issue 1070). Use central differences."
        )

    @property
    def batch_size(self) -> int:
        """The most examples in one batch, of all ranks'."""
        return max(batch_size(batch) for batch in self._whole)

    @property
    def parts(self) -> int:
        """The number of batches with an item that counts, of all ranks'."""
        return len(self._counted(self._whole))

    @property
    def part_tasks(self) -> list[str] | None:
        """The task of each batch with an item that counts, of all ranks'; `None` where tasks are not told apart."""
        if self._tasks is None:
            return None
        pairs = zip(self._whole, self._tasks, strict=True)
        return [task for batch, task in pairs if count_items(self.model, batch)]

    def of_task(self, task: str) -> Objective:
        """The mean loss of one task, shared by the same ranks."""
        assert self._tasks is not None
        objective = copy(self)
        objective._whole = [batch for batch, own in zip(self._whole, self._tasks, strict=True) if own == task]
        objective._tasks = [task] * len(objective._whole)
        objective.batches = objective._counted(objective._whole)[self.ranks.index :: self.ranks.number]
        return objective

    def shared(self, ranks: Ranks) -> Objective:
        """The share of this rank, where all have the same batches: those that count are dealt to them in turn."""
        objective = copy(self)
        objective.ranks = ranks
        objective.batches = self._counted(self._whole)[ranks.index :: ranks.number]
        return objective

    def whole(self) -> Objective:
        """The objective of all ranks, for one alone."""
        objective = copy(self)
        objective.ranks, objective.batches = ALONE, self._whole
        return objective

    def losses(self) -> Iterator[tuple[Tensor, int]]:
        """Yields each batch's sum of losses, with its graph, and the number of items it sums over."""
        for batch in self._counted(self.batches):
            self.state.rewind()
            with self.state.watched():
                found = self._sum_of_losses(self.model, batch)
            yield found

    def functional_losses(self) -> Iterator[Callable[[Sequence[Tensor]], tuple[Tensor, int]]]:
        """Yields, for each batch, what `losses` gives as a function of tensors in the place of the parameters."""
        module = _Functional(self.model, self._sum_of_losses)
        names = [f"model.{name}" for name in self.names]

        def loss_at(batch: Batch, tensors: Sequence[Tensor]) -> tuple[Tensor, int]:
            return functional_call(module, dict(zip(names, tensors, strict=True)), (batch,))

        for batch in self._counted(self.batches):
            self.state.rewind()
            yield partial(loss_at, batch)

    def outputs_and_losses(self) -> Iterator[tuple[list[Tensor], Tensor, int]]:
        """Yields the model's outputs (its logits) on each batch, and what `losses` gives, in one graph.

        Raises:
            ValueError: If the model returns neither a tensor nor an output with logits, or the loss does not call it.
        """
        for batch in self._counted(self.batches):
            outputs: list[Tensor] = []
            self.state.rewind()
            with self.model.register_forward_hook(lambda *call, outputs=outputs: outputs.extend(_logits(call[-1]))):
                loss, items = self._sum_of_losses(self.model, batch)
            if not outputs:
                raise ValueError("`loss_fn` does not call the model it is given, so that its outputs are not known.")
            yield outputs, loss, items

    def cut(self, size: int) -> Objective:
        """The same objective, in batches of at most `size` examples.

        Raises:
            ValueError: If the batches can't be cut, because their tensors differ in their first dimension.
        """
        objective = copy(self)
        objective.batches = [piece for batch in self.batches for piece in cut_batch(batch, size)]
        pieces = [cut_batch(batch, size) for batch in self._whole]
        objective._whole = [piece for batch in pieces for piece in batch]
        if self._tasks is not None:
            objective._tasks = [task for task, batch in zip(self._tasks, pieces, strict=True) for _ in batch]
        return objective

    def block(self, names: Collection[str]) -> Objective:
        """The same loss, as a function of some of the parameters alone: of it, an operator is a diagonal block.

        Raises:
            ValueError: If a name is not that of a trainable parameter.
        """
        wanted = set(names)
        unknown = wanted - set(self.names)
        if unknown or not wanted:
            raise ValueError(
                f"{_listed(sorted(unknown)) or 'Nothing'} is no block of trainable parameters. Their names are "
                f"{_listed(self.names[:3])}, …: see `Objective.names`."
            )
        block = copy(self)
        block.names = [name for name in self.names if name in wanted]
        return block

    def _counted(self, batches: list[Batch]) -> list[Batch]:
        """The batches with an item that counts: the mean of nothing is NaN."""
        return [batch for batch in batches if count_items(self.model, batch)]

    def _sum_of_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        loss = self._loss_fn(model, batch)
        if isinstance(loss, tuple):
            return loss[0], int(loss[1])
        items = count_items(model, batch)
        return loss * items, items

    def check(self, *, seed: int) -> None:
        """Tries the loss on one batch, so that a wrong argument shows before any training.

        Args:
            seed: Seed for whatever the model draws.

        Raises:
            ValueError: If labels are missing, no item counts, or the loss is no scalar that depends on the parameters.
        """
        with measuring(self.model, seed=seed):
            loss, _ = next(self.whole().losses(), (None, 0))
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


class _Functional(nn.Module):
    """A loss as a module, so that `functional_call` can put other tensors in the place of the model's parameters."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Batch], tuple[Tensor, int]]):
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        return self._loss_fn(self.model, batch)


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
    """Number of examples in a batch: its length if it is a tensor, else that of its first one."""
    if isinstance(batch, Tensor):
        return len(batch)
    values = batch.values() if isinstance(batch, Mapping) else batch
    return len(next(value for value in values if isinstance(value, Tensor)))


def cut_batch(batch: Batch, size: int) -> list[Batch]:
    """A batch in pieces of at most `size` examples, each of the batch's own type.

    Tensors and lists with one entry per example are sliced; values without a length (`None`, numbers, switches, 0-d
    tensors) and strings go into each piece as they are.

    Raises:
        ValueError: If the values have different lengths.

    Example:
        >>> cut_batch({"x": torch.arange(3), "return_dict": True}, 2)
        [{'x': tensor([0, 1]), 'return_dict': True}, {'x': tensor([2]), 'return_dict': True}]
    """
    if isinstance(batch, Tensor):
        return list(batch.split(size))
    named = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(batch))
    lengths = {name: len(value) for name, value in named.items() if _has_examples(value)}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"A batch can't be cut into smaller ones, because its values have the lengths {lengths}. "
            "The first dimension of each tensor must be the batch."
        )
    kind: Any = type(batch)
    pieces = []
    for start in range(0, next(iter(lengths.values())), size):
        piece = {name: value[start : start + size] if name in lengths else value for name, value in named.items()}
        pieces.append(kind(piece if isinstance(batch, Mapping) else piece.values()))
    return pieces


def _has_examples(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, (list, tuple))


def _logits(output: Any) -> list[Tensor]:
    """What the loss is a function of: a tensor that the model returns, or the logits in its output."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        named = {name: output[name] for name in output if name == "logits" or name.endswith("_logits")}
        logits = [value for value in named.values() if isinstance(value, Tensor)]  # `router_logits` are a tuple
        if logits:
            return logits
    raise ValueError(
        f"The Gauss-Newton matrix needs the outputs that the loss is a function of, but the model returned a "
        f"{type(output).__name__} without logits. Return a tensor, or a `ModelOutput` with `logits`."
    )


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model predicts each label from the tokens before it, so that the first label is not used."""
    inner = pretrained(model)
    if inner is None or inner.config.is_encoder_decoder:
        return False
    # `fully_shard` puts a class of its own before the model's.
    causal = any(kind.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for kind in type(inner).__mro__)
    return causal or LOSS_MAPPING.get(inner.loss_type) is ForCausalLMLoss


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
