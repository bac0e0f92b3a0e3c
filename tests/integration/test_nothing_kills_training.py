# SPDX-License-Identifier: Apache-2.0
"""Whatever can't be drawn, counted or computed is one warning and a recorded failure; training ends as without."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainerControl
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_optimizability import (
    OptimizabilityCallback,
    OptimizabilityConfig,
    OptimizabilityReport,
    OptimizabilityTrainerMixin,
    measure,
)
from hf_optimizability.objective.probe_set import fingerprint
from tests.support import tiny_training
from tests.support.training_outcome import assert_equal, run


CONFIG = {**tiny_training.CONFIG, "probe_examples": 8}
IN_ORDER = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}
HAND_OVER = "OptimizabilityCallback(config, trainer=trainer)"


class NetConfig(PreTrainedConfig):
    model_type = "net"


class Net(PreTrainedModel):
    """Four features to three classes."""

    config_class = NetConfig
    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__(NetConfig())
        torch.manual_seed(0)
        self.hidden, self.classifier = nn.Linear(4, 6), nn.Linear(6, 3)

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def logits(self, x: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.hidden(x)))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.logits(x)
        return SequenceClassifierOutput(
            loss=None if labels is None else nn.functional.cross_entropy(logits, labels), logits=logits
        )


def rows(number: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, generator=generator), "labels": index % 3} for index in range(number)]


def batch_of(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {"x": torch.stack([row["x"] for row in rows]), "labels": torch.tensor([row["labels"] for row in rows])}


def make(
    folder: Path,
    cls: type[Trainer] = Trainer,
    *,
    model: type[Net] = Net,
    data: Callable[[], Any] = rows,
    collate: Callable[[], Any] | None = None,
    **options: Any,
) -> Trainer:
    settings = {"train_dataset": data(), "max_steps": 3, "logging_steps": 1, "remove_unused_columns": False, **options}
    trainer = tiny_training.trainer(folder, cls=cls, own=model(), **settings)
    if collate is not None:
        trainer.data_collator = collate()
    return trainer


def both(
    folder: Path, cls: type[Trainer] = Trainer, *, config: dict[str, Any] = CONFIG, **options: Any
) -> list[OptimizabilityReport]:
    """Train plainly, with the callback, and with the mixin; check that all end alike; return the two reports."""
    plain = run(make(folder / "plain", cls, **options))
    callback = OptimizabilityCallback(OptimizabilityConfig(**config))
    assert_equal(run(make(folder / "callback", cls, callbacks=[callback], **options)), plain)
    mixed = type("Mixed", (OptimizabilityTrainerMixin, cls), {})
    trainer = make(folder / "mixin", mixed, optimizability=OptimizabilityConfig(**config), **options)
    assert_equal(run(trainer), plain)
    reports = [callback.report, trainer.optimizability_report()]
    for name, report in zip(("callback", "mixin"), reports, strict=True):
        saved = OptimizabilityReport.load(folder / name / "optimizability")
        assert saved.failures == report.failures and len(saved.measurements) == len(report.measurements)
    return reports


class Batches(Dataset):
    """Whole batches of unequal sizes."""

    def __init__(self) -> None:
        held = iter(rows(24))
        self.batches = [batch_of([next(held) for _ in range(size)]) for size in (4, 2, 4, 3, 4, 2, 4, 1)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batches[index]


class StreamOfBatches(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(Batches().batches)


class ByLists(Dataset):
    """Takes lists of indices alone."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, indices: list[int]) -> dict[str, Tensor]:
        if not isinstance(indices, list):
            raise TypeError(f"expected a list of indices, got {indices!r}")
        return batch_of([rows()[index] for index in indices])


class Prebatched(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, ByLists):
            sampler = BatchSampler(RandomSampler(self.train_dataset), 4, drop_last=False)
            return DataLoader(self.train_dataset, sampler=sampler, batch_size=None)
        return DataLoader(self.train_dataset, batch_size=None)


