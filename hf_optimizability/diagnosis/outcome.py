# SPDX-License-Identifier: Apache-2.0
"""What a rule comes to: a finding, nothing to report, or that it could not be checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias


if TYPE_CHECKING:
    from ..report_data.data import ReportData

Severity = Literal["problem", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")
"""Worst first."""

Status = Literal["problem", "warning", "note", "not_checked", "fine"]
STATUSES: tuple[Status, ...] = (*SEVERITIES, "not_checked", "fine")
"""Of a rule, those that need a reader's attention first."""

Missing = Literal[
    "measurement",
    "first_measurement",
    "training",
    "final_measurement",
    "logged_losses",
    "loss_fit",
    "evaluations",
    "gap",
    "optimizer_state",
    "training_mode_sharpness",
    "learning_rate",
    "trainer",
    "model",
    "classes",
    "blocks",
    "block_errors",
    "lambda_min",
    "hessian",
    "probe_batches",
    "batch_items",
    "task_batches",
]
"""What may be missing to check a rule."""


class Words(NamedTuple):
    """The words about what is missing.

    Attributes:
        reason: What follows "could not be checked, because", with slots for `found` and `needed`.
        remedy: What the user can do, in one sentence; empty where there is nothing to do.
    """

    reason: str
    remedy: str = ""


WORDS: Mapping[Missing, Words] = {
    "measurement": Words("nothing was measured", "Measure it; where that failed, the failures say what to do."),
    "first_measurement": Words(
        "nothing was measured before the first step", "Measure from the start: a run that is resumed has no start."
    ),
    "training": Words("no training has ended", "Judge a run when it has ended."),
    "final_measurement": Words(
        "the final weights were not measured", "Look at the failures: the last one says what to do."
    ),
    "logged_losses": Words(
        "the log has too few training losses ({found}, of {needed} needed)", "Log more often: lower `logging_steps`."
    ),
    "loss_fit": Words(
        "the training loss scatters too much to tell how fast it falls", "Log more often: lower `logging_steps`."
    ),
    "evaluations": Words(
        "the log has too few evaluation losses ({found}, of {needed} needed)",
        "Evaluate during training: set `eval_strategy`.",
    ),
    "gap": Words(
        "training and evaluation loss were not measured alike, with their errors",
        "Give the Trainer an `eval_dataset`, and the callback the Trainer.",
    ),
    "optimizer_state": Words(
        "the optimizer's sharpness was not measured", "Train with AdamW, SGD or Adafactor to have it measured."
    ),
    "training_mode_sharpness": Words(
        "the sharpness was measured in eval mode, which with BatchNorm is not that of training",
        "Judge the learning rate by the loss.",
    ),
    "learning_rate": Words("the learning rate is not known"),
    "trainer": Words(
        "the callback does not know the Trainer's loss",
        "Pass `trainer=` to the callback, or train with `OptimizabilityTrainer`.",
    ),
    "model": Words("it is not known whether the model has BatchNorm", "Let a callback describe the model."),
    "classes": Words(
        "neither the number of classes is known, nor accuracy and label counts",
        "Give the Trainer a `compute_metrics` with an accuracy.",
    ),
    "blocks": Words(
        "the model has too few blocks to compare ({found}, of {needed} needed)",
        "Name more blocks of parameters: set `blocks`.",
    ),
    "block_errors": Words("the errors of the blocks' traces are not known", "Raise `max_hvps`."),
    "lambda_min": Words("λ_min was not measured", "Leave `eigen_method` at 'lanczos'."),
    "hessian": Words("the matrix that was measured is not the Hessian", "Leave `curvature` at 'hessian'."),
    "probe_batches": Words(
        "so few probe batches ({found}) do not bound the noise scale",
        "Raise `probe_examples`, or lower `probe_batch_size`.",
    ),
    "batch_items": Words("the number of items in a step is not known"),
    "task_batches": Words(
        "the tasks' gradients are lost in the noise of so few probe batches",
        "Raise `probe_examples`, or lower `probe_batch_size`.",
    ),
}
"""Of everything that may be missing."""


@dataclass(frozen=True)
class Finding:
    """One conclusion about a run.

    Attributes:
        name: Stable name, that of its rule.
        severity: `"problem"` (the run or the report is not what it should be), `"warning"` (likely to cost something),
            or `"note"` (good to know).
        sentence: The conclusion, in one plain sentence.
        evidence: The numbers with their errors, as text.
        advice: What to do; the first sentence is the one thing to do first.
        source: Paper and section, or what was measured.
    """

    name: str
    severity: Severity
    sentence: str
    evidence: tuple[str, ...]
    advice: str
    source: str

    @property
    def status(self) -> Status:
        """Its severity, as the status of its rule."""
        return self.severity


@dataclass(frozen=True)
class Fine:
    """A rule that was checked, and has nothing to report.

    Attributes:
        because: Why, where that is not plain from the numbers; empty if it is.
    """

    because: str = ""

    @property
    def status(self) -> Status:
        """The status of its rule."""
        return "fine"


@dataclass(frozen=True)
class NotChecked:
    """A rule that could not be checked.

    Attributes:
        missing: What was missing; `WORDS` has the words for each.
        found: How many there were of what is counted; `None` where nothing is.
        needed: How many the rule takes; likewise.

    Example:
        >>> NotChecked("logged_losses", found=3, needed=6).reason
        'the log has too few training losses (3, of 6 needed)'
    """

    missing: Missing
    found: int | None = None
    needed: int | None = None

    @property
    def status(self) -> Status:
        """The status of its rule."""
        return "not_checked"

    @property
    def reason(self) -> str:
        """What follows "could not be checked, because"."""
        text = WORDS[self.missing].reason
        if self.found is None:
            text = text.replace(" ({found})", "")
        return text.format(found=self.found, needed=self.needed)

    @property
    def remedy(self) -> str:
        """What the user can do."""
        return WORDS[self.missing].remedy


Outcome: TypeAlias = Finding | Fine | NotChecked

Rule: TypeAlias = "Callable[[ReportData], Outcome]"
"""Its name is that of the function, and of the finding."""
