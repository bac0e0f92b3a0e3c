# SPDX-License-Identifier: Apache-2.0
"""Train every candidate with every seed, round by round, and rank them. Finished runs are cached."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from ..errors import MeasurementError, type_name
from ..files import require_writable
from ..reasons import Reason
from ..redaction import public_name, redact_secrets
from ..report import OptimizabilityReport
from ..scoring.checkpoint import CheckpointScores
from ..training import provenance
from .candidates import CHECKPOINT, Candidate, Flag, folder_name, parse_candidates
from .comparison import Comparison
from .flags import ComparisonFlags
from .results import SCREENED_BY, Entry, Failure, Round, Run, Setting, TrainingBudget, rank_entries
from .run_cache import cached_run, cached_scores, cached_step_seconds, settings_digest


if TYPE_CHECKING:
    from .training import Inputs

logger = logging.get_logger(__name__)


def compare(
    candidates: Sequence[str | Mapping[str, Flag]] | Sequence[OptimizabilityReport],
    *,
    task: str | None = None,
    **flags: Any,
) -> Comparison:
    """Fine-tune each candidate under one equal budget, and rank them; or rank existing reports.

    Killed and called again, it resumes where it was. A candidate that fails is reported, and the others finish.

    Args:
        candidates: Checkpoints (`"org/name"`), flags (`"learning_rate=1e-3,optim=sgd"`), both
            (`"org/name,method=lora"`) or mappings of flags; or reports, of one training each.
        task: `"text-classification"` or `"image-classification"`; by default that of the first checkpoint that can
            be loaded.
        flags: What all share, named as the flags of `hf-optimizability compare`: the budget (`budget_steps`,
            `budget_examples` or `budget_seconds`), `seeds`, the data, `TrainingArguments`, `OptimizabilityConfig`.

    Returns:
        The comparison, which is also saved to `output_dir` if anything was trained.

    Raises:
        ValueError: If a flag or a candidate can't work, before anything is trained.

    Example:
        >>> from hf_optimizability import OptimizabilityReport
        >>> from hf_optimizability.report_data.provenance import ModelInfo
        >>> log = [{"optimizability/eval_loss": 0.5, "optimizability/eval_loss_std_error": 0.02, "step": 9}]
        >>> better = [{"optimizability/eval_loss": 0.4, "optimizability/eval_loss_std_error": 0.02, "step": 9}]
        >>> reports = [OptimizabilityReport(model=ModelInfo(id=name), log_history=entries)
        ...            for name, entries in {"org/a": log, "org/b": better}.items()]
        >>> comparison = compare(reports)
        >>> comparison.ranking.names, comparison.ranking.ranks
        (('org/b', 'org/a'), (1, 2))
    """
    reports = [one for one in candidates if isinstance(one, OptimizabilityReport)]
    if reports:
        if len(reports) < len(candidates) or flags or task:
            raise ValueError("Reports are compared as they are: pass nothing but two or more of them.")
        return compare_reports(reports)
    parsed = parse_candidates(one for one in candidates if not isinstance(one, OptimizabilityReport))
    return ComparisonRunner(ComparisonFlags(parsed, task_name=task, values=flags)).run()


def compare_reports(reports: Sequence[OptimizabilityReport]) -> Comparison:
    """Rank reports by the loss on the evaluation set, with the standard error that each holds.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(reports) < 2:
        raise ValueError("There is nothing to compare: pass at least two reports.")
    published = [report.published() for report in reports]
    named = parse_candidates({CHECKPOINT: report.model.id or "a model"} for report in published)
    entries = [
        Entry(candidate.name, runs=[Run(report.training.get("seed"), report)])
        for candidate, report in zip(named, published, strict=True)
    ]
    first = published[0]
    setting = Setting(
        task=first.task.task,
        dataset=first.data.dataset or "",
        budget=None,
        seeds=(),
        rank_by="loss",
        examples=None,
        settings={},
        versions=first.versions,
    )
    return Comparison(setting, entries, [])


