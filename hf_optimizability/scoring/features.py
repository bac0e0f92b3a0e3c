# SPDX-License-Identifier: Apache-2.0
"""The inputs of a model's classification head: the features that scores are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ..model_state.measuring import full_precision, measuring


def head_features(
    model: nn.Module, batches: Iterable[Any], *, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the inputs of a classifier's last linear layer, in eval mode, and the labels.

    That layer is identified by its output, the logits. Where it runs over all tokens, as in decoders, the token whose
    output became the logits counts. The model is left unchanged.

    Args:
        model: A `*ForSequenceClassification` or `*ForImageClassification` model, bare or with PEFT.
        batches: Its inputs, dicts with `labels`.
        seed: Seed of whatever the model draws.

    Returns:
        Features of shape (n, d), and n labels.

    Raises:
        ValueError: If there is no such layer, or a batch has no labels that are classes.
    """
    device = next(model.parameters()).device
    features, labels = [], []
    with measuring(model, seed=seed), full_precision(model), torch.no_grad():
        for batch in batches:
            if not isinstance(batch, Mapping) or "labels" not in batch:
                raise ValueError("A batch has no labels. Pass dicts of the model's inputs with `labels`.")
            batch_labels = batch["labels"]
            if batch_labels.ndim != 1 or batch_labels.dtype.is_floating_point:
                raise ValueError(
                    f"Labels have shape {tuple(batch_labels.shape)} and dtype {batch_labels.dtype}; scores are for "
                    "one class an example, whole numbers of shape (batch,)."
                )
            features.append(_of_batch(model, send_to_device(dict(batch), device)))
            labels.append(batch_labels.cpu())
    if not features:
        raise ValueError("`batches` is empty, so there is nothing to score on. Pass at least one batch.")
    return torch.cat(features).double().numpy(), torch.cat(labels).numpy().astype(np.int64)


def _of_batch(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    calls: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls.append((inputs[0], output))

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(record).remove)
        logits = model(**batch)["logits"]
    for taken, given in reversed(calls):
        if given.shape == logits.shape and torch.equal(given, logits):
            return taken.cpu()
        if given.ndim == 3 and given.shape[::2] == logits.shape and len(given) == len(taken):
            same = (given == logits[:, None]).all(dim=-1)
            if same.any(dim=1).all():
                return taken[torch.arange(len(taken)), same.int().argmax(dim=1)].cpu()
    raise ValueError(
        f"The logits of {type(model).__name__} are not the output of any of its linear layers, so that its features "
        "are unknown. Scores need a classifier that ends in a linear layer."
    )


def validate_features(
    features: ArrayLike, labels: ArrayLike, *, minimum: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return both as arrays.

    Raises:
        ValueError: If their shapes do not match, they are too few, have one class only, or are not finite.
    """
    F, y = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if F.ndim != 2 or y.shape != (len(F),) or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"Features have shape {F.shape} and labels {y.shape}, {y.dtype}; pass (n, d) and n whole numbers."
        )
    if len(F) < minimum or len(np.unique(y)) < 2:
        raise ValueError(
            f"{len(F)} examples of {len(np.unique(y))} classes are too few for a score; pass at least {minimum} of at "
            "least 2."
        )
    if not np.isfinite(F).all():
        raise ValueError("Features are not finite: look for inputs or weights that are not.")
    return F, y
