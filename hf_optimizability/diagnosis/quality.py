# SPDX-License-Identifier: Apache-2.0
"""Rules about the trained model: is it better than a guess, and is it the same model in training and in use."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from ..linalg.statistics import NORMAL_QUANTILE
from ..log_keys import PREFIX
from ..number_format import format_number, format_percent, format_share
from ..report_data.data import ReportData
from .evidence import final_measurement, is_finite
from .learning_rate import against_raising, learning_rate_far_below_limit
from .loss_curve import (
    SMOOTHING_WINDOW,
    UNDERFIT_SHARE,
    chance_loss,
    grad_norm,
    instability,
    logged_losses,
    mean_loss,
    measured_ends,
    risen_measurements,
    start_of,
)
from .outcome import Finding, Fine, NotChecked, Outcome
from .progress import not_converged, underfitting


ABOVE_CHANCE = 1.1
"""Loss relative to that of a guess above which a model is worse than one."""

EVAL_OVER_TRAINING = 2.0
"""Loss in eval mode relative to that in training mode, on the same data, above which they are not one model. Dropout
makes the second one larger; batch statistics that fit no other batch make it smaller."""

EVAL_EXCESS = 0.2
"""Share of the start's loss by which it is then larger as well: a loss near 0 differs by any factor."""


class Accuracy(NamedTuple):
    """Accuracy on evaluation data at the end, and that of always answering the most frequent label.

    Attributes:
        value: Share of right answers.
        low: Lower end of its 95 % interval over the examples (Wilson 1927).
        high: Upper end.
        guess: Accuracy of the most frequent label; without label counts 1/C, which is at most that.
        guessed_by: What `guess` is, in words.
    """

    value: float
    low: float
    high: float
    guess: float
    guessed_by: str

    @property
    def is_like_guessing(self) -> bool:
        """Whether less than a tenth of the way from the guess to all answers right is covered."""
        return self.high < self.guess + (1 - UNDERFIT_SHARE) * (1 - self.guess)

    def __str__(self) -> str:
        share = format_share(self.value, self.low, self.high)
        return f"accuracy on evaluation data {share}, by {self.guessed_by} {format_percent(self.guess)}"


def batch_norm_statistics(report: ReportData) -> Outcome:
    """Report a model with BatchNorm that is far worse in eval mode than in training, or gets worse there alone."""
    if report.model.batch_norm is None:
        return NotChecked("model")
    if not report.model.batch_norm:
        return Fine("The model has no BatchNorm.")
    first, last, logged = start_of(report), final_measurement(report), logged_losses(report)[-SMOOTHING_WINDOW:]
    if isinstance(last, NotChecked):
        return last
    if isinstance(first, NotChecked):
        return first
    if not logged:
        return NotChecked("logged_losses", 0, 1)
    training = statistics.fmean(logged) / (report.training.get("loss_scale") or 1.0)
    least = max(EVAL_OVER_TRAINING * training, training + EVAL_EXCESS * mean_loss(first))
    rose = any(last is measurement for measurement in risen_measurements(report)) and not instability(report)
    if mean_loss(last) <= least and not rose:
        return Fine()
    norms = _ends(grad_norm(first), grad_norm(last))
    tops = _ends(first.hessian.lambda_max.value, last.hessian.lambda_max.value)
    than = "in training" if mean_loss(last) > least else "before, and in training it is not"
    return Finding(
        name="batch_norm_statistics",
        severity="problem",
        sentence=f"BatchNorm's running statistics do not fit: in eval mode the model is far worse than {than}.",
        evidence=(
            f"training loss at the end of the log: {format_number(training)}",
            measured_ends(first, last),
            *(str(accuracy) for accuracy in [accuracy_at_end(report)] if accuracy is not None),
            f"in eval mode, at step {first.step:,} and {last.step:,}: gradient norm {norms}, λ_max {tops}",
        ),
        advice="Look at the `momentum` of the BatchNorm layers: set it to 0.1 if it is near 1, where the running "
        "statistics are those of the last batch alone (`--batch_norm_momentum 0.1` with the command). If it is not, "
        "train for more steps, with larger batches, or with BatchNorm in eval mode. What is measured in eval mode is "
        "measured with these statistics.",
        source="Ioffe and Szegedy, arXiv 1502.03167, section 3.1",
    )


