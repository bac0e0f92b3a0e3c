# SPDX-License-Identifier: Apache-2.0
"""What scores drop before any training, on tiny models; and what the pages say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from hf_optimizability import Comparison, compare
from hf_optimizability.comparing.screening import select
from hf_optimizability.reasons import Reason
from hf_optimizability.scoring.checkpoint import CheckpointScores
from hf_optimizability.scoring.score import Score
from tests.support.example_comparison import make_comparison
from tests.support.html_page import read_page


def score(value: float, std_error: float = 0.01) -> Score:
    return Score.from_error(value, std_error, freedom=99, examples=100)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces scoring: a LogME that sees the changes of the configuration. What was scored, in order."""
    calls: list[str] = []
    values = {"hidden_dropout_prob=0.1": 0.9, "hidden_dropout_prob=0.2": 0.895, "hidden_dropout_prob=0.3": 0.4}

    def score_inputs(inputs: Any, *, examples: int) -> CheckpointScores:
        overrides = inputs.model.config_overrides
        calls.append(overrides)
        if overrides not in values:
            raise RuntimeError("the disk is full")
        return CheckpointScores(logme=score(values[overrides]), alignment=score(-values[overrides]))

    monkeypatch.setattr("hf_optimizability.comparing.screening.score_inputs", score_inputs)
    return calls


def candidates(*rates: float) -> list[str]:
    return [f"config_overrides=hidden_dropout_prob={rate}" for rate in rates]


class TestKept:
    def test_the_best_and_those_that_cant_be_told_from_the_last_of_them(self):
        scores = {"a": score(0.9), "b": score(0.8), "c": score(0.79), "d": score(0.7)}
        assert select(scores, 1) == ("a",)
        assert select(scores, 2) == ("a", "b", "c")
        assert select(scores, 4) == select(scores, 9) == tuple(scores)

    def test_at_the_edge_of_95_percent(self):
        """1.645 standard errors of a difference of two scores."""
        edge = 1.6449 * 0.01 * 2**0.5
        assert select({"a": score(0.9), "b": score(0.9 - edge + 1e-4)}, 1) == ("a", "b")
        assert select({"a": score(0.9), "b": score(0.9 - edge - 1e-4)}, 1) == ("a",)

    def test_without_a_score_nobody_is_dropped(self):
        assert select({"a": score(0.9), "b": None, "c": score(0.1)}, 1) == ("a", "b")


class TestScreening:
    def test_the_hopeless_are_not_trained_and_all_is_told(self, flags, made, scored):
        comparison = compare(candidates(0.1, 0.2, 0.3, 0.4), **{**flags, "seeds": 1, "screen_to": 1})
        assert [entry.dropped for entry in comparison.entries] == [None, None, 0, None]
        assert [len(entry.runs) for entry in comparison.entries] == [1, 1, 0, 1]
        assert comparison.entries[3].scores.notes == {"logme": Reason("training_failed", error="RuntimeError")}
        assert comparison.setting.screen_to == 1
        names = [entry.name for entry in comparison.entries]
        assert f"Not trained, by their scores: {names[2]}." in comparison.summary()
        page = read_page(comparison.to_html())
        assert page.tables["Scores"][1] == [
            names[0],
            "–",
            "0.900 (0.880 to 0.920)",
            "-0.900 (-0.920 to -0.880)",
            "–",
            "0.00",
            "yes",
        ]
        assert [row[6] for row in page.tables["Scores"][1:]] == ["yes", "yes", "no", "yes"]
        tables = MarkdownIt("commonmark").enable("table").parse(comparison.to_markdown())
        assert sum(token.type == "tr_open" for token in tables) == 4 + 4 + 4 + 4 + 5  # the last: the scores
        for text in (page.text, comparison.to_markdown()):
            assert (
                "The training failed (RuntimeError)" in text and "1 best by LogME were selected for training" in text
            )

    def test_what_was_scored_is_not_scored_again(self, flags, made, scored):
        options = {**flags, "seeds": 1, "screen_to": 1}
        first = compare(candidates(0.1, 0.3, 0.4), **options)
        again = compare(candidates(0.1, 0.3, 0.4), **options)
        assert len(scored) == 3
        assert again.to_dict() == first.to_dict() == Comparison.load(flags["output_dir"]).to_dict()
        compare(candidates(0.1, 0.3, 0.4), **options, retry_failures=True)
        assert scored[3:] == ["hidden_dropout_prob=0.4"]
        compare(candidates(0.1, 0.3), **{**options, "screen_examples": 300})
        assert len(scored) == 6

    def test_what_a_score_does_not_see_is_scored_once_and_stays_together(self, flags, made, scored):
        both = [f"{candidates(0.1)[0]},learning_rate={rate}" for rate in (1e-3, 1e-2)]
        comparison = compare([*both, *candidates(0.3)], **{**flags, "seeds": 1, "screen_to": 1})
        assert scored == ["hidden_dropout_prob=0.1", "hidden_dropout_prob=0.3"]
        assert [entry.dropped for entry in comparison.entries] == [None, None, 0]

    def test_a_checkpoint_that_cant_be_loaded_fails_in_both(self, flags, inputs):
        options = {**flags, "seeds": 1, "screen_to": 1, "screen_examples": 20, "train_val_split": 0.5}
        comparison = compare(["learning_rate=1e-3", str(inputs / "missing")], **options)
        scores, failure = comparison.entries[1].scores, comparison.entries[1].failure
        assert scores.notes["logme"] == failure.why and failure.why.code == "not_loaded"

    def test_one_that_is_left_is_told(self, flags, made, scored):
        comparison = compare(candidates(0.1, 0.3), **{**flags, "seeds": 1, "screen_to": 1})
        assert comparison.ranking is None
        assert "is the one that its score left: the others were dropped before." in comparison.summary()

    @pytest.mark.parametrize(
        ("options", "message"), [({"screen_to": 0}, "--screen_to is 0"), ({"screen_examples": 5}, "at least 20")]
    )
    def test_numbers_that_cant_work(self, flags, made, scored, options, message):
        with pytest.raises(ValueError, match=message):
            compare(candidates(0.1, 0.3), **flags, **options)
        assert not scored and not list(Path(flags["output_dir"]).rglob("*.json"))


def test_a_comparison_of_before_can_still_be_read():
    data = make_comparison({"a": 0.9, "b": 0.5}).to_dict()
    for entry in data["entries"]:
        del entry["scores"]
    assert "Before any training" not in Comparison.from_dict(data).to_html()
