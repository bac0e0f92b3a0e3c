# SPDX-License-Identifier: Apache-2.0
"""How candidates and budgets are read, and what is said of those that can't work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_optimizability.comparing.arguments import ComparisonArguments
from hf_optimizability.comparing.candidates import folder_name, parse_candidates


def test_a_checkpoint_flags_or_both():
    given = ["org/a", "learning_rate=1e-3,optim=sgd", "org/a,method=lora,lora_rank=4", {"random_weights": True}]
    assert [dict(candidate.changes) for candidate in parse_candidates(given)] == [
        {"model_name_or_path": "org/a"},
        {"learning_rate": "1e-3", "optim": "sgd"},
        {"model_name_or_path": "org/a", "method": "lora", "lora_rank": "4"},
        {"random_weights": True},
    ]


def test_names_tell_them_apart_and_no_place(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    found = parse_candidates(["org/a", str(tmp_path / "mine"), "org/a", "org/a,lora_rank=4", {"name": "x", "seed": 1}])
    assert [candidate.name for candidate in found] == ["org/a", "mine", "org/a (2)", "org/a, lora_rank=4", "x"]
    assert found[1].public_changes == {"model_name_or_path": "mine"}
    assert found[1].changes["model_name_or_path"] == str(tmp_path / "mine")


def test_no_two_are_called_alike():
    found = parse_candidates([{"name": name} for name in ("a", "a (2)", "a", "a")])
    assert [candidate.name for candidate in found] == ["a", "a (2)", "a (3)", "a (4)"]


def test_a_value_may_hold_an_equals_sign():
    first, _ = parse_candidates(["org/a,config_overrides=hidden_dropout_prob=0.2", "org/a"])
    assert first.flags[1] == "--config_overrides=hidden_dropout_prob=0.2"


def test_folders_are_readable_and_plain():
    first, _ = parse_candidates([{"name": "../../../etc/<x> & \u202e" + "y" * 300}, "b"])
    assert folder_name(first, "12ab") == Path("private-cd4a6dab-12ab")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing to compare: 0 candidates"),
        (["org/a"], "Name at least two"),
        (["org/a,lora", "b"], "'lora' in the candidate 'org/a,lora' does not change a flag"),
        ([",lora_rank=4", "b"], "names no checkpoint"),
        ([{"learning_rate": [1, 2]}, "b"], r"learning_rate of a candidate is \[1, 2\]"),
    ],
)
def test_what_cant_be_read_is_told(given: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        parse_candidates(given)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "exactly one of --budget_steps, --budget_examples and --budget_seconds, above 0; got none"),
        ({"budget_steps": 5, "budget_seconds": 3.0}, "got budget_steps, budget_seconds"),
        ({"budget_steps": -1}, "--budget_steps is -1"),
        ({"budget_seconds": float("inf")}, "--budget_seconds is inf"),
        ({"budget_steps": 5, "seeds": 0}, "--seeds is 0; it must be at least 1"),
        ({"budget_steps": 5, "halving_rounds": 0}, "--halving_rounds is 0"),
        ({"budget_steps": 5, "rank_by": "f1"}, "--rank_by is 'f1'; choose accuracy or loss"),
    ],
)
def test_budgets_that_cant_work_are_told(flags: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ComparisonArguments(**flags)


def test_budgets_of_the_rounds():
    steps = ComparisonArguments(budget_steps=50, halving_rounds=3)
    assert [steps.budget(number) for number in (1, 2, 3)] == [12, 25, 50]
    assert ComparisonArguments(budget_steps=1, halving_rounds=9).budget(1) == 1
    assert ComparisonArguments(budget_seconds=3.0, halving_rounds=2).budget(1) == 1.5
