# SPDX-License-Identifier: Apache-2.0
"""What a Trainer, its subclasses and other callbacks see of measurements: only what they are meant to."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalPrediction

from hf_optimizability import (
    OptimizabilityCallback,
    OptimizabilityConfig,
    OptimizabilityReport,
    OptimizabilityTrainer,
    OptimizabilityTrainerMixin,
    measure,
)
from hf_optimizability.curvature.gradient import norm_of
from hf_optimizability.measurement.results import Measurement
from hf_optimizability.training import callback
from hf_optimizability.training.history import RECORD, RECORDS, restore
from hf_optimizability.training.provenance import describe_config
from tests.support import tiny_training


CONFIG = OptimizabilityConfig(
    profile="light",
    probe_examples=6,
    probe_batch_size=3,
    max_hvps=16,
    pool_examples=0,
    measure_strategy="steps",
    measure_steps=2,
)
OURS = ("optimizability/train_grad_norm/", "_runtime", "_per_second")


@pytest.fixture(scope="module")
def measured() -> Measurement:
    [batch] = tiny_training.trainer(Path("unused"), own=Net(), train_dataset=rows(4)).get_train_dataloader()
    return measure(Net(), [batch], CONFIG, loss_fn=lambda model, batch: model(**batch)["loss"])


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch, measured: Measurement) -> None:
    """Measure once for all tests, and draw no plots: they are about what others see of it."""

    def measure_objective(objective: Any, *args: Any, step: int, epoch: float | None, **kwargs: Any) -> Any:
        return dataclasses.replace(measured, step=step, epoch=epoch), objective

    monkeypatch.setattr(callback, "measure_objective", measure_objective)
    monkeypatch.setattr(OptimizabilityReport, "save", OptimizabilityReport.save_json)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.hidden(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(number: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, generator=generator), "labels": index % 3} for index in range(number)]


def make(folder: Path, kind: str, cls: type[Trainer] = Trainer, **options: Any) -> Trainer:
    """A Trainer that measures: not at all, by the callback, by the callback bound to it, or by the mixin."""
    options = {"train_dataset": rows(), "own": Net(), **options}
    callbacks = list(options.pop("callbacks", []))
    if kind == "mixin":
        mixed = type("Mixed", (OptimizabilityTrainerMixin, cls), {})
        return tiny_training.trainer(folder, cls=mixed, callbacks=callbacks, optimizability=CONFIG, **options)
    trainer = tiny_training.trainer(folder, cls=cls, callbacks=callbacks, **options)
    if kind != "plain":
        trainer.add_callback(OptimizabilityCallback(CONFIG, trainer=trainer if kind == "bound" else None))
    return trainer


def steps_measured(trainer: Trainer) -> list[int]:
    [own] = [held for held in trainer.callback_handler.callbacks if isinstance(held, OptimizabilityCallback)]
    assert not own.report.failures
    return [measurement.step for measurement in own.report.measurements]


def theirs(trainer: Trainer) -> list[dict[str, Any]]:
    """The Trainer's log without times, and without the norms that join its losses."""
    return [
        {key: value for key, value in entry.items() if not key.startswith(OURS[0]) and not key.endswith(OURS[1:])}
        for entry in trainer.state.log_history
    ]


MEASURED = pytest.mark.parametrize("kind", ["callback", "bound", "mixin"])