@pytest.mark.parametrize(
    ("dataset", "batches", "examples"), [(Batches, None, None), (StreamOfBatches, 3, 10), (ByLists, 2, 8)]
)
def test_items_that_are_whole_batches_are_measured(
    tmp_path: Path, dataset: type[Dataset], batches: int | None, examples: int | None
):
    for report in both(tmp_path, Prebatched, data=dataset):
        assert [m.step for m in report.measurements] == [0, 2, 3] and not report.failures
        assert batches is None or report.data.probe.batches == batches
        assert examples is None or report.measurements[0].num_items == report.data.probe.examples == examples


class OneLabelABatch(BatchSampler):
    """Batches that hold one label each, which is what the collator below asks for."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.epoch)
        self.epoch += 1
        for start in torch.randperm(6, generator=generator).tolist():
            yield list(range(start % 3, 24, 3))[start // 3 * 4 :][:4]

    def __len__(self) -> int:
        return 6


def one_label_only(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    if len({row["labels"] for row in rows}) > 1:
        raise KeyError("anchor")
    return batch_of(rows)


class Grouped(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_sampler=OneLabelABatch(), collate_fn=one_label_only)


def test_a_batch_sampler_says_which_rows_share_a_batch(tmp_path: Path):
    for report in both(tmp_path, Grouped):
        assert [m.num_items for m in report.measurements] == [8, 8, 8] and not report.failures


def test_a_collator_that_refuses_rows_drawn_at_random(tmp_path: Path):
    """As with rows of several data sets; training is lucky, as its rows come in order."""

    class InOrder(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            ordered = sorted(self.train_dataset, key=lambda row: row["labels"])
            return DataLoader(ordered, batch_size=4, collate_fn=one_label_only)

    for report in both(tmp_path, InOrder):
        [failure] = report.failures
        assert not report.measurements and failure.step == 0
        assert failure.reason == "The collator refused rows drawn at random (KeyError)."
        assert "batch sampler" in failure.remedy


def test_rows_that_collate_alone_only(tmp_path: Path):
    ragged = [{"x": torch.randn(1 + index % 3, 4), "labels": index % 3} for index in range(24)]

    class Mean(Net):
        def logits(self, x: Tensor) -> Tensor:
            return super().logits(x.mean(dim=1))

    for report in both(tmp_path, model=Mean, data=lambda: ragged, per_device_train_batch_size=1):
        assert [m.num_items for m in report.measurements] == [8, 8, 8] and report.data.probe.batches == 8


class Unreadable(Dataset):
    """Training in order meets the first rows only."""

    def __init__(self, readable: int, number: int):
        self.readable, self.number = readable, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.readable:
            raise OSError("broken JPEG")
        return rows(self.number)[index]


def test_rows_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for report in both(tmp_path, data=lambda: Unreadable(16, 24), max_steps=1, train_sampling_strategy="sequential"):
        assert 2 <= report.measurements[0].num_items < 8 and not report.failures


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: rows(1), "only 1 examples, but a probe set needs at least 2"),
        (lambda: [{**row, "labels": -100} for row in rows()], "All labels of the probe set are -100"),
        (lambda: Unreadable(2, 240), "rows can't be read (OSError)"),
    ],
)
def test_what_cannot_be_measured_is_a_failure(tmp_path: Path, data: Callable[[], Any], reason: str):
    config = {**CONFIG, "probe_examples": None}
    for report in both(tmp_path, data=data, config=config, max_steps=1, **IN_ORDER):
        assert not report.measurements and reason in report.failures[0].reason


def test_without_the_trainer_its_loss_is_named_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("hf_optimizability"), "propagate", True)
    unlabelled = [{"x": row["x"], "y": row["labels"]} for row in rows()]

    class Own(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            return nn.functional.cross_entropy(model(inputs["x"]).logits, inputs["y"])

    callback, mixin = both(tmp_path, Own, data=lambda: unlabelled)
    assert not callback.measurements and len(mixin.measurements) == 3
    assert all(HAND_OVER in failure.remedy for failure in callback.failures)


class Parts(Trainer):
    """An optimizer over some of the parameters."""

    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = self.optimizer_class(self.model.classifier.parameters(), lr=1e-2)
        return self.optimizer


def test_an_optimizer_over_some_of_the_parameters(tmp_path: Path):
    """The sharpness is that of the part that moves; here that of a model whose other part is frozen."""
    for report in both(tmp_path, Parts):
        frozen = Net()
        frozen.hidden.requires_grad_(False)
        batches = [batch_of(rows()[:12]), batch_of(rows()[12:])]
        options = {"config": OptimizabilityConfig(profile="full")}
        part = measure(
            frozen, batches, optimizer=torch.optim.AdamW(frozen.classifier.parameters(), lr=1e-2), **options
        )
        whole = Net()
        optimizer = torch.optim.AdamW(whole.classifier.parameters(), lr=1e-2)
        found = measure(whole, batches, optimizer=optimizer, **options)
        assert found.optimizer_stability.sharpness.value == pytest.approx(
            part.optimizer_stability.sharpness.value, rel=1e-3
        )
        assert found.optimizer_stability.critical.value == pytest.approx(
            part.optimizer_stability.critical.value, rel=1e-3
        )
        assert all(m.optimizer_stability is not None and m.trainable_parameters == 51 for m in report.measurements)


class Thaw(TrainerCallback):
    """Trains the head alone at first, all of the network from the second step on, the body alone at last."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Net, **kwargs: Any) -> None:
        model.hidden.requires_grad_(state.global_step >= 1)
        model.classifier.requires_grad_(state.global_step < 2)


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.hidden.requires_grad_(False)


