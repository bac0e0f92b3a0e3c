# SPDX-License-Identifier: Apache-2.0
"""Kinds of distributed training that are unsupported, or supported in part, and what to do instead."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from .tensors import is_sharded


_INSTEAD = "Train with FSDP2 (`fsdp=True, fsdp_config={'version': 2}`), which can be measured, or do not measure."


def require_supported(model: nn.Module, args: TrainingArguments | None = None) -> None:
    """Raise for models whose parameters are available neither unsharded nor as FSDP2's shards.

    Supported: one process, DistributedDataParallel, FSDP2, DeepSpeed up to ZeRO-2 (see
    `deepspeed_limits`), and models that `device_map` splits over devices.

    Args:
        model: The model to measure.
        args: The Trainer's arguments, if there is one.

    Raises:
        ValueError: Under ZeRO-3, FSDP1 or tensor parallelism.

    Example:
        >>> require_supported(nn.Linear(2, 1))
    """
    if zero_stage(args) == 3 or any("ds_id" in vars(parameter) for parameter in model.parameters()):
        raise ValueError(
            "DeepSpeed ZeRO-3 partitions each parameter and gathers it only while a layer runs, within its own "
            "backward pass: there is no gradient to differentiate again, and no shard to perturb. Use ZeRO stage 2, "
            f"which does not partition parameters. {_INSTEAD}"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            f"FSDP1 flattens the parameters of a layer into one, which has no second derivative. {_INSTEAD}"
        )
    if not is_sharded(model) and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(f"The parameters are sharded by tensor parallelism. {_INSTEAD}")


def deepspeed_limits(args: TrainingArguments) -> str | None:
    """Return what is not measured under DeepSpeed up to ZeRO-2, and why; `None` without DeepSpeed."""
    stage = zero_stage(args)
    if stage is None:
        return None
    return (
        f"Under DeepSpeed (ZeRO-{stage}), gradient and curvature are measured as under DistributedDataParallel, in "
        "half-precision training on DeepSpeed's rounded weights, cast to float32. Not measured with ZeRO-1/2 or in "
        "half precision: optimizer stability, since DeepSpeed keeps the optimizer's state. Not logged: per-block "
        "gradient norms of training steps, since DeepSpeed leaves `.grad` empty. For those, train with FSDP2 or "
        "DistributedDataParallel."
    )


def zero_stage(args: TrainingArguments | None) -> int | None:
    """Return the stage of DeepSpeed's ZeRO that a Trainer with these arguments uses; `None` without DeepSpeed."""
    return None if args is None or args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage
