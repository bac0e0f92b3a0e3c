# SPDX-License-Identifier: Apache-2.0
"""What each library takes as Transformers gives it: one product on tiny models, against differences of gradients.

The truth is the central difference of gradients of the loss that a Trainer minimizes, the mean over all labels of all
batches in eval mode; it needs no second derivative and shares no code with any library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from libraries import Batch, Library, Products
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedModel


VOCABULARY = 13
IGNORED = -100
TOLERANCE = 1e-3  # Transformers takes the loss of a decoder in float32, so the differences are good to about 1e-5


@dataclass(frozen=True)
class Case:
    """A model and batches that a library may or may not take.

    Attributes:
        model: Float64.
        batches: As a data collator gives them.
        in_use: Whether the model is in the middle of training, so that its mode and `.grad` must stay as they are.
    """

    model: PreTrainedModel
    batches: list[Batch]
    in_use: bool = False


def bert(*, attention: str | None = "eager") -> PreTrainedModel:
    """Build a tiny classifier with dropout, in eval mode."""
    config = BertConfig(  # type: ignore[call-arg]  # what all configurations take is not in its signature
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8, num_labels=3, attn_implementation=attention,
    )  # fmt: skip
    return BertForSequenceClassification(config).double().eval()


def gpt2() -> PreTrainedModel:
    """Build a tiny decoder whose head is tied to its embeddings, in eval mode."""
    config = GPT2Config(  # type: ignore[call-arg]
        vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1,
        attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def sentences(*sizes: int) -> list[Batch]:
    """Batches of so many labelled sentences."""
    return [
        {
            "input_ids": _tokens(size, 6),
            "attention_mask": torch.ones(size, 6, dtype=torch.long),
            "labels": torch.randint(3, (size,)),
        }
        for size in sizes
    ]


def texts(*ignored: int) -> list[Batch]:
    """Batches of texts whose last labels, so many in each batch, are padding."""
    batches = []
    for number in ignored:
        tokens = _tokens(3, 8)
        labels = tokens.clone()
        labels[:, 8 - number :] = IGNORED
        batches.append({"input_ids": tokens, "attention_mask": (labels != IGNORED).long(), "labels": labels})
    return batches


def _tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape)  # 0 is padding, whose embedding is held fixed


def frozen() -> Case:
    """Build a classifier whose embeddings are frozen."""
    model = bert()
    model.get_input_embeddings().requires_grad_(False)
    return Case(model, sentences(4))


def unused() -> Case:
    """Build a classifier with a parameter that its loss does not use."""
    model = bert()
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    return Case(model, sentences(4))


def training() -> Case:
    """Build a classifier as in the middle of a Trainer's epoch: in train mode, with gradients."""
    model = bert().train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return Case(model, sentences(4), in_use=True)


FEATURES: dict[str, Callable[[], Case]] = {
    "SDPA attention (the default)": lambda: Case(bert(attention=None), sentences(4)),
    "model in the middle of training, with dropout": training,
    "batches of 5 and 2 examples": lambda: Case(bert(), sentences(5, 2)),
    "padded labels (-100), two batches": lambda: Case(gpt2(), texts(1, 5)),
    "tied weights": lambda: Case(gpt2(), texts(0)),
    "frozen parameters": frozen,
    "a parameter that the loss does not use": unused,
}


def try_features(library: type[Library]) -> dict[str, str]:
    """Try all features on a library; except for the first, its adapter converts dict batches.

    Returns:
        Per feature `"works"`, how far the product is off, what changed in the user's model, or how it failed.
    """

    def adapted(model: nn.Module, batches: list[Batch], vector: Tensor) -> Tensor:
        return library(model, batches, Products()).product(vector)

    torch.manual_seed(0)
    outcomes = {"dict batches, no wrapper": outcome(library.product_as_given, Case(bert(), sentences(4)))}
    for name, make in FEATURES.items():
        torch.manual_seed(0)
        outcomes[name] = outcome(adapted, make())
    return outcomes


def outcome(multiply: Callable[[nn.Module, list[Batch], Tensor], Tensor], case: Case) -> str:
    """Describe the result of `multiply(model, batches, vector)`."""
    parameters = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    vector = torch.randn(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    vector /= vector.norm()
    mode, gradients = case.model.training, [parameter.grad for parameter in parameters]
    expected = difference(case, parameters, vector)
    case.model.train(mode)
    try:
        product = multiply(case.model, case.batches, vector)
    except Exception as error:
        return failure(error)
    deviation = float((product - expected).norm() / expected.norm())
    remarks = [] if deviation < TOLERANCE else [f"off by {deviation:.1%}"]
    if case.in_use and case.model.training != mode:
        remarks.append("leaves the model in eval mode")
    if case.in_use and any(p.grad is not before for p, before in zip(parameters, gradients, strict=True)):
        remarks.append("overwrites .grad")
    return "; ".join(remarks) or "works"


def difference(case: Case, parameters: list[nn.Parameter], vector: Tensor, *, step: float = 1e-3) -> Tensor:
    """`H v` of the mean loss over all labels, by a central difference of gradients in eval mode."""
    case.model.eval()
    pieces = vector.split([parameter.numel() for parameter in parameters])

    def move(distance: float) -> None:
        with torch.no_grad():
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.add_(piece.view_as(parameter), alpha=distance)

    def gradient_at(distance: float) -> Tensor:
        move(distance)
        total, items = torch.zeros_like(vector), 0
        for batch in case.batches:
            labels = batch["labels"] if batch["labels"].ndim == 1 else batch["labels"][:, 1:]
            count = int((labels != IGNORED).sum())
            found = torch.autograd.grad(case.model(**batch).loss, parameters, materialize_grads=True)
            total += count * torch.cat([piece.flatten() for piece in found])
            items += count
        move(-distance)
        return total / items

    return (gradient_at(step) - gradient_at(-step)) / (2 * step)


def failure(error: BaseException) -> str:
    """How it failed: the exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"fails: {type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
