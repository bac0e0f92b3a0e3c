# SPDX-License-Identifier: Apache-2.0
"""A batch of two examples for any architecture, as its data collator would make it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from architecture_cases import Case
from architecture_kinds import KIND_BATCHES, Batch, tokens
from architecture_sizes import LABELS, LENGTH, PADDING, SEED
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


def make_batch(case: Case, model: PreTrainedModel) -> Batch:
    """Two examples; of two texts, the second one is padded."""
    torch.manual_seed(SEED + 1)
    if case.task in KIND_BATCHES:
        batch = KIND_BATCHES[case.task](case, model)
    elif case.task == "image classification":
        batch = {"pixel_values": torch.randn(2, 3, *image_size(model.config)), "labels": torch.tensor([0, 2])}
    else:
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        mask[1, -PADDING:] = 0
        ids = tokens(2, LENGTH) * mask
        end = vars(model.config.get_text_config()).get("eos_token_id")
        if isinstance(end, int):  # encoder-decoders classify by it
            ids[0, -1] = ids[1, -PADDING - 1] = end
        batch = {"input_ids": ids, "attention_mask": mask} | labels(case, ids, mask)
        if "attention_mask" not in inspect.signature(model.forward).parameters:
            del batch["attention_mask"]
    extras = EXTRAS.get((case.task, case.model_type), EXTRAS.get(case.model_type, dict))()
    return {name: value for name, value in {**batch, **extras}.items() if value is not None}


def image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width that a model takes; an arbitrary one where the configuration names none."""
    size = vars(vars(config).get("vision_config", config)).get("image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def labels(case: Case, ids: Tensor, mask: Tensor) -> Batch:
    """Return each task's training targets; -100 for padding and, in a masked LM, for two tokens of three."""
    if case.task == "sequence classification":
        return {"labels": torch.tensor([0, 2])}
    if case.task == "question answering":
        return {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([4, 7])}
    target = {"token classification": torch.randint(LABELS, ids.shape), "seq2seq LM": tokens(*ids.shape)}
    kept = mask.bool()
    if case.task == "masked LM":
        kept = kept & (torch.arange(LENGTH) % 3 == 0)
    return {"labels": target.get(case.task, ids).masked_fill(~kept, -100)}


def musicgen_batch() -> dict[str, Tensor | None]:
    """Four books of codes for each example, stacked."""
    return {"input_ids": tokens(8, LENGTH), "attention_mask": None, "labels": tokens(2, LENGTH, 4)}


EXTRAS: dict[str | tuple[str, str], Callable[[], dict[str, Tensor | None]]] = {
    "bros": lambda: {"bbox": torch.rand(2, LENGTH, 4)},
    "git": lambda: {"pixel_values": torch.randn(2, 3, 16, 16)},
    "imagegpt": lambda: {"pixel_values": None, "input_ids": tokens(2, LENGTH)},
    ("question answering", "longformer"): lambda: {"global_attention_mask": torch.eye(1, LENGTH).long().repeat(2, 1)},
    "lxmert": lambda: {
        "visual_feats": torch.randn(2, 4, 32), "visual_pos": torch.rand(2, 4, 4), "labels": torch.tensor([0, 1]),
        "start_positions": None, "end_positions": None,
    },
    "voxtral_realtime": lambda: {"input_features": torch.randn(2, 32, 128)},
    "musicgen": musicgen_batch,
    "musicgen_melody": musicgen_batch,
    "siglip2": lambda: {
        "pixel_values": torch.randn(2, 16, 48), "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.full((2, 2), 4),
    },
}  # fmt: skip
"""What else a model must be given, or (`None`) what it can't take; by model type, or task and model type."""
