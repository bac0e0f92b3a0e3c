# SPDX-License-Identifier: Apache-2.0
"""What one measurement found, or why it found nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .curvature.estimates import Estimate, HessianEstimates


PREFIX = "optimizability/"
"""Before every key that is logged, so that none collides with the Trainer's."""


class MeasurementError(RuntimeError):
    """A measurement that can't be made, with the reason and what to do about it.

    Attributes:
        reason: What went wrong.
        remedy: What the user can do.
    """

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason} {remedy}")
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class BlockMeasurement:
    """One block of parameters (the embeddings, a layer, the head).

    Attributes:
        parameters: Number of trainable parameters in the block.
        grad_norm: 2-norm of the block's gradient.
        weight_norm: 2-norm of the block's parameters.
        trace: Trace of the block's diagonal block of the Hessian.
    """

    parameters: int
    grad_norm: float
    weight_norm: float
    trace: Estimate


@dataclass(frozen=True)
class Measurement:
    """The local geometry of the loss at one point of training.

    Attributes:
        step: Optimizer steps taken before the measurement; 0 outside a Trainer.
        epoch: Epochs trained before the measurement; `None` outside a Trainer.
        loss: Mean loss over the probe set, in eval mode.
        items: What the mean is over: examples, or labels other than -100.
        grad_norm: 2-norm of the gradient of `loss`.
        hessian: Trace and extreme eigenvalues.
        blocks: The same by block, in the model's order.
        engine: How the Hessian was multiplied with vectors.
        attention: `"math"` where SDPA ran its twice differentiable kernel, `"eager"` where the model was switched,
            `"unchanged"` where no second derivative was needed.
        fallback: Why the engine or the attention is not the first choice; `None` if it is.
        engine_error: Relative error of one product by central differences: against the exact product where that can be
            had, else against half the step; `None` from exact engines. Kinks (ReLU) make it large.
        dtype: Precision of the products, for example `"float32"`.
        hvps: Hessian-vector products spent.
        seconds: Wall-clock time spent.
    """

    step: int
    epoch: float | None
    loss: float
    items: int
    grad_norm: float
    hessian: HessianEstimates
    blocks: Mapping[str, BlockMeasurement]
    engine: str
    attention: str
    fallback: str | None
    engine_error: float | None
    dtype: str
    hvps: int
    seconds: float

    @property
    def converged(self) -> bool:
        """Whether trace and eigenvalues reached their tolerances (traces of single blocks may be wider)."""
        return self.hessian.converged

    def to_dict(self) -> dict[str, Any]:
        """The measurement as plain numbers, strings, lists and dicts."""
        return {**asdict(self), "converged": self.converged}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        """Rebuilds a measurement from `to_dict`."""
        fields = {key: value for key, value in data.items() if key != "converged"}
        blocks = {
            name: BlockMeasurement(**{**block, "trace": Estimate.from_dict(block["trace"])})
            for name, block in data["blocks"].items()
        }
        return cls(**{**fields, "hessian": HessianEstimates.from_dict(data["hessian"]), "blocks": blocks})


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
