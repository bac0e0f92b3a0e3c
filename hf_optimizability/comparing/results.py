# SPDX-License-Identifier: Apache-2.0
"""The data of a comparison, to plain data and back, and the ranking that follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..files import finite
from ..log_keys import PREFIX
from ..reasons import Reason
from ..redaction import public_name, public_word
from ..report import OptimizabilityReport
from ..report_data.provenance import ModelInfo
from ..report_data.published import published_reason
from ..scoring.checkpoint import NAMES as SCORE_NAMES
from ..scoring.checkpoint import CheckpointScores
from ..serialization import structure
from .candidates import public_flags
from .ranking import Ranking, normal_draws, paired_bootstrap, rank


if TYPE_CHECKING:
    from typing_extensions import Self


Quality = Literal["accuracy", "loss"]

SCHEMA_VERSION = 2
"""Version of the layout of `comparison.json`."""

SCREENED_BY = "logme"
"""The score that drops candidates before any training; none of four is shown to be better (docs/prediction.md)."""


@dataclass(frozen=True)
class Scores:
    """Scores of a trained model on each evaluation example, in eval mode.

    Attributes:
        losses: Cross-entropy of each example, without label smoothing, whatever the model was trained with.
        correct: Whether the most likely class is the right one, by example.
    """

    losses: NDArray[np.float64]
    correct: NDArray[np.bool_]

    def of(self, quality: Quality) -> NDArray[np.float64]:
        """Return the scores that a quality is the mean of."""
        return self.losses if quality == "loss" else self.correct.astype(float)

    def to_dict(self) -> dict[str, Any]:
        """Return six digits of each loss, and a string of 0 and 1."""
        losses = [float(f"{loss:.6g}") for loss in self.losses]
        return {"losses": losses, "correct": "".join("01"[int(hit)] for hit in self.correct)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """Rebuild scores from `to_dict`.

        Raises:
            ValueError: If they are damaged.
        """
        losses, correct = data["losses"], data["correct"]
        if not isinstance(correct, str) or not correct or set(correct) - {"0", "1"}:
            raise ValueError("`correct` is not a string of 0 and 1.")
        numbers = isinstance(losses, list) and all(type(loss) in (int, float, type(None)) for loss in losses)
        if not numbers or len(losses) != len(correct):
            raise ValueError("`losses` is not a list of a number for each example.")
        return cls(np.array(losses, dtype=float), np.array([hit == "1" for hit in correct]))


@dataclass(frozen=True)
class Run:
    """One training of one candidate.

    Attributes:
        seed: Seed of new weights, dropout and order of the data; `None` if unknown.
        report: Model, log and dynamics of the training, and measurements if it was measured.
        scores: Scores of the trained model; `None` if there is only a report.
        train_seconds: Time of all steps, data loading included, without evaluations, checkpoints and measurements.
        predict_seconds: Time of the trained model per evaluation example.
        peak_bytes: Peak memory of the accelerator during training; `None` on the CPU.
    """

    seed: int | None
    report: OptimizabilityReport
    scores: Scores | None = None
    train_seconds: float | None = None
    predict_seconds: float | None = None
    peak_bytes: int | None = None

    @property
    def result(self) -> str:
        """Accuracy and loss in a few words."""
        if self.scores is None:
            return "not scored"
        return f"accuracy {self.scores.correct.mean():.1%}, loss {self.scores.losses.mean():.4f}"

    def to_dict(self) -> dict[str, Any]:
        """Return the run as plain data."""
        scores = None if self.scores is None else self.scores.to_dict()
        return {**vars(self), "report": self.report.published().to_dict(), "scores": scores}

    def logged(self, key: str) -> float:
        """Return the last number logged as `key`; NaN if there is none."""
        values = [entry[key] for entry in self.report.log_history if isinstance(entry.get(key), (int, float))]
        return float(values[-1]) if values else math.nan


@dataclass(frozen=True)
class Failure:
    """Why a candidate is not ranked.

    Attributes:
        seed: Seed of the training that failed.
        why: The reason.
    """

    seed: int
    why: Reason

    @property
    def reason(self) -> str:
        """What went wrong, and what to do. The log has the text of the error behind it."""
        return f"{self.why} {self.why.remedy}".rstrip()


@dataclass
class Entry:
    """A candidate and its results.

    Attributes:
        name: Its name.
        changes: Flags that only it has.
        runs: Its trainings under the largest budget it got, one for each seed.
        failure: Why it is not ranked; `None` if all its trainings finished.
        dropped: Number of the round after which successive halving dropped it, 0 if it was dropped by its score before
            any training; `None` if it got the whole budget.
        scores: Its scores before any training; `None` if that was not asked for.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    failure: Failure | None = None
    dropped: int | None = None
    scores: CheckpointScores | None = None

    @property
    def model(self) -> ModelInfo:
        """The model according to its reports."""
        return self.runs[0].report.model if self.runs else ModelInfo()

    def published(self) -> Entry:
        """Return the candidate as it is written."""
        scores = self.scores
        if scores is not None:
            notes = {name: published_reason(why) for name, why in scores.notes.items() if name in SCORE_NAMES}
            scores = replace(scores, notes=notes)
        return replace(
            self,
            name=public_name(self.name),
            changes=public_flags(self.changes),
            runs=[replace(run, report=run.report.published()) for run in self.runs],
            failure=self.failure and replace(self.failure, why=published_reason(self.failure.why)),
            scores=scores,
        )


