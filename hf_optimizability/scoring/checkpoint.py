# SPDX-License-Identifier: Apache-2.0
"""All scores of a checkpoint for a task."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import nn
from transformers.utils import logging

from ..config import OptimizabilityConfig
from ..errors import MeasurementError, type_name
from ..measurement.engines import HvpEngine, choose_engine
from ..model_state.measuring import full_precision, measuring
from ..number_format import format_interval
from ..objective.batches import cut_batch
from ..objective.objective import LossFunction, Objective
from ..reasons import Reason
from ..redaction import redact_secrets
from .features import head_features
from .gradients import gradient_scores
from .linear_probe import linear_probe
from .logme import logme
from .score import Score


logger = logging.get_logger(__name__)

PART_EXAMPLES = 4
"""Examples in each part whose gradients are compared."""

_GRADIENT, _PRODUCT = 2, 4
"""Passes of a gradient (forward, backward) and of a product, whose passes are differentiated again."""


@dataclass(frozen=True)
class CheckpointScores:
    """Scores of a checkpoint for a task before any training; `None` where one can't be computed.

    Attributes:
        logme: Log maximum evidence of the labels, given the frozen features.
        linear_probe: Cross-validated accuracy of logistic regression on the frozen features.
        alignment: Mean cosine between the gradients of small parts of the data.
        predicted_decrease: How much the best step along −g lowers the loss by the quadratic model.
        notes: Why a score can't be computed, by its name.
    """

    logme: Score | None = None
    linear_probe: Score | None = None
    alignment: Score | None = None
    predicted_decrease: Score | None = None
    notes: Mapping[str, Reason] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Time that all of them took together."""
        held = (self.logme or self.linear_probe, self.alignment or self.predicted_decrease)
        return sum(score.seconds for score in held if score is not None)

    @property
    def result(self) -> str:
        """The scores in a few words, or why there are none."""
        held = {name: self.of(name) for name in NAMES}
        parts = [
            f"{name} {format_interval(score.value, score.low, score.high)}" for name, score in held.items() if score
        ]
        return ", ".join(parts) or f"not scored: {'; '.join(dict.fromkeys(map(str, self.notes.values())))}"

    def of(self, name: str) -> Score | None:
        """Return the score of that name."""
        score: Score | None = vars(self)[name]
        return score

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain data."""
        return asdict(self)


NAMES = tuple(held.name for held in fields(CheckpointScores) if held.name != "notes")


def score_checkpoint(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: LossFunction | None = None,
    gradient_examples: int = 64,
    seed: int = 0,
) -> CheckpointScores:
    """Score a classifier for a task without training it: LogME, linear probe, gradient alignment, predicted decrease.

    In eval mode, float32. The model is left unchanged. LogME and the linear probe see the inputs of the head, so they
    ignore learning rate, optimizer and which weights are trained; gradients are with respect to the trained weights.

    Args:
        model: A `*ForSequenceClassification` or `*ForImageClassification` with a head for the task, bare or with PEFT.
        batches: A few hundred training examples, drawn at random: dicts of what the model takes, with `labels`.
        loss_fn: As for `measure`; the model's own loss by default.
        gradient_examples: How many of them, from the first on, to compute gradients of; 0 for none.
        seed: Seed of folds and groups.

    Returns:
        The scores; one that can't be computed is `None`, and `notes` say why.

    Raises:
        ValueError: If there is no batch, or nothing is trained.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                     intermediate_size=8)
        >>> tokens = torch.randint(9, (40, 4), generator=torch.Generator().manual_seed(0))
        >>> batch = {"input_ids": tokens, "labels": (tokens[:, 1] > 4).long()}
        >>> scores = score_checkpoint(BertForSequenceClassification(config), [batch], gradient_examples=40)
        >>> scores.linear_probe.passes, scores.alignment.examples
        (1, 40)
    """
    batches = list(batches)
    held: dict[str, Score] = {}
    notes: dict[str, Reason] = {}
    started = time.perf_counter()
    try:
        features, labels = head_features(model, batches, seed=seed)
        held["logme"] = logme(features, labels, seed=seed)
        held["linear_probe"] = linear_probe(features, labels, seed=seed)
    except ValueError as error:
        notes |= dict.fromkeys(("logme", "linear_probe"), _why(error))
    held = {name: _priced(score, passes=1, since=started) for name, score in held.items()}
    if gradient_examples:
        started = time.perf_counter()
        try:
            objective = Objective(model, _first(batches, gradient_examples), loss_fn=loss_fn)
            alignment, decrease = _gradient_scores(objective, seed=seed)
            held["alignment"] = _priced(alignment, passes=2 * _GRADIENT, since=started)
            if decrease is None:
                notes["predicted_decrease"] = Reason("no_best_step")
            else:
                held["predicted_decrease"] = _priced(decrease, passes=2 * _GRADIENT + _PRODUCT, since=started)
        except (MeasurementError, FloatingPointError, ValueError) as error:
            notes |= dict.fromkeys(("alignment", "predicted_decrease"), _why(error))
    return CheckpointScores(**held, notes=notes)


def _why(error: Exception) -> Reason:
    """Return why a score can't be computed, as pages have it; the log gets the text of the error."""
    logger.warning_once(redact_secrets(str(error)))
    return error.why if isinstance(error, MeasurementError) else Reason("score_failed", error=type_name(error))


def _priced(score: Score, *, passes: int, since: float) -> Score:
    return replace(score, passes=passes, seconds=time.perf_counter() - since)


def _first(batches: Iterable[Any], examples: int) -> list[Any]:
    """Return the first examples, in parts of `PART_EXAMPLES`."""
    return [part for batch in batches for part in cut_batch(batch, PART_EXAMPLES)][: examples // PART_EXAMPLES]


def _gradient_scores(objective: Objective, *, seed: int) -> tuple[Score, Score | None]:
    config = OptimizabilityConfig(probe_seed=seed)
    with measuring(objective.model, seed=seed), full_precision(objective.model):

        def score(engine: HvpEngine) -> tuple[Score, Score | None]:
            return gradient_scores(objective, engine.operator(objective))

        return choose_engine(objective, config, score)[1]
