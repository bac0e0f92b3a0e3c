# SPDX-License-Identifier: Apache-2.0
"""The self-check's first part: is a loss one function of the parameters, and which mean is it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from ..curvature.displacement import displaced
from ..errors import MeasurementError
from ..model_state.snapshot_tensors import digest
from ..objective.batches import Unit, listed
from ..objective.layout import Layout
from ..objective.objective import Objective, ProbeBatch
from ..objective.self_check import SelfCheck
from .out_of_memory import out_of_memory


logger = logging.get_logger(__name__)

MAX_REPEAT_ERROR = 1e-6
"""Relative difference of a loss evaluated twice that rounding may make: on a GPU sums come in any order, and some
kernels on CPUs are not deterministic either."""

MAX_MEAN_ERROR = 0.02
"""Difference between a batch's mean loss and that of its halves, relative to the difference between the halves: other
weights show in that, however alike the losses are."""

MIN_SPREAD = 1e-4
"""Difference between the halves, relative to the loss, below which it counts as this large: rounding in float32 makes
1e-6 of the loss."""

FAR = 0.05
"""Length of the way to the second point where batches and halves are compared, relative to each tensor: losses that
happen to be equal at the first one (a head of zeros) are not equal there."""

_UNITS: tuple[Unit, ...] = ("items", "examples", "attended tokens")


def check_mean(objective: Objective) -> SelfCheck:
    """Check that the loss of a batch is the same in each pass, and find what it is a mean over.

    To be called inside `measuring` and in the precision of the measurement, by all ranks together. Takes five forward
    passes over the probe set where all is well.

    Args:
        objective: What will be measured.

    Returns:
        What is known of it, except for the slopes.

    Raises:
        MeasurementError: If the loss of a batch differs between two passes.
    """
    objective = objective.uncut()
    means, draws, repeat_error = _repeat(objective)
    unit, mean_error, layout = _Found("items", None, objective.layout) if draws else _find_unit(objective, means)
    compared = mean_error is not None or layout is None
    in_doubt = not compared and not objective.counted_by(unit).counts_labels()
    names = layout.names if layout is not None else ()
    if in_doubt:
        logger.warning_once(
            f"The values of a batch have several lengths, not all the same in each batch. Examples are counted by "
            f"{listed(names)}, which halves of batches do not confirm, so that batches may have the wrong weights. "
            "Let `loss_fn` return the pair (sum of losses, number of items), which needs no count."
        )
    return SelfCheck(
        draws=draws,
        unit=unit,
        can_cut=not draws and unit != "batches" and compared,
        mean_error=mean_error,
        slope_errors=None,
        hooks_set_aside=tuple(objective.state.hooks_set_aside),
        module_hooks=tuple(objective.state.module_hooks),
        repeat_error=repeat_error,
        counted_by=names,
        count_in_doubt=in_doubt,
    )


def _repeat(objective: Objective) -> tuple[np.ndarray, bool, float]:
    """Return the batches' losses, whether they depend on random numbers, and their error between passes of one draw.

    Passes with other seeds are compared first: to the bit on CPUs. Where they differ, the same seeds have to give the
    same loss, up to the rounding of kernels that are not deterministic.

    Raises:
        MeasurementError: If they do not.
    """
    tolerance = 0.0 if objective.parameters[0].device.type == "cpu" else MAX_REPEAT_ERROR
    with weights_left_alone(objective):
        first, other = (_means(drawn, drawn.local_batches)[0] for drawn in (objective, objective.with_other_draws()))
        difference = _largest_difference(objective, first, other)
        if difference <= tolerance:
            return first, False, difference
        error = _largest_difference(objective, first, _means(objective, objective.local_batches)[0])
        draws = any(objective.group.all_gather_interleaved([objective.draws()]))
    if error > MAX_REPEAT_ERROR or (difference > MAX_REPEAT_ERROR and not draws):
        found = error if draws else max(error, difference)
        raise MeasurementError("loss_not_repeatable", difference=found)
    return first, draws and (error == 0 or difference > MAX_REPEAT_ERROR), error


def _largest_difference(objective: Objective, first: np.ndarray, second: np.ndarray) -> float:
    """Return the largest relative difference between losses, over all ranks."""
    with np.errstate(invalid="ignore"):  # a loss that is not finite is refused with its gradient
        errors = np.abs(first - second) / np.maximum(np.abs(first), torch.finfo(torch.float32).tiny)
    return float(np.nanmax([0.0, *objective.group.all_gather_interleaved(errors.tolist())]))


@contextmanager
def weights_left_alone(objective: Objective) -> Iterator[None]:
    """Hold around passes of a model that must not write to its trainable weights.

    Raises:
        MeasurementError: At the end, if it did.
    """
    before = [digest(parameter) for parameter in objective.parameters]
    yield
    if not all(torch.equal(digest(p), old) for p, old in zip(objective.parameters, before, strict=True)):
        raise MeasurementError("weights_changed")


def mean_loss(objective: Objective) -> float:
    """Return the mean loss over all batches of all ranks, without a graph."""
    means, items = _means(objective, objective.local_batches)
    pairs = objective.group.all_gather_interleaved(list(zip(means.tolist(), items.tolist(), strict=True)))
    return math.fsum(mean * count for mean, count in pairs) / math.fsum(count for _, count in pairs)


@torch.no_grad()
def _means(objective: Objective, batches: Sequence[ProbeBatch]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean loss of each batch, and what it is over."""
    pairs = [(float(loss), items) for loss, items in objective.over(batches).losses()]
    sums, items = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return sums / items, items


class _Found(NamedTuple):
    """What mean losses are over; how far those of halves are off, if they were compared; where the examples lie."""

    unit: Unit
    error: float | None
    layout: Layout | None


