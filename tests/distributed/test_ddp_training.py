# SPDX-License-Identifier: Apache-2.0
"""Trainings on several processes: bit for bit as without measurements, and with the numbers of one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_optimizability import OptimizabilityCallback, OptimizabilityConfig, OptimizabilityReport, OptimizabilityTrainer
from hf_optimizability.curvature import hessian as operators
from tests.support import tiny_training
from tests.support.measurement_differences import differences
from tests.support.ranks import Failed, on_ranks, results
from tests.support.stopped_training import SAVES, STEPS, StopBefore, StoppedError
from tests.support.training_outcome import assert_equal, run


CONFIG = {**tiny_training.IN_TWO_BATCHES, **STEPS}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(tiny_training.dataset("bert"))


CASES: dict[str, dict[str, Any]] = {
    "plain": {"learning_rate": 1e-3},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "split": {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 4},
    "stream": {"train_dataset": Stream()},
    "dispatch": {"train_dataset": Stream(), "accelerator_config": {"dispatch_batches": True}},
    "uneven": {"train_dataset": tiny_training.dataset("bert", 7), "eval_dataset": tiny_training.dataset("bert", 5)},
    "vit": {"name": "vit", "learning_rate": 1e-3},  # without dropout, and with a loss that is the mean
    "auto": {"config": {"measure_strategy": "auto", "overhead_budget": 0.9, "measure_steps": 500}},
}


OFTEN = ["dispatch", "uneven"]
"""The others are near enough to these to be left to `make test-slow`."""


def trainer(folder: Path, cls: type[Trainer] = Trainer, **options: Any) -> Trainer:
    settings = {"per_device_train_batch_size": 2, "max_steps": 2, "optim": "sgd", **options}
    return tiny_training.trainer(folder, cls=cls, **settings)


def trainings(rank: int, folder: Path, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        case = dict(CASES[name])
        config = OptimizabilityConfig(**{**CONFIG, **case.pop("config", {})})
        plain = run(trainer(folder / name / "plain", **case))
        own = trainer(folder / name / "own", OptimizabilityTrainer, optimizability=config, **case)
        assert_equal(run(own), plain, name)
        assert own.accelerator.num_processes == 2
        report = own.optimizability_report()
        assert not report.failures, report.failures[0]
        found[name] = [measurement.to_dict() for measurement in report.measurements]
    found["loss scale"] = own.optimizability_report().training["loss_scale"]
    found["broken"] = broken(rank, folder / "broken")
    return found


def broken(rank: int, folder: Path) -> list[str]:
    """Products of a callback fail on one rank from the second measurement on: both go without, and train on."""

    class Break(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1 and rank == 1:
                operators.second_backward = fail

    def fail(*args: object, **kwargs: object) -> None:
        raise IndexError("broken on purpose")

    right, plain = operators.second_backward, run(trainer(folder / "plain", max_steps=4))
    callback = OptimizabilityCallback(OptimizabilityConfig(**CONFIG, engine="double_backward"))
    measured = trainer(folder / "measured", callbacks=[Break(), callback], max_steps=4)
    assert_equal(run(measured), plain)
    operators.second_backward = right
    assert [measurement.step for measurement in callback.report.measurements] == [0]
    return [failure.reason for failure in callback.report.failures]


pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainings")


@pytest.fixture(scope="module", params=[OFTEN, pytest.param([*CASES], marks=pytest.mark.slow)], ids=["often", "all"])
def found(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    here = folder / request.param[0]
    return [{**result, "folder": here} for result in results(trainings, 2, here / "ranks", here, request.param)]


def test_training_is_the_same(found: list[dict[str, Any]]):
    """`trainings` compares them, on each rank."""
    for name in found[0].keys() & CASES:
        steps = [measurement["step"] for measurement in found[0][name]]
        assert steps == [0, 2] if name != "auto" else (steps[0], steps[-1]) == (0, 2)
        assert not differences(found[0][name], found[1][name], tolerance=0)


def test_the_numbers_are_those_of_one_process(tmp_path: Path, found: list[dict[str, Any]]):
    """Batches of two on both processes are the batches of four of one."""
    for name in found[0].keys() & {"plain", "stream", "uneven", "vit"}:
        options = {**CASES[name], "per_device_train_batch_size": 4}
        config = OptimizabilityConfig(**CONFIG)
        alone = trainer(tmp_path / name, OptimizabilityTrainer, optimizability=config, **options)
        alone.train()
        expected = [measurement.to_dict() for measurement in alone.optimizability_report().measurements]
        for measurement in (found[0][name][0], expected[0]):  # rounding errors
            del measurement["self_check"], measurement["eigenvalue_checks"]
        assert not differences(found[0][name][0], expected[0], tolerance=1e-5), name
        if name == "vit":
            for measured, one in zip(found[0][name], expected, strict=True):
                assert not differences(measured["hessian"]["trace"], one["hessian"]["trace"], tolerance=1e-4)


def test_one_process_writes_and_the_loss_has_both_factors(found: list[dict[str, Any]]):
    folder = found[0]["folder"]
    for name in found[0].keys() & CASES:
        report = OptimizabilityReport.load(folder / name / "own" / "optimizability")
        assert [m.step for m in report.measurements] == [m["step"] for m in found[0][name]]
    assert found[0]["loss scale"] == pytest.approx(2)  # BERT, on two processes
    assert OptimizabilityReport.load(folder / "uneven" / "own" / "optimizability").dynamics["generalization_gap"]


def test_a_measurement_that_fails_on_one_rank_fails_on_both(found: list[dict[str, Any]]):
    for result in found:
        assert len(result["broken"]) == 2
        assert all("(IndexError)" in reason for reason in result["broken"])


def killed(rank: int, folder: Path) -> None:
    def die(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        operators.second_backward = die
    trainer(folder, callbacks=[OptimizabilityCallback(OptimizabilityConfig(**CONFIG))]).train()


def test_a_rank_that_is_killed_in_a_measurement_ends_the_training(tmp_path: Path):
    found = on_ranks(killed, 2, tmp_path / "ranks", tmp_path)
    assert found[1] is None
    assert isinstance(found[0], Failed) and "Another process of the training has ended" in found[0].message


def refused(rank: int, folder: Path) -> None:
    """Only the process that writes can know that the folder can't be written."""
    (folder / "taken").write_text("a file")
    config = OptimizabilityConfig(**CONFIG)
    measuring = trainer(folder, callbacks=[OptimizabilityCallback(config)])
    measuring.args.output_dir = str(folder / "taken") if rank == 0 else str(folder / "other")
    measuring.train()


