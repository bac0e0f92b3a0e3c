# SPDX-License-Identifier: Apache-2.0
"""Comparisons of earlier versions and inconsistent ones, read from their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_optimizability import Comparison, compare
from hf_optimizability.scoring.checkpoint import CheckpointScores
from hf_optimizability.scoring.score import Score
from tests.support.example_comparison import make_comparison
from tests.support.tiny_comparison import trained


PRIVATE = ("sentinel", "/home/ada", "hf_SentinelSentinelSentinel")
OLD_FLAGS: dict[str, Any] = {
    "hub_token": "hf_SentinelSentinelSentinel",
    "run_name": "sentinel",
    "train_file": "/home/ada/sentinel.csv",
    "model_name_or_path": "/home/ada/mine",
}


def plain(comparison: Comparison) -> dict[str, Any]:
    """As it was written to a file and read again."""
    return json.loads(json.dumps(comparison.to_dict()))


def of_version_1() -> dict[str, Any]:
    """A comparison as version 1 wrote it: all flags as they were given, and texts of errors in place of reasons."""
    data = plain(make_comparison({"good": 0.9, "bad": 0.5}, seeds=1, failed=True))
    data["schema_version"] = 1
    data["setting"]["settings"] |= OLD_FLAGS
    scores = CheckpointScores(logme=Score(0.5, 0.4, 0.6, 0.05, 64)).to_dict()
    for entry in data["entries"]:
        entry["changes"] |= OLD_FLAGS
        entry["scores"] = {**scores, "notes": {"alignment": "OSError: /home/ada/sentinel", "sentinel": "sentinel"}}
        if entry["failure"]:
            entry["failure"] = {"seed": 43, "reason": "OSError: no file /home/ada/sentinel. Pass another."}
    return data


def test_what_version_1_recorded_freely_is_not_written_again(tmp_path: Path):
    (tmp_path / "comparison.json").write_text(json.dumps(of_version_1()))
    before = Comparison.load(tmp_path)
    assert before.entries[-1].failure.reason.startswith("An earlier version could not measure (OSError)")
    before.save(tmp_path)
    for file in tmp_path.iterdir():
        assert not [word for word in PRIVATE if word in file.read_text()], file
    after = Comparison.load(tmp_path)
    assert after.ranking == before.ranking == make_comparison({"good": 0.9, "bad": 0.5}, seeds=1).ranking
    flags = {"learning_rate": "1e-3", "model_name_or_path": "mine"}
    assert [entry.changes for entry in after.entries[:2]] == [flags] * 2
    assert after.setting.settings == {
        "learning_rate": 1e-3, "blocks": ["encoder", "head"], "model_name_or_path": "mine",
    }  # fmt: skip
    assert list(after.entries[0].scores.notes) == ["alignment"]
    assert str(after.entries[0].scores.notes["alignment"]).startswith("An earlier version could not measure (OSError)")


def test_scores_of_other_examples_are_refused():
    data = plain(make_comparison({"good": 0.9, "bad": 0.5}, seeds=2))
    scores = data["entries"][0]["runs"][1]["scores"]
    scores["losses"].pop()
    scores["correct"] = scores["correct"][:-1]
    with pytest.raises(ValueError, match=r"^Its trainings are scored on different numbers of examples\."):
        Comparison.from_dict(data)


def test_a_lost_training_is_told():
    data = plain(make_comparison({"good": 0.9, "bad": 0.5}, seeds=2))
    data["entries"][0]["runs"].pop()
    with pytest.raises(ValueError, match=r"^Its candidates have different numbers of trainings\."):
        Comparison.from_dict(data)


def test_data_that_changed_before_the_last_candidate_is_told(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    examples = iter([200, 200, 199, 199])

    def train(inputs: Any, **options: object) -> Any:
        return trained(inputs, quality=0.5, examples=next(examples))

    monkeypatch.setattr("hf_optimizability.comparing.training.train", train)
    with pytest.raises(ValueError, match=r"different numbers of examples\. If the data has changed in between"):
        compare(["learning_rate=0.5", "learning_rate=0.6"], **flags)
