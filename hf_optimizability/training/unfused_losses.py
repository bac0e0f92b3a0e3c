# SPDX-License-Identifier: Apache-2.0
"""Plain forms of fused losses: the same number, with a second derivative.

Fused losses compute gradients themselves, by operations that can't be differentiated again. While a loss is evaluated
for a measurement, plain functions replace them in the modules of libraries that are already imported.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)


@contextmanager
def unfused_losses() -> Iterator[None]:
    """Compute fused losses of TRL and sentence-transformers in their plain form inside; restore them at exit.

    A library that is not imported is left alone. So is one whose functions take other arguments than the plain forms
    were written for: then there is a warning, and the loss is treated as any without a second derivative.
    """
    with ExitStack() as stack:
        for (module_name, owner_name, name), plain in _PLAIN_FORMS.items():
            module = sys.modules.get(module_name)
            if module is None:
                continue
            owner = vars(module).get(owner_name, module)
            fused = vars(owner).get(name)
            if _has_same_arguments(fused, plain, f"{module_name}.{owner_name or name}"):
                stack.callback(setattr, owner, name, fused)
                setattr(owner, name, plain)
        yield


@cache
def _has_same_arguments(fused: Any, plain: Any, place: str) -> bool:
    """Return whether a fused function takes the arguments that its plain form was written for."""
    if _arguments(fused) == _arguments(plain):
        return True
    logger.warning_once(
        f"`{place}` differs from the version that hf_optimizability has a plain form of, so it is left in place. "
        "If it has no second derivative, central differences are used."
    )
    return False


def _arguments(function: Any) -> list[str]:
    """Return the names of a function's arguments; of an autograd function, those of `apply`."""
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return list(inspect.signature(function.forward).parameters)[1:]  # without the context
    if not callable(function):
        return []
    called: Any = function.apply if function is PlainLogProb else function
    return list(inspect.signature(called).parameters)


class PlainLogProb:
    """TRL's `ChunkedLogProbFunction` in plain operations: log-probabilities from hidden states and the LM head."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return log-probabilities, entropy, log Σp², mean logit and whether the target is the most likely one."""
        logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
        if final_logit_softcapping is not None:
            logits = final_logit_softcapping * torch.tanh(logits / final_logit_softcapping)
        logits = logits / temperature
        log_probs = logits.log_softmax(-1)
        target_log_probs = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1) if "entropy" in outputs else None
        with torch.no_grad():
            log_sum_sq_probs = (2 * log_probs).logsumexp(-1) if "log_sum_sq_probs" in outputs else None
            mean_logits = logits.mean(-1) if "mean_logits" in outputs else None
            is_top1 = logits.argmax(-1) == targets if "is_top1" in outputs else None
        return target_log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1


def _no_kernel(logits: Tensor, index: Tensor | None = None, row_mask: Tensor | None = None) -> bool:
    """Return `False` for `_supports_trl_loss_kernel`: `selective_log_softmax` and others then use plain operations."""
    return False


def _forward_cached(self: Any, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
    """Compute `CachedLossMixin.forward_cached` without its cache: the same mini-batches, in one graph."""
    embeddings = [[outputs[0] for outputs in _embedded(self, features)] for features in sentence_features]
    return self.calculate_loss(embeddings, labels)


def _forward_gist(self: Any, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
    """Compute `CachedGISTEmbedLoss.forward` without its cache."""
    columns = list(sentence_features)
    guides = [[outputs[1] for outputs in _embedded(self, features, with_grad=False)] for features in columns]
    embeddings = [[outputs[0] for outputs in _embedded(self, features)] for features in columns]
    return self.calculate_loss(embeddings, guides)


def _forward_multi_vector(
    self: Any, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
) -> Tensor:
    """Compute `CachedMultiVectorMultipleNegativesRankingLoss.forward` without its cache."""
    columns = [
        list(_embedded(self, {"task": "document" if index else "query", **features}))
        for index, features in enumerate(sentence_features)
    ]
    embeddings = [[outputs[0] for outputs in column] for column in columns]
    return self.calculate_loss(embeddings, [[outputs[1] for outputs in column] for column in columns])


def _forward_cross_encoder(
    self: Any,
    inputs: list[list[str]],
    labels: Tensor | None = None,
    prompt: str | None = None,
    task: str | None = None,
) -> Tensor:
    """Compute the cross-encoder's `CachedMultipleNegativesRankingLoss.forward` as its parent does, uncached."""
    module = sys.modules["sentence_transformers.cross_encoder.losses.multiple_negatives_ranking"]
    return module.MultipleNegativesRankingLoss.forward(self, inputs, labels, prompt, task)


def _shrunk_losses(self: Any, reps: list[list[Tensor]], *args: Any, **kwargs: Any) -> Tensor:
    """Compute `CachedLossDecorator.__call__` (`MatryoshkaLoss` shrinks embeddings by it) without a backward pass."""
    module = sys.modules["sentence_transformers.sentence_transformer.losses.matryoshka"]
    dimensions = list(zip(self.matryoshka_dims, self.matryoshka_weights, strict=True))
    if 0 < self.n_dims_per_step < len(dimensions):
        dimensions = random.sample(dimensions, self.n_dims_per_step)
    losses = [
        weight * self.fn([[module.shrink(r, dimension) for r in batch] for batch in reps], *args, **kwargs)
        for dimension, weight in dimensions
    ]
    return torch.stack(losses).sum()


def _embedded(loss: Any, features: Mapping[str, Any], *, with_grad: bool = True) -> Iterator[tuple[Any, ...]]:
    return loss.embed_minibatch_iter(sentence_feature=features, with_grad=with_grad, copy_random_state=False)


_ST = "sentence_transformers"
_PLAIN_FORMS: dict[tuple[str, str, str], Any] = {
    ("trl.trainer.utils", "", "_ChunkedLogProbFunction"): PlainLogProb,
    ("trl.trainer.utils", "", "_supports_trl_loss_kernel"): _no_kernel,
    (f"{_ST}.base.losses.gradcache", "CachedLossMixin", "forward_cached"): _forward_cached,
    (f"{_ST}.sentence_transformer.losses.matryoshka", "CachedLossDecorator", "__call__"): _shrunk_losses,
    (f"{_ST}.sentence_transformer.losses.cached_gist_embed", "CachedGISTEmbedLoss", "forward"): _forward_gist,
    (
        f"{_ST}.multi_vector_encoder.losses.cached_multiple_negatives_ranking",
        "CachedMultiVectorMultipleNegativesRankingLoss",
        "forward",
    ): _forward_multi_vector,
    (
        f"{_ST}.cross_encoder.losses.cached_multiple_negatives_ranking",
        "CachedMultipleNegativesRankingLoss",
        "forward",
    ): _forward_cross_encoder,
}
"""Plain forms by module, class (or none) and name, as in TRL 1.16 and sentence-transformers 6.2."""
