# SPDX-License-Identifier: Apache-2.0
"""Trainings under DeepSpeed on the CPU, with and without the callback, on one of the ranks of `torchrun`.

    torchrun --nproc_per_node 2 -m tests.support.deepspeed_training FOLDER

writes to `found.json` in that folder what was measured, by case; fails where the callback changed anything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from hf_optimizability import OptimizabilityCallback, OptimizabilityConfig
from tests.support import tiny_training
from tests.support.stopped_training import STEPS
from tests.support.training_outcome import assert_equal, run


CASES: dict[str, dict[str, Any]] = {
    **{f"ZeRO-{stage}": {"stage": stage} for stage in (0, 1, 2)},
    "ZeRO-2, accumulation": {"stage": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "ZeRO-2, bf16": {"stage": 2, "bf16": True},
}


def options(stage: int, **case: Any) -> dict[str, Any]:
    """As a user's, with what DeepSpeed wants to hear of."""
    deepspeed = {
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto"),
        "gradient_accumulation_steps": "auto",
    }
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3}
    return {"deepspeed": deepspeed, **settings, **case}


def tensors(held: Any) -> Any:
    """The same without DeepSpeed's own objects, which are new ones each time."""
    if isinstance(held, dict):
        return {key: tensors(value) for key, value in held.items()}
    if isinstance(held, (list, tuple)):
        return [tensors(value) for value in held]
    return held if held is None or isinstance(held, (torch.Tensor, str, int, float)) else type(held).__name__


def found(folder: Path, case: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements of a training that ends as one without."""
    from deepspeed import DeepSpeedEngine  # here, as pytest looks for examples in this module

    plain = run(tiny_training.trainer(folder / "plain", **options(**case)))
    callback = OptimizabilityCallback(OptimizabilityConfig(**tiny_training.IN_TWO_BATCHES, **STEPS))
    trainer = tiny_training.trainer(folder / "measured", callbacks=[callback], **options(**case))
    assert_equal(tensors(run(trainer)), tensors(plain))
    assert isinstance(trainer.model_wrapped, DeepSpeedEngine)
    assert trainer.model_wrapped.zero_optimization_stage() == case["stage"]
    assert not callback.report.failures, callback.report.failures[0].reason
    return [measurement.to_dict() for measurement in callback.report.measurements]


def main() -> None:
    """All cases, one after the other."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    measured = {name: found(folder / name, case) for name, case in CASES.items()}
    if torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
