# SPDX-License-Identifier: Apache-2.0
"""Trains every candidate with every seed, round by round, and ranks them. What is done is kept, and not done again."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from ..config import OptimizabilityConfig
from ..files import finite, require_writable, write_atomically
from ..redaction import anonymize, redact_secrets
from ..report import OptimizabilityReport
from ..scoring.checkpoint import CheckpointScores
from ..serialization import structure
from ..training import provenance
from .arguments import ComparisonArguments
from .candidates import CHECKPOINT, Candidate, Flag, folder_name, parse_candidates
from .comparison import Comparison
from .results import SCREENED_BY, Entry, Failure, Round, Run, rank_entries


if TYPE_CHECKING:
    from ..tasks.fine_tuning import Task
    from .training import Inputs

logger = logging.get_logger(__name__)

SETTLED = (
    "max_steps", "num_train_epochs", "data_seed", "logging_strategy", "logging_steps", "logging_first_step",
    "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end",
    "resume_from_checkpoint", "push_to_hub", "report_dir", "measure_strategy", "measure_steps", "do_train", "do_eval",
)  # fmt: skip
"""Flags that a comparison settles itself."""

SHARED = (
    "dataset_name", "dataset_config_name", "train_file", "validation_file", "train_dir", "validation_dir",
    "train_split_name", "validation_split_name", "train_val_split", "label_column_name", "max_train_samples",
    "max_eval_samples", "seed", "output_dir",
)  # fmt: skip
"""Flags that must be the same for all candidates: their scores are compared example by example."""

_OF_THE_COMPARISON = tuple(field.name for field in fields(ComparisonArguments))

_WITHOUT_EFFECT = ("output_dir", "cache_dir", "token", "disable_tqdm", "dataloader_num_workers", "report_to")
"""Flags that change no result, so that what was trained with others is kept."""


def compare(
    candidates: Sequence[str | Mapping[str, Flag]] | Sequence[OptimizabilityReport],
    *,
    task: str | None = None,
    **flags: Any,
) -> Comparison:
    """Fine-tunes each candidate under one equal budget, and ranks them; or ranks reports that there already are.

    Killed and called again, it goes on where it was. A candidate that fails is reported, and the others finish.

    Args:
        candidates: Checkpoints (`"org/name"`), flags (`"learning_rate=1e-3,optim=sgd"`), both
            (`"org/name,method=lora"`) or mappings of flags; or reports, of one training each.
        task: `"text-classification"` or `"image-classification"`; by default what the first checkpoint that can be
            loaded was made for.
        flags: What all share, named as the flags of `hf-optimizability compare`: the budget (`budget_steps`,
            `budget_examples` or `budget_seconds`), `seeds`, the data, `TrainingArguments`, `OptimizabilityConfig`.

    Returns:
        The comparison, which is also in `output_dir` if anything was trained.

    Raises:
        ValueError: If a flag or a candidate can't work, before anything is trained.

    Example:
        >>> from hf_optimizability import OptimizabilityReport
        >>> log = [{"optimizability/eval_loss": 0.5, "optimizability/eval_loss_std_error": 0.02, "step": 9}]
        >>> better = [{"optimizability/eval_loss": 0.4, "optimizability/eval_loss_std_error": 0.02, "step": 9}]
        >>> reports = [OptimizabilityReport(model={"id": name}, log_history=held) for name, held in
        ...            {"org/a": log, "org/b": better}.items()]
        >>> comparison = compare(reports)
        >>> comparison.ranking.names, comparison.ranking.ranks
        (('org/b', 'org/a'), (1, 2))
    """
    reports = [one for one in candidates if isinstance(one, OptimizabilityReport)]
    if reports:
        if len(reports) < len(candidates) or flags or task:
            raise ValueError("Reports are compared as they are: pass nothing but two or more of them.")
        return compare_reports(reports)
    held = parse_candidates(one for one in candidates if not isinstance(one, OptimizabilityReport))
    return Comparing(held, task_name=task, values=flags).run()


def compare_reports(reports: Sequence[OptimizabilityReport]) -> Comparison:
    """Ranks reports by the loss on the evaluation set, with the error that each knows.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(reports) < 2:
        raise ValueError("There is nothing to compare: pass at least two reports.")
    named = parse_candidates({CHECKPOINT: str(report.model.get("id") or "a model")} for report in reports)
    entries = [
        Entry(candidate.name, runs=[Run(report.training.get("seed"), report)])
        for candidate, report in zip(named, reports, strict=True)
    ]
    first = reports[0]
    setting = {
        "task": first.task.get("task", ""),
        "dataset": first.data.get("dataset") or "",
        "budget": None,
        "seeds": [],
        "rank_by": "loss",
        "examples": None,
        "settings": {},
        "versions": first.versions,
    }
    return Comparison(setting, entries, [])


