# SPDX-License-Identifier: Apache-2.0
"""What a comparison has finished: whatever is damaged is named, and made again."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_optimizability.comparing.results import Failure, Run, Scores
from hf_optimizability.comparing.run_cache import cached_run, cached_scores, cached_step_seconds
from hf_optimizability.measurement.results import MeasurementFailure
from hf_optimizability.reasons import Reason
from hf_optimizability.report import OptimizabilityReport
from hf_optimizability.report_data.provenance import ModelInfo
from hf_optimizability.scoring.checkpoint import CheckpointScores
from hf_optimizability.scoring.score import Score
from tests.support.damaged_report import damaged, to_json


REPORT = OptimizabilityReport(
    model=ModelInfo(id="org/a", parameters=7),
    training={"optimizer": "AdamW", "seed": 1},
    failures=[MeasurementFailure(step=0, epoch=0.0, why=Reason("rows_unreadable", error="KeyError"))],
    log_history=[{"loss": 0.5, "step": 1}, {"eval_loss": 0.4, "step": 2}],
)
RUN = Run(1, REPORT, Scores(np.array([0.5, 0.25]), np.array([True, False])), 3.5, 0.1, None)
FAILURE = Failure(1, Reason("training_failed", error="KeyError"))
SCORES = CheckpointScores(
    logme=Score(0.5, 0.4, 0.6, 0.05, 64), notes={"alignment": Reason("score_failed", error="ValueError")}
)

FILES: dict[str, tuple[str, Any, Callable[[Path], object]]] = {
    "run": ("run.json", {"run": RUN.to_dict()}, lambda folder: cached_run(folder, lambda: RUN, retry_failures=False)),
    "failure": (
        "run.json",
        {"failure": json.loads(json.dumps({"seed": 1, "why": vars(FAILURE.why)}))},
        lambda folder: cached_run(folder, lambda: FAILURE, retry_failures=False),
    ),
    "step": ("step.json", {"step_seconds": 0.5}, lambda folder: cached_step_seconds(folder, lambda _: 0.5)),
    "scores": (
        "scores.json",
        json.loads(json.dumps(SCORES.to_dict())),
        lambda folder: cached_scores(folder / "scores.json", lambda: SCORES, retry_failures=False),
    ),
}


def use(result: Any) -> None:
    """What a comparison does with it."""
    if isinstance(result, Run):
        result.to_dict()
        assert result.result and result.logged("eval_loss")
        assert result.scores is None or len(result.scores.of("loss")) == len(result.scores.of("accuracy"))
    elif isinstance(result, Failure):
        assert result.reason
    elif isinstance(result, CheckpointScores):
        assert result.result and result.seconds >= -math.inf
    else:
        assert 0 < result < math.inf


def check(folder: Path, kind: str, content: bytes) -> bool:
    """Whether a file of that content was taken for good; if not, it was made again, and is good now."""
    name, _, read = FILES[kind]
    (folder / name).write_bytes(content)
    use(read(folder))
    kept = (folder / name).read_bytes()
    use(read(folder))
    assert (folder / name).read_bytes() == kept
    return kept == content


@pytest.mark.parametrize("kind", FILES)
def test_what_is_whole_is_kept(kind: str, tmp_path: Path):
    assert check(tmp_path, kind, to_json(FILES[kind][1]))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"{}", b"\xff", b'{"run": null}', b'{"failure": {"seed": 1}}', b"[" * 10**5]
)
def test_what_is_torn_is_named_and_made_again(
    kind: str, content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    logging.getLogger("hf_optimizability").propagate = True
    if kind != "scores" or content != b"{}":  # all of which have defaults
        assert not check(tmp_path, kind, content)
        assert f"{tmp_path / FILES[kind][0]} can't be read, so that it is made again." in caplog.text


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("step", b'{"step_seconds": 0}'),
        ("step", b'{"step_seconds": -1.5}'),
        ("step", b'{"step_seconds": null}'),
        ("step", b'{"step_seconds": true}'),
        ("run", to_json({"run": {**RUN.to_dict(), "scores": {"losses": [1.0], "correct": "01"}}})),
        ("run", to_json({"run": {**RUN.to_dict(), "scores": {"losses": [], "correct": ""}}})),
        ("run", to_json({"run": {**RUN.to_dict(), "scores": {"losses": ["1", 2.0], "correct": "01"}}})),
        ("run", to_json({"run": {**RUN.to_dict(), "scores": {"losses": [1.0, 2.0], "correct": [1, 0]}}})),
        ("failure", to_json({"failure": {"seed": 1, "why": {**vars(FAILURE.why), "code": ["x"]}}})),
        ("failure", to_json({"failure": {"seed": 1, "why": {**vars(FAILURE.why), "error": {"a": 1}}}})),
    ],
)
def test_what_makes_no_sense_is_made_again(kind: str, content: bytes, tmp_path: Path):
    assert not check(tmp_path, kind, content)


def cases(number: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(deadline=None, derandomize=True, database=None, suppress_health_check=checks, max_examples=number)


DAMAGED = st.sampled_from(sorted(FILES)).flatmap(lambda kind: st.tuples(st.just(kind), damaged(FILES[kind][1])))


@cases(100)
@given(DAMAGED)
def test_whatever_is_damaged_stops_nothing(tmp_path: Path, case: tuple[str, Any]):
    check(tmp_path, case[0], to_json(case[1]))


@pytest.mark.slow
@cases(2000)
@given(DAMAGED)
def test_whatever_is_damaged_stops_nothing_ever(tmp_path: Path, case: tuple[str, Any]):
    check(tmp_path, case[0], to_json(case[1]))
