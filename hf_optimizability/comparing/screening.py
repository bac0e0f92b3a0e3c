# SPDX-License-Identifier: Apache-2.0
"""Which candidates are worth training: scores before any training, and who they drop."""

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
"""Of these, gradients are taken; a product over them costs as much as a forward pass over six times as many."""


def score_inputs(inputs: Inputs, *, examples: int) -> CheckpointScores:
    """Scores a candidate on training examples, the same ones for every candidate.

    Raises:
        ValueError: If something can't be loaded or does not fit.
        Exception: Whatever the model raises.
    """
    loaded = inputs.loaded()
    trainer = Trainer(args=inputs.training, **loaded)
    spec = ProbeSpec(examples, batch_size=inputs.training.per_device_eval_batch_size, seed=inputs.data_seed)
    batches = draw_probe_set(trainer.get_train_dataloader(), spec).batches
    return score_checkpoint(
        loaded["model"],
        batches,
        loss_fn=trainer_loss(trainer),
        gradient_examples=GRADIENT_EXAMPLES,
        seed=inputs.data_seed,
    )


def kept(scores: Mapping[str, Score | None], number: int) -> tuple[str, ...]:
    """The `number` best, those that can't be told from the last of these, and those without a score.

    Two scores are told apart where the better one is truly better with a probability of at least 0.95, their errors
    taken as independent. They are from the same examples, so that this errs on the side of keeping. Candidates that
    differ only in what the score does not see score alike, and go or stay together.

    Args:
        scores: By candidate.
        number: How many shall stay at least.

    Example:
        >>> scores = {name: Score.from_error(value, 0.02, freedom=99, examples=100) for name, value in
        ...           {"a": 0.9, "b": 0.7, "b too": 0.7, "c": 0.68, "d": 0.5}.items()}
        >>> kept(scores, 2)
        ('a', 'b', 'b too', 'c')
    """
    known = sorted((score for score in scores.values() if score is not None), key=lambda score: -score.value)
    if len(known) <= number:
        return tuple(scores)
    last = known[number - 1]

    def told_worse(score: Score) -> bool:
        error = math.hypot(last.std_error, score.std_error)
        return last.value - score.value > float(norm.ppf(CONFIDENCE)) * error

    return tuple(name for name, score in scores.items() if score is None or not told_worse(score))
