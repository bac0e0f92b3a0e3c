# SPDX-License-Identifier: Apache-2.0
"""Numbers by task in one measurement: against dense truth, however batches come, and in a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import torch
from torch import Tensor, nn

from hf_optimizability import (
    Measurement,
    OptimizabilityCallback,
    OptimizabilityConfig,
    OptimizabilityReport,
    OptimizabilityTrainer,
    measure,
)
from hf_optimizability.measurement.measure import measure_objective
from hf_optimizability.objective.objective import Objective
from hf_optimizability.redaction import public_name
from hf_optimizability.report.markdown import to_markdown
from tests.support import tiny_training
from tests.support.tiny_training import CONFIG
from tests.support.training_outcome import assert_equal, run
from tests.support.two_tasks import Heads, cut, of_task, rows


class OneHead(Heads):
    """The same without knowing of tasks."""

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(pixels, torch.zeros(len(labels), dtype=torch.long), labels)


def dense(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the mean loss, by autograd on the whole of it."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sizes = [parameter.numel() for parameter in named.values()]

    def loss(vector: Tensor) -> Tensor:
        pieces = zip(named.items(), vector.split(sizes), strict=True)
        values = {name: piece.view_as(p) for (name, p), piece in pieces}
        return torch.func.functional_call(model, values, kwargs=batch)["loss"]

    point = torch.cat([parameter.flatten() for parameter in named.values()])
    return torch.autograd.functional.jacobian(loss, point), torch.autograd.functional.hessian(loss, point)


BLOCKS = ["trunk.*", "heads.*"]
PRECISE: dict[str, Any] = {"task_column": "task", "max_hvps": 60, "eigen_tolerance": 1e-6, "blocks": BLOCKS}


def weighted(found: Measurement, value: Callable[[Any], float]) -> float:
    """The sum of a number over the tasks, each times its weight."""
    return sum(task.weight * value(task) for task in found.multitask.tasks.values())


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("trace_method", ["hutchinson", "exact"])
def test_tasks_add_up_to_the_joint_one(curvature: str, trace_method: str):
    config = OptimizabilityConfig(**PRECISE, curvature=curvature, trace_method=trace_method)
    found = measure(Heads(), cut(rows(), 7), config)
    assert list(found.multitask.tasks) == ["0", "1"]
    assert weighted(found, lambda task: task.loss.value) == pytest.approx(found.loss, rel=1e-10)
    assert weighted(found, lambda task: task.trace.value) == pytest.approx(found.hessian.trace.value, rel=1e-10)
    curve = found.quadratic_model.curvature
    assert weighted(found, lambda task: task.curvature_along_gradient) == pytest.approx(curve, rel=1e-10)
    for name, block in found.blocks.items():
        joint = weighted(found, lambda task, name=name: task.blocks[name].trace.value)
        assert joint == pytest.approx(block.trace.value, rel=1e-10)
    assert sum(task.num_items for task in found.multitask.tasks.values()) == found.num_items == 21


def test_each_task_is_what_it_is_alone():
    """Exact trace, largest eigenvalue, gradient and gᵀHg against a dense Hessian of that task's examples."""
    model, whole = Heads(), rows()
    found = measure(model, cut(whole, 7), OptimizabilityConfig(**{**PRECISE, "max_hvps": 150}, trace_method="exact"))
    joint, _ = dense(model, whole)
    for index, (name, task) in enumerate(found.multitask.tasks.items()):
        gradient, hessian = dense(model, of_task(whole, index))
        assert name == str(index)
        assert task.trace.value == pytest.approx(float(hessian.trace()), rel=1e-10)
        assert task.trace.std_error == 0 and task.trace.data_std_error > 0
        assert task.lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-5)
        assert task.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-10)
        assert task.curvature_along_gradient == pytest.approx(float(joint @ hessian @ joint), rel=1e-10)
        assert task.blocks["trunk.*"].grad_norm == pytest.approx(float(gradient[:25].norm()), rel=1e-10)
    head = found.multitask.conflicts[0].blocks["heads.*"]
    assert head is None or head.value == 0  # each head is one task's own


@pytest.mark.slow  # the next but one mixes them, too
def test_batches_that_mix_tasks_are_cut():
    model, whole = Heads(), rows(12)
    config = OptimizabilityConfig(**PRECISE)
    mixed = measure(model, cut(whole, 3), config)
    order = torch.argsort(whole["task"], stable=True)
    apart = measure(model, cut({key: value[order] for key, value in whole.items()}, 1), config)
    named = [
        {**batch, "task": batch["task"], "kind": ["ab"[task] for task in batch["task"]]} for batch in cut(whole, 3)
    ]
    strings = measure(model, named, OptimizabilityConfig(**{**PRECISE, "task_column": "kind"}))
    assert list(strings.multitask.tasks) == ["a", "b"]
    for found in (apart, strings):
        for one, other in zip(mixed.multitask.tasks.values(), found.multitask.tasks.values(), strict=True):
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-10)
            assert one.trace.value == pytest.approx(other.trace.value, rel=1e-8)
            assert one.lambda_max.value == pytest.approx(other.lambda_max.value, rel=1e-6)