class ComparisonRunner:
    """Runs a comparison.

    Args:
        flags: The candidates, and the flags that they share.

    Attributes:
        folder: Where the pages and the cached runs are.

    Raises:
        ValueError: If a candidate's flags can't be parsed, or the output folder is not writable.
    """

    def __init__(self, flags: ComparisonFlags):
        self._flags = flags
        self._candidates = {candidate.name: candidate for candidate in flags.candidates}
        self._parsed = {candidate.name: flags.parse(candidate) for candidate in flags.candidates}
        self._first = flags.candidates[0]
        first = self._parsed[self._first.name]
        if first.training.world_size > 1:
            raise ValueError("A comparison trains in one process. Start it without torchrun or accelerate launch.")
        self._arguments, self._first_seed = first.comparison, first.training.seed
        self.folder = Path(str(first.training.output_dir))
        require_writable(self.folder, "output_dir")

    def run(self, *, on_run: Callable[[str], object] = logger.info) -> Comparison:
        """Train whatever is not in the cache, and write the pages.

        Args:
            on_run: Is called with a line of text for each training that has ended.
        """
        entries = [Entry(name, candidate.public_changes) for name, candidate in self._candidates.items()]
        self._screen(entries, on_run)
        numbers = range(1, self._arguments.halving_rounds + 1)
        rounds = [self._run_round(number, entries, on_run) for number in numbers]
        comparison = Comparison(self._setting(entries), entries, rounds)
        comparison.save(self.folder)
        return comparison

    def _screen(self, entries: list[Entry], on_run: Callable[[str], object]) -> None:
        """Score all candidates, and drop those whose score is significantly worse than enough others."""
        if self._arguments.screen_to is None:
            return
        from .screening import select

        for entry in entries:
            entry.scores = self._score(self._candidates[entry.name])
            on_run(f"{entry.name}, before training: {entry.scores.result}")
        scores = {entry.name: entry.scores.of(SCREENED_BY) for entry in entries if entry.scores is not None}
        selected = select(scores, self._arguments.screen_to)
        for entry in entries:
            if entry.name not in selected:
                entry.dropped = 0
                on_run(f"{entry.name} is not trained: its score is significantly worse.")

    def _score(self, candidate: Candidate) -> CheckpointScores:
        """Return the scores of this candidate, or of one with the same model and data."""
        from .screening import score_inputs

        examples = self._arguments.screen_examples
        model, data, _, training, _ = self._parsed[candidate.name]
        key = self._digest(candidate, [model, data], examples, self._first_seed, training.label_smoothing_factor)
        folder = self.folder / "scores"

        def compute() -> CheckpointScores:
            try:
                return score_inputs(self._inputs(candidate, {"output_dir": str(folder)}), examples=examples)
            except Exception as error:
                return CheckpointScores(notes={SCREENED_BY: _why(f"The scores of {candidate.name} failed.", error)})

        return cached_scores(folder / f"{key}.json", compute, retry_failures=self._arguments.retry_failures)

    def _run_round(self, number: int, entries: list[Entry], on_run: Callable[[str], object]) -> Round:
        """Train all remaining candidates with the budget of this round, and drop those that are worse."""
        arguments = self._arguments
        budget = arguments.budget(number)
        remaining = [entry for entry in entries if entry.failure is None and entry.dropped is None]
        runs: dict[str, list[Run]] = {entry.name: [] for entry in remaining}
        for index in range(arguments.seeds):
            for entry in remaining:
                if entry.failure is not None:
                    continue
                result = self._run(
                    self._candidates[entry.name],
                    seed=self._first_seed + index,
                    budget=budget,
                    measured=index < arguments.measured_seeds,
                )
                if isinstance(result, Failure):
                    entry.failure = result
                    on_run(f"{entry.name} failed with seed {result.seed}: {result.why} The others continue.")
                else:
                    runs[entry.name].append(result)
                    on_run(f"{entry.name}, seed {result.seed}, budget {budget:g}: {result.result}")
        for entry in remaining:
            entry.runs = runs[entry.name]
        ranking = rank_entries(entries, arguments.rank_by)
        if ranking is None or number == arguments.halving_rounds:
            kept = tuple(entry.name for entry in remaining if entry.failure is None)
        else:
            kept = ranking.kept(math.ceil(len(ranking.names) / 2))
        for entry in remaining:
            if entry.failure is None and entry.name not in kept:
                entry.dropped = number
        return Round(budget, ranking, kept)

    def _run(self, candidate: Candidate, *, seed: int, budget: float, measured: bool) -> Run | Failure:
        """Return a run from the cache, or train; any exception becomes a failure, which is cached as well."""
        try:
            steps = self._steps(candidate, budget)
        except Exception as error:
            return Failure(seed, _why(f"{candidate.name} can't be timed.", error))
        leaf = f"seed-{seed}-measured" if measured else f"seed-{seed}"
        folder = self._folder_of(candidate) / f"steps-{steps}" / leaf
        train = partial(self._train, candidate, folder, seed=seed, steps=steps, measured=measured)
        return cached_run(folder, train, retry_failures=self._arguments.retry_failures)

    def _train(self, candidate: Candidate, folder: Path, *, seed: int, steps: int, measured: bool) -> Run | Failure:
        from .training import train, training_flags

        flags = {
            "output_dir": str(folder / "training"),
            "report_dir": str(folder / "optimizability"),
            "measure_strategy": "steps",
            **training_flags(steps, seed),
        }
        try:
            inputs = self._inputs(candidate, flags)
            return train(inputs, measured=measured, save_seconds=self._arguments.save_seconds)
        except Exception as error:
            return Failure(seed, _why(f"{candidate.name} failed with seed {seed}.", error))

    def _steps(self, candidate: Candidate, budget: float) -> int:
        """Return the steps that a candidate can take within the budget; for seconds, by timing a few once."""
        if self._arguments.unit == "steps":
            return int(budget)
        if self._arguments.unit == "examples":
            return max(1, math.ceil(budget / self._inputs(candidate, {}).examples_per_step))
        from .training import TIMED_STEPS, step_seconds

        def measure(folder: Path) -> float:
            flags = {"output_dir": str(folder), "max_steps": TIMED_STEPS, "save_strategy": "no"}
            return step_seconds(self._inputs(candidate, flags))

        return max(1, math.floor(budget / cached_step_seconds(self._folder_of(candidate), measure)))

    def _folder_of(self, candidate: Candidate) -> Path:
        """Return a folder that no training with other settings has."""
        *parts, _ = self._parsed[candidate.name]
        return self.folder / "runs" / folder_name(candidate, self._digest(candidate, parts))

    def _digest(self, candidate: Candidate, parts: Iterable[Any], *more: float) -> str:
        return settings_digest(self._flags.task.NAME, self._flags.settings(candidate, parts), *more)

    def _inputs(self, candidate: Candidate, overrides: Mapping[str, Any]) -> Inputs:
        from .training import Inputs

        model, data, config, training, _ = self._flags.parse(candidate, overrides)
        return Inputs(self._flags.task, model, data, config, training, self._first_seed)

    def _setting(self, entries: Sequence[Entry]) -> Setting:
        """Return what the page says about how the comparison was made."""
        scores = [run.scores for entry in entries for run in entry.runs if run.scores is not None]
        arguments, first = self._arguments, self._parsed[self._first.name]
        return Setting(
            task=self._flags.task.NAME,
            dataset=public_name(first.data.public_name),
            budget=TrainingBudget(arguments.unit, arguments.amount),
            seeds=tuple(self._first_seed + index for index in range(arguments.seeds)),
            rank_by=arguments.rank_by,
            examples=len(scores[0].losses) if scores else None,
            settings=self._flags.public_settings(self._first, first),
            versions=provenance.library_versions(),
            screen_to=arguments.screen_to,
        )


def _why(what: str, error: Exception) -> Reason:
    """Return why a training failed, as the pages have it; the log gets the text of the error, which may be private."""
    logger.warning(redact_secrets(f"{what} {type(error).__name__}: {error}"))
    logger.debug(what, exc_info=True)
    from ..tasks.checkpoint import LoadingError
    from .training import DivergedError

    if isinstance(error, MeasurementError):
        return error.why
    if isinstance(error, DivergedError):
        return Reason("training_diverged")
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    if memory:
        return Reason("training_out_of_memory", error=type_name(error))
    if isinstance(error, LoadingError):
        return Reason("not_loaded", error=type_name(error.__cause__ or error))
    return Reason("training_failed", error=type_name(error))
