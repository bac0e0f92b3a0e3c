# SPDX-License-Identifier: Apache-2.0
"""Traces of the batches whose mean a matrix is: what they say about other data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .estimate import Estimate
from .operator import SymmetricOperator
from .statistics import jackknife, standard_error, student_quantile
from .vectors import Segments


Array = NDArray[np.float64]


class BatchTraces:
    """The traces of the batches whose mean an operator is, estimated by its own probes at no further cost.

    The jackknife over the batches says how far the mean would move with other data. Batch b deviates from the mean by
    the average over probes of `v_sᵀ((A_b − A)v)_s`. The probe noise of that average adds to the squared deviation; its
    variance is known from the spread over the probes, and is subtracted. Where it is far larger, the difference may
    come out at 0. These traces are taken without deflation.

    Args:
        segments: Slices of the rows; together they must hold each row once.
        exact: Of shape (batches, segments): traces to add to those of the probes, known without error.

    Attributes:
        items: The number of items in each batch.
    """

    def __init__(self, segments: Segments, exact: Array | None = None):
        self.items: list[float] = []
        self._segments = segments
        self._exact = exact
        self._forms: list[Array] = []  # vᵀA_b v of each probe, of shape (batches, segments)

    def multiply(self, operator: SymmetricOperator, probes: Tensor) -> tuple[Tensor, Array]:
        """Return the rows Av for rows v, whose entries are ±1 or 0, and `v_sᵀ(Av)_s`, of shape (k, segments)."""
        products, forms, self.items = operator.matmat_per_batch(probes.T, self._segments)
        self._forms += list(forms.swapaxes(0, 1))
        return products.T, np.average(forms, axis=0, weights=self.items)

    def sums(self) -> Array:
        """Return the sum of `v_sᵀ(A_b v)_s` over the probes, of shape (batches, segments)."""
        total: Array = np.sum(self._forms, axis=0)
        return total

    def of_unit_vectors(self) -> BatchTraces:
        """Return the same traces as exact ones, if the probes were all unit vectors."""
        exact = BatchTraces(self._segments, self.sums())
        exact.items = self.items
        return exact

    def mean_of(self, batches: Sequence[int], *, tolerance: float, method: str, hvps: int) -> tuple[Estimate, ...]:
        """Estimate the trace of the mean of some batches, weighted by items, and those of its segments.

        All batches have the same probes, so that such means add up to that of all. Errors are from the spread over
        the probes, with Student's t.

        Args:
            batches: Indices of the batches.
            tolerance: Relative standard error of a converged estimate.
            method: Recorded in the estimates.
            hvps: Recorded in the estimates.

        Returns:
            The trace, then that of each segment.
        """
        chosen = BatchTraces(self._segments, None if self._exact is None else self._exact[batches])
        chosen.items, chosen._forms = (
            [self.items[batch] for batch in batches],
            [forms[batches] for forms in self._forms],
        )
        if not chosen._forms:
            assert chosen._exact is not None
            total, segments = exact_estimates(chosen._exact, chosen.items, hvps=hvps)
            return (total, *segments)
        samples = np.average(chosen._all_forms(), axis=1, weights=chosen.items)
        samples = np.concatenate([samples.sum(axis=1, keepdims=True), samples], axis=1)
        errors = standard_error(samples)
        quantile, data_errors = student_quantile(len(samples) - 1), chosen.std_errors()
        return tuple(
            Estimate.from_std_error(
                value,
                error,
                quantile=quantile,
                tolerance=tolerance,
                method=method,
                hvps=hvps,
                data_std_error=data_error,
            )
            for value, error, data_error in zip(
                samples.mean(axis=0).tolist(),
                errors.tolist(),
                [None] * len(errors) if data_errors is None else data_errors.tolist(),
                strict=True,
            )
        )

    def std_errors(self) -> Array | None:
        """Return standard errors over the data of the trace and of each segment's; `None` from one batch or probe."""
        if len(self.items) < 2 or len(self._forms) < 2:
            return None
        forms = self._all_forms()
        forms = np.concatenate([forms.sum(axis=2, keepdims=True), forms], axis=2)
        deviations = forms - np.average(forms, axis=1, weights=self.items, keepdims=True)
        weights = np.array(self.items) / (sum(self.items) - np.array(self.items))  # the jackknife's
        noise = weights @ deviations.var(axis=0, ddof=1) / len(forms) / len(weights)
        spread = [jackknife(column, self.items) ** 2 for column in deviations.mean(axis=0).T]
        errors: Array = np.sqrt(np.maximum(spread - noise, 0))
        return errors

    def means(self) -> Array:
        """Return the present estimates of the batches' traces, of shape (batches, segments)."""
        means = self._exact if not self._forms else self._all_forms().mean(axis=0)
        assert means is not None
        return means

    def probed(self) -> Array:
        """Return the same of what was not known exactly; of all if everything was."""
        return np.array(self._forms).mean(axis=0) if self._forms else self.means()

    def _all_forms(self) -> Array:
        """Return a sample of each batch's traces from each probe, of shape (probes, batches, segments)."""
        forms = np.array(self._forms)
        return forms if self._exact is None else self._exact + forms


def exact_estimates(traces: Array, items: Sequence[float], *, hvps: int) -> tuple[Estimate, tuple[Estimate, ...]]:
    """Return the trace and the segments' traces from those of the batches, which are known without error.

    Args:
        traces: Of shape (batches, segments).
        items: The number of items in each batch.
        hvps: Recorded in the estimates.
    """

    def exact(column: Array) -> Estimate:
        value = float(np.average(column, weights=items))
        error = jackknife(column, items) if len(items) > 1 else None
        return Estimate(
            value, value, value, method="exact", hvps=hvps, converged=True, std_error=0.0, data_std_error=error
        )

    return exact(traces.sum(axis=1)), tuple(map(exact, traces.T))