def _find_unit(objective: Objective, near: np.ndarray) -> _Found:
    """Return the first unit, and the first layout, in which the mean losses of batches are those of their halves."""
    if not objective.layouts:
        return _find_unit_in(objective, near)
    on_shards = objective.rows.group.world_size > 1  # where a pass that breaks off on one rank ends all
    for layout in objective.layouts:
        if layout.can_try and not on_shards:
            found = _find_unit_in(objective.laid_out(layout), near)
            if found.error is not None:
                return found
    return _Found("items" if objective.counts_labels() else "batches", None, objective.layout)


def _find_unit_in(objective: Objective, near: np.ndarray) -> _Found:
    """Return the first unit in which the mean losses of batches are those of their halves, in one layout."""
    halves = _Halves(objective, "items", near)
    if not any(objective.group.all_gather_interleaved([bool(halves.batches)])):
        return _Found("items", None, objective.layout)
    means = halves.means_near_and_far()
    for unit in _UNITS:
        if (error := halves.error(means, unit)) <= MAX_MEAN_ERROR:
            return _Found(unit, error, objective.layout)
    pairs = _Halves(objective, "pairs", near)
    if all(objective.group.all_gather_interleaved([len(pairs.batches) == len(halves.batches)])):
        error = pairs.error(pairs.means_near_and_far(), "pairs")
        if error <= MAX_MEAN_ERROR:
            return _Found("pairs", error, objective.layout)
    return _Found("batches", None, objective.layout)


class _Means(NamedTuple):
    """Mean losses of batches, those of their halves, of shape (batches, 2), and what these are over by `loss_fn`."""

    whole: np.ndarray
    halves: np.ndarray
    items: np.ndarray


class _Halves:
    """The local batches that can be cut in two, and their halves.

    Args:
        objective: The objective.
        unit: `"pairs"` keeps pairs together.
        near: The mean loss of each local batch at the present parameters.
    """

    def __init__(self, objective: Objective, unit: Unit, near: np.ndarray):
        self._objective = objective
        self._near: list[float] = []
        self.batches: list[ProbeBatch] = []
        self._halves: list[ProbeBatch] = []
        for batch, mean in zip(objective.local_batches, near.tolist(), strict=True):
            examples = objective.examples(batch.inputs)
            half = 2 * -(-examples // 4) if unit == "pairs" else -(-examples // 2)
            try:
                halves = objective.pieces(batch, half, unit=unit)
            except ValueError:
                continue
            if len(halves) == 2:
                self.batches.append(batch)
                self._near.append(mean)
                self._halves += halves

    def means_near_and_far(self) -> list[_Means]:
        """Return mean losses at the present parameters, and at a second point unless the loss is not finite there."""
        near = self._means(np.array(self._near))
        with moved_far(self._objective):
            far = self._means(_means(self._objective, self.batches)[0])
        finite = all(self._objective.group.all_gather_interleaved([bool(np.isfinite(far.whole).all())]))
        return [near, far] if finite else [near]

    def _means(self, whole: np.ndarray) -> _Means:
        # Halves in which nothing counts have weight 0; they are evaluated all the same, so that each batch has two.
        try:
            halves, items = _means(self._objective, [replace(half, items=half.items or 1) for half in self._halves])
        except Exception as error:
            on_shards = self._objective.rows.group.world_size > 1  # there a pass that breaks off on one rank ends all
            if on_shards or out_of_memory(error) or isinstance(error, MeasurementError):
                raise
            halves = items = np.full(len(self._halves), math.nan)  # a loss that has no halves
        items[[half.items == 0 for half in self._halves]] = 0
        return _Means(whole, halves.reshape(-1, 2), items.reshape(-1, 2))

    def error(self, means: Sequence[_Means], unit: Unit) -> float:
        """Return the largest difference between a batch's mean and its halves' mean in a unit, over all ranks."""
        errors = [0.0]
        for whole, halves, items in means:
            weights = items if unit == "items" else self._weights(unit)
            halves = np.where(weights == 0, 0.0, halves)
            with np.errstate(invalid="ignore", divide="ignore"):
                mean = (weights * halves).sum(1) / weights.sum(1)
                counted = np.where(weights == 0, mean[:, None], halves)
                spread = np.maximum(np.ptp(counted, axis=1), MIN_SPREAD * np.abs(counted).max(1))
                difference = np.where(mean == whole, 0.0, np.abs(mean - whole) / spread)
            errors += np.nan_to_num(difference, nan=math.inf).tolist()
        return max(self._objective.group.all_gather_interleaved(errors))

    def _weights(self, unit: Unit) -> np.ndarray:
        counts = [self._objective.count(half.inputs, unit) for half in self._halves]
        return np.array([math.nan if count is None else count for count in counts]).reshape(-1, 2)


def moved_far(objective: Objective) -> AbstractContextManager[None]:
    """Move each parameter by `FAR` of its size, with random signs; one that is 0 by the size of a typical one."""
    generator = torch.Generator().manual_seed(0)
    signs = [2.0 * torch.randint(2, p.shape, generator=generator) - 1 for p in objective.parameters]
    directions = [sign.to(p.detach()) for sign, p in zip(signs, objective.parameters, strict=True)]
    return displaced(objective.parameters, directions, [FAR * size for size in typical_sizes(objective)])


def typical_sizes(objective: Objective) -> list[float]:
    """Return the root mean square of each parameter; of one that is 0, the median of the others."""
    sizes = [float(p.detach().double().square().mean().sqrt()) if p.numel() else 0.0 for p in objective.parameters]
    others = sorted(filter(None, sizes))
    typical = others[len(others) // 2] if others else FAR
    return [size or typical for size in sizes]
