# SPDX-License-Identifier: Apache-2.0
"""Train a part of a checkpoint: LoRA matrices and the head, or the head alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


if TYPE_CHECKING:
    from peft import PeftModel


def with_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    """Freeze the model, and add LoRA matrices to every linear layer below the head, which is trained entirely.

    Alpha is twice the rank, dropout is 0. Source: Hu et al. 2021, arXiv 2106.09685.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If the rank is below 1, or there is no linear layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'hf-optimizability[peft]'.") from error
    if rank < 1:
        raise ValueError(f"--lora_rank is {rank}; it must be at least 1.")
    base = model.base_model
    prefix = model.base_model_prefix
    linear = [f"{prefix}.{name}" for name, layer in base.named_modules() if isinstance(layer, (nn.Linear, Conv1D))]
    if not linear:
        raise ValueError(
            f"{type(model).__name__} has no linear layer below its head to add LoRA matrices to. Pass --method "
            "full or linear_probe."
        )
    head = [name for name, layer in model.named_children() if layer is not base and list(layer.parameters())]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, modules_to_save=head))


def with_frozen_features(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze everything but the head, and keep the frozen part in eval mode.

    In training mode, dropout would perturb the features, and BatchNorm would make them depend on the batch.

    Raises:
        ValueError: If the model has no head apart from its base.
    """
    base = model.base_model
    if base is model:
        raise ValueError(f"{type(model).__name__} has no head apart from its base. Pass --method full.")

    def stay_in_eval_mode(mode: bool = True) -> nn.Module:
        return nn.Module.train(base, False)

    base.train = stay_in_eval_mode  # type: ignore[method-assign]
    base.requires_grad_(False).eval()
    return model
