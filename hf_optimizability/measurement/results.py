# SPDX-License-Identifier: Apache-2.0
"""What one measurement found, or why it found nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..curvature.eigenvalue_check import EigenvalueCheck
from ..linalg.estimate import Estimate
from ..linalg.spectrum_and_trace import HessianEstimates
from ..objective.self_check import SelfCheck
from ..quantities.loss_landscape import Landscape
from ..quantities.step_size import CriticalLearningRate, QuadraticModel
from ..quantities.task_conflict import SAME
from ..serialization import structure


@dataclass(frozen=True)
class BlockMeasurement:
    """One block of parameters (the embeddings, a layer, the head).

    Attributes:
        parameters: Number of trainable parameters in the block.
        grad_norm: 2-norm of the block's gradient.
        weight_norm: 2-norm of the block's parameters.
        trace: Trace of the block's diagonal block of the Hessian.
        lambda_max: Its largest eigenvalue, where `block_eigenvalues` asks for it.
        lambda_min: Its smallest eigenvalue, likewise.
    """

    parameters: int
    grad_norm: float
    weight_norm: float
    trace: Estimate
    lambda_max: Estimate | None = None
    lambda_min: Estimate | None = None


@dataclass(frozen=True)
class OptimizerStability:
    """How far the optimizer in use may step from here.

    Attributes:
        optimizer: Its class.
        learning_rate: η, the largest among the parameter groups.
        sharpness: λ_max(P^-½HP^-½), P the optimizer's diagonal preconditioner (1 for SGD).
        limit: The sharpness above which this optimizer diverges on a quadratic at η; infinite at η = 0.
        critical: The learning rate at which the loss first rises along the optimizer's next update.
    """

    optimizer: str
    learning_rate: float
    sharpness: Estimate
    limit: float
    critical: CriticalLearningRate


@dataclass(frozen=True)
class TaskMeasurement:
    """One task of several; what it is a mean over are this task's examples of the probe set.

    Attributes:
        num_items: What the mean is over: examples, or labels other than -100.
        batches: Batches of the probe set; fewer than 3 leave no error over the data.
        weight: w, its share of all items; the joint loss is the sum of w times the tasks' losses.
        loss: Mean loss, in eval mode, with its standard error over the batches.
        grad_norm: 2-norm of the gradient of that loss.
        signal_norm: 2-norm of the gradient over all data: what the noise adds to `grad_norm` is taken off.
        share: wₜ⟨gₜ, g⟩/‖g‖², g the joint gradient over all data: the task's part in what a small step of gradient
            descent gains. The shares add up to 1; below 0, that step raises the task's own loss.
        noise_scale: Of this task alone.
        trace: Trace of the Hessian of its loss. Times w they add up to the joint one.
        lambda_max: Its largest eigenvalue, where `task_eigenvalues` asks for it.
        curvature_along_gradient: gᵀHₜg, g the joint gradient on the probe set; times w they add up to the joint one.
        equal_norm_weight: In the place of w, what makes the gradients of all tasks equally long.
        min_norm_weight: In the place of w, what makes the joint gradient shortest, so that a step along it raises no
            task's loss.
        blocks: Gradient norm and trace by block.
    """

    num_items: int
    batches: int
    weight: float
    loss: Estimate
    grad_norm: float
    signal_norm: Estimate | None
    share: Estimate | None
    noise_scale: Estimate | None
    trace: Estimate | None
    lambda_max: Estimate | None
    curvature_along_gradient: float | None
    equal_norm_weight: Estimate | None
    min_norm_weight: Estimate | None
    blocks: Mapping[str, TaskBlock]


@dataclass(frozen=True)
class TaskBlock:
    """One block of parameters, as one task sees it.

    Attributes:
        grad_norm: 2-norm of the block's part of the task's gradient.
        trace: Trace of the block's diagonal block of the task's Hessian.
    """

    grad_norm: float
    trace: Estimate | None


@dataclass(frozen=True)
class Conflict:
    """How far the gradients of two tasks agree, over all data.

    Attributes:
        first: A task.
        second: Another.
        cosine: Of the angle between their gradients; `None` where the noise hides one of them. Below 0, a step that
            lowers one loss raises the other.
        blocks: The same by block.
    """

    first: str
    second: str
    cosine: Estimate | None
    blocks: Mapping[str, Estimate | None]


@dataclass(frozen=True)
class MultitaskMeasurement:
    """What is known of each task of a joint loss, and of each pair of them.

    Attributes:
        tasks: By name, in alphabetical order.
        conflicts: A pair each.
    """

    tasks: Mapping[str, TaskMeasurement]
    conflicts: tuple[Conflict, ...]

    def cosine(self, first: str, second: str, block: str | None = None) -> Estimate | None:
        """The cosine of two tasks' gradients, in all or of a block; 1 of a task with itself."""
        if first == second:
            return SAME
        found = next(pair for pair in self.conflicts if {pair.first, pair.second} == {first, second})
        return found.cosine if block is None else found.blocks[block]