@dataclass(frozen=True)
class Round:
    """One round of successive halving, or the only one.

    Attributes:
        budget: Steps, examples or seconds of each of its trainings.
        ranking: Ranking of the candidates that finished it.
        kept: Candidates in the next round, or at the end all.
    """

    budget: float
    ranking: Ranking | None
    kept: tuple[str, ...]


@dataclass(frozen=True)
class TrainingBudget:
    """What each candidate may spend on a training.

    Attributes:
        unit: Unit of the amount.
        amount: How many of them.
    """

    unit: Literal["steps", "examples", "seconds"]
    amount: float


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How candidates were compared.

    Attributes:
        task: The task.
        dataset: Name of the data set; empty if unknown.
        budget: Budget of each training; `None` if reports were compared.
        seeds: Seeds of the trainings.
        rank_by: The quality that ranks.
        examples: Evaluation examples that were scored; `None` if there are no scores.
        settings: Flags that all candidates share, by name: as free as the flags are.
        versions: Library versions.
        screen_to: How many candidates the screening was to keep; `None` if there was none.
    """

    task: str
    dataset: str
    budget: TrainingBudget | None
    seeds: tuple[int, ...]
    rank_by: Quality
    examples: int | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    screen_to: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the setting as plain data."""
        data = asdict(self)
        if self.budget is None:  # reports are never screened
            del data["screen_to"]
        return data


