# SPDX-License-Identifier: Apache-2.0
"""Rows of embedding weights whose lookups have no gradient in torch: `padding_idx`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .objective import Objective


def without_padding_rows(objective: Objective, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors shaped like the parameters with 0 in the rows that `padding_idx` excludes from the gradient.

    If the weight is tied to the head, the gradient of that row contains only the head's part, although the loss also
    depends on the lookup if the token is not only padding (the end of each turn of a chat).

    Args:
        objective: The loss.
        tensors: One per parameter; shards are returned as they are.
    """
    rows = {
        id(module.weight): module.padding_idx
        for module in objective.model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None
    }
    masked = []
    for parameter, tensor in zip(objective.parameters, tensors, strict=True):
        row = rows.get(id(parameter))
        if row is not None and tensor.layout is torch.strided and tensor.shape == parameter.shape:
            tensor = tensor.clone()
            tensor[row] = 0
        masked.append(tensor)
    return tuple(masked)
