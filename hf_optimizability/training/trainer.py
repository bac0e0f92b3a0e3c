# SPDX-License-Identifier: Apache-2.0
"""A Trainer that measures as it trains, and a mixin for any other Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from ..config import OptimizabilityConfig
from ..distributed.tensors import norms_over_ranks
from ..log_keys import PREFIX
from ..objective.objective import trainable_parameters
from ..objective.parameter_blocks import block_indices
from ..publishing.hub import add_to_model_folder
from ..publishing.hub_client import HubError, explained
from ..redaction import redact_secrets
from ..report import OptimizabilityReport
from .callback import OptimizabilityCallback


if TYPE_CHECKING:
    import datasets
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import Dataset
    from transformers import (
        BaseImageProcessor,
        DataCollator,
        EvalPrediction,
        FeatureExtractionMixin,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
        TrainingArguments,
    )

    _Base = Trainer
else:
    _Base = object

logger = logging.get_logger(__name__)


class OptimizabilityTrainerMixin(_Base):
    """Adds measurements and the optimizability report to a Trainer class; put it before that class.

    Besides what [`OptimizabilityCallback`] does, it logs the gradient norm of each block with each training loss, as
    `optimizability/train_grad_norm/<block>`: of the training batch, summed over accumulation steps, before clipping.
    They are computed at the steps given by `logging_strategy`; a loss that a callback logs at other steps has none.

    Args:
        optimizability: What to measure and when.

    Raises:
        ValueError: If the configuration's blocks or folder can't work.

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
        self._trained_names: list[str] = []
        self._train_grad_norms: dict[str, Tensor] = {}
        if any(parameter.requires_grad for parameter in cast(nn.Module, self.model).parameters()):
            self._block_names()  # else it can't be trained, but evaluated

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        above = next(base for base in cls.__mro__ if "__init__" in vars(base))
        if above is OptimizabilityTrainerMixin:
            cls.__init__ = _constructor(cls)  # type: ignore[method-assign]

    def optimizability_report(self) -> OptimizabilityReport:
        """Return the report so far; it is complete after `train()`."""
        return self.optimizability_callback.report

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch; if that completes an optimizer step, compute the norms before clipping."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self._train_grad_norms = {}
            if self._is_logged():
                try:
                    self._train_grad_norms = self._grad_norms()
                except Exception as error:  # whatever it is, training matters more
                    reason = redact_secrets(f"{type(error).__name__}: {error}")
                    logger.warning_once(f"The gradient norms by block are not logged. {reason} Training continues.")
        return loss

    def _grad_norms(self) -> dict[str, Tensor]:
        """Return the current norm of each block's gradient, of blocks that have one."""
        parameters = dict(cast(nn.Module, self.model).named_parameters())
        gradients = {
            block: [grad for name in names if (grad := parameters[name].grad) is not None]
            for block, names in self._block_names().items()
        }
        return norms_over_ranks({block: grads for block, grads in gradients.items() if grads})

    def _is_logged(self) -> bool:
        """Return whether the current step will be logged, by the arguments: only then do norms cost any time."""
        step, args = self.state.global_step + 1, self.args
        if step == 1 and args.logging_first_step:
            return True
        if args.logging_strategy == "steps":
            return step % self.state.logging_steps == 0
        last = step == self.state.max_steps or self.accelerator.gradient_state.end_of_dataloader
        return args.logging_strategy == "epoch" and last

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does: times without those of measurements, training losses with the norms by block."""
        if self.is_in_train and (borrowed := self.optimizability_callback.borrowed_seconds):
            if {"train_runtime", "train_loss"} <= logs.keys():
                _subtract_time(borrowed, logs)
            start_time = None if start_time is None else start_time + borrowed
        if "loss" in logs:
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            norms = {name: float(norm) / scale for name, norm in self._train_grad_norms.items()}
            logs = {**logs, **{f"{PREFIX}train_grad_norm/{name}": norm for name, norm in norms.items()}}
        super().log(logs, *([] if start_time is None else [start_time]))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card as the Trainer does, with the report in it; the report's files go next to the model.

        `push_to_hub` uploads everything in `output_dir` in one commit.
        """
        super().create_model_card(*args, **kwargs)
        report, folder = self.optimizability_report(), Path(cast(str, self.args.output_dir))
        if not (report.created and self.is_world_process_zero()):
            return
        try:
            add_to_model_folder(report, folder, name=Path(self.args.hub_model_id or folder.resolve()).name)
        except Exception as error:
            reason = redact_secrets(f"{type(error).__name__}: {error}")
            logger.warning(f"The model card has no optimizability report. {reason}")

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the model as the Trainer does; if a push that comes with it fails, that is a warning."""
        try:
            super().save_model(*args, **kwargs)
        except HubError as error:
            logger.warning(str(error))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push model, card and report as the Trainer does.

        Raises:
            HubError: If that fails, with the reason and what to do. Nothing in `output_dir` is lost.
        """
        unchanged = f"The model and its report are in {self.args.output_dir}."
        with explained("pushing the model", unchanged=unchanged, token=kwargs.get("token") or self.args.hub_token):
            return super().push_to_hub(*args, **kwargs)

    def _block_names(self) -> dict[str, list[str]]:
        """Return the names of the parameters that are trained now by block: they may change, as may the model."""
        names = list(trainable_parameters(cast(nn.Module, self.model)))
        if names != self._trained_names:
            blocks = block_indices(names, self.optimizability_callback.config)
            self._blocks = {block: [names[index] for index in indices] for block, indices in blocks.items()}
            self._trained_names = names
        return self._blocks


