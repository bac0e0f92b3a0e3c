# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped and goes on from a checkpoint ends with the report it would have had."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from itertools import chain, cycle, islice, product
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerState

from hf_optimizability import OptimizabilityCallback, OptimizabilityConfig, OptimizabilityReport, OptimizabilityTrainer
from hf_optimizability.measurement.results import MeasurementFailure
from hf_optimizability.reasons import Reason
from hf_optimizability.training.clock import Clock
from hf_optimizability.training.history import RECORD, RECORDS, record, restore
from hf_optimizability.training.provenance import describe_config
from tests.support import tiny_training
from tests.support.stopped_training import QUICK, SAVES, STEPS, StopBefore, StoppedError


ROOT = Path(__file__).parents[2]
KILLS = 20


def run(
    folder: Path,
    cls: type[Trainer] = OptimizabilityTrainer,
    *,
    config: dict[str, Any],
    stop_before: int | None = None,
    measured: bool = True,
    resume: bool = False,
    **options: Any,
) -> OptimizabilityReport | None:
    """Trains until done or stopped; the report, if there is one."""
    settings = OptimizabilityConfig(**{**QUICK, **config})
    callbacks = [] if stop_before is None else [StopBefore(stop_before)]
    if not measured:
        trainer = tiny_training.trainer(folder, callbacks=callbacks, **SAVES, **options)
    elif cls is Trainer:
        callbacks.append(OptimizabilityCallback(settings))
        trainer = tiny_training.trainer(folder, callbacks=callbacks, **SAVES, **options)
    else:
        trainer = tiny_training.trainer(
            folder, cls=cls, optimizability=settings, callbacks=callbacks, **SAVES, **options
        )
    try:
        trainer.train(resume_from_checkpoint=resume)
    except StoppedError:
        return None
    return OptimizabilityReport.load(folder / "optimizability") if measured else None


def records(checkpoint: Path) -> list[dict[str, Any]]:
    """What a checkpoint holds of measurements."""
    return json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"][RECORDS]


def numbers(report: OptimizabilityReport) -> dict[str, Any]:
    """All of a report that does not depend on the clock, or on what the Trainer itself forgets: its mean loss."""
    data = report.to_dict()
    for measurement in data["measurements"]:
        del measurement["seconds"], measurement["self_check"]  # each process makes its own, at its first weights
        measurement["blocks"] = list(measurement["blocks"].items())  # in their order
    del data["created"]
    data["training"].pop("overhead", None)  # a run that was stopped has none
    timed = ("runtime", "per_second", "optimizability/seconds", "train_loss")
    data["log_history"] = [
        {name: value for name, value in entry.items() if not name.endswith(timed)} for entry in data["log_history"]
    ]
    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    report = run(folder, config=STEPS)
    assert [measurement.step for measurement in report.measurements] == [0, 2, 4, 6]
    return folder


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    assert run(folder, config=STEPS, stop_before=3) is None
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """The folder of a run that was stopped before its third step, to be resumed."""
    return shutil.copytree(stopped_once, tmp_path / "stopped")


@pytest.mark.parametrize(
    ("stop_before", "restores_states"),
    [
        (2, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, False), (3, False), (3, True), (5, False), (5, True))
        ),
    ],
)
def test_a_resumed_run_has_the_report_of_an_uninterrupted_one(
    tmp_path: Path, whole: Path, stop_before: int, restores_states: bool
):
    options = {"restore_callback_states_from_checkpoint": restores_states, "config": STEPS}
    assert run(tmp_path, stop_before=stop_before, **options) is None
    resumed = run(tmp_path, resume=True, **options)
    assert numbers(resumed) == numbers(OptimizabilityReport.load(whole / "optimizability"))


@pytest.mark.usefixtures("quickly")
def test_a_plain_callback_resumes_too(tmp_path: Path):
    whole = run(tmp_path / "whole", Trainer, config=STEPS)
    run(tmp_path / "run", Trainer, config=STEPS, stop_before=3)
    assert numbers(run(tmp_path / "run", Trainer, config=STEPS, resume=True)) == numbers(whole)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "stop_before",
    [
        pytest.param(2, marks=pytest.mark.slow),
        3,
        pytest.param(4, marks=pytest.mark.slow),
        pytest.param(5, marks=pytest.mark.slow),
    ],
)
def test_epochs_that_end_with_a_checkpoint_are_measured(tmp_path: Path, stop_before: int):
    """The checkpoint at the last step of an epoch is written before the epoch ends."""
    options = {"max_steps": -1, "num_train_epochs": 3, "train_dataset": tiny_training.dataset("bert", 8)}
    options |= {"config": {"measure_strategy": "epoch"}}
    whole = run(tmp_path / "whole", **options)
    assert [measurement.step for measurement in whole.measurements] == [0, 2, 4, 6]
    run(tmp_path / "run", stop_before=stop_before, **options)
    assert numbers(run(tmp_path / "run", resume=True, **options)) == numbers(whole)


