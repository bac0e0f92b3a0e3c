# SPDX-License-Identifier: Apache-2.0
"""What is said where training is spread over devices in a way that can't be measured under."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.utils import DeepSpeedPlugin
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainingArguments
from transformers.utils import logging

from hf_optimizability import OptimizabilityCallback, OptimizabilityConfig
from hf_optimizability.distributed.supported import deepspeed_limits, require_supported, zero_stage
from tests.support import tiny_models, tiny_training


def arguments(folder: Path, stage: int | None) -> TrainingArguments:
    """As `accelerate launch --use_deepspeed` makes them; DeepSpeed itself is not installed here."""
    args = tiny_training.arguments(folder)
    if stage is not None:
        args.deepspeed_plugin = DeepSpeedPlugin(zero_stage=stage)
    return args


def test_without_deepspeed_all_is_measured(tmp_path: Path):
    args = arguments(tmp_path, None)
    assert zero_stage(args) is None and deepspeed_limits(args) is None
    require_supported(tiny_models.bert(), args)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_whole_parameters_are_measured_but_for_what_deepspeed_keeps_to_itself(stage: int, tmp_path: Path):
    args = arguments(tmp_path, stage)
    require_supported(tiny_models.bert(), args)
    limits = deepspeed_limits(args)
    assert limits is not None and f"ZeRO-{stage}" in limits
    assert "optimizer stability" in limits and "`.grad`" in limits


def test_zero_3_is_refused_with_the_alternatives(tmp_path: Path):
    with pytest.raises(ValueError, match=r"ZeRO-3.*stage 2.*FSDP2"):
        require_supported(tiny_models.bert(), arguments(tmp_path, 3))


def test_parameters_that_zero_3_has_cut_are_known_without_a_trainer():
    model = tiny_models.bert()
    require_supported(model)
    model.classifier.weight.ds_id = 7  # as `deepspeed.zero.Init` marks them
    with pytest.raises(ValueError, match="ZeRO-3"):
        require_supported(model)


def test_training_with_zero_3_does_not_begin(tmp_path: Path):
    trainer = tiny_training.trainer(tmp_path, callbacks=[OptimizabilityCallback()])
    trainer.args.deepspeed_plugin = DeepSpeedPlugin(zero_stage=3)
    with pytest.raises(ValueError, match="ZeRO-3"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_training_with_zero_2_tells_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    callback = OptimizabilityCallback(OptimizabilityConfig(**tiny_training.QUICK))
    trainer = tiny_training.trainer(tmp_path, callbacks=[callback], max_steps=1)
    trainer.args.deepspeed_plugin = DeepSpeedPlugin(zero_stage=2)
    logging.enable_propagation()
    try:
        trainer.train()
    finally:
        logging.disable_propagation()
    assert "Under DeepSpeed (ZeRO-2)" in caplog.text
    assert callback.report.measurements and not callback.report.failures


def test_fsdp_1_is_refused():
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # which takes an accelerator to make
    nn.Module.__init__(wrapper)
    with pytest.raises(ValueError, match=r"FSDP1.*'version': 2"):
        require_supported(nn.Sequential(wrapper))
