# SPDX-License-Identifier: Apache-2.0
"""What a comparison trains, keeps, drops and says of what failed: tiny models, or trainings whose scores are given."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import Trainer

from hf_optimizability import Comparison, OptimizabilityReport, compare
from hf_optimizability.comparing.results import Run
from hf_optimizability.comparing.training import Inputs
from hf_optimizability.reasons import Reason
from tests.support.example_report import make_report
from tests.support.tiny_comparison import flags_of, trained


class Compared(NamedTuple):
    """A comparison of what differs in kind, and what its trainings saw."""

    comparison: Comparison
    candidates: list[Any]
    flags: dict[str, Any]
    seen: list[list[list[int]]]
    """The tokens of each batch of each training."""

    predictors: list[Trainer]


DIVERGES, TOO_LARGE = "diverges", "too large"


@pytest.fixture(scope="module")
def compared(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Trains two copies, random weights, LoRA and a linear probe, and three that fail; with smoothed labels."""
    checkpoint, seen, predictors = str(inputs / "tiny-bert"), defaultdict(list), []
    candidates = [
        checkpoint,
        {"name": "missing", "model_name_or_path": str(inputs / "missing")},
        checkpoint,
        {"name": DIVERGES, "optim": "sgd", "learning_rate": 1e30},
        {"name": "random", "random_weights": True, "attn_implementation": "eager"},
        {"name": TOO_LARGE, "random_weights": True, "config_overrides": "hidden_size=4000000"},
        {"name": "lora", "method": "lora", "lora_rank": 1},
        {"name": "probe", "method": "linear_probe", "learning_rate": 1e-2},
    ]
    flags = {**flags_of(inputs, tmp_path_factory.mktemp("compared")), "label_smoothing_factor": 0.1}
    step, predict = Trainer.training_step, Trainer.predict

    def remembered_step(self: Trainer, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        seen[id(self.args)].append(inputs["input_ids"].flatten().tolist())
        return step(self, model, inputs, *args, **options)

    def remembered_predict(self: Trainer, *args: Any, **options: Any) -> Any:
        predictors.append(self)  # which also keeps the id of its arguments from coming again
        return predict(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", remembered_step)
        patch.setattr(Trainer, "predict", remembered_predict)
        comparison = compare(candidates, **flags)
    return Compared(comparison, candidates, flags, list(seen.values()), predictors)


def rates(*qualities: float) -> list[str]:
    return [f"learning_rate={quality}" for quality in qualities]


class TestTraining:
    def test_copies_cant_be_told_apart_and_nothing_is_trained_twice(self, compared, made):
        comparison, out = compared.comparison, Path(compared.flags["output_dir"])
        first, second = (comparison.entry(name) for name in ("tiny-bert", "tiny-bert (2)"))
        assert [run.seed for run in first.runs] == [42, 43]
        for one, other in zip(first.runs, second.runs, strict=True):
            assert one.scores.losses.tolist() == other.scores.losses.tolist()
        assert first.runs[0].scores.losses.tolist() != first.runs[1].scores.losses.tolist()
        one, other = (comparison.ranking.names.index(entry.name) for entry in (first, second))
        assert comparison.ranking.ranks[one] == comparison.ranking.ranks[other]
        assert comparison.ranking.better[one][other] == 0.5
        assert "statistically tied" in comparison.summary()
        assert {path.name for path in out.iterdir()} == {"comparison.html", "comparison.json", "comparison.md", "runs"}
        assert not list(out.rglob("training"))

        again = compare(compared.candidates, **compared.flags)
        assert made == []
        assert again.to_dict() == comparison.to_dict() == Comparison.load(out).to_dict()

    def test_scores_are_those_of_the_trained_model(self, compared):
        """Against the model itself, one example at a time; without the smoothing of the labels in training."""
        run, trainer = compared.comparison.entry("probe").runs[-1], compared.predictors[-1]
        assert (trainer.args.learning_rate, trainer.args.seed, trainer.args.label_smoothing_factor) == (1e-2, 43, 0.1)
        model = trainer.model.eval()
        for at, example in enumerate(trainer.eval_dataset):
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor([example["input_ids"]]),
                    attention_mask=torch.tensor([example["attention_mask"]]),
                ).logits
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([example["labels"]]))
            assert run.scores.losses[at] == pytest.approx(float(loss), abs=1e-5)
            assert run.scores.correct[at] == (int(logits.argmax()) == example["labels"])

    @pytest.mark.slow
    def test_measuring_changes_no_score(self, compared, flags):
        measured = compare(
            [compared.candidates[0], compared.candidates[4]],
            **{**compared.flags, "output_dir": flags["output_dir"], "seeds": 1, "measured_seeds": 1},
        )
        for other in measured.entries:
            one = compared.comparison.entry(other.name)
            assert one.runs[0].scores.losses.tolist() == other.runs[0].scores.losses.tolist()
            assert [m.step for m in other.runs[0].report.measurements] == [0, 2, 4]
            dynamics = [entry.runs[0].report.dynamics["generalization_gap"] for entry in (one, other)]
            assert dynamics[0]["loss_gap"] == pytest.approx(dynamics[1]["loss_gap"])
            assert dynamics[0]["measured_alike"]

    def test_every_candidate_sees_the_same_examples_in_the_same_order(self, compared):
        orders = compared.seen
        assert len(orders) == 5 * 2 + 1 and all(len(batches) == 4 for batches in orders)
        assert all(order == orders[0] for order in orders[:6])  # of the first seed, with what diverges
        assert all(order == orders[6] for order in orders[6:])
        assert orders[0] != orders[6]

    def test_methods_train_what_they_say(self, compared):
        full, random, lora, probe = (
            compared.comparison.entry(name).model for name in ("tiny-bert", "random", "lora", "probe")
        )
        assert full.trainable_parameters == full.parameters == random.trainable_parameters
        assert probe.trainable_parameters == 4 * 2 + 2
        assert 10 < lora.trainable_parameters < full.parameters