@dataclass(frozen=True)
class _Job:
    """A training to make: of which candidate, with which seed and how many steps, and where."""

    candidate: Candidate
    seed: int
    steps: int
    measured: bool
    folder: Path


class Comparing:
    """A comparison that is being made.

    Args:
        candidates: What is compared.
        task_name: The task; told from the checkpoints if it is `None`.
        values: Flags that all share, with their values.
        args: More of them, as they stand on a command line; they overrule `values`.

    Raises:
        ValueError: If a flag or a candidate can't work.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        *,
        task_name: str | None = None,
        values: Mapping[str, Any] | None = None,
        args: Sequence[str] = (),
    ):
        self.candidates = candidates
        self._values, self._args = dict(values or {}), list(args)
        self._require_flags_that_are_free()
        self.task = self._find_task(task_name)
        self._plain = {candidate.name: self._parsed(candidate, {}) for candidate in candidates}
        *_, training, self.arguments = self._plain[candidates[0].name]
        if training.world_size > 1:
            raise ValueError("A comparison trains in one process. Start it without torchrun or accelerate launch.")
        self.folder = Path(str(training.output_dir))
        self._first_seed: int = training.seed
        self._dataset = self._plain[candidates[0].name][1].public_name
        require_writable(self.folder, "output_dir")

    def run(self, *, on_run: Callable[[str], object] = logger.info) -> Comparison:
        """Makes every training that is not yet made, and writes the page.

        Args:
            on_run: Is told of each training that is done or has failed, in a line of text.
        """
        entries = [Entry(candidate.name, candidate.public_changes) for candidate in self.candidates]
        self._screen(entries, on_run)
        rounds = []
        for number in range(1, self.arguments.halving_rounds + 1):
            rounds.append(self._round(number, entries, on_run))
        comparison = Comparison(self._setting(entries), entries, rounds)
        comparison.save(self.folder)
        return comparison

    def _screen(self, entries: list[Entry], on_run: Callable[[str], object]) -> None:
        """Scores all candidates, and drops those that their score tells to be worse than enough others."""
        if self.arguments.screen_to is None:
            return
        from .screening import kept

        for entry, candidate in zip(entries, self.candidates, strict=True):
            entry.scores = self._scores(candidate)
            on_run(f"{entry.name}, before training: {entry.scores.result}")
        scores = {entry.name: entry.scores.of(SCREENED_BY) for entry in entries if entry.scores is not None}
        left = kept(scores, self.arguments.screen_to)
        for entry in entries:
            if entry.name not in left:
                entry.dropped = 0
                on_run(f"{entry.name} is not trained: its score tells it to be worse.")

    def _scores(self, candidate: Candidate) -> CheckpointScores:
        """The scores made before, of this candidate or of one with the same model and data; or makes them."""
        from .screening import score_inputs

        examples = self.arguments.screen_examples
        model, data, _, training, _ = self._plain[candidate.name]
        more = (examples, self._first_seed, training.label_smoothing_factor)
        file = self.folder / "scores" / f"{self._digest(candidate, [model, data], *more)}.json"
        held = structure(CheckpointScores, json.loads(file.read_bytes())) if file.exists() else None
        if held is None or (held.notes and self.arguments.retry_failures):
            try:
                held = score_inputs(self._inputs(candidate, {"output_dir": str(file.parent)}), examples=examples)
            except Exception as error:
                logger.debug("The scores failed.", exc_info=True)
                held = CheckpointScores(notes={SCREENED_BY: _reason(error)})
            write_atomically(file, json.dumps(finite(held.to_dict()), allow_nan=False).encode())
        return held

    def _round(self, number: int, entries: list[Entry], on_run: Callable[[str], object]) -> Round:
        """Trains all that are left with the budget of this round, and drops those that it tells to be worse."""
        budget = self.arguments.budget(number)
        left = [entry for entry in entries if entry.failure is None and entry.dropped is None]
        runs: dict[str, list[Run]] = {entry.name: [] for entry in left}
        for index in range(self.arguments.seeds):
            for entry in left:
                if entry.failure is not None:
                    continue
                candidate = next(one for one in self.candidates if one.name == entry.name)
                measured = index < self.arguments.measured_seeds
                found = self._attempt(candidate, self._first_seed + index, budget, measured)
                if isinstance(found, Failure):
                    entry.failure = found
                    on_run(f"{entry.name} failed with seed {found.seed}: {found.reason} The others go on.")
                else:
                    runs[entry.name].append(found)
                    on_run(f"{entry.name}, seed {found.seed}, budget {budget:g}: {found.result}")
        for entry in left:
            entry.runs = runs[entry.name]
        ranking = rank_entries(entries, self.arguments.rank_by)
        if ranking is None or number == self.arguments.halving_rounds:
            kept = tuple(entry.name for entry in left if entry.failure is None)
        else:
            kept = ranking.kept(math.ceil(len(ranking.names) / 2))
        for entry in left:
            if entry.failure is None and entry.name not in kept:
                entry.dropped = number
        return Round(budget, ranking, kept)

    def _attempt(self, candidate: Candidate, seed: int, budget: float, measured: bool) -> Run | Failure:
        """The run that was made before, or makes it; whatever goes wrong is a failure, and kept as one."""
        try:
            steps = self._steps(candidate, budget)
        except Exception as error:
            return Failure(seed, _reason(error))
        job = self._job(candidate, seed, steps, measured)
        file = job.folder / "run.json"
        held = json.loads(file.read_bytes()) if file.exists() else {}
        if not held or ("failure" in held and self.arguments.retry_failures):
            found = self._made(job)
            made = {"failure": asdict(found)} if isinstance(found, Failure) else {"run": found.to_dict()}
            write_atomically(file, json.dumps(finite(made), allow_nan=False).encode())
            shutil.rmtree(job.folder / "training", ignore_errors=True)
            held = json.loads(file.read_bytes())  # with the digits that a later call will find
        return structure(Failure, held["failure"]) if "failure" in held else structure(Run, held["run"])

    def _made(self, job: _Job) -> Run | Failure:
        from .training import train, training_flags

        try:
            flags = {
                "output_dir": str(job.folder / "training"),
                "report_dir": str(job.folder / "optimizability"),
                "measure_strategy": "steps",
                **training_flags(job.steps, job.seed),
            }
            inputs = self._inputs(job.candidate, flags)
            return train(inputs, measured=job.measured, save_seconds=self.arguments.save_seconds)
        except Exception as error:
            logger.debug("The training failed.", exc_info=True)
            return Failure(job.seed, _reason(error))

    def _steps(self, candidate: Candidate, budget: float) -> int:
        """The steps that a budget buys a candidate; for one in seconds, a few are timed and the answer is kept."""
        if self.arguments.unit == "steps":
            return int(budget)
        if self.arguments.unit == "examples":
            return max(1, math.ceil(budget / self._inputs(candidate, {}).examples_per_step))
        return max(1, math.floor(budget / self._step_seconds(candidate)))

    def _step_seconds(self, candidate: Candidate) -> float:
        from .training import TIMED_STEPS, step_seconds

        folder = self._folder_of(candidate)
        file = folder / "step.json"
        if not file.exists():
            flags = {"output_dir": str(folder / "timing"), "max_steps": TIMED_STEPS, "save_strategy": "no"}
            seconds = step_seconds(self._inputs(candidate, flags))
            write_atomically(file, json.dumps({"step_seconds": seconds}).encode())
            shutil.rmtree(folder / "timing", ignore_errors=True)
        return float(json.loads(file.read_bytes())["step_seconds"])

    def _job(self, candidate: Candidate, seed: int, steps: int, measured: bool) -> _Job:
        leaf = f"seed-{seed}-measured" if measured else f"seed-{seed}"
        return _Job(candidate, seed, steps, measured, self._folder_of(candidate) / f"steps-{steps}" / leaf)

    def _folder_of(self, candidate: Candidate) -> Path:
        """A folder that no training with other settings has."""
        *parts, _ = self._plain[candidate.name]
        return self.folder / "runs" / folder_name(candidate, self._digest(candidate, parts))

    def _digest(self, candidate: Candidate, parts: Sequence[Any], *more: float) -> str:
        """Tells the flags of a candidate that are in some of its dataclasses."""
        names = [*self._given(), *candidate.changes]
        settings = {
            field: value
            for part in parts
            for field, value in vars(part).items()
            if field in names and field not in _WITHOUT_EFFECT
        }
        text = json.dumps([self.task.NAME, settings, *more], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def _inputs(self, candidate: Candidate, flags: Mapping[str, Any]) -> Inputs:
        from .training import Inputs

        model, data, config, training, _ = self._parsed(candidate, flags)
        return Inputs(self.task, model, data, config, training, self._first_seed)

    def _parsed(self, candidate: Candidate, flags: Mapping[str, Any]) -> tuple[Any, ...]:
        """The dataclasses of one candidate: of model, data, measurement, training and comparison."""
        from ..tasks.fine_tuning import FlagParser, parse_arguments

        parser = FlagParser(_dataclasses(self.task))
        parser.set_defaults(output_dir="comparison", profile="light", disable_tqdm=True)
        more = [f"--{name}={value}" for name, value in flags.items()]
        try:
            return parse_arguments(parser, [*self._args, *candidate.flags, *more], values=self._values)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{candidate.name}: {error}" if candidate.changes else str(error)) from error

    def _find_task(self, name: str | None) -> Task:
        """The task of that name, or what the first checkpoint that can be loaded was made for."""
        from ..tasks.checkpoint import CheckpointArguments
        from ..tasks.fine_tuning import TASKS, FlagParser, made_for, parse_arguments

        if name is not None:
            found = [task for task in TASKS if name == task.NAME]
            if not found:
                raise ValueError(f"There is no task {name!r}; choose one of {', '.join(task.NAME for task in TASKS)}.")
            return found[0]
        problems = []
        for candidate in self.candidates:
            checkpoint_only: Any = CheckpointArguments
            (checkpoint,) = parse_arguments(
                FlagParser(checkpoint_only), [*self._args, *candidate.flags], values=self._values, partly=True
            )
            try:
                tasks = made_for(checkpoint)
            except ValueError as error:
                problems.append(f"{candidate.name}: {error}")
                continue
            if len(tasks) == 1:
                return tasks[0]
            fitting = " and ".join(task.NAME for task in tasks) or "no task of this command"
            problems.append(f"{candidate.name} is made for {fitting}")
        raise ValueError(f"Can't tell the task: {'; '.join(problems)}. Choose one by --task.")

    def _given(self) -> list[str]:
        """Names of the flags that all share."""
        flags = [word.removeprefix("--").partition("=")[0] for word in self._args if word.startswith("--")]
        return [*self._values, *(flag.replace("-", "_") for flag in flags)]

    def _require_flags_that_are_free(self) -> None:
        for name in self._given():
            if name in SETTLED:
                raise ValueError(f"--{name} is settled by the comparison: give a budget, such as --budget_steps 200.")
        for candidate in self.candidates:
            for name in candidate.changes:
                if name in (*SETTLED, *SHARED, *_OF_THE_COMPARISON):
                    raise ValueError(
                        f"{candidate.name} changes {name}, but data, seeds and budget are the same for all candidates."
                    )

    def _setting(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """What the page says about how the comparison was made."""
        scores = [run.scores for entry in entries for run in entry.runs if run.scores is not None]
        arguments = self.arguments
        return {
            "task": self.task.NAME,
            "dataset": self._dataset,
            "budget": {"unit": arguments.unit, "amount": arguments.amount},
            "seeds": [self._first_seed + index for index in range(arguments.seeds)],
            "rank_by": arguments.rank_by,
            "examples": len(scores[0].losses) if scores else None,
            "settings": self._public_settings(),
            "versions": provenance.library_versions(),
            "screen_to": arguments.screen_to,
        }

    def _public_settings(self) -> dict[str, Any]:
        """The shared flags that were given and shape the result, without the places of files."""
        hidden = (*_WITHOUT_EFFECT, *_OF_THE_COMPARISON, CHECKPOINT)
        held = {
            name: value
            for part in self._plain[self.candidates[0].name]
            for name, value in vars(part).items()
            if name in self._given() and name not in hidden and name not in self.candidates[0].changes
        }
        return {name: provenance.public_id(v) if isinstance(v, str) else v for name, v in held.items()}


def _dataclasses(task: Task) -> Any:
    """All whose fields are flags of a comparison."""
    return task.ModelArguments, task.DataArguments, OptimizabilityConfig, TrainingArguments, ComparisonArguments


def list_of_flags(task_name: str | None) -> str:
    """All flags of a comparison, as `--flags` prints them; those of text classification if no task is named."""
    from ..tasks.fine_tuning import TASKS, FlagParser

    task = next((task for task in TASKS if task_name == task.NAME), TASKS[0])
    return FlagParser(_dataclasses(task), usage=f"{task.NAME}: all flags", add_help=False).format_help()


def _reason(error: Exception) -> str:
    """What went wrong, without what tells who ran it and where."""
    told = str(error) if isinstance(error, (ValueError, ImportError)) else f"{type(error).__name__}: {error}"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in told:
        told = f"Out of memory: {told.rstrip('.')}. Lower --per_device_train_batch_size, and raise "
        told += "--gradient_accumulation_steps by as much."
    return anonymize(redact_secrets(told))
