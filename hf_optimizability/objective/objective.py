# SPDX-License-Identifier: Apache-2.0
"""The loss that is measured: one mean over fixed probe batches, as the Trainer minimizes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.func import functional_call
from transformers.utils.generic import find_labels

from ..curvature.empirical_risk import HvpCounter, ModelRisk
from ..errors import MeasurementInterruptedError, UnmeasurableError, WrongDerivativeError
from ..linalg.communicator import SINGLE_PROCESS, ProcessGroup
from ..model_state.measuring import measuring, pretrained, quantization, rng_state, seed_all
from ..model_state.state import ModelState
from .batches import (
    IGNORED_LABEL,
    Batch,
    Unit,
    batch_elements,
    batch_size,
    copy_batch,
    count_units,
    counts_labels,
    cut_batch,
    listed,
)
from .example_losses import ExampleLosses
from .layout import Layout, possible_layouts
from .population import Drawn, Population
from .self_check import SelfCheck


LossFunction = Callable[[nn.Module, Batch], "Tensor | tuple[Tensor, int]"]


@dataclass(frozen=True)
class ProbeBatch:
    """A batch of the probe set, or a piece of one.

    Attributes:
        inputs: What the loss function takes.
        items: What its mean loss is over, unless the loss function says.
        index: The place of the batch among those drawn, which seeds whatever the model draws in a pass.
        task: The task of its examples, where there are several.
        drawn: How its examples were drawn; `None` where all that there are are measured.
    """

    inputs: Batch
    items: int
    index: int
    task: str | None = None
    drawn: Drawn | None = None


class Objective(ModelRisk):
    """A mean loss over probe batches, as a function of the model's trainable parameters.

    Each batch's mean is weighted by the number of items it is over (examples, or labels other than -100), so that the
    objective is one mean over all items, however they are cut into batches. Each pass of a batch is given a copy of
    it, the model as it was handed over, and the same random state, so that it has the same loss each time.

    Args:
        model: The model; its parameters with `requires_grad` are the variables.
        batches: What the model takes, batch by batch; moved to the model's device.
        loss_fn: `loss_fn(model, batch)` returns the batch's mean loss, or the pair (sum of losses, number of items).
            By default the model's own loss.
        tasks: The task of each batch, where there are several.
        seed: Seed of whatever the model or its loss draws.
        preserved: Objects besides the model whose state a pass may change, for example the Trainer.
        should_stop: Asked before each batch's pass, which raises `MeasurementInterruptedError` where it is true.

    Attributes:
        group: The processes that share the batches; one alone, unless `shard` made it.
        state: What comes back after a measurement.
        unit: What the mean losses of the batches are over.
        self_check: The outcome of the self-check, once there is one.
        population: What the batches are a sample of; `None` where they are all there is.
        layouts: Where the examples may lie, the likeliest first, if the batches' values have different lengths.
        layout: Where they are thought to lie.

    Raises:
        ValueError: If there is nothing to differentiate by, a parameter is complex, or there is no batch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        loss_fn: LossFunction | None = None,
        tasks: Sequence[str] | None = None,
        seed: int = 0,
        preserved: Sequence[object] = (),
        should_stop: Callable[[], bool] | None = None,
    ):
        named = trainable_parameters(model)
        complex_names = [name for name, parameter in named.items() if parameter.is_complex()]
        if complex_names:
            raise ValueError(
                f"The trainable parameters {listed(complex_names[:3])} are complex, but curvature is that of a "
                "function of real numbers. Keep real and imaginary parts as real parameters (`torch.view_as_real`), "
                "or freeze them."
            )
        self.model = model
        self.names = list(named)
        self.state = ModelState(model, others=preserved)
        self.unit: Unit = "items"
        self.self_check: SelfCheck | None = None
        self.population: Population | None = None
        self.group = SINGLE_PROCESS
        moved = [send_to_device(batch, self.parameters[0].device) for batch in batches]
        self.layouts = possible_layouts(moved)
        self.layout = self.layouts[0] if self.layouts else None
        self._all = [
            ProbeBatch(batch, self.count(batch) or 0, index, None if tasks is None else tasks[index])
            for index, batch in enumerate(moved)
        ]
        self._local = self._all
        self._loss_fn = loss_fn or model_loss
        self._seed = seed
        self._should_stop = should_stop
        if not moved:
            raise ValueError("`batches` is empty, so there is nothing to measure on. Pass at least one batch.")

    @property
    def batches(self) -> list[Batch]:
        """The batches of this rank."""
        return [batch.inputs for batch in self._local]

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The variables as the model holds them now: inside `full_precision` they are the float32 copies."""
        return [self.model.get_parameter(name) for name in self.names]

    @property
    def sizes(self) -> list[int]:
        """The number of entries of each variable, wherever they are."""
        return [self.model.get_parameter(name).numel() for name in self.names]

    @property
    def second_derivative_blocker(self) -> WrongDerivativeError | None:
        """Why quantized weights have no exact second derivatives; `None` for others."""
        method = quantization(self.model)
        if method is None:
            return None
        return WrongDerivativeError("quantized", method=method)

    @property
    def local_batches(self) -> list[ProbeBatch]:
        """The batches of this rank that have an item that counts."""
        return _counted(self._local)

    @property
    def batch_size(self) -> int:
        """The most examples in one batch, of all ranks'."""
        return max(self.examples(batch.inputs) for batch in self._all)

    @property
    def parts(self) -> int:
        """The number of batches with an item that counts, of all ranks'."""
        return len(_counted(self._all))

    @property
    def part_tasks(self) -> list[str] | None:
        """The task of each batch with an item that counts, of all ranks'; `None` where there are no tasks."""
        tasks = [batch.task for batch in _counted(self._all) if batch.task is not None]
        return tasks or None

    def of_task(self, task: str) -> Objective:
        """Return the mean loss of one task, shared by the same ranks; its products are not counted."""
        return self.counting(None)._with([batch for batch in self._all if batch.task == task]).shard(self.group)

    def shard(self, group: ProcessGroup) -> Objective:
        """Return the share of this rank, where all have the same batches: those with items are distributed in turn."""
        objective = copy(self)
        objective.group = group
        objective._local = _counted(self._all)[group.rank :: group.world_size]
        return objective

    def uncut(self) -> Objective:
        """Return the objective whose passes are of whole batches, as they are unless the parameters are sharded."""
        return self

    def unsharded(self) -> Objective:
        """Return the objective of all ranks, for one process."""
        objective = copy(self)
        objective.group, objective._local = SINGLE_PROCESS, self._all
        return objective

    def counting(self, counter: HvpCounter | None) -> Objective:
        """Return the objective whose products are counted there."""
        objective = copy(self)
        objective.hvp_counter = counter
        return objective

    def probe_batch(self, batch: Batch, index: int) -> ProbeBatch:
        """Return a batch on the model's device, with its number of items."""
        moved = send_to_device(batch, self.parameters[0].device)
        return ProbeBatch(moved, self.count(moved) or 0, index)

    def sampled(self, batches: Sequence[ProbeBatch], population: Population) -> Objective:
        """Return the mean loss over a population, estimated from batches drawn from it; for one process."""
        objective = self._with(list(batches))
        objective.population = population
        return objective

    def over(self, batches: Sequence[ProbeBatch]) -> Objective:
        """Return the objective over other local batches."""
        objective = copy(self)
        objective._local = list(batches)
        return objective

    @torch.no_grad()
    def draws(self) -> bool:
        """Return whether passes of the local batches take random numbers; inside `measuring`."""
        for batch in self.local_batches:
            self._pass(batch)
            after = rng_state()
            seed_all(self._seed + batch.index)
            if after != rng_state():
                return True
        return False

    def with_other_draws(self) -> Objective:
        """Return the objective with other random numbers in each batch's passes."""
        objective = copy(self)
        objective._seed += 2**31
        return objective

    def checked(self, check: SelfCheck) -> Objective:
        """Return the objective with the outcome of its self-check, weighted by the unit that it found."""
        named = [layout for layout in self.layouts if layout.names == check.counted_by]
        objective = self.laid_out(named[0] if named else self.layout).counted_by(check.unit)
        objective.self_check = check
        return objective

    def counted_by(self, unit: Unit) -> Objective:
        """Return the objective with its batches weighted by their number of units."""

        def counted(batch: ProbeBatch) -> ProbeBatch:
            return replace(batch, items=objective.count(batch.inputs) or 0)

        objective = copy(self)
        objective.unit = unit
        objective._all = [counted(batch) for batch in self._all]
        objective._local = [counted(batch) for batch in self._local]
        return objective

    def laid_out(self, layout: Layout | None) -> Objective:
        """Return the objective whose batches have their examples there."""
        if layout is self.layout:
            return self
        objective = copy(self)
        objective.layout = layout
        return objective.counted_by(self.unit)

    def examples(self, batch: Batch) -> int:
        """Return the number of examples of a batch."""
        return batch_size(batch, self.layout)

    def count(self, batch: Batch, unit: Unit | None = None) -> int | None:
        """Return how many units the mean loss of a batch is over, or `None` if the batch does not say."""
        return count_units(self.model, batch, unit or self.unit, self.layout)

    def counts_labels(self) -> bool:
        """Return whether labels say what mean losses are over, and not the number of examples."""
        return self.unit == "items" and all(counts_labels(self.model, batch.inputs) for batch in self._all)

    def largest(self) -> tuple[Objective, float]:
        """Return the objective on its largest local batch alone, and how many times as large all of them are."""
        sizes = [batch.items and batch_elements(batch.inputs) for batch in self._local]
        largest = max(range(len(sizes)), key=lambda index: sizes[index])
        return self.over([self._local[largest]]), sum(sizes) / sizes[largest]

    def first_example(self) -> Objective:
        """Return the objective on the first example of its first local batch.

        Raises:
            ValueError: If the batch can't be cut.
        """
        return self.over(self.pieces(self._local[0], 1)[:1])

    def losses(self) -> Iterator[tuple[Tensor, float]]:
        """Yield each batch's sum of losses, with its graph, and the number of items it sums over."""
        for batch in _counted(self._local):
            yield self._pass(batch)

    def functional_losses(self) -> Iterator[Callable[[Sequence[Tensor]], tuple[Tensor, float]]]:
        """Yield, for each batch, what `losses` gives as a function of tensors in place of the parameters."""
        module = _Functional(self.model, self._pass)
        names = [f"model.{name}" for name in self.names]

        def loss_at(batch: ProbeBatch, tensors: Sequence[Tensor]) -> tuple[Tensor, float]:
            return functional_call(module, dict(zip(names, tensors, strict=True)), (batch,))

        for batch in _counted(self._local):
            yield partial(loss_at, batch)

    def outputs_and_losses(self) -> Iterator[tuple[list[Tensor], Tensor, float]]:
        """Yield the model's outputs (its logits) on each batch, and what `losses` gives, in one graph.

        Raises:
            ValueError: If the model returns neither a tensor nor an output with logits, or the loss does not call it.
        """
        for batch in _counted(self._local):
            outputs: list[Tensor] = []
            with self.model.register_forward_hook(lambda *call, outputs=outputs: outputs.extend(_logits(call[-1]))):
                loss, items = self._pass(batch)
            if torch.is_grad_enabled():  # a loss may call the model without, too, or return logits for its metrics
                outputs = [output for output in outputs if output.requires_grad]
            if not outputs:
                raise ValueError(
                    "`loss_fn` does not call the model it is given, or not for outputs with a gradient, so that what "
                    "the loss is a function of is not known."
                )
            yield outputs, loss, items

    def cut(self, size: int) -> Objective:
        """Return the same objective, in batches of at most `size` examples.

        Raises:
            ValueError: If the batches can't be cut: their values differ in length, or their loss is not a mean over
                countable items.
        """
        if self.self_check is not None and not self.self_check.can_cut:
            raise ValueError(
                "Batches must stay as they were collated: the loss draws random numbers in eval mode, or is not a "
                "mean over countable items. Collate fewer examples at a time (`probe_batch_size`)."
            )
        objective = self._with([piece for batch in self._all for piece in self.pieces(batch, size)])
        objective._local = [piece for batch in self._local for piece in self.pieces(batch, size)]
        return objective

    def block(self, names: Collection[str]) -> Objective:
        """Return the loss as a function of some parameters alone; an operator of it is a diagonal block.

        Raises:
            ValueError: If a name is not that of a trainable parameter.
        """
        wanted = set(names)
        unknown = wanted - set(self.names)
        if unknown or not wanted:
            raise ValueError(
                f"{listed(sorted(unknown)) or 'Nothing'} is not a block of trainable parameters. Their names are "
                f"{listed(self.names[:3])}, …: see `Objective.names`."
            )
        block = copy(self)
        block.names = [name for name in self.names if name in wanted]
        return block

    def _with(self, batches: list[ProbeBatch]) -> Objective:
        """Return the objective over other batches, for one process."""
        objective = copy(self)
        objective._all = objective._local = batches
        return objective

    def pieces(self, batch: ProbeBatch, size: int, *, unit: Unit | None = None) -> list[ProbeBatch]:
        """Return a batch in pieces of at most `size` examples, counted in that unit; they keep its index.

        Raises:
            ValueError: If it can't be cut.
        """
        unit = unit or self.unit
        pieces = cut_batch(batch.inputs, size, unit=unit, layout=self.layout)
        counted = [replace(batch, inputs=piece, items=self.count(piece, unit) or 0) for piece in pieces]
        if batch.drawn is None:
            return counted
        drawn = batch.drawn.split([self.examples(piece) for piece in pieces])
        return [replace(piece, drawn=part) for piece, part in zip(counted, drawn, strict=True)]

    def _pass(self, batch: ProbeBatch) -> tuple[Tensor, float]:
        """Return the sum of a batch's losses, from the state that the measurement began with, and its items."""
        if batch.drawn is None:
            return self._plain_pass(batch)
        weights = torch.from_numpy(1 / batch.drawn.probabilities)
        with ExampleLosses(self.examples(batch.inputs), weights):
            loss, _ = self._plain_pass(batch)
        return loss, batch.drawn.share

    def example_losses(self, batch: ProbeBatch) -> tuple[Tensor, ExampleLosses]:
        """Return the sum of a batch's losses, and the pass that keeps those of its examples apart."""
        with ExampleLosses(self.examples(batch.inputs)) as apart:
            loss, _ = self._plain_pass(batch)
        return loss, apart

    def _plain_pass(self, batch: ProbeBatch) -> tuple[Tensor, int]:
        if self._should_stop is not None and self._should_stop():
            raise MeasurementInterruptedError
        if self.state.is_borrowed:
            self.state.rewind()
            seed_all(self._seed + batch.index)
        with self.state.watched():
            loss = self._loss_fn(self.model, copy_batch(batch.inputs))
        if isinstance(loss, tuple):
            return loss[0], int(loss[1])
        return loss * batch.items, batch.items

    def check(self) -> None:
        """Try the loss on one batch, so that a wrong argument shows before any training.

        Raises:
            ValueError: If labels are missing, no item counts, or the loss is not a scalar or depends on no parameter.
        """
        with measuring(self.model, seed=self._seed, state=self.state):
            loss, _ = next(self.unsharded().losses(), (None, 0))
        if loss is None:
            raise UnmeasurableError("labels_ignored", label=IGNORED_LABEL)
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
    """A loss as a module, so that `functional_call` can put other tensors in place of the model's parameters."""

    def __init__(self, model: nn.Module, loss_of: Callable[[ProbeBatch], tuple[Tensor, float]]):
        super().__init__()
        self.model = model
        self._loss_of = loss_of

    def forward(self, batch: ProbeBatch) -> tuple[Tensor, float]:
        return self._loss_of(batch)


def _counted(batches: list[ProbeBatch]) -> list[ProbeBatch]:
    """Return the batches with an item that counts: the mean of nothing is NaN."""
    return [batch for batch in batches if batch.items]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name; a tied one appears under its first name only.

    Raises:
        ValueError: If there is none.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        raise UnmeasurableError("nothing_trainable")
    return named


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that a Transformers model computes for a batch with labels.

    Raises:
        ValueError: If the batch is not a mapping, has no labels, or the model returns no loss.
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
            f"The batch has no labels: its keys are {listed(batch)}, but {type(model).__name__} computes a loss only "
            f"from {listed(labels)}. Add the labels to the data set, or pass a `loss_fn`."
        )
    raise ValueError(
        f"{type(model).__name__} returned no loss for a batch with the keys {listed(batch)}. "
        "Use a model with a task head (a `*For…` class), or pass a `loss_fn`."
    )


def _logits(output: Any) -> list[Tensor]:
    """Return what the loss is a function of: a tensor that the model returns, or the logits in its output."""
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