class TestFailures:
    def test_what_fails_is_reported_and_the_others_finish(self, compared, inputs):
        comparison = compared.comparison
        failures = {entry.name: entry.failure.reason for entry in comparison.entries if entry.failure}
        assert set(failures) == {"missing", DIVERGES, TOO_LARGE}
        assert "can't be loaded" in failures["missing"] and "--model_name_or_path" in failures["missing"]
        assert "not finite" in failures[DIVERGES] and "learning rate" in failures[DIVERGES]
        assert "Out of memory" in failures[TOO_LARGE] and "batch_size" in failures[TOO_LARGE]
        assert set(comparison.ranking.names) == {"tiny-bert", "tiny-bert (2)", "random", "lora", "probe"}
        assert str(inputs) not in comparison.to_html() + comparison.to_markdown() + json.dumps(comparison.to_dict())
        for name, reason in failures.items():
            assert name in comparison.to_markdown() and f"{name} failed: {reason[:40]}" in comparison.summary()

    def test_failures_are_tried_again_only_if_asked_for(self, flags, monkeypatch):
        broken = {5e-1}

        def train(inputs: Inputs, **options: object) -> Run:
            if inputs.training.learning_rate in broken:
                raise RuntimeError("the disk is full")
            return trained(inputs, quality=inputs.training.learning_rate)

        monkeypatch.setattr("hf_optimizability.comparing.training.train", train)
        first = compare(rates(0.5, 0.9), **flags)
        assert first.entries[0].failure.why == Reason("training_failed", error="RuntimeError")
        assert first.ranking is None and "There is no ranking" in first.summary()
        broken.clear()
        assert compare(rates(0.5, 0.9), **flags).entries[0].failure is not None
        assert compare(rates(0.5, 0.9), **flags, retry_failures=True).entries[0].failure is None

    def test_a_candidate_that_fails_once_is_not_trained_further(self, flags, made):
        compare([*rates(0.5, 0.9), "model_name_or_path=nowhere/at-all"], **{**flags, "seeds": 3})
        assert len(made) == 9  # the substitute loads nothing
        assert {rate for rate, _, _ in made} == {0.5, 0.9, 1e-3}

    def test_an_interrupt_is_no_failure(self, flags, monkeypatch):
        def train(inputs: Inputs, **options: object) -> Run:
            raise KeyboardInterrupt

        monkeypatch.setattr("hf_optimizability.comparing.training.train", train)
        with pytest.raises(KeyboardInterrupt):
            compare(rates(0.5, 0.9), **flags)
        assert not list(Path(flags["output_dir"]).rglob("run.json"))


