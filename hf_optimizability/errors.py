# SPDX-License-Identifier: Apache-2.0
"""Why a measurement could not be made, and what to do about it."""

from __future__ import annotations


class MeasurementError(RuntimeError):
    """A measurement that can't be made, with the reason and what to do about it.

    Attributes:
        reason: What went wrong.
        remedy: What the user can do.
    """

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason, remedy)  # so that it can be sent to another process
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason} {self.remedy}"


class WrongDerivativeError(MeasurementError):
    """Second derivatives that are not those of the loss: another engine may not need them."""


class MeasurementInterruptedError(MeasurementError):
    """A measurement that was given up between two passes, because training is about to stop."""

    def __init__(
        self,
        reason: str = "The measurement was interrupted, because training is stopping.",
        remedy: str = "Resume from the checkpoint; the next measurement is made there.",
    ):
        super().__init__(reason, remedy)
