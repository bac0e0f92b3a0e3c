# SPDX-License-Identifier: Apache-2.0
"""The ranking against closed forms, and against synthetic truths over hundreds of seeds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm, t

from hf_optimizability.comparing.ranking import CONFIDENCE, normal_draws, paired_bootstrap, rank


Array = NDArray[np.float64]


def crossed(rng: np.random.Generator, *, seeds: int, examples: int, by_seed: float, by_example: float, by_both: float):
    """Scores of two candidates that are equally good in truth, with crossed random effects of these sizes."""
    difference = (
        rng.normal(0, by_seed, (seeds, 1))
        + rng.normal(0, by_example, (1, examples))
        + rng.normal(0, by_both, (seeds, examples))
    )
    shared = rng.normal(0, 3, (1, examples)) + rng.normal(0, 3, (seeds, 1))  # cancels where the two are compared
    return np.stack([shared + difference / 2, shared - difference / 2])


def ranked(scores: Array, **options: object):
    names = "abcdefgh"[: len(scores)]
    return rank(list(names), scores.mean(axis=(1, 2)).tolist(), paired_bootstrap(scores), **options)


def better(scores: Array) -> float:
    """P(a is better than b)."""
    draws = paired_bootstrap(scores)
    ranking = rank(["a", "b"], scores.mean(axis=(1, 2)).tolist(), draws)
    a, b = ranking.names.index("a"), ranking.names.index("b")
    return ranking.better[a][b]


class TestClosedForms:
    @pytest.mark.parametrize("gain", [-0.2, 0.0, 0.05, 0.1])
    def test_one_seed_is_normal_over_many_examples(self, gain: float):
        rng = np.random.default_rng(1)
        hardness, difference = rng.normal(0, 5, 400), rng.normal(0, 1, 400)
        difference += gain - difference.mean()
        scores = np.stack([hardness + difference, hardness])[:, None, :]
        std_error = difference.std() / np.sqrt(400)
        assert better(scores) == pytest.approx(norm.cdf(gain / std_error), abs=0.02)
        a, b = (ranked(scores).names.index(name) for name in "ab")
        value, low, high = ranked(scores).differences[a][b]
        assert value == pytest.approx(gain)
        assert (low, high) == pytest.approx((gain - 1.96 * std_error, gain + 1.96 * std_error), abs=0.1 * std_error)

    @pytest.mark.parametrize("seeds", [2, 3, 6])
    @pytest.mark.parametrize("gain", [0.3, 1.0])
    def test_seeds_alone_are_students_t(self, seeds: int, gain: float):
        """No example differs from another."""
        rng = np.random.default_rng(seeds)
        difference = rng.normal(0, 1, seeds)
        difference += gain - difference.mean()
        scores = np.tile(np.stack([difference, np.zeros(seeds)])[:, :, None], (1, 1, 5))
        std_error = difference.std(ddof=1) / np.sqrt(seeds)
        assert better(scores) == pytest.approx(t.cdf(gain / std_error, seeds - 1), abs=0.02)

    def test_independent_errors_add_in_squares(self):
        draws = normal_draws([0.5, 0.53], [0.03, 0.04])
        ranking = rank(["a", "b"], [0.5, 0.53], draws, greater_is_better=False)
        assert ranking.names == ("a", "b")
        assert ranking.better[0][1] == pytest.approx(norm.cdf(0.03 / 0.05), abs=0.02)
        assert (ranking.low[0], ranking.high[0]) == pytest.approx((0.5 - 1.96 * 0.03, 0.5 + 1.96 * 0.03), abs=2e-3)


class TestHonesty:
    """In truth there is no difference: it must lie in the interval, and rarely be significant."""

    @pytest.mark.parametrize(
        ("seeds", "sizes"),
        [
            (3, {"by_seed": 0.1, "by_example": 0.3, "by_both": 0.3}),  # seeds decide
            (3, {"by_seed": 0.0, "by_example": 1.0, "by_both": 0.0}),  # examples decide
            (1, {"by_seed": 0.0, "by_example": 1.0, "by_both": 0.3}),
            # Between the first two:
            pytest.param(3, {"by_seed": 0.03, "by_example": 0.5, "by_both": 0.5}, marks=pytest.mark.slow),
            pytest.param(6, {"by_seed": 0.05, "by_example": 0.5, "by_both": 0.5}, marks=pytest.mark.slow),
        ],
    )
    def test_intervals_cover_the_truth(self, seeds: int, sizes: dict[str, float]):
        covered = told = 0
        trials = 200
        for trial in range(trials):
            scores = crossed(np.random.default_rng(5000 + trial), seeds=seeds, examples=100, **sizes)
            draws = paired_bootstrap(scores, resamples=500)
            ranking = rank(["a", "b"], scores.mean(axis=(1, 2)).tolist(), draws)
            _, low, high = ranking.differences[0][1]
            covered += low <= 0 <= high
            told += ranking.differs_significantly(0, 1)
        assert covered / trials >= 0.92
        assert told / trials <= 0.15  # 0.10 is what two sides of 0.95 promise, ± 0.02 for so few trials

    def test_resampled_seeds_would_not_be_honest(self):
        """Why seeds are not resampled: the plain bootstrap of three seeds covers far less than it says."""
        covered = 0
        for trial in range(300):
            rng = np.random.default_rng(trial)
            by_seed = rng.normal(0, 1, 3)
            low, high = np.quantile(by_seed[rng.integers(0, 3, (1000, 3))].mean(axis=1), [0.025, 0.975])
            covered += low <= 0 <= high
        assert covered / 300 < 0.85

    def test_copies_with_the_same_seeds_are_alike(self):
        scores = np.random.default_rng(0).normal(size=(1, 3, 50))
        ranking = ranked(np.concatenate([scores, scores, scores + 1]))
        assert ranking.names[0] == "c" and ranking.ranks == (1, 2, 2)
        assert ranking.better[1][2] == 0.5 and not ranking.differs_significantly(1, 2)
        assert ranking.differences[1][2] == (0, 0, 0)


class TestRanks:
    def test_equal_ranks_where_no_order_is_known(self):
        """a beats c, but b can be told from neither."""
        values, errors = [0.80, 0.78, 0.74], [0.02, 0.02, 0.02]
        ranking = rank(["c", "b", "a"], values[::-1], normal_draws(values[::-1], errors))
        assert ranking.names == ("a", "b", "c")
        assert ranking.better[0][2] >= CONFIDENCE > max(ranking.better[0][1], ranking.better[1][2])
        assert ranking.ranks == (1, 1, 2)

    def test_losses_rank_upside_down(self):
        scores = np.abs(np.random.default_rng(0).normal(size=(4, 3, 60)) + np.arange(4)[:, None, None])
        up, down = ranked(scores), ranked(scores, greater_is_better=False)
        assert down.names == up.names[::-1]
        assert np.array(down.better)[::-1, ::-1] == pytest.approx(1 - np.array(up.better))
        assert sum(up.best) == pytest.approx(1)

    def test_probabilities_add_up_and_follow_the_order(self):
        ranking = ranked(np.random.default_rng(2).normal(size=(5, 4, 80)))
        table = np.array(ranking.better)
        assert table + table.T == pytest.approx(np.ones((5, 5)))
        assert all(one >= other for one, other in pairwise(ranking.values))
        assert all(
            low < value < high for low, value, high in zip(ranking.low, ranking.values, ranking.high, strict=True)
        )

    def test_no_interval_of_a_share_goes_beyond_0_and_1(self):
        draws = normal_draws([0.97, 0.05], [0.1, 0.1])
        ranking = rank(["a", "b"], [0.97, 0.05], draws, bounds=(0, 1))
        assert (ranking.high[0], ranking.low[1]) == (1, 0)
        assert ranking.low[0] == pytest.approx(0.97 - 0.196, abs=0.01)
        assert ranking.better == rank(["a", "b"], [0.97, 0.05], draws).better

    def test_the_order_given_changes_nothing(self):
        scores = np.random.default_rng(3).normal(size=(3, 3, 40)) + np.arange(3)[:, None, None] * 0.1
        forward = ranked(scores)
        backward = rank(["c", "b", "a"], scores.mean(axis=(1, 2))[::-1].tolist(), paired_bootstrap(scores[::-1]))
        assert forward.names == backward.names and forward.ranks == backward.ranks
        assert np.array(forward.better) == pytest.approx(np.array(backward.better))

    def test_halving_keeps_the_better_half_and_what_the_best_may_be(self):
        values = [0.9, 0.89, 0.88, 0.5, 0.4]
        sure = rank(list("abcde"), values, normal_draws(values, [1e-3] * 5))
        assert sure.kept(2) == ("a", "b")
        unsure = rank(list("abcde"), values, normal_draws(values, [0.02] * 5))
        assert unsure.kept(2) == ("a", "b", "c")
        assert unsure.kept(4) == ("a", "b", "c", "d")


@pytest.mark.parametrize("scores", [np.zeros((2, 1, 0)), np.full((2, 1, 3), np.nan)])
def test_no_scores_are_refused(scores: Array):
    with pytest.raises(ValueError, match="at least one example"):
        paired_bootstrap(scores)
