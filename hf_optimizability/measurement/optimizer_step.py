# SPDX-License-Identifier: Apache-2.0
"""What the optimizer's next step meets: sharpness as it sees it, critical learning rate, the loss along the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer
from transformers.optimization import Adafactor
from transformers.utils import logging

from ..curvature.compact_embeddings import drop_unused_embedding_rows
from ..curvature.gradient import Gradient, gradient
from ..distributed.sharded_objective import ShardedObjective
from ..linalg.estimate import Estimate
from ..linalg.spectrum_and_trace import SpectrumAndTrace
from ..linalg.vectors import flatten
from ..objective.objective import Objective
from ..quantities.loss_landscape import LossLine, LossPlane, loss_line, loss_plane
from ..quantities.preconditioner import Preconditioner, TensorReader, optimizer_update, read_preconditioner
from ..quantities.step_size import critical_learning_rate, loss_along
from .results import OptimizerStability


logger = logging.get_logger(__name__)

_START = 1e-3
"""Where the search for the critical learning rate starts if the learning rate is 0, as at the start of a warm-up."""


@dataclass(frozen=True)
class OptimizerStep:
    """The next step of an optimizer, from the gradient of the objective.

    Attributes:
        preconditioner: P, as the optimizer's state has it.
    """

    preconditioner: Preconditioner
    _optimizer: Optimizer
    _parameters: Sequence[Tensor]
    _gradient: Gradient
    _read_tensor: TensorReader

    @classmethod
    def read(
        cls,
        optimizer: Optimizer | None,
        parameters: Sequence[Tensor],
        objective: Objective,
        gradient: Gradient,
        read_tensor: TensorReader,
    ) -> OptimizerStep | None:
        """Return the step of an optimizer over `parameters`; `None` if there is none that can be read.

        Raises:
            TypeError: If the optimizer's state is of a form that is not known.
        """
        # Adafactor's update is not elementwise, so that it cannot be computed from a shard.
        if optimizer is None or (isinstance(objective, ShardedObjective) and isinstance(optimizer, Adafactor)):
            return None
        try:
            preconditioner = read_preconditioner(
                optimizer, parameters, gradients=gradient.tensors, read_tensor=read_tensor
            )
        except ValueError as error:
            logger.warning_once(f"How far the optimizer may step is not measured. {error}")
            return None
        return cls(preconditioner, optimizer, parameters, gradient, read_tensor)

    def update(self) -> Tensor:
        """Return the update for a learning rate of 1, of shape (n,). It is not kept: it is as long as the weights."""
        return optimizer_update(
            self._optimizer, self._parameters, self._gradient.tensors, read_tensor=self._read_tensor
        )

    def preconditions(self, objective: Objective) -> bool:
        """Return whether P differs from the identity on any rank."""
        identity = objective.rows.group.all_gather_interleaved([self.preconditioner.is_identity])
        return not all(identity)


def measure_stability(
    objective: Objective, step: OptimizerStep, update: Tensor, sharpness: Estimate
) -> OptimizerStability:
    """Return the sharpness that the optimizer sees, its limit, and the critical learning rate along its update."""
    preconditioner = step.preconditioner
    with loss_along(objective, update) as loss:
        critical = critical_learning_rate(loss, start=preconditioner.learning_rate or _START)
    return OptimizerStability(
        optimizer=preconditioner.name,
        learning_rate=preconditioner.learning_rate,
        sharpness=sharpness,
        limit=preconditioner.limit,
        critical=critical,
        peak_learning_rate=preconditioner.peak_learning_rate,
    )


def update_line(
    objective: Objective, point: Gradient, update: Tensor, curvature: float, stability: OptimizerStability
) -> LossLine:
    """Return the loss along the update, about as far as it falls and rises again."""
    critical = stability.critical
    return loss_line(
        objective,
        update,
        gradient=flatten(point.tensors).to(update),
        curvature=curvature,
        reach=critical.value if critical.converged else stability.learning_rate or _START,
        step=stability.learning_rate,
    )


def eigenvector_plane(objective: Objective, spectrum: SpectrumAndTrace) -> LossPlane | None:
    """Return the loss over the plane of the top two eigenvectors."""
    if spectrum.eigenvectors is None:
        return None
    with drop_unused_embedding_rows(objective):  # as where the eigenvectors were found
        point = gradient(objective)
        return loss_plane(
            objective,
            spectrum.eigenvectors,
            spectrum.eigenvalues,
            gradient=flatten(point.tensors).to(spectrum.eigenvectors),
            present=point.loss,
        )
