# SPDX-License-Identifier: Apache-2.0
"""Results of one measurement, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..curvature.eigenvalue_check import EigenvalueCheck
from ..linalg.estimate import Estimate
from ..linalg.spectrum_and_trace import HessianEstimates
from ..number_format import NOT_CONVERGED
from ..objective.self_check import SelfCheck
from ..quantities.batch_sharpness import BatchSharpness
from ..quantities.loss_landscape import Landscape
from ..quantities.step_size import CriticalLearningRate, QuadraticModel
from ..quantities.task_conflict import WITH_ITSELF
from ..reasons import Reason
from ..serialization import structure
from .values import formatted


NOT_CONVERGED_NOTE = f"{NOT_CONVERGED} Not converged: the interval is wider than asked for. Raise max_hvps."


@dataclass(frozen=True)
class BlockMeasurement:
    """One block of parameters (the embeddings, a layer, the head).

    Attributes:
        parameters: Number of trainable parameters in the block.
        grad_norm: 2-norm of the block's gradient.
        weight_norm: 2-norm of the block's parameters.
        trace: Trace of the block's diagonal block of the Hessian.
        lambda_max: Largest eigenvalue of that diagonal block; only with `block_eigenvalues`.
        lambda_min: Smallest eigenvalue; only with `block_eigenvalues`.
    """

    parameters: int
    grad_norm: float
    weight_norm: float
    trace: Estimate
    lambda_max: Estimate | None = None
    lambda_min: Estimate | None = None


@dataclass(frozen=True)
class OptimizerStability:
    """Stability of the optimizer in use at the current weights.

    Attributes:
        optimizer: Class of the optimizer.
        learning_rate: η, the largest among the parameter groups.
        sharpness: λ_max(P^-½HP^-½), P the optimizer's diagonal preconditioner (1 for SGD).
        limit: Sharpness above which this optimizer diverges on a quadratic at η; infinite at η = 0.
        critical: Learning rate at which the loss first rises along the optimizer's next update.
        peak_learning_rate: η at the peak of a schedule that scales it by at most 1; `None` without a schedule.
    """

    optimizer: str
    learning_rate: float
    sharpness: Estimate
    limit: float
    critical: CriticalLearningRate
    peak_learning_rate: float | None = None


@dataclass(frozen=True)
class TaskMeasurement:
    """One task of a joint loss, on its examples of the probe set.

    Attributes:
        num_items: Items of the mean: examples, or labels other than -100.
        batches: Batches of the probe set; fewer than 3 leave no error over the data.
        weight: w, the task's share of all items; the joint loss is the sum of w times the tasks' losses.
        loss: Mean loss, in eval mode, with its standard error over the batches.
        grad_norm: 2-norm of the gradient of that loss.
        signal_norm: 2-norm of the gradient over all data: `grad_norm` without the contribution of the noise.
        share: wₜ⟨gₜ, g⟩/‖g‖², g the joint gradient over all data: the task's part in the decrease of the joint loss by
            a small step of gradient descent. Shares sum to 1; a negative one means that this step raises the task's
            own loss.
        noise_scale: Gradient noise scale of this task alone.
        trace: Trace of the Hessian of the task's loss. Times w, the traces sum to the joint one.
        lambda_max: Largest eigenvalue of that Hessian; only with `task_eigenvalues`.
        curvature_along_gradient: gᵀHₜg, g the joint gradient on the probe set; times w, they sum to the joint one.
        equal_norm_weight: Weight, in place of w, with which the gradients of all tasks have equal norms.
        min_norm_weight: Weight, in place of w, with which the joint gradient is shortest: a step along it raises no
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
    """One block of parameters, for one task.

    Attributes:
        grad_norm: 2-norm of the block's part of the task's gradient.
        trace: Trace of the block's diagonal block of the task's Hessian.
    """

    grad_norm: float
    trace: Estimate | None


@dataclass(frozen=True)
class Conflict:
    """Agreement of the gradients of two tasks, over all data.

    Attributes:
        first: Name of one task.
        second: Name of the other.
        cosine: Cosine between their gradients; `None` where noise dominates one of them. If negative, a step that
            lowers one loss raises the other.
        blocks: The same cosine by block.
    """

    first: str
    second: str
    cosine: Estimate | None
    blocks: Mapping[str, Estimate | None]


