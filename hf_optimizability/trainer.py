# SPDX-License-Identifier: Apache-2.0
"""A Trainer that measures as it trains, and the mixin that makes one of any Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import Trainer

from .callback import OptimizabilityCallback
from .configuration import OptimizabilityConfig
from .fsdp import norms_over_ranks
from .measure import block_indices
from .measurement import PREFIX
from .objective import trainable_parameters
from .report import OptimizabilityReport


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class OptimizabilityTrainerMixin(_Base):
    """Adds measurements and the optimizability report to a Trainer class; put it before that class.

    Besides what [`OptimizabilityCallback`] does, it logs the gradient norm of each block beside each training loss, as
    `optimizability/train_grad_norm/<block>`: of the training batch, summed over accumulation steps, before clipping.

    Args:
        optimizability: What to measure and when.

    Raises:
        ValueError: If the model has no trainable parameter, or the configuration's blocks or folder can't work.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> from hf_optimizability import OptimizabilityTrainerMixin
        >>> class OptimizabilitySeq2SeqTrainer(OptimizabilityTrainerMixin, Seq2SeqTrainer):
        ...     pass
    """

    def __init__(self, *args: Any, optimizability: OptimizabilityConfig | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.optimizability_callback = OptimizabilityCallback(optimizability, trainer=self)
        self.add_callback(self.optimizability_callback)
        self._blocks: dict[str, list[str]] = {}
        self._blocks_model: nn.Module | None = None
        self._train_grad_norms: dict[str, Tensor] = {}
        self._block_names()

    def optimizability_report(self) -> OptimizabilityReport:
        """The report so far; complete after `train()`."""
        return self.optimizability_callback.report

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Trains on one batch; where that completes an optimizer step, takes the norms before they are clipped."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            gradients = {
                block: [p.grad for p in map(cast(nn.Module, self.model).get_parameter, names) if p.grad is not None]
                for block, names in self._block_names().items()
            }
            self._train_grad_norms = norms_over_ranks({block: held for block, held in gradients.items() if held})
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs; the gradient norms by block join the training loss."""
        if "loss" in logs:
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            norms = {name: float(norm) / scale for name, norm in self._train_grad_norms.items()}
            logs = {**logs, **{f"{PREFIX}train_grad_norm/{name}": norm for name, norm in norms.items()}}
        super().log(logs, *args, **kwargs)

    def _block_names(self) -> dict[str, list[str]]:
        """Names of the trainable parameters by block, of the model that the Trainer has now (see `model_init`)."""
        if self._blocks_model is not self.model:
            names = list(trainable_parameters(cast(nn.Module, self.model)))
            blocks = block_indices(names, self.optimizability_callback.config)
            self._blocks = {block: [names[index] for index in indices] for block, indices in blocks.items()}
            self._blocks_model = self.model
        return self._blocks


class OptimizabilityTrainer(OptimizabilityTrainerMixin, Trainer):
    """A [`~transformers.Trainer`] that measures as it trains; `optimizability` is its one further argument.

    Example:
        >>> from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
        >>> def fine_tune(model, args, train_dataset):
        ...     config = OptimizabilityConfig(profile="light")
        ...     trainer = OptimizabilityTrainer(model, args, train_dataset=train_dataset, optimizability=config)
        ...     trainer.train()
        ...     return trainer.optimizability_report()
    """
