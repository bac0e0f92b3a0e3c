# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-optimizability[vision]", "keras>=3"]
# ///
r"""A Keras 3 model on the torch backend, measured before and after training: a small CNN on MNIST.

    python recipes/keras_model.py [--dataset_name recipes/data/mnist_5k] [--max_train_samples 1024] [--epochs 2]

A Keras model on the torch backend is a torch module, so `measure()` takes it like any other; there is no Trainer, and
no report. What Keras calls the loss is written once more as a function of model and batch.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser
from typing import Any

import numpy as np
import torch
from datasets import load_dataset


os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported

import keras

from hf_optimizability import Measurement, OptimizabilityConfig, measure


Batch = dict[str, torch.Tensor]
PROBES, BATCH_SIZE = 64, 16


def make_model() -> Any:
    """Return a network as in Keras's first example."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(16, 3, activation="relu", name="conv"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10, name="dense"),
        ]
    )


def load_digits(dataset_name: str, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images in [0, 1] of shape (samples, 28, 28, 1), and their labels."""
    rows = load_dataset(dataset_name, split="train").shuffle(seed=0).select(range(samples))
    return np.stack([np.asarray(image, np.float32) / 255 for image in rows["image"]])[..., None], np.array(
        rows["label"]
    )


def loss_fn(model: Any, batch: Batch) -> torch.Tensor:
    """Return the mean loss of a batch, as Keras trains it; `training=False` switches dropout off."""
    return torch.nn.functional.cross_entropy(model(batch["images"], training=False), batch["labels"])


def describe(step: str, measured: Measurement) -> str:
    """Return a line with the measured numbers."""
    hessian = measured.hessian
    shares = ", ".join(f"{name} {block.trace.value:.3g}" for name, block in measured.blocks.items())
    return (
        f"{step:8} loss {measured.loss:.3f}  gradient {measured.grad_norm:.3g}  trace {hessian.trace}: {shares}  "
        f"λ_max {hessian.lambda_max}"
    )


def main() -> None:
    parser = ArgumentParser(description="Measure a Keras model before and after training.")
    parser.add_argument("--dataset_name", default="recipes/data/mnist_5k")
    parser.add_argument("--max_train_samples", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()

    keras.utils.set_random_seed(0)
    images, labels = load_digits(args.dataset_name, args.max_train_samples)
    model = make_model()
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    probes = [
        {
            "images": torch.tensor(images[start : start + BATCH_SIZE]),
            "labels": torch.tensor(labels[start : start + BATCH_SIZE]),
        }
        for start in range(0, min(PROBES, len(images)), BATCH_SIZE)
    ]
    config = OptimizabilityConfig(profile="light")
    print(describe("before", measure(model, probes, config, loss_fn=loss_fn)))
    model.fit(images, labels, batch_size=32, epochs=args.epochs, verbose=0)
    print(describe("after", measure(model, probes, config, loss_fn=loss_fn)))


if __name__ == "__main__":
    main()
