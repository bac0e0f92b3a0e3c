# SPDX-License-Identifier: Apache-2.0
"""What a curvature matrix is the matrix of: a mean loss over items, evaluated batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from ..errors import WrongDerivativeError
from ..linalg.communicator import SINGLE_PROCESS, ProcessGroup
from ..linalg.row_partition import RowPartition


FunctionalLoss = Callable[[Sequence[Tensor]], tuple[Tensor, float]]
"""The sum of a batch's losses and its number of items, as a function of the variables."""


class HvpCounter:
    """Count of the Hessian-vector products made with one loss.

    Args:
        on_products: Called with the number of products just made, for progress bars.

    Attributes:
        total: Products made so far.

    Example:
        >>> counter = HvpCounter()
        >>> counter.add(3)
        >>> counter.total
        3
    """

    def __init__(self, on_products: Callable[[int], object] | None = None):
        self.total = 0
        self._on_products = on_products

    def add(self, products: int) -> None:
        """Count products."""
        self.total += products
        if self._on_products is not None:
            self._on_products(products)


class EmpiricalRisk:
    """A mean loss over items, evaluated batch by batch, so that no more than one batch's graph is in memory.

    A subclass has `parameters`, and of the methods those that its matrices need: `losses` for the Hessian, also `cut`
    for the Fisher matrix, `outputs_and_losses` for the Gauss-Newton matrix, `functional_losses` for forward mode.

    Attributes:
        group: The processes that share the batches: each evaluates its own, and sums go over all of them.
        hvp_counter: Count of the products made with this loss, if anybody wants to know.
    """

    group: ProcessGroup = SINGLE_PROCESS
    hvp_counter: HvpCounter | None = None

    @property
    def second_derivative_blocker(self) -> WrongDerivativeError | None:
        """Why the loss has no exact second derivatives (quantized weights, for example); `None` if it has."""
        return None

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The variables."""
        raise NotImplementedError

    @property
    def rows(self) -> RowPartition:
        """How vectors over the variables lie: each process holds them whole, unless it has shards of them."""
        return RowPartition.whole(sum(parameter.numel() for parameter in self.parameters))

    def losses(self) -> Iterable[tuple[Tensor, float]]:
        """Yield each batch's sum of losses, with its graph, and the number of items it sums over."""
        raise NotImplementedError

    def outputs_and_losses(self) -> Iterable[tuple[Sequence[Tensor], Tensor, float]]:
        """Yield each batch's outputs of the model, its sum of losses and its number of items, in one graph."""
        raise NotImplementedError

    def functional_losses(self) -> Iterable[FunctionalLoss]:
        """Yield, for each batch, its sum of losses and its number of items as a function of the variables."""
        raise NotImplementedError

    def cut(self, size: int) -> EmpiricalRisk:
        """Return the same mean, in batches of at most `size` examples."""
        raise NotImplementedError


class ModelRisk(EmpiricalRisk):
    """An empirical risk whose variables are parameters of a model, read from it by their names each time.

    Attributes:
        model: The model.
        names: Names of the variables in the model.
    """

    model: nn.Module
    names: Sequence[str]
