# SPDX-License-Identifier: Apache-2.0
"""The page on what is known early holds the tables that the results give; and these are computed rightly."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import prediction_page
import pytest
import rank_correlation
from published import ROOT
from scipy.stats import kendalltau


RESULTS = ROOT / "benchmarks" / "results" / "prediction.json"


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_pages_are_what_the_results_say(results):
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8") == prediction_page.page(results)
    assert prediction_page.tables(results) in (ROOT / "docs" / "prediction.md").read_text(encoding="utf-8")


def test_single_rows_are_kendalls_tau_pair_by_pair(results):
    """Read from the JSON itself."""
    table = prediction_page.tables(results)
    row = next(line for line in table.splitlines() if line.startswith("| linear probe ↑"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    for cell, runs in zip(cells[2:], results["tasks"].values(), strict=False):
        pairs = [(run["known"]["linear_probe"], run["final"]["accuracy"]) for run in runs.values()]
        signs = [(np.sign(a - c), np.sign(b - d)) for (a, b), (c, d) in combinations(pairs, 2)]
        agree = sum(x * y for x, y in signs)
        untied = np.prod([sum(pair[at] != 0 for pair in signs) for at in (0, 1)]) ** 0.5
        assert float(cell) == pytest.approx(agree / untied, abs=0.006)


def test_no_row_can_be_expected_above_how_well_the_seeds_agree(results):
    """By SciPy, from the JSON."""
    row = next(
        line for line in prediction_page.tables(results).splitlines() if line.startswith("| accuracy at the end")
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    by_task = [
        kendalltau(*zip(*(run["final"]["accuracy_by_seed"] for run in runs.values()), strict=True)).statistic
        for runs in results["tasks"].values()
    ]
    assert [float(cell) for cell in cells[2:-1]] == pytest.approx(by_task, abs=0.006)
    assert float(cells[1].split()[0]) == pytest.approx(np.mean(by_task), abs=0.006)


def made(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Three tasks; the first quantity tells the truth, the second the opposite, the third nothing."""
    rng = np.random.default_rng(seed)
    final = {task: rng.normal(size=30) for task in "abc"}
    known = {task: np.column_stack([y, -y, rng.normal(size=30)]) for task, y in final.items()}
    return known, final


def test_a_combination_takes_what_tells_and_learns_its_sign():
    known, final = made()
    weights = rank_correlation.fit(known, final, ["a", "b"])
    assert weights[0] == pytest.approx(-weights[1]) and weights[0] > 0.4 and abs(weights[2]) < 0.1
    predicted = rank_correlation.out_of_sample(known, final)
    assert rank_correlation.mean_tau(predicted, final)[0] > 0.95


def test_a_combination_never_sees_the_task_it_is_tested_on():
    known, final = made()
    before = rank_correlation.out_of_sample(known, final)["a"]
    after = rank_correlation.out_of_sample(known, {**final, "a": -final["a"]})["a"]
    assert np.array_equal(before, after)


def test_tau_is_scipys():
    rng = np.random.default_rng(0)
    one, other = rng.integers(6, size=(2, 40)).astype(float)
    assert rank_correlation.tau(one, other) == pytest.approx(kendalltau(one, other).statistic)


def test_what_is_not_known_ranks_last_and_ties_share_a_rank():
    group = rank_correlation.group(np.array([[3.0], [np.nan], [1.0], [3.0]]))[:, 0]
    assert group == pytest.approx(np.array([1.0, -1.5, -0.5, 1.0]) / 3)
    assert rank_correlation.tau(np.ones(5), np.arange(5.0)) == 0


def test_the_interval_covers():
    """Two normal variables with correlation 0.5, of which τ is 2/π arcsin 0.5 = 1/3, on three tasks."""
    covered = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pairs = {task: rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], size=20) for task in "abc"}
        one, other = ({task: pair[:, at] for task, pair in pairs.items()} for at in (0, 1))
        _, low, high = rank_correlation.mean_tau(one, other, seed=seed, resamples=200)
        covered.append(low < 1 / 3 < high)
    assert np.mean(covered) > 0.85