class TestBudgets:
    def test_seeds_are_paired_and_follow_one_another(self, flags, made):
        compare(rates(0.5, 0.9), **{**flags, "seeds": 3, "seed": 7})
        assert made == [(rate, seed, 4) for seed in (7, 8, 9) for rate in (0.5, 0.9)]

    def test_examples_are_steps_of_each_batch_size(self, flags, made):
        del flags["budget_steps"]
        candidates = ["per_device_train_batch_size=8", "per_device_train_batch_size=4,gradient_accumulation_steps=8"]
        compare(candidates, **{**flags, "seeds": 1, "budget_examples": 100})
        assert [steps for _, _, steps in made] == [13, 4]

    def test_seconds_are_steps_of_the_time_that_some_took(self, flags, made, monkeypatch):
        del flags["budget_steps"]
        timed: list[float] = []

        def step_seconds(inputs: Inputs) -> float:
            timed.append(inputs.training.learning_rate)
            return inputs.training.learning_rate

        monkeypatch.setattr("hf_optimizability.comparing.training.step_seconds", step_seconds)
        comparison = compare(rates(0.25, 0.75), **flags, budget_seconds=6.5)
        assert [steps for _, _, steps in made] == [26, 8] * 2
        assert timed == [0.25, 0.75]  # once for all seeds
        compare(rates(0.25, 0.75), **flags, budget_seconds=13.0)
        assert timed == [0.25, 0.75] and [steps for _, _, steps in made[4:]] == [52, 17] * 2
        assert "timing a few" in comparison.to_html()

    def test_a_real_step_is_timed(self, flags, made, compared):
        del flags["budget_steps"]
        compare(rates(1e-3, 1e-2), **{**flags, "seeds": 1, "budget_seconds": 0.05})
        assert len(made) == 2 and all(1 <= steps < 1000 for _, _, steps in made)
        for entry in compared.comparison.entries:
            assert all(0 < run.train_seconds < 5 for run in entry.runs)

    def test_other_settings_are_other_trainings_but_more_seeds_are_not(self, flags, made):
        compare(rates(0.5, 0.9), **flags)
        compare(rates(0.5, 0.9), **{**flags, "seeds": 3, "dataloader_num_workers": 0})
        assert made[4:] == [(0.5, 44, 4), (0.9, 44, 4)]
        compare(rates(0.5, 0.9), **{**flags, "weight_decay": 0.1})
        assert len(made) == 10


class TestHalving:
    def test_budgets_grow_and_the_worse_half_goes(self, flags, made):
        qualities = (0.2, 0.9, 0.5, 0.7)
        options = {**flags, "budget_steps": 40, "halving_rounds": 3, "seeds": 3}
        comparison = compare(rates(*qualities), **options)
        assert [round.budget for round in comparison.rounds] == [10, 20, 40]
        assert [len(round.kept) for round in comparison.rounds] == [2, 1, 1]
        assert len(made) == 3 * (4 + 2 + 1)
        assert {rate for rate, _, steps in made if steps == 40} == {0.9}
        dropped = {entry.name: entry.dropped for entry in comparison.entries}
        assert dropped == dict(zip(rates(*qualities), [1, None, 1, 2], strict=True))
        assert "dropped after round 1" in comparison.to_markdown()

    def test_what_cant_be_told_from_the_best_stays(self, flags, made):
        comparison = compare(
            rates(0.90, 0.899, 0.898, 0.3), **{**flags, "budget_steps": 8, "halving_rounds": 2, "seeds": 3}
        )
        assert comparison.rounds[0].kept == tuple(rates(0.90, 0.899, 0.898))
        assert len(comparison.ranking.names) == 3

    def test_one_that_is_left_is_told(self, flags, made):
        comparison = compare(rates(0.9, 0.3), **{**flags, "budget_steps": 8, "halving_rounds": 2, "seeds": 3})
        assert comparison.ranking is None
        assert comparison.summary().endswith(
            "learning_rate=0.9 is the one that successive halving left: the others were dropped before."
        )