@dataclass
class ComparisonData:
    """Candidates that were fine-tuned under one equal budget, and which of them is better.

    Attributes:
        setting: How they were compared.
        entries: The candidates, in the order in which they were given.
        rounds: Rounds of successive halving; one if there was none.
        schema_version: Layout of the JSON file.
    """

    setting: Setting
    entries: list[Entry] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    @cached_property
    def ranking(self) -> Ranking | None:
        """The ranking by `setting.rank_by` of the candidates that got the whole budget; `None` if there is none."""
        return rank_entries(self.entries, self.setting.rank_by)

    def by(self, quality: Quality) -> Ranking | None:
        """Return the ranking by another quality."""
        return rank_entries(self.entries, quality)

    def entry(self, name: str) -> Entry:
        """Return the candidate of that name."""
        return next(entry for entry in self.entries if entry.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data; numbers that are not finite become `None`."""
        entries = [{**vars(entry), "runs": [run.to_dict() for run in entry.runs]} for entry in self.entries]
        for plain, entry in zip(entries, self.entries, strict=True):
            plain["failure"] = None if entry.failure is None else asdict(entry.failure)
            plain["scores"] = None if entry.scores is None else entry.scores.to_dict()
        rounds = [asdict(one) for one in self.rounds]
        ranking = None if self.ranking is None else asdict(self.ranking)
        data = {"schema_version": self.schema_version, "setting": self.setting.to_dict(), "ranking": ranking}
        return finite({**data, "entries": entries, "rounds": rounds})

    def published(self) -> Self:
        """Return the comparison as it is written: what a report's schema allows, and of flags the recorded ones."""
        setting = replace(
            self.setting,
            task=public_name(self.setting.task),
            dataset=public_name(self.setting.dataset),
            settings=public_flags(self.setting.settings),
            versions={public_word(name): public_word(text) for name, text in self.setting.versions.items()},
        )
        rounds = [
            replace(
                one,
                ranking=one.ranking and replace(one.ranking, names=tuple(map(public_name, one.ranking.names))),
                kept=tuple(map(public_name, one.kept)),
            )
            for one in self.rounds
        ]
        return type(self)(setting, [entry.published() for entry in self.entries], rounds, self.schema_version)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a comparison from `to_dict`.

        Raises:
            ValueError: If the data was written by a later version of this package, or is not a comparison, or its
                trainings can't be compared example by example.
        """
        if data.get("schema_version") not in range(1, SCHEMA_VERSION + 1):
            raise ValueError(
                f"It has schema version {data.get('schema_version')!r}, this package reads up to {SCHEMA_VERSION}. "
                "Upgrade hf-optimizability to open it, or compare again."
            )
        entries = [structure(Entry, _with_reasons(entry)) for entry in data["entries"]]
        rounds = [structure(Round, one) for one in data["rounds"]]
        _score_table(_ranked(entries), "loss")
        return cls(setting=structure(Setting, data["setting"]), entries=entries, rounds=rounds)


def _with_reasons(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with reasons by code in place of the texts of version 1, which may hold anything."""
    failure, scores = entry.get("failure"), entry.get("scores")
    if failure and "reason" in failure:
        failure = {"seed": failure["seed"], "why": asdict(Reason.of_earlier_version(failure["reason"]))}
    if scores:
        notes = {
            name: asdict(Reason.of_earlier_version(note)) if isinstance(note, str) else note
            for name, note in scores["notes"].items()
        }
        scores = {**scores, "notes": notes}
    return {**entry, "failure": failure, "scores": scores}


def rank_entries(entries: Sequence[Entry], quality: Quality) -> Ranking | None:
    """Rank the candidates with the largest budget, by the scores of their runs or else by their reports.

    A report alone has the loss with its error on a sample of the evaluation set, but metrics without errors, so that
    reports are ranked by the loss.

    Returns:
        The ranking; `None` if there are fewer than two to rank.

    Raises:
        ValueError: If trainings are scored on different numbers of examples, or candidates have different numbers of
            trainings.
    """
    ranked = _ranked(entries)
    if len(ranked) < 2:
        return None
    names = [entry.name for entry in ranked]
    table = _score_table(ranked, quality)
    if table is not None:
        draws = paired_bootstrap(table)
        means = table.mean(axis=(1, 2)).tolist()
        if quality == "loss":
            return rank(names, means, draws, greater_is_better=False, bounds=(0, math.inf))
        return rank(names, means, draws, bounds=(0, 1))
    losses = [entry.runs[0].logged(f"{PREFIX}eval_loss") for entry in ranked]
    errors = [entry.runs[0].logged(f"{PREFIX}eval_loss_std_error") for entry in ranked]
    if quality != "loss" or not np.isfinite([*losses, *errors]).all():
        return None
    return rank(names, losses, normal_draws(losses, errors), greater_is_better=False)


def _ranked(entries: Sequence[Entry]) -> list[Entry]:
    """Return the candidates that got the whole budget."""
    return [entry for entry in entries if entry.failure is None and entry.dropped is None and entry.runs]


def _score_table(ranked: Sequence[Entry], quality: Quality) -> NDArray[np.float64] | None:
    """Return the scores by candidate, training and example; `None` if a candidate has none."""
    scores = [[run.scores.of(quality) for run in entry.runs if run.scores is not None] for entry in ranked]
    if not all(scores):
        return None
    if len({len(examples) for runs in scores for examples in runs}) > 1:
        raise ValueError(
            "Its trainings are scored on different numbers of examples. If the data has changed in between, compare "
            "again in another folder."
        )
    if len({len(runs) for runs in scores}) > 1:
        raise ValueError("Its candidates have different numbers of trainings.")
    return np.array(scores)
