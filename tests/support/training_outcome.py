# SPDX-License-Identifier: Apache-2.0
"""What a training leaves behind, and whether two leave the same, to the last bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Trainer


def run(trainer: Trainer) -> dict[str, Any]:
    """Trains; all that this leaves behind."""
    trainer.train()
    return left_behind(trainer)


def left_behind(trainer: Trainer) -> dict[str, Any]:
    """All that a training leaves behind, wherever it stopped."""
    model = trainer.model
    own = ("loss", "grad_norm", "learning_rate", "epoch", "step", "eval_loss")
    log = [{k: v for k, v in entry.items() if k in own} for entry in trainer.state.log_history]
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return {
        "weights": model.state_dict(),
        "buffers": dict(model.named_buffers()),  # those too that are not saved
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "log": [entry for entry in log if entry.keys() & {"loss", "eval_loss"}],
        "rng": torch.get_rng_state(),
        "numpy rng": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
        "python rng": random.getstate(),
        "modes": [module.training for module in model.modules()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "attention": [config._attn_implementation for config in configs],
        "cache": [vars(config).get("use_cache") for config in configs],
        "checkpointing": [vars(module).get("gradient_checkpointing") for module in model.modules()],
        "compiled": [module._compiled_call_impl is not None for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, however nested."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{index}")
    else:
        assert a == b or (a != a and b != b), where  # NaN is what it was, too
