# SPDX-License-Identifier: Apache-2.0
"""A score: a value with its error and its cost."""

from __future__ import annotations

from dataclasses import dataclass

from ..linalg.statistics import student_quantile


@dataclass(frozen=True)
class Score:
    """A number that may predict how well a checkpoint will do, computed before any training.

    Attributes:
        value: The score; more should be better.
        low: Lower bound of its 95 % interval over examples like those it was computed on.
        high: Upper bound.
        std_error: Its standard error over such examples.
        examples: Examples it was computed on.
        passes: Passes through the model over all these examples; forward and backward count one each.
        seconds: Time it took; passes that scores share count for each.
    """

    value: float
    low: float
    high: float
    std_error: float
    examples: int
    passes: int = 0
    seconds: float = 0.0

    @classmethod
    def from_error(cls, value: float, std_error: float, *, freedom: int, examples: int) -> Score:
        """Return a score with an interval by Student's t.

        Example:
            >>> Score.from_error(1.0, 0.1, freedom=9, examples=40).high
            1.226...
        """
        margin = student_quantile(freedom) * std_error
        return cls(value, value - margin, value + margin, std_error, examples)
