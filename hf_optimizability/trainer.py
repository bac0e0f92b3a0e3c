# SPDX-License-Identifier: Apache-2.0
"""A Trainer that measures as it trains, and the mixin that makes one of any Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from .callback import OptimizabilityCallback
from .configuration import OptimizabilityConfig
from .fsdp import norms_over_ranks
from .hub import HubError, add_to_model_folder, explained
from .measure import block_indices
from .measurement import PREFIX
from .objective import trainable_parameters
from .privacy import without_secrets
from .report import OptimizabilityReport
from .report.markdown import CARD_FOLDER


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.get_logger(__name__)


class OptimizabilityTrainerMixin(_Base):
    """Adds measurements and the optimizability report to a Trainer class; put it before that class.

    Besides what [`OptimizabilityCallback`] does, it logs the gradient norm of each block beside each training loss, as
    `optimizability/train_grad_norm/<block>`: of the training batch, summed over accumulation steps, before clipping.
    They are taken at the steps that `logging_strategy` names; a loss that a callback has logged besides is without.

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
            self._train_grad_norms = {}
        if self.accelerator.sync_gradients and self._is_logged():
            gradients = {
                block: [p.grad for p in map(cast(nn.Module, self.model).get_parameter, names) if p.grad is not None]
                for block, names in self._block_names().items()
            }
            self._train_grad_norms = norms_over_ranks({block: held for block, held in gradients.items() if held})
        return loss

    def _is_logged(self) -> bool:
        """Whether the present step will be logged, as the arguments have it: only then do norms cost any time."""
        step, args = self.state.global_step + 1, self.args
        if step == 1 and args.logging_first_step:
            return True
        if args.logging_strategy == "steps":
            return step % self.state.logging_steps == 0
        ends = step == self.state.max_steps or self.accelerator.gradient_state.end_of_dataloader
        return args.logging_strategy == "epoch" and ends

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs; the gradient norms by block join the training loss."""
        if "loss" in logs:
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            norms = {name: float(norm) / scale for name, norm in self._train_grad_norms.items()}
            logs = {**logs, **{f"{PREFIX}train_grad_norm/{name}": norm for name, norm in norms.items()}}
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card as the Trainer does, and puts the report into it; its files go beside the model.

        What lies in `output_dir` goes up with `push_to_hub`, in one commit.
        """
        super().create_model_card(*args, **kwargs)
        report, folder = self.optimizability_report(), Path(cast(str, self.args.output_dir))
        if not (report.created and self.is_world_process_zero()):
            return
        try:
            add_to_model_folder(
                report,
                folder,
                report_folder=Path(self.optimizability_callback.config.report_dir or folder / CARD_FOLDER),
                name=Path(self.args.hub_model_id or folder.resolve()).name,
            )
        except Exception as error:
            reason = without_secrets(f"{type(error).__name__}: {error}")
            logger.warning(f"The model card goes without the optimizability report. {reason}")

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Saves the model as the Trainer does; if a push that goes with it fails, that is a warning."""
        try:
            super().save_model(*args, **kwargs)
        except HubError as error:
            logger.warning(str(error))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Pushes model, card and report as the Trainer does.

        Raises:
            HubError: If that fails: why, and what to do. Nothing in `output_dir` is lost.
        """
        kept = f"The model and its report are in {self.args.output_dir}."
        with explained("pushing the model", kept=kept, token=kwargs.get("token") or self.args.hub_token):
            return super().push_to_hub(*args, **kwargs)

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
