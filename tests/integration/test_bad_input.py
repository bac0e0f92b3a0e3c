# SPDX-License-Identifier: Apache-2.0
"""Whatever can't work is refused before training, by the name of the argument and with what to do."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_optimizability import OptimizabilityCallback, OptimizabilityConfig, OptimizabilityTrainer, forecast, measure
from tests.support import tiny_models, tiny_training


class NoStep(TrainerCallback):
    """Sees to it that nothing is trained."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        pytest.fail("training has begun")


def refused(folder: Path, match: str, *, config: dict[str, Any] | None = None, **options: Any) -> None:
    callback = OptimizabilityCallback(OptimizabilityConfig(**(config or {})))
    trainer = tiny_training.trainer(folder, callbacks=[NoStep(), callback], **options)
    with pytest.raises(ValueError, match=match):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"profile": "cheap"}, "`profile` is 'cheap'; choose one of 'light', 'standard', 'full'"),
        ({"engine": "magic"}, "`engine` is 'magic'; choose one of 'auto', 'double_backward'"),
        ({"measure_strategy": "often"}, "`measure_strategy` is 'often'; choose one of 'auto', 'no', 'steps', 'epoch'"),
        ({"eigen_method": "qr"}, "`eigen_method`"),
        ({"trace_method": "sum"}, "`trace_method`"),
        ({"max_hvps": -1}, "`max_hvps` is -1; it must be at least 16"),
        ({"measure_steps": 0}, "`measure_steps` is 0; it must be at least 1"),
        ({"probe_examples": 1}, "`probe_examples` is 1; it must be at least 2"),
        ({"probe_batch_size": 0}, "`probe_batch_size` is 0; it must be at least 1"),
        ({"trace_tolerance": 0.0}, "`trace_tolerance` is 0.0; it must lie between 0 and 1"),
        ({"eigen_tolerance": 1.5}, "`eigen_tolerance` is 1.5; it must lie between 0 and 1"),
        ({"blocks": []}, "`blocks` is empty"),
        (
            {"curvature": "gauss_newton", "engine": "forward_over_reverse"},
            "`engine` is 'forward_over_reverse', which multiplies with the Hessian only.*Leave `engine` at 'auto'",
        ),
        ({"curvature": "empirical_fisher", "engine": "central_difference"}, "`engine` is 'central_difference'"),
        ({"curvature": "gauss_newton", "block_eigenvalues": True}, "`block_eigenvalues` are those of the Hessian"),
        (
            {"engine": "central_difference", "block_eigenvalues": True},
            "`block_eigenvalues` need double_backward, but `engine` is 'central_difference'",
        ),
        (
            {"eigen_method": "power_iteration", "num_eigenvalues": 2},
            "`num_eigenvalues` is 2, but power iteration computes one. Set `eigen_method` to 'lanczos'",
        ),
    ],
)
def test_configuration(options: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        OptimizabilityConfig(**options)


@pytest.mark.parametrize("curvature", ["gauss_newton", "empirical_fisher"])
def test_what_a_profile_fills_in_is_not_refused(curvature: str):
    OptimizabilityConfig(profile="full", curvature=curvature, engine="double_backward")


def test_folder_that_cannot_be_written(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(ValueError, match=r"`report_dir` is .*file/report.*Pass a folder that you may write to"):
        OptimizabilityCallback(OptimizabilityConfig(report_dir=str(file / "report")))
    output = tmp_path / "output"
    output.mkdir()
    (output / "optimizability").write_text("not a folder either")
    refused(output, r"`report_dir` is .*output/optimizability")


def test_folder_of_reports_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    callback = OptimizabilityCallback(OptimizabilityConfig(report_dir="~/reports"))
    assert callback.config.report_dir == str(tmp_path / "reports") and (tmp_path / "reports").is_dir()


def test_earlier_report_that_cannot_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a folder with the sticky bit, where it belongs to another user."""
    (tmp_path / "report.json").write_text("{}")

    def rename(self: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "rename", rename)
    refused(
        tmp_path / "out",
        r"report.json' is there already.*\(Operation not permitted\).*another folder as `report_dir`",
        config={"report_dir": str(tmp_path)},
    )


def test_more_probe_examples_than_the_data_set_has(tmp_path: Path):
    refused(
        tmp_path,
        "only 24 examples, but `probe_examples` is 100.*lower `probe_examples`",
        config={"probe_examples": 100},
    )


def test_block_pattern_that_fits_nothing(tmp_path: Path):
    match = r"'\*layer.7\*' in `blocks` fits no trainable parameter.*bert.embeddings"
    refused(tmp_path, match, config={"blocks": ["*layer.7*"]})
    with pytest.raises(ValueError, match=match):
        tiny_training.trainer(
            tmp_path, cls=OptimizabilityTrainer, optimizability=OptimizabilityConfig(blocks=["*layer.7*"])
        )


def test_model_without_trainable_parameters():
    model = tiny_models.bert().requires_grad_(False)
    with pytest.raises(ValueError, match=r"`model` has no trainable parameter.*Set `requires_grad`"):
        measure(model, tiny_models.cut(tiny_models.examples("bert", 2), 2))


@pytest.mark.parametrize(
    ("batches", "loss_fn", "match"),
    [
        ([], None, "`batches` is empty"),
        ([torch.ones(2, 3)], None, "A batch is a Tensor, but the model's own loss needs a dict"),
        ([(torch.ones(2, 3),)], lambda model, batch: model(batch[0]), r"loss has shape \(2, 1\); it must be a scalar"),
        (
            [(torch.ones(2, 3),)],
            lambda model, batch: model(batch[0]).mean().detach(),
            "does not depend on the trainable",
        ),
    ],
)
@pytest.mark.parametrize("function", [measure, forecast])
def test_measure_and_forecast(function: Callable[..., Any], batches: list[Any], loss_fn: Any, match: str):
    with pytest.raises(ValueError, match=match):
        function(nn.Linear(3, 1), batches, loss_fn=loss_fn)


@pytest.mark.parametrize("function", [measure, forecast])
def test_measure_and_forecast_with_an_optimizer_that_cannot_be_read(function: Callable[..., Any]):
    model = tiny_models.bert()
    batches = tiny_models.cut(tiny_models.examples("bert", 2, dtype=torch.float32), 2)
    with pytest.raises(TypeError, match="RMSprop"):
        function(model, batches, optimizer=torch.optim.RMSprop(model.parameters()))
