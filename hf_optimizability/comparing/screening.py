# SPDX-License-Identifier: Apache-2.0
"""Score candidates before any training, and select those worth training."""

from __future__ import annotations

import math
from collections.abc import Mapping

from scipy.stats import norm
from transformers import Trainer

from ..objective.probe_set import ProbeSpec, draw_probe_set
from ..scoring.checkpoint import CheckpointScores, score_checkpoint
from ..scoring.score import Score
from ..training.trainer_loss import trainer_loss
from .ranking import CONFIDENCE
from .training import Inputs


GRADIENT_EXAMPLES = 32
"""Examples whose gradients are taken; a product over them costs as much as a forward pass over six times as many."""


def score_inputs(inputs: Inputs, *, examples: int) -> CheckpointScores:
    """Score a candidate on training examples, the same ones for every candidate.

    Raises:
        ValueError: If something can't be loaded or does not fit.
        Exception: Whatever the model raises.
    """
    loaded = inputs.load()
    trainer = Trainer(args=inputs.training, **loaded.as_kwargs())
    spec = ProbeSpec(examples, batch_size=inputs.training.per_device_eval_batch_size, seed=inputs.data_seed)
    batches = draw_probe_set(trainer.get_train_dataloader(), spec).batches
    return score_checkpoint(
        loaded.model,
        batches,
        loss_fn=trainer_loss(trainer),
        gradient_examples=GRADIENT_EXAMPLES,
        seed=inputs.data_seed,
    )


def select(scores: Mapping[str, Score | None], number: int) -> tuple[str, ...]:
    """Return the `number` best, those not significantly worse than the last of these, and those without a score.

    A score is significantly worse if it is so with a probability of at least 0.95, the errors taken as independent.
    They are from the same examples, so that this errs on the side of keeping. Candidates that differ only in what the
    score does not see score alike, and are kept or dropped together.

    Args:
        scores: By candidate.
        number: How many to keep at least.

    Example:
        >>> scores = {name: Score.from_error(value, 0.02, freedom=99, examples=100) for name, value in
        ...           {"a": 0.9, "b": 0.7, "b too": 0.7, "c": 0.68, "d": 0.5}.items()}
        >>> select(scores, 2)
        ('a', 'b', 'b too', 'c')
    """
    ordered = sorted((score for score in scores.values() if score is not None), key=lambda score: -score.value)
    if len(ordered) <= number:
        return tuple(scores)
    last = ordered[number - 1]

    def significantly_worse(score: Score) -> bool:
        error = math.hypot(last.std_error, score.std_error)
        return last.value - score.value > float(norm.ppf(CONFIDENCE)) * error

    return tuple(name for name, score in scores.items() if score is None or not significantly_worse(score))
