# SPDX-License-Identifier: Apache-2.0
"""A made-up comparison that looks like a real one, of any size."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np

from hf_optimizability import Comparison
from hf_optimizability.comparing.results import (
    Entry,
    Failure,
    Round,
    Run,
    Scores,
    Setting,
    TrainingBudget,
    rank_entries,
)
from hf_optimizability.reasons import Reason
from tests.support.example_report import make_report


EXAMPLES = 200


def make_run(quality: float, seed: int, *, steps: int = 60, speed: float = 1.0, size: int = 22_700_000) -> Run:
    """A training that ends with about that accuracy; the first seed is measured."""
    luck = np.random.default_rng(0).uniform(size=EXAMPLES) + 0.01 * np.random.default_rng(seed).normal()
    report = make_report(3 if seed == 42 else 0, blocks=4, total=steps)
    report.model = dataclasses.replace(report.model, parameters=size, trainable_parameters=size)
    report.training.update(max_steps=steps, seed=seed)
    report.dynamics = make_report(1).dynamics
    report.log_history = [
        {"loss": 0.7 - quality * (1 - math.exp(-3 * step / steps)) / 2, "step": step}
        for step in range(3, steps + 1, 3)
    ]
    report.log_history += [
        {"eval_loss": 0.75 - quality * step / steps / 2, "eval_accuracy": quality * step / steps, "step": step}
        for step in (15, 30, 45, 60)
    ]
    right = luck < quality
    return Run(
        seed, report, Scores(np.where(right, 0.2, 1.6), right), 30 * speed + seed - 42, 0.004 * speed, 3 * 2**28
    )


def make_comparison(qualities: dict[str, float], *, seeds: int = 3, failed: bool = False) -> Comparison:
    """Candidates of these names and accuracies; two rounds of halving, the first of which dropped one more."""
    entries = [
        Entry(name, {"learning_rate": "1e-3"}, [
            make_run(quality, 42 + seed, speed=1 + at, size=10_000_000 * (at + 1)) for seed in range(seeds)
        ])
        for at, (name, quality) in enumerate(qualities.items())
    ]  # fmt: skip
    dropped = Entry(
        "dropped", {"random_weights": "True"}, [make_run(0.3, 42 + seed) for seed in range(seeds)], None, 1
    )
    failure = Failure(43, Reason("training_out_of_memory", error="OutOfMemoryError"))
    setting = Setting(
        task="text-classification",
        dataset="movie_review_sentences",
        budget=TrainingBudget("steps", 60),
        seeds=tuple(42 + seed for seed in range(seeds)),
        rank_by="accuracy",
        examples=EXAMPLES,
        settings={"learning_rate": 1e-3, "blocks": ["encoder", "head"]},
        versions={"hf-optimizability": "0.1.0", "torch": "2.13.0"},
    )
    everything = [*copy.deepcopy(entries), Entry("dropped", {}, dropped.runs)]
    rounds = [
        Round(30, rank_entries(everything, "accuracy"), tuple(qualities)),
        Round(60, rank_entries(entries, "accuracy"), tuple(qualities)),
    ]
    return Comparison(setting, [*entries, dropped, *[Entry("failed", {}, [], failure)] * failed], rounds)
