# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a training are about: the loss over the training set, unless a reason says why not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, WeightedRandomSampler
from transformers import Trainer

from hf_optimizability import OptimizabilityConfig, OptimizabilityReport, OptimizabilityTrainer
from hf_optimizability.objective.pool import Pool
from hf_optimizability.report.tables import subject
from tests.support import tiny_training


CONFIG: dict[str, Any] = {"profile": "light", "probe_examples": 4, "probe_batch_size": 4, "max_hvps": 16}


def report_of(folder: Path, cls: type[Trainer] = OptimizabilityTrainer, **options: Any) -> OptimizabilityReport:
    config = OptimizabilityConfig(**{**CONFIG, "measure_strategy": "no", **options.pop("config", {})})
    trainer = tiny_training.trainer(folder, cls=cls, optimizability=config, max_steps=1, **options)
    trainer.train()
    return trainer.optimizability_report()


def mean_loss(rows: Any, weights: torch.Tensor | None = None) -> float:
    batch = next(iter(DataLoader(rows, batch_size=len(rows))))
    with torch.no_grad():
        logits = tiny_training.model("bert").eval()(**batch).logits
    losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    return float(losses.mean() if weights is None else (weights * losses).sum() / weights.sum())


def test_by_default_they_are_about_the_loss_over_the_training_set(tmp_path: Path):
    rows = tiny_training.dataset("bert", 20)
    report = report_of(tmp_path, train_dataset=rows)
    population = report.measurements[0].population
    assert population is not None and (population.examples, population.sampled_examples) == (20, 4)
    assert population.pool_examples == 16  # 4 examples in at most 16 products: a fourth of 64
    assert population.loss.low < mean_loss(rows) < population.loss.high
    assert subject(report) == "the training loss, from a random 16 of 20 examples"
    assert report.data.no_pool is None


def test_where_the_probe_set_is_all_there_is_nothing_is_drawn(tmp_path: Path):
    rows = tiny_training.dataset("bert", 4)
    report = report_of(tmp_path, train_dataset=rows)
    assert report.measurements[0].population is None and report.data.no_pool is None
    assert report.measurements[0].loss == pytest.approx(mean_loss(rows), rel=1e-5)
    assert subject(report) == "the training loss over all 4 examples"


def test_nothing_is_drawn_where_that_is_asked_for(tmp_path: Path):
    report = report_of(tmp_path, config={"pool_examples": 0})
    assert report.measurements[0].population is None and report.data.no_pool is None
    assert subject(report) == "the mean loss over these 4 examples"


class Stream(IterableDataset):
    def __iter__(self):
        rows = tiny_training.dataset("bert", 20)
        return (rows[index] for index in range(20))


class OnePerBatch(OptimizabilityTrainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + 0.1 * model.classifier.weight.square().sum()


@pytest.mark.parametrize(
    ("options", "cls", "says"),
    [
        ({"train_dataset": Stream()}, OptimizabilityTrainer, "is a stream"),
        ({}, OnePerBatch, "a penalty on the weights"),
    ],
)
def test_a_reason_is_in_log_and_report(
    tmp_path: Path, options: dict[str, Any], cls: type[Trainer], says: str, caplog: pytest.LogCaptureFixture
):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        report = report_of(tmp_path, cls, **options)
    assert len(report.measurements) == 2 and not report.failures
    assert [m.population for m in report.measurements] == [None, None]
    [warning] = [text for text in caplog.messages if "whole training set" in text]
    assert says in warning
    again = OptimizabilityReport.load(tmp_path / "optimizability")
    assert again.data.no_pool == report.data.no_pool and says in str(again.data.no_pool)
    assert says in (tmp_path / "optimizability" / "report.md").read_text(encoding="utf-8")


class Sampled(OptimizabilityTrainer):
    sampler: Any

    def _get_train_sampler(self, *_: Any) -> Any:
        return self.sampler


def test_a_sampler_that_weights_rows_draws_the_probe_set(tmp_path: Path):
    """Rows 3 and 5 are all that training sees."""
    rows, weights = tiny_training.dataset("bert", 20), torch.zeros(20)
    weights[3], weights[5] = 1.0, 3.0
    Sampled.sampler = WeightedRandomSampler(weights, 64, generator=torch.Generator().manual_seed(0))
    state = Sampled.sampler.generator.get_state()
    report = report_of(tmp_path, Sampled, train_dataset=rows, config={"probe_examples": 64, "probe_batch_size": 64})
    assert "`WeightedRandomSampler`" in str(report.data.no_pool)
    single = [mean_loss([rows[index]]) for index in (3, 5)]
    share = (report.measurements[0].loss - single[1]) / (single[0] - single[1])
    assert 0.1 < share < 0.4  # 1 in 4
    assert not torch.equal(Sampled.sampler.generator.get_state(), state)  # by training


def test_a_sampler_that_leaves_rows_out_does_so_in_measuring(tmp_path: Path):
    rows = tiny_training.dataset("bert", 20)
    Sampled.sampler = SubsetRandomSampler([1, 4, 7, 9])
    report = report_of(tmp_path, Sampled, train_dataset=rows)
    assert report.measurements[0].loss == pytest.approx(mean_loss([rows[i] for i in (1, 4, 7, 9)]), rel=1e-5)


def test_samplers_of_the_trainer_are_even(tmp_path: Path):
    for strategy in ("random", "sequential", "group_by_length"):
        trainer = tiny_training.trainer(tmp_path, train_sampling_strategy=strategy)
        assert Pool(trainer.get_train_dataloader(), examples=9, seed=0).total == 24
