# SPDX-License-Identifier: Apache-2.0
"""The callback: measures while a Trainer trains, and writes the report at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..config import OptimizabilityConfig
from ..distributed.process_group import RankLostError, training_process_group
from ..distributed.supported import deepspeed_limits, require_supported
from ..distributed.tensors import class_name, is_sharded
from ..errors import ExplainedError, MeasurementError, MeasurementInterruptedError, UnmeasurableError
from ..files import back_up, require_writable
from ..linalg.communicator import ProcessGroup
from ..measurement.batch_sharpness_pass import not_measured
from ..measurement.measure import POOL_FAILURES, measure_objective, progress_bar, step_batches
from ..measurement.results import Measurement, MeasurementFailure, TaskMeasurement
from ..model_state.measuring import pretrained
from ..objective.objective import Objective
from ..objective.parameter_blocks import block_indices
from ..objective.pool import Pool
from ..objective.probe_set import ProbeSpec, dataset_of, draw_probe_set
from ..objective.step_batches import StepBatches
from ..quantities.preconditioner import unwrapped
from ..reasons import Reason
from ..redaction import redact_secrets
from ..report import OptimizabilityReport
from . import provenance
from .clock import Clock
from .history import merged_log, record, restore
from .log_entry import log_entry
from .loss_scale import explanation, loss_scale
from .probe_objective import ProbeObjective, trained_names
from .schedule import Schedule
from .stopping import StopRequests
from .tracker_log import TrackerLog, run_safely
from .trainer_loss import require_measurable_loss


if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)


@dataclass
class _Run:
    """One training.

    Attributes:
        model: The model as it is trained.
        optimizer: The optimizer, if its state can be read.
        group: Processes that train together.
        folder: Where the report goes.
        clock: Times training and measurements.
        accumulation: Batches of the loader in one step of the optimizer.
        schedule: When to measure.
        stops: Requests to stop.
        trackers: Where the numbers are logged.
        loss: The loss on the probe set; `None` if no probe set could be drawn.
        pool: The examples to draw from at each measurement; `None` if the probe set is measured on.
        steps: Batches of one optimizer step each, or why there are none; `None` if batch sharpness is not asked for.
        gap: Log entries of the generalization gap.
        ended: Whether training has ended.
    """

    model: nn.Module
    optimizer: Optimizer | None
    group: ProcessGroup
    folder: Path
    clock: Clock
    accumulation: int
    schedule: Schedule
    stops: StopRequests
    trackers: TrackerLog
    loss: ProbeObjective | None = None
    pool: Pool | None = None
    steps: StepBatches | Reason | None = None
    gap: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False

    def is_stopping(self, control: TrainerControl) -> bool:
        """Return whether training, on any rank, has been asked to stop; from now on, watch for requests."""
        self.stops.watch(control)
        return any(self.group.all_gather_interleaved([self.stops.pending()]))


class OptimizabilityCallback(TrainerCallback):
    """Measures gradient and curvature while a Trainer trains, and writes the optimizability report.

    Works in any `Trainer`. Without a `trainer` it measures the model's own loss; with one, it measures the Trainer's
    loss (label smoothing, `compute_loss_func`, an overridden `compute_loss`), and TensorBoard, W&B, Trackio and all
    other callbacks get its numbers by `on_log`.

    `state.log_history` stays the Trainer's own, entry by entry. `report.log_history` has an entry for each measurement
    as well, with its seconds: they are part of the Trainer's `train_runtime` (`OptimizabilityTrainer` subtracts them).

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

    def __init__(self, config: OptimizabilityConfig | None = None, *, trainer: Trainer | None = None):
        self.config = config or OptimizabilityConfig()
        self.report = OptimizabilityReport()
        self._trainer = trainer
        self._run: _Run | None = None  # from the start of training on
        if self.config.report_dir is not None:
            require_writable(Path(self.config.report_dir), "report_dir")

    @property
    def borrowed_seconds(self) -> float:
        """Seconds of the current, or last, training spent on measurements and on preparing them."""
        return 0.0 if self._run is None else self._run.clock.borrowed

    def set_trainer(self, trainer: Trainer) -> None:
        """Bind the callback to the Trainer whose loss it measures and through which it logs."""
        self._trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check the configuration, draw the probe set, and make the first measurement.

        A run that resumes from a checkpoint keeps what was measured before.

        Raises:
            ValueError: If the blocks, the task column, the number of probe examples or the report's folder can't work,
                or the model is distributed in an unsupported way.
        """
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        require_supported(model, args)
        if limits := deepspeed_limits(args):
            logger.warning_once(limits)
        if names := trained_names(model):  # with none, training itself fails
            block_indices(names, self.config)
        group = training_process_group(next(model.parameters()).device)
        history = restore(state, config=provenance.describe_config(self.config))
        clock = Clock(trained=history.train_seconds, measured=history.measured_seconds)
        run = _Run(
            model=model,
            optimizer=_supported_optimizer(kwargs["optimizer"]),
            group=group,
            folder=self.config.report_folder(args.output_dir),
            clock=clock,
            accumulation=args.gradient_accumulation_steps,
            schedule=Schedule(self.config, group=group, clock=clock),
            stops=StopRequests(args),
            trackers=TrackerLog(self._trainer),
        )
        with group.propagate_errors():
            if state.is_world_process_zero:
                _prepare_folder(run.folder, keep_report=bool(history.steps))
        self.report = self._new_report(model, dataset_of(loader))
        self.report.training = provenance.describe_training(args, kwargs["optimizer"], state.max_steps)
        self.report.measurements, self.report.failures = history.measurements, history.failures
        self._run = run
        run.stops.watch(control)
        self._draw(run, loader, state)
        if not history.steps or run.schedule.is_due_on_resuming(state):
            self._measure(run, args, state, control)
        run.clock.begin()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send the first measurement to the trackers: now all of them have begun."""
        if self._run is not None:
            self._run.trackers.flush()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move before the trackers at the Trainer's last log: training ends next, and they must not end first."""
        if self._run is not None and {"train_runtime", "train_loss"} <= kwargs["logs"].keys():
            self._run.trackers.put_first(self)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure every `measure_steps` steps, or when there is time for it."""
        run = self._run
        if run is None:
            return
        run.clock.step_ended()
        run.stops.step_ended(state, control)
        if run.schedule.is_due_after_step(state, measured=bool(self.report.measurements)):
            self._measure(run, args, state, control)
            run.clock.restart()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the evaluation: training may stop early because of it."""
        if self._run is not None and not self._run.ended:
            self._run.stops.evaluated(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure after each epoch, if that is the strategy."""
        if self._run is not None and self._run.schedule.is_due_after_epoch():
            self._measure(self._run, args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the final weights, add the training dynamics and write the whole report.

        Where training was asked to stop, only what is there is written: the exit does not wait.
        """
        run = self._run
        if run is None:
            return
        run.ended = True
        run.trackers.train_ended()
        run.stops.train_ended(state)
        if run.is_stopping(control):
            self._measure(run, args, state, control)
            return
        best_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        step = state.best_global_step if best_loaded else state.global_step
        self._measure(run, args, state, control, step=step)
        if self._trainer is not None:
            with run.clock.paused():
                action = partial(self._measure_gap, run, self._trainer, step)
                gap = run_safely("measuring the generalization gap", action)
            if gap:
                run.gap = [{**gap, "epoch": state.epoch, "step": step}]
                run.trackers.send(gap, state)
        if state.is_world_process_zero:
            run_safely("writing the report", partial(self._write_whole_report, run, state))

    def _new_report(self, model: nn.Module, train_dataset: Dataset | None) -> OptimizabilityReport:
        trainer = self._trainer
        eval_dataset = None if trainer is None or isinstance(trainer.eval_dataset, dict) else trainer.eval_dataset
        return provenance.new_report(model, train_dataset, eval_dataset, own_loss=trainer is None, config=self.config)

    def _draw(self, run: _Run, loader: DataLoader, state: TrainerState) -> None:
        """Draw the probe set and check the loss on it; failure is a warning and a recorded failure.

        Raises:
            ValueError: If the configuration asks for examples or a column that the data set does not have.
        """
        trainer = self._trainer
        try:
            if trainer is not None:
                require_measurable_loss(trainer)
            run.loss = ProbeObjective(
                run.model,
                draw_probe_set(
                    loader,
                    ProbeSpec.from_config(self.config, group=run.group),
                    rows=dataset_of(loader) if trainer is None else trainer.train_dataset,
                ),
                trainer=trainer,
                seed=self.config.probe_seed,
                group=run.group,
                report=self.report,
                should_stop=run.stops.pending,
            )
            objective = run.loss.current()  # raises no ValueError
            self._make_pool(run, loader)
            run.steps = self._new_steps(run, loader)
        except (ValueError, RankLostError):
            raise
        except Exception as error:
            run.clock.measured.append(0.0)
            self._record_failure(run, error, state.global_step, state)
            return
        if trainer is not None:
            run_safely("checking the scale of the loss", partial(self._find_loss_scale, run, trainer, objective))

    @property
    def _probe_examples(self) -> int | None:
        return None if self.report.data.probe is None else self.report.data.probe.examples

    def _make_pool(self, run: _Run, loader: DataLoader) -> None:
        """Choose the examples to draw from at each measurement, unless the probe set holds all of them."""
        if not self.config.pool_size:
            return
        try:
            pool = Pool(loader, examples=self.config.pool_size, seed=self.config.probe_seed)
            if pool.total == self._probe_examples:
                return
            if run.group.world_size > 1 or is_sharded(run.model):
                raise UnmeasurableError("pool_processes")
        except UnmeasurableError as error:
            self._do_without_pool(run, error)
        else:
            run.pool = pool

    def _do_without_pool(self, run: _Run, error: ExplainedError) -> None:
        """Measure on the probe set from now on, and say why."""
        run.pool = None
        self.report.data = replace(self.report.data, no_pool=error.why)
        logger.warning_once(
            f"The numbers are about the {self._probe_examples} examples that are measured, not "
            f"about the whole training set. {error.why}"
        )

    def _new_steps(self, run: _Run, loader: DataLoader) -> StepBatches | Reason | None:
        """Return batches of one optimizer step each, if batch sharpness is asked for; or why there are none."""
        if not self.config.batch_sharpness:
            return None
        if run.group.world_size > 1 or is_sharded(run.model):
            return not_measured(UnmeasurableError("several_processes"))
        return step_batches(loader, self.config, parts=run.accumulation)

    def _find_loss_scale(self, run: _Run, trainer: Trainer, objective: Objective) -> None:
        """Record by what factor the Trainer's loss differs from the mean, and warn once."""
        factor = loss_scale(trainer, objective.unsharded().batches[0], seed=self.config.probe_seed)
        self.report.training["loss_scale"] = factor
        if factor != 1:
            logger.warning_once(explanation(class_name(pretrained(run.model) or run.model), factor))

    def _measure(
        self,
        run: _Run,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        step: int | None = None,
    ) -> None:
        """Make, record and log one measurement; whatever goes wrong becomes a warning and a recorded failure.

        Args:
            run: The training.
            args: The Trainer's arguments.
            state: The Trainer's state.
            control: The Trainer's control.
            step: The step whose weights the model has; by default the last one. A step is measured once.
        """
        step = state.global_step if step is None else step
        tried = [m.step for m in self.report.measurements] + [f.step for f in self.report.failures]
        if run.loss is None or step in tried:
            return
        hidden = args.disable_tqdm or not state.is_world_process_zero
        try:
            with run.clock.paused(), progress_bar(self.config, disable=hidden) as bar:
                if run.is_stopping(control):
                    raise MeasurementInterruptedError
                measurement, run.loss.objective = self._measured(
                    run, run.loss.current(), step=step, epoch=state.epoch, on_products=bar.update
                )
        except RankLostError:
            raise
        except Exception as error:
            run.stops.seen |= isinstance(error, MeasurementInterruptedError)  # on whichever rank it was
            self._record_failure(run, error, step, state)
        else:
            self.report.measurements.append(measurement)
            self._record(run, measurement, state)
            run.trackers.send(log_entry(measurement), state)
        if state.is_world_process_zero:
            run_safely("writing the report", partial(self._write_numbers, run))

    def _measured(
        self,
        run: _Run,
        objective: Objective,
        *,
        step: int,
        epoch: float | None,
        on_products: Callable[[int], object],
    ) -> tuple[Measurement, Objective]:
        """Measure on examples drawn from the pool; where that can't be, on the probe set, from then on."""
        measured = partial(
            measure_objective,
            objective,
            self.config,
            optimizer=run.optimizer,
            step=step,
            epoch=epoch,
            on_products=on_products,
            steps=run.steps,
        )
        try:
            return measured(pool=run.pool)
        except MeasurementError as error:
            if run.pool is None or error.why.code not in POOL_FAILURES:
                raise
            self._do_without_pool(run, error)
            return measured()

    def _record_failure(self, run: _Run, error: Exception, step: int, state: TrainerState) -> None:
        explained = error if isinstance(error, ExplainedError) else MeasurementError("unexpected", error=error)
        failure = MeasurementFailure(step=step, epoch=state.epoch, why=explained.why)
        if failure.why not in [earlier.why for earlier in self.report.failures]:  # warn once per reason
            continues = "" if isinstance(error, MeasurementInterruptedError) else " Training continues."
            reason = redact_secrets(str(explained))
            logger.warning(f"No optimizability measurement at step {step}. {reason}{continues}")
        self.report.failures.append(failure)
        self._record(run, failure, state)

    def _record(self, run: _Run, result: Measurement | MeasurementFailure, state: TrainerState) -> None:
        """Add a result to the next checkpoint; at the end none follows, and the state is left as training left it."""
        if not run.ended:
            record(state, result, config=self.report.config, clock=run.clock)

    def _measure_gap(self, run: _Run, trainer: Trainer, step: int | None) -> dict[str, float]:
        from .train_eval_gap import measure_gap, measure_task_gaps

        with run.group.propagate_errors():
            if gaps := measure_task_gaps(trainer, self._tasks_at(step), self.config, group=run.group):
                return gaps
            objective = None if run.loss is None else run.loss.objective
            unit = "items" if objective is None else objective.unit
            return measure_gap(trainer, self.config, group=run.group, unit=unit)

    def _tasks_at(self, step: int | None) -> Mapping[str, TaskMeasurement]:
        """Return the tasks as they were measured at a step; none if they were not."""
        multitask = next((m.multitask for m in self.report.measurements if m.step == step), None)
        return {} if multitask is None else multitask.tasks

    def _write_numbers(self, run: _Run) -> None:
        self.report.created = provenance.timestamp()
        self.report.save_json(run.folder)

    def _write_whole_report(self, run: _Run, state: TrainerState) -> None:
        """Add the log and the training dynamics, and write all files."""
        from ..dynamics import compute_dynamics

        report = self.report
        entries = [{**log_entry(m), "epoch": m.epoch, "step": m.step} for m in report.measurements]
        report.log_history = merged_log(state.log_history, [*entries, *run.gap])
        multitask = report.measurements[-1].multitask if report.measurements else None
        tasks = [] if multitask is None else list(multitask.tasks)
        report.dynamics = compute_dynamics(report.log_history, tasks=tasks, seed=self.config.probe_seed)
        report.training["overhead"] = run.clock.overhead
        report.created = provenance.timestamp()
        report.save(run.folder)
        logger.warning(f"{report.verdict} The page: {run.folder / 'report.html'}")


def _prepare_folder(folder: Path, *, keep_report: bool) -> None:
    """Check that the report can be written, and rename that of an earlier run."""
    require_writable(folder, "report_dir")
    if not keep_report and (earlier := back_up(folder / "report.json")):
        logger.info(f"The report of an earlier run is now {earlier}.")


def _supported_optimizer(optimizer: Optimizer) -> Optimizer | None:
    """Return the optimizer, if its state can be read."""
    try:
        return unwrapped(optimizer)
    except TypeError as error:
        logger.info(f"Optimizer stability is not measured. {error}")
        return None