@dataclass(frozen=True)
class MultitaskMeasurement:
    """Results by task of a joint loss, and by pair of tasks.

    Attributes:
        tasks: Results by task, in alphabetical order.
        conflicts: One entry per pair of tasks.
    """

    tasks: Mapping[str, TaskMeasurement]
    conflicts: tuple[Conflict, ...]

    def cosine(self, first: str, second: str, block: str | None = None) -> Estimate | None:
        """Return the cosine between two tasks' gradients, whole or of a block; 1 for a task with itself."""
        if first == second:
            return WITH_ITSELF
        conflict = next(pair for pair in self.conflicts if {pair.first, pair.second} == {first, second})
        return conflict.cosine if block is None else conflict.blocks[block]


@dataclass(frozen=True)
class PopulationMeasurement:
    """What is known of the training set that the measured examples were drawn from.

    Attributes:
        examples: Examples in the training set.
        pool_examples: Those of them that were looked at.
        sampled_examples: Those measured.
        certain_examples: Of these, those that any draw would hold, as they are a large part of the curvature.
        loss: Mean loss.
        grad_norm: 2-norm of the gradient of the mean loss, without what a pool that is a part of the set adds to it.
        loss_quantiles: Loss of an example below which 5, 25, 50, 75 and 95 % of the pool lie.
        hardest: Places in the data set of the examples with the largest losses, the largest first.
    """

    examples: int
    pool_examples: int
    sampled_examples: int
    certain_examples: int
    loss: Estimate
    grad_norm: Estimate
    loss_quantiles: tuple[float, ...]
    hardest: tuple[int, ...]

    def __str__(self) -> str:
        """Return how the measured examples were drawn, in a sentence."""
        looked_at = "all" if self.pool_examples == self.examples else f"{self.pool_examples:,} of them"
        return (
            f"{self.sampled_examples:,} of {self.examples:,} examples, drawn by their curvature after forward passes "
            f"over {looked_at}; loss, gradient, traces, extreme eigenvalues and sharpness, with their intervals, are "
            "those of the training loss"
        )