class AllParameters(Trainer):
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        return self.optimizer


@pytest.mark.parametrize("cls", [AllParameters, Parts])
def test_parameters_frozen_and_unfrozen_in_mid_run(tmp_path: Path, cls: type[Trainer]):
    config = {**CONFIG, "measure_steps": 1, "blocks": ["classifier.*"]}
    plain = run(make(tmp_path / "plain", cls, model=Frozen, callbacks=[Thaw()]))
    callback = OptimizabilityCallback(OptimizabilityConfig(**config))
    assert_equal(run(make(tmp_path / "callback", cls, model=Frozen, callbacks=[Thaw(), callback])), plain)
    report = OptimizabilityReport.load(tmp_path / "callback" / "optimizability")
    assert [m.trainable_parameters for m in report.measurements] == [21, 21, 51, 30] and not report.failures
    assert [list(m.blocks) for m in report.measurements] == [["classifier.*"]] * 2 + [
        ["classifier.*", "other"],
        ["other"],
    ]
    assert report.model.trainable_parameters == 30
    assert all((m.optimizer_stability is None) == (cls is Parts and m.step == 3) for m in report.measurements)


def test_a_model_that_is_all_frozen_at_first(tmp_path: Path):
    class AllFrozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)

    options = {"cls": AllParameters, "model": AllFrozen, "callbacks": [Thaw()]}
    plain = run(make(tmp_path / "plain", **options))
    callback = OptimizabilityCallback(OptimizabilityConfig(**CONFIG))
    assert_equal(run(make(tmp_path / "callback", **{**options, "callbacks": [Thaw(), callback]})), plain)
    assert [failure.step for failure in callback.report.failures] == [0]
    assert "no trainable parameter" in callback.report.failures[0].reason
    assert [m.step for m in callback.report.measurements] == [2, 3]


class StopWhileMeasuring(TrainerCallback):
    """As a signal handler or a thread does: stops training at the n-th pass of a measurement."""

    def __init__(self, step: int, how: Callable[[TrainerControl], None]):
        self.step, self.how, self.passes = step, how, 0

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, model: Net, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.hook = model.register_forward_hook(lambda *call: self.count(control))

    def count(self, control: TrainerControl) -> None:
        self.passes += 1
        if self.passes == 2:
            self.how(control)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.passes:
            self.hook.remove()

    on_train_end = on_step_begin


def flag(control: TrainerControl) -> None:
    control.should_training_stop = True


def terminate(control: TrainerControl) -> None:
    """What the timer of Transformers' handler does, three seconds after SIGTERM."""
    signal.getsignal(signal.SIGTERM).__self__._enable_checkpoint()