def test_failures_are_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor is there a measurement more at the checkpoint, from which nothing but failures is known."""

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken on purpose")

    config = {"measure_strategy": "steps", "measure_steps": 3, "engine": "double_backward"}
    with monkeypatch.context() as broken:
        broken.setattr("hf_optimizability.curvature.hessian.second_backward", fail)
        run(tmp_path, config=config, stop_before=5)
    resumed = run(tmp_path, config=config, resume=True)
    assert [failure.step for failure in resumed.failures] == [0, 3]
    assert [measurement.step for measurement in resumed.measurements] == [6]


@pytest.mark.usefixtures("quickly")
def test_when_to_measure_may_change(stopped: Path):
    resumed = run(stopped, config={"measure_strategy": "steps", "measure_steps": 3}, resume=True)
    assert [measurement.step for measurement in resumed.measurements] == [0, 2, 3, 6]


@pytest.mark.usefixtures("quickly")
def test_the_share_of_a_process_in_a_step_may_change(stopped: Path):
    """As it does where there are more of them, or fewer."""
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    resumed = run(stopped, config=STEPS, resume=True, **smaller)
    assert [measurement.step for measurement in resumed.measurements] == [0, 2, 4, 6]
    assert {measurement.num_items for measurement in resumed.measurements} == {QUICK["probe_examples"]}


@pytest.mark.usefixtures("quickly")
def test_with_other_options_the_report_begins_anew_and_nothing_is_lost(
    stopped: Path, caplog: pytest.LogCaptureFixture
):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        resumed = run(stopped, config={**STEPS, "max_hvps": 20}, resume=True)
    assert "The run was measured 2 times with another `max_hvps`." in caplog.text
    assert [measurement.step for measurement in resumed.measurements] == [2, 4, 6]
    earlier = OptimizabilityReport.load(stopped / "optimizability" / "report-1.json")
    assert [measurement.step for measurement in earlier.measurements] == [0, 2]
    [checkpoint] = stopped.glob("checkpoint-*")
    assert [held["step"] for held in records(checkpoint)] == [0, 2, 2, 4, 6]


@pytest.mark.usefixtures("quickly")
def test_several_callbacks_take_up_each_what_it_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    logging.getLogger("transformers").propagate = True
    every = {"often": {**QUICK, **STEPS}, "well": {**QUICK, "measure_strategy": "steps", "measure_steps": 3}}
    every["well"]["max_hvps"] = 20

    def train(folder: str, *, stop_before: int | None = None, resume: bool = False) -> dict[str, Any]:
        callbacks = {
            name: OptimizabilityCallback(OptimizabilityConfig(**options, report_dir=str(tmp_path / folder / name)))
            for name, options in every.items()
        }
        stops = [] if stop_before is None else [StopBefore(stop_before)]
        trainer = tiny_training.trainer(tmp_path / folder, callbacks=[*stops, *callbacks.values()], **SAVES)
        with suppress(StoppedError):
            trainer.train(resume_from_checkpoint=resume)
        return {name: numbers(callback.report) for name, callback in callbacks.items()}

    whole = train("whole")
    assert [[m["step"] for m in whole[name]["measurements"]] for name in every] == [[0, 2, 4, 6], [0, 3, 6]]
    train("run", stop_before=5)
    with caplog.at_level(logging.WARNING):
        assert train("run", resume=True) == whole
    assert "another" not in caplog.text


@pytest.mark.usefixtures("quickly")
def test_a_callback_that_is_new_to_the_checkpoint_begins_there(tmp_path: Path):
    run(tmp_path, config={}, measured=False, stop_before=3)
    resumed = run(tmp_path, config=STEPS, resume=True)
    assert [measurement.step for measurement in resumed.measurements] == [2, 4, 6]


def test_what_is_measured_lives_in_the_last_checkpoint_alone(whole: Path):
    [checkpoint] = whole.glob("checkpoint-*")
    assert [held["step"] for held in records(checkpoint)] == [0, 2, 4, 6]


@pytest.mark.usefixtures("quickly")
def test_a_record_that_cannot_be_read_is_told_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run(tmp_path, config=STEPS, stop_before=5)
    [checkpoint] = tmp_path.glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    broken = next(held for held in state["stateful_callbacks"][RECORDS] if held["step"] == 2)
    del broken[RECORD]["measurement"]["hessian"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        resumed = run(tmp_path, config=STEPS, resume=True)
    assert "The measurement at step 2 in the checkpoint can't be read" in caplog.text
    assert [measurement.step for measurement in resumed.measurements] == [0, 4, 6]


def places(held: Any) -> Iterator[tuple[Any, Any]]:
    """Every dict and list inside, with each key, or the first index, of it."""
    if isinstance(held, (dict, list)):
        for key in list(held) if isinstance(held, dict) else range(len(held))[:1]:
            yield held, key
            yield from places(held[key])


@pytest.mark.usefixtures("quickly")
def test_a_damaged_record_never_raises_and_is_never_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Each entry of a record in turn is lost, and becomes something else, of four kinds in turn."""
    callback = OptimizabilityCallback(OptimizabilityConfig(**{**QUICK, **STEPS, "measure_steps": 1}))
    trainer = tiny_training.trainer(tmp_path, callbacks=[callback], max_steps=1)
    trainer.train()
    config = describe_config(callback.config)
    records = json.dumps(trainer.state.stateful_callbacks[RECORDS])
    state = TrainerState(stateful_callbacks={RECORDS: json.loads(records)})
    assert len(restore(state, config=config).measurements) == 2
    logging.getLogger("transformers").propagate = True
    entries = range(sum(1 for _ in places(json.loads(records)[0])))
    damages = zip(entries, cycle((None, "torn", [], 7)), strict=False)
    for number, damage in chain(damages, product(entries, (...,))):
        log = json.loads(records)
        container, key = next(islice(places(log[0]), number, None))
        needed = container is log[0][RECORD]["measurement"] and key not in (
            "converged",
            "self_check",
            "eigenvalue_checks",
            "population",
            "batch_sharpness",
            "batch_sharpness_failure",
        )
        if damage is ...:
            del container[key]
        else:
            container[key] = damage
        before = deepcopy(log)
        caplog.clear()
        history = restore(TrainerState(stateful_callbacks={RECORDS: log}), config=config)
        assert log == before and len(history.measurements) >= 1
        if needed and damage is ...:
            told = f"The measurement at step {log[0]['step']} in the checkpoint can't be read"
            assert len(history.measurements) == 1 and told in caplog.text


