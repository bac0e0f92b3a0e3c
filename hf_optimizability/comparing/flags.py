# SPDX-License-Identifier: Apache-2.0
"""The flags of a comparison: those that all candidates share, and each candidate's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import TrainingArguments

from ..config import OptimizabilityConfig
from .arguments import ComparisonArguments
from .candidates import CHECKPOINT, Candidate, public_flags


if TYPE_CHECKING:
    from ..tasks.fine_tuning import Task

FIXED_FLAGS = (
    "max_steps", "num_train_epochs", "data_seed", "logging_strategy", "logging_steps", "logging_first_step",
    "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end",
    "resume_from_checkpoint", "push_to_hub", "report_dir", "measure_strategy", "measure_steps", "do_train", "do_eval",
)  # fmt: skip
"""Flags that a comparison sets itself."""

SHARED_FLAGS = (
    "dataset_name", "dataset_config_name", "train_file", "validation_file", "train_dir", "validation_dir",
    "train_split_name", "validation_split_name", "train_val_split", "label_column_name", "max_train_samples",
    "max_eval_samples", "seed", "output_dir",
)  # fmt: skip
"""Flags that must be the same for all candidates: their scores are compared example by example."""

FLAGS_WITHOUT_EFFECT = ("output_dir", "cache_dir", "token", "disable_tqdm", "dataloader_num_workers", "report_to")
"""Flags that change no result, so that what was trained with others is reused."""

_COMPARISON_FLAGS = tuple(field.name for field in fields(ComparisonArguments))


class CandidateArguments(NamedTuple):
    """The dataclasses of one candidate: of model, data, measurement, training and comparison."""

    model: Any
    data: Any
    config: OptimizabilityConfig
    training: TrainingArguments
    comparison: ComparisonArguments


class ComparisonFlags:
    """What all candidates share, and how to parse it together with a candidate's own flags.

    Args:
        candidates: What is compared.
        task_name: The task; by default that of the first checkpoint that can be loaded.
        values: Flags that all share, with their values.
        args: More of them, as they stand on a command line; they override `values`.

    Attributes:
        candidates: What is compared.
        task: What the checkpoints are trained for.

    Raises:
        ValueError: If a flag is not free, or the task can't be determined.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        *,
        task_name: str | None = None,
        values: Mapping[str, Any] | None = None,
        args: Sequence[str] = (),
    ):
        self.candidates = tuple(candidates)
        self._values, self._args = dict(values or {}), list(args)
        self._require_free(candidates)
        self.task = self._find_task(candidates, task_name)

    @property
    def shared_names(self) -> list[str]:
        """Names of the flags that all share."""
        flags = [word.removeprefix("--").partition("=")[0] for word in self._args if word.startswith("--")]
        return [*self._values, *(flag.replace("-", "_") for flag in flags)]

    def parse(self, candidate: Candidate, overrides: Mapping[str, Any] | None = None) -> CandidateArguments:
        """Return a candidate's dataclasses, with `overrides` in place of other flags.

        Raises:
            ValueError: If a flag is unknown or its value impossible; the message names the candidate.
        """
        from ..tasks.fine_tuning import FlagParser, parse_arguments

        parser = FlagParser(*_dataclasses(self.task))
        parser.set_defaults(output_dir="comparison", profile="light", disable_tqdm=True)
        more = [f"--{name}={value}" for name, value in (overrides or {}).items()]
        try:
            args = [*self._args, *candidate.flags, *more]
            return CandidateArguments(*parse_arguments(parser, args, values=self._values))
        except (ValueError, ImportError) as error:
            raise ValueError(f"{candidate.name}: {error}" if candidate.changes else str(error)) from error

    def settings(self, candidate: Candidate, parts: Iterable[Any]) -> dict[str, Any]:
        """Return the given flags that shape a result, as far as they are fields of the dataclasses `parts`."""
        names = [*self.shared_names, *candidate.changes]
        return {
            name: value
            for part in parts
            for name, value in vars(part).items()
            if name in names and name not in FLAGS_WITHOUT_EFFECT
        }

    def public_settings(self, candidate: Candidate, parts: Iterable[Any]) -> dict[str, Any]:
        """Return the shared flags that shape the result, from a candidate's `parts`, as they are published."""
        hidden = (*_COMPARISON_FLAGS, CHECKPOINT, *candidate.changes)
        settings = self.settings(candidate, parts)
        shared = {name: settings[name] for name in settings if name in self.shared_names and name not in hidden}
        return public_flags(shared)

    def _require_free(self, candidates: Sequence[Candidate]) -> None:
        """Raise if a flag is given that the comparison sets, or a candidate changes one that all must share."""
        for name in self.shared_names:
            if name in FIXED_FLAGS:
                raise ValueError(f"--{name} is set by the comparison: give a budget, such as --budget_steps 200.")
        for candidate in candidates:
            for name in candidate.changes:
                if name in (*FIXED_FLAGS, *SHARED_FLAGS, *_COMPARISON_FLAGS):
                    raise ValueError(
                        f"{candidate.name} changes {name}, but data, seeds and budget are the same for all candidates."
                    )

    def _find_task(self, candidates: Sequence[Candidate], name: str | None) -> Task:
        """Return the task of that name, or that of the first checkpoint that can be loaded."""
        from ..tasks.fine_tuning import checkpoint_arguments, task_named, task_of_checkpoint

        if name is not None:
            return task_named(name)
        problems = []
        for candidate in candidates:
            checkpoint = checkpoint_arguments([*self._args, *candidate.flags], values=self._values)
            try:
                return task_of_checkpoint(checkpoint)
            except ValueError as error:
                problems.append(f"{candidate.name}: {error}")
        raise ValueError(f"No task fits the candidates. {' '.join(problems)} Choose a task by --task.")


def _dataclasses(task: Task) -> tuple[type[Any], ...]:
    """Return the dataclasses whose fields are the flags of a comparison."""
    return task.ModelArguments, task.DataArguments, OptimizabilityConfig, TrainingArguments, ComparisonArguments


def list_flags(task_name: str | None) -> str:
    """Return all flags of a comparison, as `--flags` prints them; by default those of text classification."""
    from ..tasks.fine_tuning import TASKS, FlagParser, task_named

    task = TASKS[0] if task_name is None else task_named(task_name)
    return FlagParser(*_dataclasses(task), usage=f"{task.NAME}: all flags", add_help=False).format_help()