def _ends(first: float, last: float) -> str:
    return " and ".join(format_number(number, digits=2) for number in (first, last))


def no_better_than_chance(report: ReportData) -> Outcome:
    """Report a model that does not do better than a guess when training has ended."""
    first, last = start_of(report), final_measurement(report)
    if isinstance(last, NotChecked):
        return last
    if isinstance(first, NotChecked):
        return first
    chance, accuracy = chance_loss(report), accuracy_at_end(report)
    if chance is None and accuracy is None:
        return NotChecked("classes")
    fell = mean_loss(last) < UNDERFIT_SHARE * mean_loss(first)
    above = chance is not None and not fell and mean_loss(last) > ABOVE_CHANCE * chance
    guesses = accuracy is not None and accuracy.is_like_guessing
    at_chance = chance is not None and not fell and mean_loss(last) > UNDERFIT_SHARE * chance
    better = accuracy is not None and accuracy.low > accuracy.guess
    if not above and not guesses and (better or not at_chance):
        return Fine()
    if not above and not guesses and (_slow(report) or isinstance(underfitting(report), Finding)):
        return Fine("Another finding explains it.")
    evidence = [measured_ends(first, last)]
    if chance is not None:
        evidence.append(f"loss of a guess among {report.model.classes:,} classes: {format_number(chance)}")
    if accuracy is not None:
        evidence.append(str(accuracy))
    return Finding(
        name="no_better_than_chance",
        severity="problem" if above or guesses else "warning",
        sentence=f"The model {'does worse' if above else 'does not do better'} than a guess.",
        evidence=tuple(evidence),
        advice=_cure(report, fell=fell),
        source="less than a tenth of the way from a guess is covered; a guess has a loss of ln C",
    )


def _cure(report: ReportData, *, fell: bool) -> str:
    """Return what to do about a model that guesses, by what is known of its training."""
    if isinstance(batch_norm_statistics(report), Finding):
        return "First make BatchNorm's statistics fit, then judge the model again."
    if instability(report):
        return "Start again with a lower learning rate or a longer warm-up: training was unstable."
    if slow := _slow(report):
        return slow.advice
    if fell:
        return (
            "Check that the labels of the evaluation set mean what those of the training set do. The model has learnt "
            "its training examples; if the labels agree, it has learnt nothing else from them: look for wrong labels, "
            "and for more data."
        )
    labels = "Check that the labels belong to the inputs and that nothing needed is frozen."
    against = against_raising(report)
    return f"{labels} Then train for more steps{'' if against else ', or at a higher learning rate'}."


def _slow(report: ReportData) -> Finding | None:
    """Return the finding that the model needs more steps, or larger ones."""
    outcomes = (rule(report) for rule in (learning_rate_far_below_limit, not_converged))
    return next((outcome for outcome in outcomes if isinstance(outcome, Finding)), None)


def accuracy_at_end(report: ReportData) -> Accuracy | None:
    """Return the accuracy of the final weights, by the Trainer's own evaluation or by the measured gap's examples."""
    last = final_measurement(report)
    if isinstance(last, NotChecked) or not (report.model.classes or report.data.majority_share):
        return None
    entries = [entry for entry in report.log_history if entry.get("step") == last.step]
    for key, examples in (("eval_accuracy", report.data.eval_examples), (f"{PREFIX}eval_accuracy", None)):
        for entry in entries:
            number = examples or entry.get(f"{PREFIX}gap_examples")
            if number and is_finite(entry.get(key)) and 0 <= entry[key] <= 1:
                return _accuracy(report, float(entry[key]), int(number))
    return None


def _accuracy(report: ReportData, value: float, examples: int) -> Accuracy:
    """Return an accuracy with its interval, and the guess that it compares with."""
    z2 = NORMAL_QUANTILE**2 / examples
    middle = (value + z2 / 2) / (1 + z2)
    margin = math.sqrt(z2 * (value * (1 - value) + z2 / 4)) / (1 + z2)
    if report.data.majority_share is not None:
        guess, words = report.data.majority_share, "the most frequent label"
    else:
        guess, words = 1 / (report.model.classes or 1), "a guess among all classes"
    return Accuracy(value, middle - margin, middle + margin, guess, words)
