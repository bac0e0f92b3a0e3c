# SPDX-License-Identifier: Apache-2.0
"""What a Hessian-vector product costs beside a gradient, on the checkpoints of the demo, in one process, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from hf_optimizability.curvature.operators import HessianOperator
from hf_optimizability.gradients import gradient
from hf_optimizability.objective import Objective
from hf_optimizability.safety import math_attention


ROUNDS = 5
EXAMPLES = 16
LOCKSTEPS = (1, 4)


def cases() -> dict[str, tuple[PreTrainedModel, dict[str, Tensor]]]:
    """Real checkpoints, random inputs of the demo's sizes."""
    torch.manual_seed(0)
    text = AutoModelForSequenceClassification.from_pretrained(".venv/all-MiniLM-L6-v2", num_labels=2, dtype="float32")
    path = "recipes/checkpoints/mobilenet_v2_1.0"
    vision = AutoModelForImageClassification.from_pretrained(path, num_labels=10, dtype="float32")
    labels = torch.randint(0, 2, (EXAMPLES,))
    return {
        "MiniLM-L6, 48 tokens": (text, {"input_ids": torch.randint(1000, 20000, (EXAMPLES, 48)), "labels": labels}),
        "MobileNetV2, 64 px": (vision, {"pixel_values": torch.randn(EXAMPLES, 3, 64, 64), "labels": labels}),
    }


def seconds(action: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Prints medians: seconds of a gradient, and of a product in gradients."""
    print(f"{'':24}{'gradient':>12}" + "".join(f"{f'HVP, {k} at once':>18}" for k in LOCKSTEPS))
    for name, (model, batch) in cases().items():
        objective = Objective(model.eval(), [batch])
        operator = HessianOperator(objective)
        vectors = torch.randn(operator.size, max(LOCKSTEPS))
        actions: dict[int, Callable[[], object]] = {0: partial(gradient, objective)}
        actions |= {k: partial(operator.matmat, vectors[:, :k]) for k in LOCKSTEPS}
        times: dict[int, list[float]] = {k: [] for k in actions}
        with math_attention():
            for _ in range(ROUNDS + 1):  # the first one warms up
                for k, action in actions.items():
                    times[k].append(seconds(action) / max(k, 1))
        medians = {k: statistics.median(values[1:]) for k, values in times.items()}
        ratios = "".join(f"{medians[k] / medians[0]:>8.1f} gradients" for k in LOCKSTEPS)
        print(f"{name:24}{medians[0]:>10.2f} s{ratios}")


if __name__ == "__main__":
    main()