@dataclass(frozen=True)
class Measurement:
    """The local geometry of the loss at one point of training.

    Attributes:
        step: Optimizer steps taken before the measurement; 0 outside a Trainer.
        epoch: Epochs trained before the measurement; `None` outside a Trainer.
        loss: Mean loss over the probe set, in eval mode.
        num_items: What the mean is over: examples, or labels other than -100.
        grad_norm: 2-norm of the gradient of `loss`.
        hessian: Trace, extreme eigenvalues and spectral density of `curvature`.
        blocks: The same by block, in the model's order.
        curvature: Which matrix `hessian` and `blocks` are about.
        quadratic_model: gᵀHg, the best single step along −g, and what it would gain.
        noise_scale: Items over which a mean gradient has as much noise as signal; `None` from fewer than 3 batches.
        optimizer_stability: How far the optimizer may step; `None` without one whose state can be read.
        landscape: Slices through the loss; `None` unless `landscape` asks for them.
        multitask: The same by task, and how far tasks conflict; `None` unless `task_column` tells them apart.
        engine: How the Hessian was multiplied with vectors.
        attention: `"math"` where SDPA ran its twice differentiable kernel, `"eager"` where the model was switched,
            `"unchanged"` where no second derivative was needed.
        fallback: Why the engine or the attention is not the first choice; `None` if it is.
        central_difference_error: Relative error of central differences, the larger one along a random vector and along those of
            the eigenvalues: against the exact product where that can be had, else against half the step; `None` from
            exact engines. Kinks (ReLU) make it large.
        dtype: Precision of the products, for example `"float32"`.
        batch_size: Most examples in one graph; less than asked for where memory did not suffice.
        unused_embedding_parameters: Embedding parameters that no token of the probe set looks up: their rows of the matrix are zero, and
            were left out of the products.
        hvps: Hessian-vector products spent.
        seconds: Wall-clock time spent.
        self_check: What the numbers can be trusted with; `None` in older reports.
        eigenvalue_checks: What differences of the gradient along their own vectors say of λ_max and λ_min.
    """

    step: int
    epoch: float | None
    loss: float
    num_items: int
    grad_norm: float
    hessian: HessianEstimates
    blocks: Mapping[str, BlockMeasurement]
    curvature: str
    quadratic_model: QuadraticModel | None
    noise_scale: Estimate | None
    optimizer_stability: OptimizerStability | None
    landscape: Landscape | None
    multitask: MultitaskMeasurement | None
    engine: str
    attention: str
    fallback: str | None
    central_difference_error: float | None
    dtype: str
    batch_size: int
    unused_embedding_parameters: int
    hvps: int
    seconds: float
    self_check: SelfCheck | None = None
    eigenvalue_checks: tuple[EigenvalueCheck, ...] = ()

    @property
    def converged(self) -> bool:
        """Whether trace and eigenvalues reached their tolerances (traces of single blocks may be wider)."""
        return self.hessian.converged

    @property
    def trainable_parameters(self) -> int:
        """Entries of all parameters that were trained when this was measured, and are differentiated by."""
        return sum(block.parameters for block in self.blocks.values())

    def to_dict(self) -> dict[str, Any]:
        """The measurement as plain numbers, strings, lists and dicts."""
        return {**asdict(self), "converged": self.converged}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        """Rebuild a measurement from `to_dict`."""
        return structure(cls, {name: value for name, value in data.items() if name != "converged"})


@dataclass(frozen=True)
class MeasurementFailure:
    """A measurement that could not be made; training went on without it.

    Attributes:
        step: Optimizer steps taken when it was tried.
        epoch: Epochs trained when it was tried.
        reason: What went wrong.
        remedy: What the user can do.
    """

    step: int
    epoch: float | None
    reason: str
    remedy: str