def _constructor(cls: type[OptimizabilityTrainerMixin]) -> Callable[..., None]:
    """Return an `__init__` with the signature of the class after the mixin, plus `optimizability`."""
    following = cls.__mro__[cls.__mro__.index(OptimizabilityTrainerMixin) + 1 :]
    base = next(other for other in following if "__init__" in vars(other))
    signature = inspect.signature(base.__init__)  # type: ignore[misc]
    parameters = list(signature.parameters.values())
    added = inspect.signature(OptimizabilityTrainerMixin.__init__).parameters["optimizability"]
    last = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)

    def construct(self: OptimizabilityTrainerMixin, *args: Any, **kwargs: Any) -> None:
        super(cls, self).__init__(*args, **kwargs)

    construct.__name__, construct.__qualname__ = "__init__", f"{cls.__qualname__}.__init__"
    construct.__signature__ = signature.replace(parameters=[*parameters[:last], added, *parameters[last:]])  # type: ignore[attr-defined]
    return construct


def _subtract_time(seconds: float, logs: dict[str, float]) -> None:
    """Subtract seconds from the run time that the Trainer logs at the end, and that `train()` returns as well."""
    runtime = logs["train_runtime"]
    trained = max(runtime - seconds, 1e-4)  # to which the Trainer rounds
    logs["train_runtime"] = round(trained, 4)
    for name in logs:
        if name.startswith("train_") and name.endswith("_per_second"):
            logs[name] = round(logs[name] * runtime / trained, 3)


class OptimizabilityTrainer(OptimizabilityTrainerMixin, Trainer):
    """A [`~transformers.Trainer`] that measures as it trains, with one further argument, `optimizability`.

    Example:
        >>> from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
        >>> def fine_tune(model, args, train_dataset):
        ...     config = OptimizabilityConfig(profile="light")
        ...     trainer = OptimizabilityTrainer(model, args, train_dataset=train_dataset, optimizability=config)
        ...     trainer.train()
        ...     return trainer.optimizability_report()
    """

    if TYPE_CHECKING:  # for editors and type checkers; `inspect.signature` says the same

        def __init__(
            self,
            model: PreTrainedModel | nn.Module | None = None,
            args: TrainingArguments | None = None,
            data_collator: DataCollator | None = None,
            train_dataset: Dataset[Any] | datasets.Dataset | None = None,
            eval_dataset: Dataset[Any] | dict[str, Dataset[Any]] | datasets.Dataset | None = None,
            processing_class: PreTrainedTokenizerBase
            | BaseImageProcessor
            | FeatureExtractionMixin
            | ProcessorMixin
            | None = None,
            model_init: Callable[..., PreTrainedModel] | None = None,
            compute_loss_func: Callable[..., Any] | None = None,
            compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
            callbacks: list[TrainerCallback] | None = None,
            optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
            optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
            preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
            *,
            optimizability: OptimizabilityConfig | None = None,
        ) -> None: ...
