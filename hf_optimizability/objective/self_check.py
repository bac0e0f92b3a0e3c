# SPDX-License-Identifier: Apache-2.0
"""The outcome of an objective's self-check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


Unit = Literal["items", "examples", "attended tokens", "pairs", "batches"]
"""What a mean loss is over: what its labels or examples say (`count_items`), all examples, the tokens that
`attention_mask` lets through, pairs whose second halves follow all first ones, or nothing that can be counted: then
batches are kept as they were collated, and weighted by their examples."""


@dataclass(frozen=True)
class SelfCheck:
    """The outcome of an objective's self-check.

    Attributes:
        draws: Whether the loss depends on random numbers in eval mode. Each batch then has its own draw, the same in
            all passes.
        unit: What the mean losses of the batches are over.
        can_cut: Whether smaller batches give the same mean; batches are kept as they were collated if not.
        mean_error: Largest difference between a batch's mean loss and that of its halves, in this unit, relative to
            the difference between the halves; `None` if they could not be compared.
        slope_errors: Difference between g·v and differences of the loss, relative to ‖g‖‖v‖: along the gradient, and
            along the gradient with a random sign for each tensor; `None` where the loss moves with the step.
            No errors at all if the gradient is 0.
        hooks_set_aside: Parameters whose gradient hooks did not run.
        module_hooks: Modules whose hooks ran.
        repeat_error: Relative difference of a batch's loss between two passes with the same draw: 0 unless a kernel is
            not deterministic. `None` in older reports.
        counted_by: The values whose length is the number of examples, if those of a batch have different lengths.
        count_in_doubt: Whether the number of examples may be another one of these lengths, and halves do not tell.
    """

    draws: bool
    unit: Unit
    can_cut: bool
    mean_error: float | None
    slope_errors: tuple[float | None, ...] | None
    hooks_set_aside: tuple[str, ...] = ()
    module_hooks: tuple[str, ...] = ()
    repeat_error: float | None = None
    counted_by: tuple[str, ...] = ()
    count_in_doubt: bool = False

    def __str__(self) -> str:
        return "; ".join([self._mean(), self._slope(), *self._notes()])

    def _mean(self) -> str:
        if self.mean_error is not None:
            return f"the mean over {self.unit} of a batch is that of its halves"
        if self.unit == "batches":
            return "the loss is not a mean over countable items, so batches are kept as collated"
        return "batches were not compared with their halves"

    def _slope(self) -> str:
        errors = [error for error in self.slope_errors or () if error is not None]
        if errors:
            return f"the gradient is the slope of the loss (to {max(errors):.0e})"
        return "the gradient could not be compared with differences of the loss"

    def _notes(self) -> list[str]:
        notes = ["random numbers in eval mode: each batch has the same draw in all passes"] if self.draws else []
        if self.repeat_error:
            notes.append(f"a kernel is not deterministic: the loss of a batch differs by {self.repeat_error:.0e}")
        if self.counted_by:
            doubt = ", which halves do not confirm" if self.count_in_doubt else ""
            notes.append(f"examples are counted by {_quoted(self.counted_by)}{doubt}")
        if self.hooks_set_aside:
            notes.append(f"gradient hooks set aside on {_shortened(self.hooks_set_aside)}")
        if self.module_hooks:
            notes.append(f"hooks ran in {_shortened(self.module_hooks)}")
        return notes


def _quoted(names: Sequence[str]) -> str:
    return _shortened([f"`{name}`" for name in names])


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
