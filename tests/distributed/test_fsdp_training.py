# SPDX-License-Identifier: Apache-2.0
"""Trainings under Accelerate's FSDP2 on two processes: bit for bit as without measurements, and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

from hf_optimizability import OptimizabilityConfig, OptimizabilityReport, OptimizabilityTrainer
from tests.support import tiny_training
from tests.support.little_memory import little_memory
from tests.support.measurement_differences import differences
from tests.support.ranks import results
from tests.support.stopped_training import SAVES, STEPS, StopBefore, StoppedError
from tests.support.training_outcome import assert_equal, run


FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",  # the whole one is not put together on the CPU
    },
}
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "shards": {},
    "bf16, accumulation, sgd": {"bf16": True, "gradient_accumulation_steps": 2, "optim": "sgd"},
}


@contextmanager
def fsdp_on_the_cpu() -> Iterator[None]:
    """Lets Accelerate, which leaves FSDP to accelerators, train under it on the CPU too."""

    def allowed(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    init, AcceleratorState.__init__ = AcceleratorState.__init__, allowed
    try:
        yield
    finally:
        AcceleratorState.__init__ = init


def trainer(folder: Path, cls: type[Trainer] = Trainer, **options: Any) -> Trainer:
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-3, **FSDP, **options}
    return tiny_training.trainer(folder, cls=cls, **settings)


def local(value: Any) -> Any:
    """With what is here of tensors that lie over ranks in their place, however nested."""
    if isinstance(value, dict):
        return {key: local(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [local(inner) for inner in value]
    return value.to_local() if isinstance(value, DTensor) else value


def trainings(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    with fsdp_on_the_cpu():
        for name, case in CASES.items():
            plain = local(run(trainer(folder / name / "plain", **case)))
            config = OptimizabilityConfig(**tiny_training.IN_TWO_BATCHES, **STEPS)
            own = trainer(folder / name / "own", OptimizabilityTrainer, optimizability=config, **case)
            with little_memory() if name == "shards" else nullcontext():
                assert_equal(local(run(own)), plain, name)
            assert isinstance(own.model, FSDPModule) and len(plain["gradients"]) > 10
            report = own.optimizability_report()
            assert not report.failures, report.failures[0]
            found[name] = [measurement.to_dict() for measurement in report.measurements]
    return found


def until(rank: int, folder: Path, stop_before: int | None) -> None:
    callbacks = [] if stop_before is None else [StopBefore(stop_before)]
    config = OptimizabilityConfig(**tiny_training.IN_TWO_BATCHES, **STEPS)
    with fsdp_on_the_cpu(), suppress(StoppedError):
        resuming = trainer(
            folder, OptimizabilityTrainer, optimizability=config, callbacks=callbacks, **{**SAVES, "max_steps": 6}
        )
        resuming.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainings")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return results(trainings, 2, folder / "ranks", folder)


def test_training_is_the_same(found: list[dict[str, Any]]):
    """`trainings` compares them, on each rank."""
    for name in CASES:
        assert [measurement["step"] for measurement in found[0][name]] == [0, 2, 4]
        assert not differences(found[0][name], found[1][name], tolerance=0)
        engines = {measurement["engine"] for measurement in found[0][name]}
        assert engines == {"central_difference" if name == "shards" else "double_backward"}


def test_the_numbers_are_those_of_one_process(tmp_path: Path, found: list[dict[str, Any]]):
    """At the first step: later ones see what dropout on two processes has made of the weights."""
    config = OptimizabilityConfig(**tiny_training.IN_TWO_BATCHES, **STEPS)
    options = {"fsdp": None, "fsdp_config": None, "per_device_train_batch_size": 4}
    alone = trainer(tmp_path, OptimizabilityTrainer, optimizability=config, **options)
    alone.train()
    expected = alone.optimizability_report().measurements[0].to_dict()
    for measurement in (found[0]["whole"][0], expected):  # rounding errors
        del measurement["self_check"], measurement["eigenvalue_checks"]
    assert not differences(found[0]["whole"][0], expected, tolerance=1e-5)
    for number in ("loss", "grad_norm"):
        assert found[0]["shards"][0][number] == pytest.approx(expected[number], rel=1e-5)


def test_a_run_that_was_stopped_ends_with_the_report_it_would_have_had(tmp_path: Path):
    for name, stops in (("run", (3, 5, None)), ("whole", (None,))):
        for number, stop in enumerate(stops):
            results(until, 2, tmp_path / f"{name} {number}", tmp_path / name, stop)
    resumed, whole = (OptimizabilityReport.load(tmp_path / name / "optimizability") for name in ("run", "whole"))
    assert [measurement.step for measurement in resumed.measurements] == [0, 2, 4, 6]
    for one, other in zip(resumed.measurements, whole.measurements, strict=True):
        alike, expected = (replace(measurement, self_check=None).to_dict() for measurement in (one, other))
        assert not differences(alike, expected, tolerance=0)  # each process checks itself at its first weights
