# SPDX-License-Identifier: Apache-2.0
"""The callback: when to measure, what to log, and the report at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..config import OptimizabilityConfig
from ..distributed.fsdp import class_name
from ..distributed.process_group import RankLostError, training_process_group
from ..distributed.supported import deepspeed_limits, require_supported
from ..errors import MeasurementError, MeasurementInterruptedError
from ..files import keep_aside, require_writable
from ..linalg.communicator import ProcessGroup
from ..log_keys import PREFIX
from ..measurement.measure import measure_objective, progress_bar
from ..measurement.out_of_memory import out_of_memory
from ..measurement.results import Measurement, MeasurementFailure, MultitaskMeasurement, TaskMeasurement
from ..model_state.measuring import pretrained
from ..objective.objective import Objective
from ..objective.parameter_blocks import block_indices
from ..objective.probe_set import ProbeSet, ProbeSpec, dataset_of, draw_probe_set, tensors_in
from ..quantities.preconditioner import unwrapped
from ..redaction import anonymous, in_strings, without_secrets
from ..report import OptimizabilityReport
from . import provenance
from .clock import Clock
from .history import merged_log, record, restore
from .loss_scale import explanation, loss_scale
from .schedule import affordable
from .stopping import StopRequests
from .trainer_loss import require_measurable_loss, trainer_loss


if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)

MAX_SCHEDULING_POLLS = 100
"""How often in a run several processes settle whether there is time to measure: each time takes a message."""


class OptimizabilityCallback(TrainerCallback):
    """Measures gradient and curvature while a Trainer trains, and writes the optimizability report.

    Works in any `Trainer`. Without a `trainer` it measures the model's own loss; with one, it measures the Trainer's
    loss (label smoothing, `compute_loss_func`, an overridden `compute_loss`), and TensorBoard, W&B, Trackio and all
    other callbacks get its numbers by `on_log`.

    `state.log_history` stays the Trainer's own, entry by entry. `report.log_history` has an entry for each measurement
    as well, with its seconds: they are part of the Trainer's `train_runtime` (`OptimizabilityTrainer` takes them out).

    Args:
        config: What to measure and when.
        trainer: The Trainer this callback is added to; can be given later with `set_trainer`.

    Attributes:
        report: The report so far; complete after training.

    Example:
        >>> from hf_optimizability import OptimizabilityCallback, OptimizabilityConfig
        >>> callback = OptimizabilityCallback(OptimizabilityConfig(profile="light"))
        >>> callback.report.measurements  # Trainer(..., callbacks=[callback]).train() fills it
        []
    """

    _model: nn.Module  # all are set when training begins
    _group: ProcessGroup
    _probe_set: ProbeSet | None
    _objective: Objective | None
    _optimizer: Optimizer | None
    _folder: Path
    _stops: StopRequests
    _asked_to_stop: Callable[[], bool]

    def __init__(self, config: OptimizabilityConfig | None = None, *, trainer: Trainer | None = None):
        self.config = config or OptimizabilityConfig()
        self.report = OptimizabilityReport()
        self._trainer = trainer
        self._clock = Clock()
        self._trains = False
        self._in_order: list[TrainerCallback] | None = None
        if self.config.report_dir is not None:
            require_writable(Path(self.config.report_dir), "report_dir")

    @property
    def borrowed_seconds(self) -> float:
        """Seconds of the present, or last, training that went into measurements and what prepares them."""
        return self._clock.borrowed

    def set_trainer(self, trainer: Trainer) -> None:
        """Binds the callback to the Trainer whose loss it measures and through which it logs."""
        self._trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check the configuration, draw the probe set, and make the first measurement.

        A run that resumes from a checkpoint takes up what was measured before.

        Raises:
            ValueError: If the blocks, the task column, the number of probe examples or the report's folder can't work,
                or the model is spread over devices in a way that can't be measured under.
        """
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        require_supported(model, args)
        if limits := deepspeed_limits(args):
            logger.warning_once(limits)
        self._require_blocks(model)
        self._model, self._group = model, training_process_group(next(model.parameters()).device)
        history = restore(state, config=provenance.describe_config(self.config))
        self._pending: list[dict[str, float]] = []
        self._gap: list[dict[str, Any]] = []
        self._begun = self._ended = False
        self._clock = Clock(trained=history.train_seconds, measured=history.measured_seconds)
        self._folder = Path(self.config.report_dir or f"{args.output_dir}/optimizability")
        with self._group.propagate_errors():
            if state.is_world_process_zero:
                require_writable(self._folder, "report_dir")
                if not history.steps and (earlier := keep_aside(self._folder / "report.json")):
                    logger.info(f"The report of an earlier run is now {earlier}.")
        trainer, dataset = self._trainer, dataset_of(loader)
        eval_dataset = None if trainer is None or isinstance(trainer.eval_dataset, dict) else trainer.eval_dataset
        self._optimizer = _supported_optimizer(kwargs["optimizer"])
        self.report = OptimizabilityReport(
            model=provenance.describe_model(model),
            task=provenance.describe_task(model, own_loss=trainer is None),
            data=provenance.describe_data(dataset, eval_dataset),
            training=provenance.describe_training(args, kwargs["optimizer"], state.max_steps),
            config=provenance.describe_config(self.config),
            versions=provenance.library_versions(),
            measurements=history.measurements,
            failures=history.failures,
        )
        self._objective, self._probe_set = None, None
        self._stops = StopRequests(args)
        self._trains = True
        self._asked_to_stop = self._stops.during(control)
        self._draw(loader, dataset if trainer is None else trainer.train_dataset, state)
        if not history.steps or self._ends_an_epoch(state):
            self._measure(args, state, control)
        self._clock.begin()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send the first measurement to the trackers: now all of them have begun."""
        self._log_pending()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Come first at the end of training, which follows the Trainer's last log: before the trackers end."""
        last = {"train_runtime", "train_loss"} <= kwargs["logs"].keys()
        if self._trainer is not None and last:
            handler = self._trainer.callback_handler
            self._in_order = handler.callbacks
            # A new list: the handler is going through the present one.
            handler.callbacks = [self, *(callback for callback in self._in_order if callback is not self)]

    def _require_blocks(self, model: nn.Module) -> None:
        """Raise if `blocks` fits no trainable parameter; if there is none at all, that is for training to meet."""
        names = _trained(model)
        if names:
            block_indices(names, self.config)

    def _draw(self, loader: DataLoader, rows: Dataset | None, state: TrainerState) -> None:
        """Draw the probe set and try the loss on it; what can't be drawn is a warning and a recorded failure.

        Raises:
            ValueError: If the configuration asks for examples or a column that the data set does not have.
        """
        try:
            if self._trainer is not None:
                require_measurable_loss(self._trainer)
            spec = ProbeSpec.from_config(self.config, group=self._group)
            self._probe_set = draw_probe_set(loader, spec, rows=rows)
            objective = self._present_objective()  # raises no ValueError
        except (ValueError, RankLostError):
            raise
        except Exception as error:
            self._clock.measured.append(0.0)
            self._record_failure(error, state.global_step, state)
            return
        if self._trainer is not None:
            trainer = self._trainer
            self._run_safely("finding the scale of the loss", lambda: self._find_loss_scale(trainer, objective))

    def _present_objective(self) -> Objective:
        """Return the loss on the probe set, by the parameters that are trained now, once it is known to be one.

        Raises:
            MeasurementError: If the probe set can't be counted, or has no loss with a gradient.
        """
        if self._objective is not None and self._objective.names != _trained(self._model):  # frozen or unfrozen since
            self._objective = None
        if self._objective is None:
            assert self._probe_set is not None
            with self._group.propagate_errors():
                self._objective = self._tried_objective(self._probe_set.batches, self._probe_set.tasks)
        return self._objective

    def _tried_objective(self, batches: list[Any], tasks: list[str] | None) -> Objective:
        loss_fn = None if self._trainer is None else trainer_loss(self._trainer)
        try:
            objective = Objective(
                self._model,
                batches,
                loss_fn=loss_fn,
                tasks=tasks,
                seed=self.config.probe_seed,
                preserved=() if self._trainer is None else (self._trainer,),
                should_stop=lambda: self._asked_to_stop(),
            ).shard(self._group)
            self.report.data |= provenance.describe_probe_set(batches, self._model)
            self.report.model = provenance.describe_model(self._model)
            try:
                objective.check()
            except Exception as error:
                if not out_of_memory(error):  # for that, a measurement cuts the batches into smaller ones
                    raise
        except MeasurementInterruptedError:
            raise
        except Exception as error:
            raise _no_loss(error, batches, own_loss=loss_fn is None) from error
        return objective

    def _ends_an_epoch(self, state: TrainerState) -> bool:
        """Whether a checkpoint at the end of an epoch, from which a run goes on, was made before `on_epoch_end`."""
        return self.config.measure_strategy == "epoch" and state.epoch is not None and state.epoch % 1 == 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures every `measure_steps` steps, or when there is time for it."""
        self._clock.step_ended()
        self._stops.step_ended(state, control)
        if self._due(state):
            self._measure(args, state, control)
            self._clock.go_on()

    def _due(self, state: TrainerState) -> bool:
        if self.config.measure_strategy == "steps":
            return state.global_step % self.config.measure_steps == 0
        if self.config.measure_strategy != "auto" or not self.report.measurements:
            return False
        group = self._group
        if group.world_size > 1 and state.global_step % math.ceil(state.max_steps / MAX_SCHEDULING_POLLS):
            return False
        due = affordable(
            state.global_step,
            max_steps=state.max_steps,
            budget=self.config.overhead_budget,
            step_seconds=self._clock.step_seconds,
            measured_seconds=self._clock.measured,
        )
        return group.all_gather_interleaved([due])[0]  # by one clock

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the evaluation: training that stops early after one may take its time."""
        if self._trains:
            self._stops.evaluated(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures after each epoch."""
        if self.config.measure_strategy == "epoch":
            self._measure(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the final weights, add the training dynamics and write the whole report.

        Where training was asked to stop, only what is there is written: the exit does not wait.
        """
        self._trains, self._ended = False, True
        self._begun = self._in_order is not None  # else there was no last log, and the trackers may have ended
        if self._trainer is not None and self._in_order is not None:
            self._trainer.callback_handler.callbacks, self._in_order = self._in_order, None
            self._log_pending()
        self._stops.train_ended(state)
        if self._stopping(control):
            self._measure(args, state, control)
            return
        best_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        step = state.best_global_step if best_loaded else state.global_step
        self._measure(args, state, control, step=step)
        trainer = self._trainer
        if trainer is not None:
            from .train_eval_gap import measure_gap, measure_task_gaps

            group = self._group

            def measured_gap() -> dict[str, float]:
                with group.propagate_errors():
                    gaps = measure_task_gaps(trainer, self._tasks_at(step), self.config, group=group)
                    unit = "items" if self._objective is None else self._objective.unit
                    return gaps or measure_gap(trainer, self.config, group=group, unit=unit)

            with self._clock.paused():
                gap = self._run_safely("measuring the generalization gap", measured_gap)
            if gap:
                self._gap = [{**gap, "epoch": state.epoch, "step": step}]
                self._log(gap, state)
        if state.is_world_process_zero:
            self._run_safely("writing the report", lambda: self._finish(state))

    def _tasks_at(self, step: int | None) -> Mapping[str, TaskMeasurement]:
        """The tasks as they were measured at a step; none if they were not."""
        several = next((m.multitask for m in self.report.measurements if m.step == step), None)
        return {} if several is None else several.tasks

    def _measure(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, step: int | None = None
    ) -> None:
        """Makes, records and logs one measurement; whatever goes wrong becomes a warning and a recorded failure.

        Args:
            args: The Trainer's arguments.
            state: The Trainer's state.
            control: The Trainer's control.
            step: The step whose weights the model has; by default the last one. A step is measured once.
        """
        step = state.global_step if step is None else step
        if step in [m.step for m in self.report.measurements] + [f.step for f in self.report.failures]:
            return
        if self._probe_set is None:
            return
        hidden = args.disable_tqdm or not state.is_world_process_zero
        try:
            with self._clock.paused(), progress_bar(self.config, disable=hidden) as bar:
                if self._stopping(control):
                    raise MeasurementInterruptedError
                measurement, self._objective = measure_objective(
                    self._present_objective(),
                    self.config,
                    optimizer=self._optimizer,
                    step=step,
                    epoch=state.epoch,
                    on_products=bar.update,
                )
        except RankLostError:
            raise
        except Exception as error:
            self._stops.seen |= isinstance(error, MeasurementInterruptedError)  # on whichever rank it was
            self._record_failure(error, step, state)
        else:
            self.report.measurements.append(measurement)
            self._record(measurement, state)
            self._log(log_entry(measurement), state)
        if state.is_world_process_zero:
            self._run_safely("writing the report", lambda: self._set_timestamp().save_json(self._folder))

    def _stopping(self, control: TrainerControl) -> bool:
        """Return whether training, on any rank, has been asked to stop; from now on it may be."""
        self._asked_to_stop = self._stops.during(control)
        return any(self._group.all_gather_interleaved([self._asked_to_stop()]))

    def _record_failure(self, error: Exception, step: int, state: TrainerState) -> None:
        if isinstance(error, MeasurementError):
            reason, remedy = error.reason, error.remedy
        else:
            reason = f"{type(error).__name__}: {error}"
            remedy = "Try `hf_optimizability.measure` on the same model and batches to see the whole traceback."
        failure = MeasurementFailure(step=step, epoch=state.epoch, reason=anonymous(reason), remedy=remedy)
        if failure.reason not in [earlier.reason for earlier in self.report.failures]:  # once is enough to know
            reason = without_secrets(reason)
            continues = "" if isinstance(error, MeasurementInterruptedError) else " Training continues."
            logger.warning(f"No optimizability measurement at step {step}. {reason} {remedy}{continues}")
        self.report.failures.append(failure)
        self._record(failure, state)

    def _record(self, found: Measurement | MeasurementFailure, state: TrainerState) -> None:
        if not self._ended:  # no checkpoint follows, and the Trainer's state is left as training left it
            record(state, found, config=self.report.config, clock=self._clock)

    def _find_loss_scale(self, trainer: Trainer, objective: Objective) -> None:
        """Records by what factor the Trainer's loss is off the mean, and says so once."""
        factor = loss_scale(trainer, objective.unsharded().batches[0], seed=self.config.probe_seed)
        self.report.training["loss_scale"] = factor
        if factor != 1:
            logger.warning_once(explanation(class_name(pretrained(self._model) or self._model), factor))

    def _log(self, logs: dict[str, float], state: TrainerState) -> None:
        """Send numbers to the trackers; those measured before training begins once all have begun."""
        self._pending.append({**logs, "epoch": state.epoch})
        if self._begun:
            self._log_pending()

    def _log_pending(self) -> None:
        """Send what is pending by `on_log`, past `Trainer.log`.

        That is overridden to count and to clear metrics, and would leave an entry among the Trainer's own.
        """
        pending, self._pending, self._begun = self._pending, [], True
        trainer = self._trainer
        if trainer is not None:
            for logs in pending:
                self._run_safely("logging a measurement", partial(_tell_callbacks, trainer, logs))

    def _finish(self, state: TrainerState) -> None:
        from ..dynamics import compute_dynamics

        entries = [{**log_entry(m), "epoch": m.epoch, "step": m.step} for m in self.report.measurements]
        self.report.log_history = in_strings(merged_log(state.log_history, [*entries, *self._gap]), anonymous)
        last = self.report.measurements[-1].multitask if self.report.measurements else None
        tasks = [] if last is None else list(last.tasks)
        self.report.dynamics = compute_dynamics(self.report.log_history, tasks=tasks, seed=self.config.probe_seed)
        self.report.training["overhead"] = self._clock.overhead
        path = self._set_timestamp().save(self._folder)
        logger.info(f"Optimizability report: {path}")

    def _set_timestamp(self) -> OptimizabilityReport:
        self.report.created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return self.report

    def _run_safely(self, what: str, action: Callable[[], Any]) -> Any:
        """Runs what must not take the training down; a failure becomes a warning."""
        try:
            return action()
        except RankLostError:
            raise
        except Exception as error:
            reason = without_secrets(f"{type(error).__name__}: {error}")
            logger.warning(f"Failed at {what}: {reason}. Training continues.")


def _trained(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are trained now."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _no_loss(error: Exception, batches: list[Any], *, own_loss: bool) -> MeasurementError:
    """Return why there is no loss on the probe set, and what to do about it."""
    reason = str(error) if isinstance(error, (ValueError, MeasurementError)) else f"{type(error).__name__}: {error}"
    if not any(list(tensors_in(batch)) for batch in batches):
        return MeasurementError(
            f"The collator's batches hold no tensors, and there is no loss on them ({reason}): what the loss is "
            "computed from is made while training (completions, in GRPO and other online methods).",
            "Measure with `hf_optimizability.measure`, on batches as the loss takes them.",
        )
    if own_loss:
        return MeasurementError(
            f"The model gives no loss that can be measured: {reason}",
            "If the loss is the Trainer's (`compute_loss`, `compute_loss_func`), pass "
            "`OptimizabilityCallback(config, trainer=trainer)`, call its `set_trainer`, or put "
            "`OptimizabilityTrainerMixin` before the Trainer's class.",
        )
    return MeasurementError(
        f"The Trainer's loss can't be computed on the probe set: {reason}",
        "Check that `trainer.compute_loss(model, batch)` gives a scalar with a gradient in eval mode.",
    )


def _supported_optimizer(optimizer: Optimizer) -> Optimizer | None:
    """The optimizer, if its state can be read."""
    try:
        return unwrapped(optimizer)
    except TypeError as error:
        logger.info(f"How far the optimizer may step is not measured. {error}")
        return None


def _tell_callbacks(trainer: Trainer, logs: dict[str, float]) -> None:
    """Call `on_log` of all callbacks as if the Trainer had logged, with its log and its switches as before."""
    state, control = trainer.state, trainer.control
    switches = control.should_log, control.should_evaluate, control.should_save
    entry = {**logs, "step": state.global_step}
    state.log_history.append(entry)
    try:
        control = trainer.callback_handler.on_log(trainer.args, state, control, logs)
    finally:
        state.log_history[:] = [held for held in state.log_history if held is not entry]
        control.should_log, control.should_evaluate, control.should_save = switches
        trainer.control = control


def log_entry(measurement: Measurement) -> dict[str, float]:
    """The numbers of a measurement that go to the trackers."""
    hessian, step_size, noise = measurement.hessian, measurement.optimizer_stability, measurement.noise_scale
    numbers: dict[str, float | None] = {
        "loss": measurement.loss,
        "grad_norm": measurement.grad_norm,
        "hessian_trace": hessian.trace.value,
        "hessian_trace_std_error": hessian.trace.std_error,
        "hessian_trace_data_std_error": hessian.trace.data_std_error,
        "hessian_lambda_max": hessian.lambda_max.value,
        "hessian_lambda_max_residual": hessian.lambda_max.residual,
    }
    if hessian.lambda_min is not None:
        numbers["hessian_lambda_min"] = hessian.lambda_min.value
        numbers["hessian_lambda_min_residual"] = hessian.lambda_min.residual
    if hessian.density is not None:
        numbers["hessian_frobenius_norm"] = hessian.density.frobenius_norm.value
        numbers["hessian_effective_rank"] = hessian.density.effective_rank.value
        numbers["hessian_negative_mass"] = hessian.density.negative_mass.value
    if noise is not None:
        numbers["gradient_noise_scale"] = noise.value
    if step_size is not None:
        numbers["sharpness"] = step_size.sharpness.value
        numbers["sharpness_limit"] = step_size.limit
        numbers["critical_learning_rate"] = step_size.critical.value
    if measurement.multitask is not None:
        numbers |= _task_entry(measurement.multitask)
    numbers |= {"hvps": measurement.hvps, "seconds": measurement.seconds}
    return {PREFIX + name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}


def _task_entry(several: MultitaskMeasurement) -> dict[str, float | None]:
    """The numbers of each task, and of each pair."""
    numbers: dict[str, float | None] = {}
    for name, task in several.tasks.items():
        numbers |= {f"task/{name}/loss": task.loss.value, f"task/{name}/grad_norm": task.grad_norm}
        for key, estimate in (
            ("grad_share", task.share),
            ("hessian_trace", task.trace),
            ("hessian_lambda_max", task.lambda_max),
        ):
            if estimate is not None:
                numbers[f"task/{name}/{key}"] = estimate.value
    for pair in several.conflicts:
        if pair.cosine is not None:
            numbers[f"task_cosine/{pair.first}/{pair.second}"] = pair.cosine.value
    return numbers