def test_a_resumed_clock_knows_what_was_measured_and_what_failed():
    state, clock = TrainerState(), Clock(trained=100.0)
    for step in (0, 2):
        with suppress(StoppedError), clock.paused():
            raise StoppedError
        failure = MeasurementFailure(step=step, epoch=None, why=Reason("rows_unreadable", error="KeyError"))
        record(state, failure, config={"max_hvps": 16}, clock=clock)
    state.stateful_callbacks = json.loads(json.dumps(state.stateful_callbacks))
    history = restore(state, config={"max_hvps": 16, "measure_steps": 5})
    assert history.steps == [0, 2] and history.measured_seconds == clock.measured
    assert history.train_seconds == pytest.approx(100.0, abs=1.0)


@pytest.mark.usefixtures("quickly")
def test_the_report_of_an_earlier_run_is_kept(tmp_path: Path):
    first, second, third = (
        run(tmp_path, config={"measure_strategy": "no", "probe_seed": seed}, max_steps=1) for seed in range(3)
    )
    folder = tmp_path / "optimizability"
    for number, report in ((1, first), (2, second)):
        assert OptimizabilityReport.load(folder / f"report-{number}.json").config == report.config
    assert OptimizabilityReport.load(folder).config == third.config


TRAINING = """
import sys
from pathlib import Path
from tests.support import tiny_training
from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
folder, checkpoint = Path(sys.argv[1]), sys.argv[2] or None
quick = {"probe_examples": 6, "max_hvps": 16, "probe_batch_size": 2, "pool_examples": 0}
config = OptimizabilityConfig(measure_strategy="steps", measure_steps=2, **quick)
options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 12}
options["logging_steps"] = 1  # a Trainer forgets the losses since the last log
trainer = tiny_training.trainer(folder, cls=OptimizabilityTrainer, optimizability=config, **options)
trainer.train(resume_from_checkpoint=checkpoint)
"""


def start(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """Trains in a process of its own, from the last checkpoint that is whole."""
    whole = ""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])):
        with suppress(OSError, ValueError):  # the Trainer writes its state last
            json.loads((checkpoint / "trainer_state.json").read_text())
            whole = str(checkpoint)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAINING, str(folder), whole]
    with log.open("ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_again_and_again(tmp_path: Path):
    log = tmp_path / "log"
    whole = start(tmp_path / "whole", log)
    assert whole.wait() == 0, log.read_text()
    moments = random.Random(0)
    done = 0
    while done < KILLS:
        begun = time.time()
        process = start(tmp_path / "run", log)
        report = tmp_path / "run" / "optimizability" / "report.json"
        while process.poll() is None and not (report.exists() and report.stat().st_mtime > begun):
            time.sleep(0.01)
        try:
            process.wait(timeout=moments.uniform(0, 1.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            continue
        assert process.returncode == 0, log.read_text()
        shutil.rmtree(tmp_path / "run")  # done before it could be killed: once more from the start
    assert start(tmp_path / "run", log).wait() == 0, log.read_text()
    resumed, expected = (
        numbers(OptimizabilityReport.load(tmp_path / run / "optimizability")) for run in ("run", "whole")
    )
    assert [measurement["step"] for measurement in resumed["measurements"]] == [0, 2, 4, 6, 8, 10, 12]
    assert resumed == expected
