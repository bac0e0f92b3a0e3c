# SPDX-License-Identifier: Apache-2.0
"""Keras models on the torch backend are measured as any torch module: against a closed form, and by the recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras_model
import pytest
import torch
from keras_model import keras

from hf_optimizability import OptimizabilityConfig, measure


def test_a_linear_model_has_the_hessian_of_its_closed_form():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    shown = keras.layers.Dropout(0.5)(inputs)  # keeps the state of its seed among the parameters
    model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False, name="last")(shown))
    x, y = torch.randn(12, 4), torch.randn(12, 1)

    def loss_fn(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (model(batch[0], training=False) - batch[1]).square().mean()

    config = OptimizabilityConfig(eigen_tolerance=1e-5)
    measured = measure(model, [(x[:7], y[:7]), (x[7:], y[7:])], config, loss_fn=loss_fn)
    expected = torch.linalg.eigvalsh(2 / 12 * x.T.double() @ x.double())
    assert measured.engine == "double_backward" and measured.fallback is None
    assert list(measured.blocks) == ["last"]
    assert measured.hessian.lambda_max.value == pytest.approx(float(expected[-1]), rel=1e-4)
    assert measured.hessian.trace.value == pytest.approx(float(expected.sum()), rel=1e-4)


@pytest.mark.slow
def test_the_recipe_measures_before_and_after(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    data = str(Path(keras_model.__file__).parent / "data/mnist_5k")
    flags = ["--dataset_name", data, "--max_train_samples", "256", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["keras_model.py", *flags])
    keras_model.main()
    before, after = (line.split() for line in capsys.readouterr().out.splitlines())
    assert before[:2] == ["before", "loss"] and after[:2] == ["after", "loss"]
    assert float(after[2]) < float(before[2]) == pytest.approx(2.3, abs=0.1)