def test_a_model_that_does_not_take_the_key_does_not_get_it():
    batches = [{**batch, "task": "ab"[index % 2]} for index, batch in enumerate(cut(rows(24), 3))]
    found = measure(OneHead(), batches, OptimizabilityConfig(**PRECISE))
    assert [task.batches for task in found.multitask.tasks.values()] == [4, 4]


class TestConflict:
    """Of regressions: near 0 the gradient of a squared error is that of minus the target times the output."""

    def measured(self, sign: float) -> Measurement:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(128, 6, generator=generator)
        targets = inputs @ torch.ones(6) + 0.3 * torch.randn(128, generator=generator)
        tasks = torch.arange(128) // 64
        targets = torch.where(tasks == 0, targets, sign * targets)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
        nn.init.normal_(model[2].weight, std=0.05)
        batches = cut({"inputs": inputs, "targets": targets, "task": tasks}, 8)

        def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return (model(batch["inputs"])[:, 0] - batch["targets"]).square().mean()

        config = OptimizabilityConfig(profile="light", task_column="task")
        return measure(model, batches, config, loss_fn=loss_fn)

    def test_a_task_agrees_with_itself_and_with_more_of_the_same(self):
        found = self.measured(1.0).multitask
        assert found.cosine("0", "0").value == 1
        assert found.cosine("0", "1").low > 0.8

    def test_negated_labels_conflict_in_all_and_by_block(self):
        measurement = self.measured(-1.0)
        found = measurement.multitask
        assert found.cosine("0", "1").high < -0.5 and found.cosine("1", "0").value < -0.8
        assert all(cosine.value < 0 for cosine in found.conflicts[0].blocks.values() if cosine is not None)
        report = OptimizabilityReport(measurements=[measurement])
        assert "tasks_conflict" in [finding.name for finding in report.findings]
        assert "tasks_conflict" not in [
            finding.name for finding in OptimizabilityReport(measurements=[self.measured(1.0)]).findings
        ]


@pytest.mark.slow  # test_measure.py shows the same without tasks
def test_where_memory_is_short_tasks_stay_apart():
    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if len(batch["labels"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return model(**batch)["loss"]

    config, whole = OptimizabilityConfig(**PRECISE), rows()
    batches = [piece for index in (0, 1) for piece in cut(of_task(whole, index), 7)]
    tasks = [str(int(batch["task"][0])) for batch in batches]
    found, fitting = measure_objective(Objective(Heads(), batches, loss_fn=loss_fn, tasks=tasks), config)
    assert fitting.batch_size == 2
    assert [task.batches for task in found.multitask.tasks.values()] == [8, 4]
    reference = measure(Heads(), batches, config)
    for one, other in zip(found.multitask.tasks.values(), reference.multitask.tasks.values(), strict=True):
        assert one.trace.value == pytest.approx(other.trace.value, rel=1e-8)


def test_central_differences_tell_gradients_apart_but_no_curvature():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient

    class OnceDifferentiable(Heads):
        def forward(self, pixels: Tensor, task: Tensor, labels: Tensor) -> dict[str, Tensor]:
            hidden = Once.apply(self.trunk(pixels).tanh())
            logits = torch.stack([head(hidden) for head in self.heads], dim=1)[torch.arange(len(task)), task]
            return {"loss": nn.functional.cross_entropy(logits, labels)}

    found = measure(OnceDifferentiable(), cut(rows(), 7), OptimizabilityConfig(task_column="task", profile="light"))
    assert found.engine == "central_difference"
    task = found.multitask.tasks["0"]
    assert task.grad_norm > 0 and task.trace is task.lambda_max is task.curvature_along_gradient is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace_method": "hutch++"}, "`trace_method` is 'hutch\\+\\+'.*'hutchinson' or 'exact'"),
        ({"trace_method": "xtrace"}, "`trace_method` is 'xtrace'"),
        ({"curvature": "empirical_fisher"}, "`curvature` is 'empirical_fisher'.*Choose 'hessian'"),
        ({"engine": "central_difference"}, "`engine` is 'central_difference'.*Leave `engine` at 'auto'"),
    ],
)
def test_what_does_not_tell_tasks_apart_is_refused_at_once(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        OptimizabilityConfig(task_column="task", **options)
    with pytest.raises(ValueError, match="`task_eigenvalues` needs `task_column`"):
        OptimizabilityConfig(task_eigenvalues=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda batch: {key: value for key, value in batch.items() if key != "task"},
            "has the keys 'pixels', 'labels'",
        ),
        (lambda batch: {**batch, "task": torch.zeros_like(batch["task"])}, "belong to one task, '0'"),
        (lambda batch: {**batch, "task": batch["pixels"][:, 0]}, "named by a string or a whole number"),
        (lambda batch: {**batch, "extra": torch.zeros(7)}, "'extra' has 7 entries for 3 examples"),
        (lambda batch: {**batch, "task": [str(float(x)) for x in batch["pixels"][:, 0]]}, "at most 16 tasks"),
    ],
)
def test_batches_without_tasks_are_refused(change: Callable[[dict[str, Tensor]], Any], message: str):
    with pytest.raises(ValueError, match=message):
        measure(Heads(), [change(batch) for batch in cut(rows(), 3)], OptimizabilityConfig(task_column="task"))