def test_a_folder_that_can_not_be_written_is_told_to_all(tmp_path: Path):
    for result in on_ranks(refused, 2, tmp_path / "ranks", tmp_path):
        assert isinstance(result, Failed) and result.kind == "ValueError" and "can't be written" in result.message


def until(rank: int, folder: Path, stop_before: int | None, processes: int) -> None:
    callbacks: list[TrainerCallback] = [] if stop_before is None else [StopBefore(stop_before)]
    config = OptimizabilityConfig(**CONFIG)
    resuming = trainer(
        folder, OptimizabilityTrainer, name="llama", optimizability=config, callbacks=callbacks,
        **{**SAVES, "save_steps": 1, "max_steps": 4, "per_device_train_batch_size": 4 // processes},
    )  # fmt: skip
    with suppress(StoppedError):
        resuming.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)


def test_a_run_goes_on_with_fewer_and_with_more_processes(tmp_path: Path):
    folder = tmp_path / "run"
    results(until, 2, tmp_path / "first", folder, 1, 2)
    until(0, folder, 3, 1)
    results(until, 2, tmp_path / "last", folder, None, 2)
    whole = tmp_path / "whole"
    until(0, whole, None, 1)
    report, expected = (OptimizabilityReport.load(place / "optimizability") for place in (folder, whole))
    assert [measurement.step for measurement in report.measurements] == [0, 2, 4]
    for found, one in zip(report.measurements, expected.measurements, strict=True):
        assert found.loss == pytest.approx(one.loss, rel=1e-5)
        assert found.hessian.trace.value == pytest.approx(one.hessian.trace.value, rel=1e-4)