class TestMistakes:
    @pytest.mark.parametrize(
        ("candidates", "more", "message"),
        [
            (rates(1, 2), {"num_train_epochs": 3}, "--num_train_epochs is set by the comparison"),
            (rates(1, 2), {"budget_steps": None}, "exactly one of --budget_steps"),
            (rates(1, 2), {"lerning_rate": 3}, "Did you mean --learning_rate"),
            (["lerning_rate=1", "b"], {}, "lerning_rate=…: There is no argument --lerning_rate"),
            (["seed=1", "seed=2"], {}, "data, seeds and budget are the same for all"),
            (["budget_steps=1", "b"], {}, "data, seeds and budget are the same for all"),
            (["optim=none-such", "b"], {}, "optim=none-such: .*none-such"),
            (["method=lora,lora_rank=x", "b"], {}, "lora_rank"),
            (["a", "b"], {"task": "poetry"}, "no task 'poetry'; choose one of text-classification"),
            (["nowhere/at-all", "nowhere/else"], {}, "No task fits the candidates. nowhere/at-all: .*--task"),
        ],
    )
    def test_flags_that_cant_work_are_told_before_any_training(self, flags, made, candidates, more, message):
        with pytest.raises(ValueError, match=message):
            compare(candidates, **{name: value for name, value in {**flags, **more}.items() if value is not None})
        assert made == []

    def test_several_processes_are_refused(self, flags, made, monkeypatch):
        monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
        with pytest.raises(ValueError, match="trains in one process"):
            compare(rates(0.5, 0.9), **flags)


class TestReports:
    def reports(self, change: Callable[[OptimizabilityReport, float], None]) -> list[OptimizabilityReport]:
        reports = [make_report(2), make_report(2)]
        for report, loss in zip(reports, (0.5, 0.4), strict=True):
            change(report, loss)
        return reports

    def test_are_ranked_by_the_loss_they_know_with_its_error(self):
        def change(report: OptimizabilityReport, loss: float) -> None:
            error = {"optimizability/eval_loss": loss, "optimizability/eval_loss_std_error": 0.03, "step": 300}
            report.log_history.append(error)

        comparison = compare(self.reports(change))
        name = "sentence-transformers/all-MiniLM-L6-v2"
        assert comparison.ranking.names == (f"{name} (2)", name)
        assert comparison.ranking.better[0][1] == pytest.approx(0.991, abs=0.004)  # Φ(0.1 / (0.03 √2))
        assert comparison.ranking.ranks == (1, 2)
        assert comparison.to_markdown().startswith("# Comparison on reports")
        assert f"{name} (2)" in comparison.to_html()

    def test_without_errors_they_stand_side_by_side(self):
        comparison = compare(self.reports(lambda report, loss: None))
        assert comparison.ranking is None
        assert "There is no ranking" in comparison.to_markdown()
        assert len(comparison.to_dict()["entries"]) == 2

    def test_come_alone(self):
        with pytest.raises(ValueError, match="nothing but two or more"):
            compare([make_report(1), "org/a"])
        with pytest.raises(ValueError, match="at least two reports"):
            compare([make_report(1)])


def test_a_file_that_is_no_comparison_is_told(tmp_path: Path):
    (tmp_path / "comparison.json").write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match=r"comparison\.json can't be read .* schema version 99"):
        Comparison.load(tmp_path)
    (tmp_path / "comparison.json").write_text('{"schema_version": 1}')
    with pytest.raises(ValueError, match="can't be read as a comparison"):
        Comparison.load(tmp_path)
