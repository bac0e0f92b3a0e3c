# SPDX-License-Identifier: Apache-2.0
"""Training with the callback is bit for bit the training without it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertTokenizer, DataCollatorForLanguageModeling, Trainer

from hf_optimizability import (
    OptimizabilityCallback,
    OptimizabilityConfig,
    OptimizabilityTrainer,
    OptimizabilityTrainerMixin,
)
from hf_optimizability.objective.objective import Objective
from tests.support import stateful_models, tiny_training, tiny_trl
from tests.support.tiny_training import CONFIG
from tests.support.training_outcome import assert_equal, run


@pytest.mark.parametrize(
    ("name", "optimizer", "accumulation"),
    [
        ("bert", "adamw_torch", 1), ("resnet", "sgd", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("bert", "sgd", 1), ("bert", "sgd", 3), ("bert", "adamw_torch", 3),
            ("mobilenet", "sgd", 1), ("mobilenet", "adamw_torch", 1),
            ("mobilenet", "adamw_torch", 3), ("mobilenet", "sgd", 3),
        )),
    ],
)  # fmt: skip
def test_training_is_the_same(tmp_path: Path, name: str, optimizer: str, accumulation: int):
    options = {
        "optim": optimizer,
        "gradient_accumulation_steps": accumulation,
        "eval_dataset": tiny_training.dataset(name, 8),
    }
    options |= {"eval_strategy": "steps", "eval_steps": 3}
    plain = run(tiny_training.trainer(tmp_path, name, **options))
    callback = OptimizabilityCallback(OptimizabilityConfig(**CONFIG))
    assert_equal(run(tiny_training.trainer(tmp_path, name, callbacks=[callback], **options)), plain)
    assert len(callback.report.measurements) == 4 and not callback.report.failures

    config = OptimizabilityConfig(**CONFIG)
    trainer = tiny_training.trainer(tmp_path, name, OptimizabilityTrainer, optimizability=config, **options)
    assert_equal(run(trainer), plain)
    assert len(trainer.optimizability_report().measurements) == 4 and not trainer.optimizability_report().failures
    assert len(plain["log"]) == 5  # three losses, two evaluations


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["bert", pytest.param("mobilenet", marks=pytest.mark.slow)])
def test_training_is_the_same_with_slices_through_the_landscape(
    tmp_path: Path, name: str, fails: bool, monkeypatch: pytest.MonkeyPatch
):
    """Which move the weights 143 times, and may raise on the way."""
    plain = run(tiny_training.trainer(tmp_path, name))
    losses, passes = Objective.losses, itertools.count()

    def fail_in_the_plane(self: Objective) -> Iterator[tuple[torch.Tensor, int]]:
        if not torch.is_grad_enabled() and next(passes) % 100 == 60:
            raise RuntimeError("broken on purpose")
        yield from losses(self)

    if fails:
        monkeypatch.setattr(Objective, "losses", fail_in_the_plane)
    config = OptimizabilityConfig(**{**CONFIG, "measure_strategy": "no"}, landscape=True)
    callback = OptimizabilityCallback(config)
    assert_equal(run(tiny_training.trainer(tmp_path, name, callbacks=[callback])), plain)
    if fails:
        assert [failure.step for failure in callback.report.failures] == [0, 6]
        assert callback.report.failures[0].why.error == "RuntimeError"
    else:
        assert [m.landscape.eigenvectors is not None for m in callback.report.measurements] == [True, True]


def test_training_is_the_same_where_the_gap_is_measured_without_evaluations(tmp_path: Path):
    options = {"eval_dataset": tiny_training.dataset("bert", 8)}
    plain = run(tiny_training.trainer(tmp_path, **options))
    config = OptimizabilityConfig(**{**CONFIG, "measure_strategy": "no"})
    trainer = tiny_training.trainer(tmp_path, cls=OptimizabilityTrainer, optimizability=config, **options)
    assert_equal(run(trainer), plain)
    log = trainer.optimizability_report().log_history
    assert any("optimizability/eval_accuracy" in entry for entry in log) and all(plain["modes"])


@pytest.mark.parametrize("kind", ["queue", "nested dict", "numpy generator", "merging"])
def test_training_is_the_same_where_the_model_keeps_state(tmp_path: Path, kind: str):
    """State that each forward pass changes, in eval mode too, and weights that `eval()` changes."""
    rows = [{"x": x, "labels": y} for x, y in zip(*stateful_models.batch(24).values(), strict=True)]

    def trainer(**options: Any) -> Trainer:
        model: Any = stateful_models.merging() if kind == "merging" else stateful_models.stateful(kind)
        return tiny_training.trainer(tmp_path, own=model, train_dataset=rows, max_steps=3, **options)

    plain = run(trainer())
    callback = OptimizabilityCallback(OptimizabilityConfig(**{**CONFIG, "measure_strategy": "no"}))
    assert_equal(run(trainer(callbacks=[callback])), plain)
    assert len(callback.report.measurements) == 2 and not callback.report.failures


class Remembering(Trainer):
    """Counts calls, keeps a mean and metrics of them, and logs in its loss, which depends on them."""

    calls = 0
    mean: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.losses: dict[str, list[float]] = {"train": []}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.mean = loss.detach() if self.mean is None else 0.9 * self.mean + 0.1 * loss.detach()
        self.losses["train"].append(float(self.mean))
        self.log({"part": float(self.mean)})
        return loss * min(1.0, self.calls / 5)


class MeasuredRemembering(OptimizabilityTrainerMixin, Remembering):
    pass


def test_training_is_the_same_where_the_loss_keeps_state_on_the_trainer(tmp_path: Path):
    plain = tiny_training.trainer(tmp_path, cls=Remembering, max_steps=3)
    expected = run(plain)
    config = OptimizabilityConfig(**{**CONFIG, "measure_strategy": "no"})
    trainer = tiny_training.trainer(tmp_path, cls=MeasuredRemembering, max_steps=3, optimizability=config)
    assert_equal(run(trainer), expected)
    for kept in ("calls", "losses", "mean"):
        assert_equal(vars(trainer)[kept], vars(plain)[kept], kept)
    parts = [[entry for entry in t.state.log_history if "part" in entry] for t in (trainer, plain)]
    assert parts[0] == parts[1] and len(parts[0]) == 3
    report = trainer.optimizability_report()
    assert len(report.measurements) == 2 and not report.failures


def test_training_is_the_same_when_measurements_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A product that raises in the middle, when the model is in eval mode and the RNG is seeded anew."""
    plain = run(tiny_training.trainer(tmp_path))

    def fail(*args: object) -> None:
        torch.rand(3)
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("hf_optimizability.curvature.hessian.second_backward", fail)
    callback = OptimizabilityCallback(OptimizabilityConfig(**CONFIG, engine="double_backward"))
    assert_equal(run(tiny_training.trainer(tmp_path, callbacks=[callback])), plain)
    assert not callback.report.measurements and len(callback.report.failures) == 4