@pytest.mark.parametrize(
    ("how", "options"),
    [(flag, {}), (terminate, {"enable_jit_checkpoint": True})],
    ids=["flag", "checkpoint on SIGTERM"],
)
@pytest.mark.parametrize("by", ["callback", "mixin"])
def test_a_measurement_lets_go_where_training_is_to_stop(
    tmp_path: Path, how: Callable[[TrainerControl], None], options: dict[str, Any], by: str
):
    stop, config = StopWhileMeasuring(2, how), OptimizabilityConfig(**{**CONFIG, "probe_batch_size": 4})
    own = {"callbacks": [stop], "max_steps": 6, **options}
    if by == "mixin":
        mixed = type("Mixed", (OptimizabilityTrainerMixin, Trainer), {})
        trainer = make(tmp_path, mixed, optimizability=config, **own)
        callback = trainer.optimizability_callback
    else:
        callback = OptimizabilityCallback(config)
        trainer = make(tmp_path, **{**own, "callbacks": [stop, callback]})
    trainer.train()
    # The checkpoint is made when the next step begins, which is then finished.
    assert trainer.state.global_step == (3 if how is terminate else 2) and stop.passes == 2
    assert [m.step for m in callback.report.measurements] == [0]
    failures = OptimizabilityReport.load(tmp_path / "optimizability").failures
    assert [failure.step for failure in failures] == ([2, 3] if how is terminate else [2])
    assert all("interrupted" in failure.reason for failure in failures)
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists() == (how is terminate)
    assert not (tmp_path / "optimizability" / "report.html").exists()


def test_no_last_measurement_after_a_checkpoint_on_sigterm(tmp_path: Path):
    class Terminate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
            if state.global_step == 1:
                terminate(control)

    callback = OptimizabilityCallback(OptimizabilityConfig(**CONFIG))
    make(tmp_path, callbacks=[Terminate(), callback], max_steps=6, enable_jit_checkpoint=True).train()
    assert [m.step for m in callback.report.measurements] == [0]
    assert [(f.step, "interrupted" in f.reason) for f in callback.report.failures] == [(2, True)]


def test_training_that_stops_early_after_an_evaluation_is_measured_last(tmp_path: Path):
    class Early(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
            control.should_training_stop = True

    callback = OptimizabilityCallback(OptimizabilityConfig(**{**CONFIG, "measure_strategy": "no"}))
    options = {"eval_dataset": rows(8), "eval_strategy": "steps", "eval_steps": 1, "enable_jit_checkpoint": True}
    make(tmp_path, callbacks=[Early(), callback], **options).train()
    assert [m.step for m in callback.report.measurements] == [0, 1] and not callback.report.failures


def test_a_collator_that_changes_the_rows_it_is_given(tmp_path: Path):
    class Popping(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(self.train_dataset, batch_size=4, collate_fn=take_labels)

    def take_labels(given: list[dict[str, Any]]) -> dict[str, Tensor]:
        labels = [row.pop("labels", 0) for row in given]
        return {"x": torch.stack([row["x"].mul_(2) for row in given]), "labels": torch.tensor(labels)}

    for report in both(tmp_path, Popping, data=lambda: rows(1200)):  # more than are looked into
        assert not report.failures


class Dense(Net):
    """Takes sparse and ragged inputs as well."""

    def logits(self, x: Tensor) -> Tensor:
        x = torch.stack([row.sum(0) for row in x.unbind()]) if x.is_nested else x
        return super().logits(x.to_dense() if x.is_sparse else x)


def ragged(given: list[dict[str, Any]]) -> dict[str, Tensor]:
    values = [row["x"].repeat(1 + row["labels"], 1) / (1 + row["labels"]) for row in given]
    return {**batch_of(given), "x": torch.nested.nested_tensor(values)}


def sparse(given: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {**batch_of(given), "x": batch_of(given)["x"].to_sparse()}


@pytest.mark.parametrize("collate", [sparse, ragged])
def test_sparse_and_ragged_inputs_are_measured(collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]):
    config = OptimizabilityConfig(profile="light")
    found, dense = (measure(Dense(), [made(rows(8)), made(rows(8))], config) for made in (collate, batch_of))
    assert found.loss == pytest.approx(dense.loss) and found.num_items == 16
    assert found.hessian.lambda_max.value == pytest.approx(dense.hessian.lambda_max.value, rel=1e-3)
    assert found.hessian.trace.value == pytest.approx(dense.hessian.trace.value, rel=1e-2)
    assert fingerprint([collate(rows(8))]) == fingerprint([collate(rows(8))]) != fingerprint([collate(rows(9))])