class RateByLoss(TrainerCallback):
    """Goes by the last entry of the log, as many callbacks do."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.log_history:
            kwargs["optimizer"].param_groups[0]["lr"] = 0.01 * state.log_history[-1]["loss"]


@MEASURED
def test_the_trainers_log_stays_its_own(tmp_path: Path, kind: str):
    plain, trainer = (
        make(tmp_path, held, logging_steps=3, callbacks=[RateByLoss()], lr_scheduler_type="constant")
        for held in ("plain", kind)
    )
    plain.train()
    trainer.train()
    assert steps_measured(trainer) == [0, 2, 4, 6]
    assert theirs(trainer) == theirs(plain) and trainer.state.log_history[-1]["train_loss"] > 0
    assert all(map(torch.equal, trainer.model.parameters(), plain.model.parameters()))


def test_the_state_of_a_resumed_run_is_that_of_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All of it but times, as Transformers' own tests compare it."""
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", dataclasses.replace(CONFIG, measure_strategy="no"))
    whole, resumed = (make(tmp_path, "mixin", save_strategy="steps", save_steps=2, logging_steps=2) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole.state.stateful_callbacks == resumed.state.stateful_callbacks
    assert [record["step"] for record in resumed.state.stateful_callbacks[RECORDS]] == [0]
    assert steps_measured(resumed) == [0, 6]


class Tracker(TrainerCallback):
    """Writes down what a tracker would."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.seen.append(("begin", state.global_step))

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        name = "ours" if "optimizability/loss" in logs else "gap" if "optimizability/train_loss" in logs else "theirs"
        self.seen.append((name, state.global_step))
        assert logs.items() <= state.log_history[-1].items()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.seen.append(("end", state.global_step))


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("kind", ["bound", "mixin"])
def test_trackers_get_every_measurement_between_their_begin_and_their_end(tmp_path: Path, kind: str, best: bool):
    options: dict[str, Any] = {"eval_dataset": rows(8)}
    if best:
        options |= {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
        options |= {"eval_steps": 2, "save_steps": 2, "metric_for_best_model": "loss", "greater_is_better": True}
    first, last = Tracker(), Tracker()
    trainer = make(tmp_path, kind, callbacks=[first], **options)
    trainer.add_callback(last)
    order = list(trainer.callback_handler.callbacks)
    for _ in range(2):  # a second training with the same Trainer is told in the same order
        first.seen.clear(), last.seen.clear()
        trainer.train()
        assert trainer.callback_handler.callbacks == order
        for seen in (first.seen, last.seen):
            assert seen[0] == ("begin", 0) and seen[-1] == ("end", 6)
            assert [step for name, step in seen if name == "ours"] == [0, 2, 4, 6]
            assert [step for name, step in seen if name == "gap"] == [6]
            assert sum(name == "theirs" for name, _ in seen) == len(trainer.state.log_history)


class Counting(Trainer):
    """Keeps metrics until the next log, as TRL's Trainers do, and counts logs."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.metrics: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.metrics.append(float(loss))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "metrics": len(self.metrics)}, start_time)
        self.metrics.clear()


@MEASURED
def test_an_overridden_log_is_called_for_the_trainers_own_entries_only(tmp_path: Path, kind: str):
    plain, trainer = (make(tmp_path, held, Counting, logging_steps=3) for held in ("plain", kind))
    plain.train()
    trainer.train()
    assert steps_measured(trainer) == [0, 2, 4, 6]
    assert theirs(trainer) == theirs(plain) and [entry["metrics"] for entry in theirs(plain)] == [3, 3, 0]


@pytest.mark.parametrize("tokens", ["no", "all"])
def test_times_of_the_subclass_are_those_of_training(tmp_path: Path, tokens: str, monkeypatch: pytest.MonkeyPatch):
    measure_objective = callback.measure_objective

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return measure_objective(*args, **kwargs)

    monkeypatch.setattr(callback, "measure_objective", slowly)
    trainer = make(tmp_path, "mixin", include_num_input_tokens_seen=tokens)
    started = time.perf_counter()
    metrics = trainer.train().metrics
    assert trainer.optimizability_callback.borrowed_seconds > 0.8  # four measurements
    assert 0 < metrics["train_runtime"] < time.perf_counter() - started - 0.8
    assert metrics["train_samples_per_second"] == pytest.approx(24 / metrics["train_runtime"], rel=1e-2)
    assert metrics["train_steps_per_second"] == pytest.approx(6 / metrics["train_runtime"], rel=1e-2)
    times = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    assert times == sorted(times) and len(times) == (1 if tokens == "no" else 4)


def test_what_an_earlier_version_left_in_the_log_is_taken_out_of_it(tmp_path: Path):
    trainer = make(tmp_path, "callback")
    trainer.train()
    own = json.loads(json.dumps(trainer.state.stateful_callbacks[RECORDS]))
    numbers = {"optimizability/loss": 1.0, "optimizability/hvps": 4, "step": 0}
    loss, norm = {"loss": 1.0, "step": 2}, {"loss": 1.0, "optimizability/train_grad_norm/head": 1.0, "step": 3}
    state = TrainerState(log_history=[own[0], numbers, loss, own[1], norm])
    assert RECORD in own[0]
    assert restore(state, config=describe_config(CONFIG)).steps == [0, 2]
    assert state.log_history == [loss, norm] and state.stateful_callbacks == {RECORDS: own[:2]}


@pytest.mark.parametrize("cls", [Trainer, Seq2SeqTrainer])
def test_a_measuring_trainer_takes_what_the_trainer_takes_and_one_keyword(cls: type[Trainer]):
    class Measuring(OptimizabilityTrainerMixin, cls):  # type: ignore[misc,valid-type]
        pass

    class Further(Measuring):
        def __init__(self, *, one: int):
            super().__init__()

    for constructor, base in ((Measuring, cls), (Measuring.__init__, cls.__init__)):
        own, theirs = (inspect.signature(held).parameters for held in (constructor, base))
        assert [name for name in own if name not in theirs] == ["optimizability"]
        assert own["optimizability"].kind is inspect.Parameter.KEYWORD_ONLY
        assert all(own[name] == parameter for name, parameter in theirs.items())
    assert list(inspect.signature(Further).parameters) == ["one"]


def test_a_frozen_model_may_be_evaluated(tmp_path: Path):
    model = Net().requires_grad_(False)
    trainer = tiny_training.trainer(tmp_path, cls=OptimizabilityTrainer, own=model, eval_dataset=rows(8))
    plain = tiny_training.trainer(tmp_path, own=model, eval_dataset=rows(8))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


class TestNormsOfTheTrainingBatch:
    def test_of_several_types(self):
        sparse = torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, 4.0], (3,))
        tensors = [torch.ones(2, dtype=torch.float64), torch.full((2,), 3 + 4j), torch.ones(3).bfloat16(), sparse]
        assert norm_of(tensors).dtype == torch.float64
        assert float(norm_of(tensors)) == pytest.approx((2 + 50 + 3 + 25) ** 0.5)

    def test_follow_what_is_frozen_on_the_way(self, tmp_path: Path):
        class Thaw(TrainerCallback):
            def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
                kwargs["model"].hidden.requires_grad_(state.global_step >= 2)

        options = {"callbacks": [Thaw()], "logging_steps": 1, "max_steps": 4, "max_grad_norm": 0.0}
        trainer = make(tmp_path, "mixin", **options)
        trainer.train()
        logged = [{key.rsplit("/")[-1] for key in entry if OURS[0] in key} for entry in trainer.state.log_history]
        assert logged == [{"hidden", "head"}, {"head"}, {"hidden", "head"}, {"hidden", "head"}, set()]

    def test_that_cannot_be_had_do_not_stop_training(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def fail(*args: Any) -> None:
            raise RuntimeError("broken on purpose")

        monkeypatch.setattr("hf_optimizability.training.trainer.norms_over_ranks", fail)
        trainer = make(tmp_path, "mixin")
        trainer.train()
        assert trainer.state.global_step == 6
        assert not any(OURS[0] in key for entry in trainer.state.log_history for key in entry)


class Predicting(Trainer):
    """Counts what a user may have made expensive, as `predict_with_generate` does."""

    calls = 0

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().prediction_step(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().predict(*args, **kwargs)


def test_the_gap_calls_nothing_of_the_users_but_the_loss(tmp_path: Path):
    metrics = {"accuracy": 0}

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        metrics["accuracy"] += 1
        return {"accuracy": 0.5}

    options = {"eval_dataset": rows(8), "compute_metrics": compute_metrics, "eval_strategy": "steps", "eval_steps": 3}
    plain, trainer = (make(tmp_path, kind, Predicting, **options) for kind in ("plain", "mixin"))
    plain.train()
    called = dict(metrics)
    trainer.train()
    assert trainer.calls == plain.calls > 0 and metrics["accuracy"] == 2 * called["accuracy"] == 4
    gap = trainer.optimizability_report().dynamics["generalization_gap"]
    assert gap["measured_alike"] and gap["examples"] == 8 and gap["metric_gaps"] == {}