HOSTILE = "<b>a|`x`</b>\n# y"


def dataset(kind: Callable[[int], Any], *, features: Any = None) -> datasets.Dataset:
    plain = tiny_training.dataset("bert")
    columns = [{**row, "input_ids": row["input_ids"].tolist(), "kind": kind(i)} for i, row in enumerate(plain)]
    made = datasets.Dataset.from_list(columns)
    return made.cast_column("kind", features) if features is not None else made


class TestTrainer:
    OPTIONS: ClassVar[dict[str, Any]] = {
        **CONFIG,
        "measure_strategy": "no",
        "probe_examples": 8,
        "task_column": "kind",
    }

    def test_training_is_the_same_and_names_come_through_whatever_they_are(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("hf_optimizability.report.figures.plot_all", lambda report: {})
        data = dataset(lambda i: HOSTILE if i % 2 else "plain")
        sets = {
            name: data.filter(lambda kind, name=name: kind == name, input_columns="kind")
            for name in (HOSTILE, "plain")
        }
        options = {"train_dataset": data, "eval_dataset": sets, "eval_strategy": "steps", "eval_steps": 2}
        options |= {"max_steps": 2, "logging_steps": 1}
        plain = run(tiny_training.trainer(tmp_path, **options))
        trainer = tiny_training.trainer(
            tmp_path, cls=OptimizabilityTrainer, optimizability=OptimizabilityConfig(**self.OPTIONS), **options
        )
        assert_equal(run(trainer), plain)
        report = OptimizabilityReport.load(tmp_path / "optimizability")
        assert report.measurements == trainer.optimizability_report().published().measurements and not report.failures
        several = report.measurements[-1].multitask
        assert (
            list(several.tasks) == [public_name(HOSTILE), "plain"]
            and next(iter(several.conflicts[0].blocks)) == "embeddings"
        )
        assert {f"optimizability/task/plain/{name}" for name in ("loss", "grad_norm", "hessian_trace")} <= {
            key for entry in report.log_history for key in entry
        }
        gap = report.dynamics["tasks"]["plain"]["loss_gap"]
        assert gap["loss_gap"] is not None and gap["std_error"] > 0
        for text in (to_markdown(report), report.to_html()):
            assert "<b>a" not in text and "`x`" not in to_markdown(report)

    def test_a_column_that_is_gone_is_asked_for(self, tmp_path: Path):
        callback = OptimizabilityCallback(OptimizabilityConfig(**self.OPTIONS))
        data = dataset(lambda i: i % 2)
        with pytest.raises(ValueError, match=r"no column 'kind'.*only 'input_ids', 'labels'.*OptimizabilityTrainer"):
            tiny_training.trainer(tmp_path, train_dataset=data, callbacks=[callback]).train()

    @pytest.mark.slow
    def test_rows_that_keep_it_do_without_a_trainer_and_classes_give_their_names(self, tmp_path: Path):
        callback = OptimizabilityCallback(OptimizabilityConfig(**self.OPTIONS))
        rows = [{**row, "kind": i % 2} for i, row in enumerate(tiny_training.dataset("bert"))]
        tiny_training.trainer(tmp_path, train_dataset=rows, callbacks=[callback], max_steps=1).train()
        assert list(callback.report.measurements[-1].multitask.tasks) == ["0", "1"]
        names = datasets.ClassLabel(names=["spam", "topic"])
        trainer = tiny_training.trainer(tmp_path, train_dataset=dataset(lambda i: i % 2, features=names), max_steps=1)
        callback = OptimizabilityCallback(OptimizabilityConfig(**self.OPTIONS), trainer=trainer)
        trainer.add_callback(callback)
        trainer.train()
        assert list(callback.report.measurements[-1].multitask.tasks) == ["spam", "topic"]

    def test_a_stream_is_refused(self, tmp_path: Path):
        stream = dataset(lambda i: i % 2).to_iterable_dataset()
        config = OptimizabilityConfig(**self.OPTIONS)
        trainer = tiny_training.trainer(
            tmp_path, cls=OptimizabilityTrainer, train_dataset=stream, optimizability=config
        )
        with pytest.raises(ValueError, match="streamed; `task_column` needs"):
            trainer.train()
