# SPDX-License-Identifier: Apache-2.0
"""Errors of a measurement that can't be made."""

from __future__ import annotations

from typing import TypeVar

from .reasons import Reason, Value


_LONGEST_LINE = 300
"""Characters of an error's text that are kept."""

Error = TypeVar("Error", bound="ExplainedError")


class ExplainedError(Exception):
    """An error with its reason, by code, and what to do about it.

    Args:
        code: The reason, one of `hf_optimizability.reasons.WORDS`.
        error: The error behind it. Its text is part of this one's, not of the `why` that goes into a report.
        because: The reason behind it.
        values: What the reason's sentences are completed with.

    Attributes:
        why: The reason as a report has it.

    Example:
        >>> print(MeasurementError("rows_unreadable", error=OSError("no such file")).reason)
        The training set's rows can't be read: OSError: no such file.
    """

    def __init__(
        self,
        code: str,
        *,
        error: BaseException | None = None,
        because: Reason | None = None,
        **values: Value,
    ):
        kind = None if error is None else type_name(error)
        self.why = Reason(code, error=kind, values=values, because=because)
        self._behind = "" if error is None else f": {kind}: {_first_line(error)}"
        super().__init__(str(self))

    def __str__(self) -> str:
        return f"{self.reason} {self.remedy}".rstrip()

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuilt, (type(self), self.why, self._behind)  # to be sent to another process

    @property
    def reason(self) -> str:
        """What went wrong, with the text of the error behind it."""
        return self.why.sentence(self._behind)

    @property
    def remedy(self) -> str:
        """What the user can do."""
        return self.why.remedy


class MeasurementError(ExplainedError, RuntimeError):
    """A measurement that can't be made, with the reason and what to do about it."""


class UnmeasurableError(ExplainedError, ValueError):
    """A model or batches that leave nothing to measure."""


class WrongDerivativeError(MeasurementError):
    """Second derivatives that are missing, or not those of the loss: another engine may not need them."""


class MeasurementInterruptedError(MeasurementError):
    """A measurement that was given up between two passes, because training is about to stop."""

    def __init__(self) -> None:
        super().__init__("interrupted")


def type_name(error: BaseException) -> str:
    """Return the name of an error's type, for a reason; of a class that was named otherwise at run time, its base's.

    Example:
        >>> type_name(KeyError()), type_name(type("File x", (OSError,), {})())
        ('KeyError', 'OSError')
    """
    return next(cls.__name__ for cls in type(error).__mro__ if cls.__name__.isidentifier())


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text: that of torch may take 30."""
    first = str(error).strip().partition("\n")[0]
    return first.rstrip(".") if len(first) <= _LONGEST_LINE else f"{first[:_LONGEST_LINE]} …"


def _rebuilt(cls: type[Error], why: Reason, behind: str) -> Error:
    error = cls.__new__(cls)
    error.why, error._behind = why, behind
    return error
