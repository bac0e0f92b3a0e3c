# SPDX-License-Identifier: Apache-2.0
"""What a Hessian-vector product costs, in gradients: medians of interleaved repeats on two real checkpoints.

A gradient is a forward and a backward pass as Transformers runs them by default. By matrix products alone, each of k
Hessian-vector products in lockstep costs 2 + 1/k gradients. With one thread the time of the processor is taken, which
other processes disturb less; else that of the clock on the wall.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from hf_optimizability.curvature.compact_embeddings import drop_unused_embedding_rows
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.curvature.twice_differentiable import CheapSecondDerivatives
from hf_optimizability.model_state.measuring import math_attention
from hf_optimizability.objective.objective import Objective


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


@contextmanager
def fast(objective: Objective) -> Iterator[None]:
    """Everything that makes products cheaper."""
    with drop_unused_embedding_rows(objective), CheapSecondDerivatives():
        yield


@contextmanager
def plain(objective: Objective) -> Iterator[None]:
    """Second derivatives as torch has them."""
    yield


def main() -> None:
    """Print the median seconds of a gradient, and of a product relative to it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    print(f"{arguments.threads} threads, {arguments.repeats} repeats, torch {torch.__version__}")
    columns = "".join(f"{f'{way.__name__}, {k}':>10}" for way in (plain, fast) for k in LOCKSTEPS)
    print(f"{'':22}{'gradient':>10}{columns}")
    for name, (model, batch) in cases().items():
        objective = Objective(model.eval(), [batch])
        times: dict[object, list[float]] = {}

        def measure(key: object, action: Callable[[], object], times=times) -> None:
            start = clock()
            action()
            times.setdefault(key, []).append(clock() - start)

        for _ in range(arguments.repeats + 1):
            measure("gradient", partial(gradient, objective))
            for way in (plain, fast):
                with math_attention(), way(objective):
                    operator = HessianOperator(objective)
                    vectors = torch.randn(max(LOCKSTEPS), operator.size)
                    for k in LOCKSTEPS:
                        measure((way, k), partial(operator.matmat, vectors[:k].T))
        medians = {key: statistics.median(values[1:]) for key, values in times.items()}  # the first one warms up
        one = medians.pop("gradient")
        ratios = "".join(f"{seconds / k / one:>10.2f}" for (_, k), seconds in medians.items())
        print(f"{name:22}{one:>8.3f} s{ratios}")


def gradient(objective: Objective) -> None:
    """One forward and one backward pass."""
    for loss, _ in objective.losses():
        torch.autograd.grad(loss, objective.parameters, materialize_grads=True)


if __name__ == "__main__":
    main()
