# SPDX-License-Identifier: Apache-2.0
"""Options of a comparison: budget, seeds, ranking criterion."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..scoring.logme import MIN_EXAMPLES


@dataclass
class ComparisonArguments:
    """The budget of each training, the seeds, and what candidates are ranked by.

    Works with `HfArgumentParser`: every field is a command-line flag of the same name.

    Raises:
        ValueError: If there is not exactly one budget, or a number is impossible.

    Example:
        >>> arguments = ComparisonArguments(budget_steps=100, halving_rounds=3)
        >>> arguments.unit, [arguments.budget(number) for number in (1, 2, 3)]
        ('steps', [25, 50, 100])
    """

    budget_steps: int | None = field(default=None, metadata={"help": "Train each candidate for so many steps."})
    budget_examples: int | None = field(
        default=None, metadata={"help": "Train each candidate on so many examples, counted each time they are seen."}
    )
    budget_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Train each candidate for about so many seconds: the number of steps is determined beforehand, by "
            "timing a few."
        },
    )
    seeds: int = field(default=3, metadata={"help": "Trainings of each candidate, with seeds from --seed on."})
    rank_by: Literal["accuracy", "loss"] = field(
        default="accuracy", metadata={"help": "What to rank by, on the evaluation set after training."}
    )
    halving_rounds: int = field(
        default=1,
        metadata={
            "help": "Rounds of successive halving: each but the last has half the budget of the next, and drops the "
            "worse half, except candidates statistically tied with the best."
        },
    )
    screen_to: int | None = field(
        default=None,
        metadata={
            "help": "Score the candidates before any training, and train so many: the best, and all that are "
            "statistically tied with the last of them."
        },
    )
    screen_examples: int = field(default=256, metadata={"help": "Training examples to compute the scores on."})
    measured_seeds: int = field(
        default=1, metadata={"help": "Trainings of each candidate in which curvature is measured."}
    )
    save_seconds: float = field(
        default=60.0, metadata={"help": "Seconds between two checkpoints, from which a killed training resumes."}
    )
    retry_failures: bool = field(default=False, metadata={"help": "Retry what failed in an earlier call."})

    def __post_init__(self) -> None:
        budgets = [name for name in ("budget_steps", "budget_examples", "budget_seconds") if vars(self)[name]]
        if len(budgets) != 1:
            raise ValueError(
                "Pass exactly one of --budget_steps, --budget_examples and --budget_seconds, above 0; got "
                f"{', '.join(budgets) or 'none'}."
            )
        minimums = {budgets[0]: 0, "seeds": 1, "halving_rounds": 1, "measured_seeds": 0, "save_seconds": 0}
        for name, bound in minimums.items():
            if not math.isfinite(vars(self)[name]) or vars(self)[name] < bound:
                raise ValueError(f"--{name} is {vars(self)[name]}; it must be at least {bound}.")
        if self.screen_to is not None and self.screen_to < 1:
            raise ValueError(f"--screen_to is {self.screen_to}; it must be at least 1, or left out to train them all.")
        if self.screen_examples < MIN_EXAMPLES:
            raise ValueError(f"--screen_examples is {self.screen_examples}; it must be at least {MIN_EXAMPLES}.")
        if self.rank_by not in ("accuracy", "loss"):
            raise ValueError(f"--rank_by is {self.rank_by!r}; choose accuracy or loss.")

    @property
    def unit(self) -> Literal["steps", "examples", "seconds"]:
        """Unit of the budget."""
        return "steps" if self.budget_steps else "examples" if self.budget_examples else "seconds"

    @property
    def amount(self) -> float:
        """The whole budget of a training."""
        return self.budget_steps or self.budget_examples or self.budget_seconds or 0

    def budget(self, number: int) -> float:
        """Return the budget of a training in round `number`, counted from 1; steps and examples are integers."""
        budget = self.amount / 2 ** (self.halving_rounds - number)
        return budget if self.unit == "seconds" else max(1, round(budget))
