# SPDX-License-Identifier: Apache-2.0
"""What a score is: a value with its error, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.special import stdtrit


@dataclass(frozen=True)
class Score:
    """A number that may tell how well a checkpoint will do, had before any training.

    Attributes:
        value: The score; more is meant to be better.
        low: Lower end of its 95 % interval over examples like those it is from.
        high: Upper end.
        std_error: Its standard error over such examples.
        examples: What it is from.
        passes: Passes through the model over all these examples, a forward and a backward pass counted as one each.
        seconds: What it took by the clock; passes that scores share are in the seconds of each.
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
        """With an interval by Student's t.

        Example:
            >>> Score.from_error(1.0, 0.1, freedom=9, examples=40).high
            1.226...
        """
        margin = float(stdtrit(freedom, 0.975)) * std_error
        return cls(value, value - margin, value + margin, std_error, examples)