class CountingRows(torch.utils.data.IterableDataset):
    """A stream that counts what it has served; its place and its count decide what comes next."""

    def __init__(self) -> None:
        self.served = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in tiny_training.dataset("bert", 24):
            self.served += 1
            yield {**row, "labels": (row["labels"] + self.served) % 3}


@pytest.mark.parametrize("kind", ["collator", "stream"])
def test_training_is_the_same_where_the_data_keep_state(tmp_path: Path, kind: str):
    """Transformers' own collator that masks with a generator of its own; a stream that counts."""

    def trainer(**options: Any) -> Trainer:
        if kind == "stream":
            return tiny_training.trainer(tmp_path, train_dataset=CountingRows(), max_steps=3, **options)
        words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, **{str(n): n for n in range(5, 13)}}
        collator = DataCollatorForLanguageModeling(BertTokenizer(vocab=words), seed=42)
        torch.manual_seed(0)
        model = BertForMaskedLM(tiny_training.model("bert").config)
        rows = [{"input_ids": row["input_ids"]} for row in tiny_training.dataset("bert", 24)]
        return tiny_training.trainer(
            tmp_path, own=model, train_dataset=rows, data_collator=collator, max_steps=3, **options
        )

    plain = run(trainer())
    callback = OptimizabilityCallback(OptimizabilityConfig(**{**CONFIG, "measure_strategy": "no"}))
    assert_equal(run(trainer(callbacks=[callback])), plain)
    assert len(callback.report.measurements) == 2 and not callback.report.failures


