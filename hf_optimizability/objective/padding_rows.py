# SPDX-License-Identifier: Apache-2.0
"""Rows of embedding weights that torch makes no gradient for when they are looked up: `padding_idx`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .objective import Objective


def without_padding_rows(objective: Objective, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors shaped like the parameters with 0 where `padding_idx` keeps the gradient from being the slope.

    Of a weight that is tied to the head, the gradient of that row is the head's part alone, although the loss depends
    on the lookup as well, wherever the token is more than padding (the end of each turn of a chat).

    Args:
        objective: The loss.
        tensors: One for each of its parameters; shards are returned as they are.
    """
    rows = {
        id(module.weight): module.padding_idx
        for module in objective.model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None
    }
    found = []
    for parameter, tensor in zip(objective.parameters, tensors, strict=True):
        row = rows.get(id(parameter))
        if row is not None and tensor.layout is torch.strided and tensor.shape == parameter.shape:
            tensor = tensor.clone()
            tensor[row] = 0
        found.append(tensor)
    return tuple(found)