@dataclass(frozen=True)
class Measurement:
    """The local geometry of the loss at one point of training.

    Attributes:
        step: Optimizer steps taken before the measurement; 0 outside a Trainer.
        epoch: Epochs trained before the measurement; `None` outside a Trainer.
        loss: Mean loss over the probe set, in eval mode.
        num_items: Items of that mean: examples, or labels other than -100.
        grad_norm: 2-norm of the gradient of `loss`.
        hessian: Trace, extreme eigenvalues and spectral density of `curvature`.
        blocks: Results by block of parameters, in the model's order.
        curvature: Which matrix `hessian` and `blocks` are about.
        quadratic_model: Second-order model of the loss along −g: gᵀHg, the best step, its predicted decrease.
        noise_scale: Items at which a mean gradient has as much noise as signal; `None` with fewer than 3 batches.
        optimizer_stability: Sharpness, its limit and the critical learning rate of the optimizer; `None` without an
            optimizer whose state can be read.
        landscape: Slices through the loss; `None` unless `landscape` asks for them.
        multitask: Results by task and by pair of tasks; `None` without `task_column`.
        engine: How Hessian-vector products were computed.
        attention: `"math"` where SDPA ran its twice differentiable kernel, `"eager"` where the model was switched,
            `"unchanged"` where no second derivative was needed.
        fallback: Why the engine or the attention is not the first choice; `None` if it is.
        central_difference_error: Relative error of central differences, the larger of that along a random vector and
            those along eigenvectors: against the exact product where there is one, else against half the step; `None`
            for exact engines. Kinks (ReLU) make it large.
        dtype: Precision of the products, for example `"float32"`.
        batch_size: Largest number of examples in one graph; smaller than configured where memory did not suffice.
        unused_embedding_parameters: Embedding parameters that no token of the probe set looks up. Their rows of the
            matrix are zero and were left out of the products.
        hvps: Hessian-vector products spent.
        seconds: Wall-clock time spent.
        self_check: Results of the self-check of the loss; `None` in older reports.
        eigenvalue_checks: Checks of λ_max and λ_min by differences of the gradient along their eigenvectors.
        population: The training set that the examples were drawn from; `None` where the batches were given.
        batch_sharpness: Curvature of batches of one optimizer step along their own gradients, as trained; `None`
            unless `batch_sharpness` asks for it.
        batch_sharpness_failure: Why there is none, where it was asked for.

    Example:
        >>> import torch
        >>> from hf_optimizability import measure
        >>> model, batch = torch.nn.Linear(2, 1, bias=False), (torch.diag(torch.tensor([1.0, 3.0])), torch.ones(2, 1))
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> print(measure(model, [batch], loss_fn=loss_fn))
        Of the mean loss over these 2 items; in parentheses: 95 % intervals.
        <BLANKLINE>
        Loss                  1.000
        Gradient norm ‖g‖     3.162
        Hessian trace         10.000
        λ_max                 9.0000
        λ_min                 1.0000
        Gradient noise scale  –
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
    fallback: Reason | None
    central_difference_error: float | None
    dtype: str
    batch_size: int
    unused_embedding_parameters: int
    hvps: int
    seconds: float
    self_check: SelfCheck | None = None
    eigenvalue_checks: tuple[EigenvalueCheck, ...] = ()
    population: PopulationMeasurement | None = None
    batch_sharpness: BatchSharpness | None = None
    batch_sharpness_failure: Reason | None = None

    def __str__(self) -> str:
        """Return the main numbers with their 95 % intervals, and what they are about."""
        about, whole = self.subject, self.population
        if whole is not None:
            about += f", measured on {whole.sampled_examples:,} of them"
        rows = {
            "Loss": formatted(self.loss if whole is None else whole.loss),
            "Gradient norm ‖g‖": formatted(self.grad_norm if whole is None else whole.grad_norm, nonnegative=True),
            "Hessian trace": formatted(self.hessian.trace),
            "λ_max": formatted(self.hessian.lambda_max),
            "λ_min": formatted(self.hessian.lambda_min),
            "Gradient noise scale": formatted(self.noise_scale, nonnegative=True),
        }
        lines = [f"Of {about}; in parentheses: 95 % intervals.", ""]
        lines += [f"{label:<22}{text}" for label, text in rows.items()]
        return "\n".join(lines if self.converged else [*lines, "", NOT_CONVERGED_NOTE])

    @property
    def subject(self) -> str:
        """What the numbers are about."""
        if self.population is None:
            return f"the mean loss over these {self.num_items:,} items"
        pool, whole = self.population.pool_examples, self.population.examples
        if pool == whole:
            return f"the training loss over all {whole:,} examples"
        return f"the training loss, from a random {pool:,} of {whole:,} examples"

    @property
    def converged(self) -> bool:
        """Whether trace and eigenvalues reached their tolerances (traces of single blocks may not have)."""
        return self.hessian.converged

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that were trainable at the measurement."""
        return sum(block.parameters for block in self.blocks.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts."""
        return {**asdict(self), "converged": self.converged}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        """Rebuild a measurement from `to_dict`."""
        return structure(cls, {name: value for name, value in data.items() if name != "converged"})


@dataclass(frozen=True)
class MeasurementFailure:
    """A measurement that failed; training continued without it.

    Attributes:
        step: Optimizer steps taken before the attempt.
        epoch: Epochs trained before the attempt.
        why: The reason.
    """

    step: int
    epoch: float | None
    why: Reason

    @property
    def reason(self) -> str:
        """What went wrong. The log has the text of the error behind it."""
        return str(self.why)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts."""
        return {**asdict(self), "reason": self.reason, "remedy": self.remedy}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MeasurementFailure:
        """Rebuild a failure from `to_dict`; its words are those of this version."""
        return structure(cls, {name: data[name] for name in ("step", "epoch", "why")})

    @property
    def remedy(self) -> str:
        """What the user can do."""
        return self.why.remedy