@pytest.mark.parametrize("kind", [pytest.param("sft", marks=pytest.mark.slow), "dpo"])  # DPO gathers more metrics
def test_trl_chooses_the_same_checkpoint_by_the_same_metrics(tmp_path: Path, kind: str):
    """Its trainers gather metrics in `compute_loss` and clear them in `log`."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    cls, config, rows = (
        (SFTTrainer, SFTConfig, tiny_trl.TEXTS) if kind == "sft" else (DPOTrainer, DPOConfig, tiny_trl.PAIRS)
    )
    best = "eval_mean_token_accuracy" if kind == "sft" else "eval_rewards/margins"
    options = {
        "eval_dataset": Dataset.from_list(rows[::2]), "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": best,
        "greater_is_better": True, "logging_steps": 3, "per_device_train_batch_size": 2,
    }  # fmt: skip

    def trained(cls: type[Trainer], **more: Any) -> Trainer:
        more |= {} if kind == "sft" else {"ref_model": tiny_trl.language_model()}
        trainer = tiny_trl.trainer(
            tmp_path / cls.__name__, cls, config, rows, tiny_trl.language_model(), **options, **more
        )
        trainer.train()
        return trainer

    plain = trained(cls)
    settings = OptimizabilityConfig(**{**CONFIG, "measure_strategy": "no"})
    measured = trained(type("Measured", (OptimizabilityTrainerMixin, cls), {}), optimizability=settings)
    timed = ("_runtime", "_per_second", "num_tokens")
    logs = [
        [{k: v for k, v in entry.items() if not k.endswith(timed) and "/train_grad_norm/" not in k} for entry in log]
        for log in (measured.state.log_history, plain.state.log_history)
    ]
    assert logs[0] == logs[1] and any(best in entry for entry in logs[1])
    assert measured.state.best_global_step == plain.state.best_global_step
    assert_equal(measured.model.state_dict(), plain.model.state_dict())
    assert measured.optimizability_report().measurements


def weighted(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss whose examples are not known one by one."""
    return nn.functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([0.2, 1.0, 3.0]))


@pytest.mark.parametrize(
    ("name", "options", "known"),
    [
        ("bert", {"label_smoothing_factor": 0.1}, True),
        pytest.param("mobilenet", {}, True, marks=pytest.mark.slow),
        ("bert", {"compute_loss_func": weighted}, False),
    ],
)
def test_training_is_the_same_with_examples_drawn_at_each_measurement(
    tmp_path: Path, name: str, options: dict[str, Any], known: bool
):
    plain = run(tiny_training.trainer(tmp_path, name, **options))
    config = OptimizabilityConfig(**{**CONFIG, "pool_examples": 16})
    trainer = tiny_training.trainer(tmp_path, name, OptimizabilityTrainer, optimizability=config, **options)
    assert_equal(run(trainer), plain)
    report = trainer.optimizability_report()
    assert len(report.measurements) == 4 and not report.failures
    assert [measurement.population is not None for measurement in report.measurements] == [known] * 4
    method = "gauss-newton + hutchinson" if known else "hutchinson"
    assert report.measurements[0].hessian.trace.method == method  # MobileNetV2's loss is huge later on


@pytest.mark.parametrize(
    ("name", "optimizer"), [("bert", "adamw_torch"), pytest.param("mobilenet", "sgd", marks=pytest.mark.slow)]
)
def test_training_is_the_same_with_batch_sharpness(tmp_path: Path, name: str, optimizer: str):
    options = {"optim": optimizer, "gradient_accumulation_steps": 2}
    plain = run(tiny_training.trainer(tmp_path, name, **options))
    callback = OptimizabilityCallback(OptimizabilityConfig(**CONFIG, batch_sharpness=True))
    assert_equal(run(tiny_training.trainer(tmp_path, name, callbacks=[callback], **options)), plain)
    found = [measurement.batch_sharpness for measurement in callback.report.measurements]
    assert len(found) == 4 and all(found) and not callback.report.failures
    assert [(batches.batches, batches.items) for batches in found] == [(3, 8)] * 4  # of 24 examples
    assert [batches.preconditioned is not None for batches in found] == [optimizer == "adamw_torch"] * 4
