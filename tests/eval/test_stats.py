"""Intervals, paired tests and calibration: against hand-computed values, other libraries and simulations."""

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score

from eval.stats import (
    approximate_randomisation,
    bootstrap_sums,
    brier,
    cell,
    expected_calibration_error,
    holm,
    items_to_settle,
    macro_f1,
    mcnemar_exact,
    mean_cells,
    mean_sd,
    reliability_bins,
    wilson_interval,
)
from tests.helpers.comparisons import mean_interval


def planted(items: int, gain: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two systems on the same items; the first is right on a share `gain` more than the second."""
    rng = np.random.default_rng(seed)
    b = (rng.random(items) < 0.6).astype(float)
    a = b.copy()
    wrong, right = np.flatnonzero(b == 0), np.flatnonzero(b == 1)
    noise = items // 20
    a[rng.choice(wrong, noise + round(gain * items), replace=False)] = 1
    a[rng.choice(right, noise, replace=False)] = 0
    return a, b


def test_a_system_against_itself_has_p_of_exactly_1():
    a, _ = planted(300, 0.05)
    clusters = [str(i // 3) for i in range(300)]
    assert mcnemar_exact(a, a) == (1.0, 0, 0)
    assert approximate_randomisation(a, a, clusters) == 1.0
    assert mean_interval(a - a, clusters, 200) == (0.0, 0.0)
    assert items_to_settle(a, a, clusters) is None


def test_a_planted_difference_of_5_points_on_2000_items_is_found():
    a, b = planted(2000, 0.05)
    clusters = [str(i // 4) for i in range(2000)]
    low, high = mean_interval(a - b, clusters, 2000)
    assert 0 < low < 0.05 < high
    assert approximate_randomisation(a, b, clusters, resamples=2000) < 0.001
    assert mcnemar_exact(a, b)[0] < 0.001
    assert approximate_randomisation(b, a, clusters, resamples=2000) < 0.001


def test_mcnemar_by_hand():
    a = [1] * 8 + [0] * 2 + [1] * 5 + [0] * 5
    b = [0] * 8 + [1] * 2 + [1] * 5 + [0] * 5
    # 10 discordant, 8 to 2: twice the chance of 2 or fewer heads in 10 throws
    assert mcnemar_exact(a, b) == (pytest.approx(2 * (1 + 10 + 45) / 2**10), 8, 2)


def test_randomisation_by_hand_and_against_mcnemar():
    a, b = [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]
    # 2 of the 16 ways to swap give a difference as large
    assert approximate_randomisation(a, b, list("abcd")) == pytest.approx(1 / 8, abs=0.01)
    # as two clusters: 2 of 4 ways
    assert approximate_randomisation(a, b, list("aabb")) == pytest.approx(1 / 2, abs=0.02)
    a, b = planted(400, 0.02, seed=3)
    clusters = [str(i) for i in range(400)]
    assert approximate_randomisation(a, b, clusters) == pytest.approx(mcnemar_exact(a, b)[0], abs=0.02)


def test_cluster_test_keeps_its_false_positive_rate_and_mcnemar_does_not():
    rng = np.random.default_rng(5)
    clusters = [str(i // 10) for i in range(400)]
    trials, cluster_hits, naive_hits = 200, 0, 0
    for _ in range(trials):  # no true difference; questions of a passage fall together
        a, b = ((np.repeat(rng.random(40), 10) + 0.1 * rng.random(400)) > 0.55 for _ in range(2))
        cluster_hits += approximate_randomisation(a, b, clusters, resamples=300) < 0.05
        naive_hits += mcnemar_exact(a.astype(float), b.astype(float))[0] < 0.05
    assert cluster_hits / trials < 0.09
    assert naive_hits / trials > 0.25


def test_interval_of_a_paired_difference_covers_the_truth():
    rng, hits, trials = np.random.default_rng(7), 0, 150
    clusters = [str(i // 5) for i in range(300)]
    for _ in range(trials):
        passage = np.repeat(rng.normal(0, 0.5, 60), 5)
        a = passage + rng.normal(0.3, 1, 300) + np.repeat(rng.normal(0, 0.5, 60), 5)
        b = passage + rng.normal(0, 1, 300)
        low, high = np.percentile(bootstrap_sums(a - b, clusters, 400)[1:, 0] / 300, [2.5, 97.5])
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / trials <= 0.99


def test_first_row_of_a_bootstrap_is_what_was_seen():
    scores, clusters = np.random.default_rng(2).random((120, 2)), [f"c{i % 17}" for i in range(120)]
    sums = bootstrap_sums(scores, clusters, 500)
    assert sums.shape == (501, 2)
    assert sums[0] == pytest.approx(scores.sum(0))
    assert bootstrap_sums(scores[:, :1], clusters, 500)[:, 0] == pytest.approx(sums[:, 0])  # columns share the draws


def test_holm_by_hand():
    # sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1 which may not fall below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_items_to_settle_by_hand_and_by_power():
    # differences 1, 1, 0, 0 ... of mean 0.25 and variance 0.1875
    a, b = [1.0, 0.0, 0.0, 0.0] * 5, [0.0] * 20
    needed = items_to_settle(a, b, [str(i) for i in range(20)])
    assert needed == math.ceil(0.1875 * ((1.959964 + 0.841621) / 0.25) ** 2)
    assert items_to_settle(a, b, [str(i // 4) for i in range(20)]) < needed  # every passage has the same difference
    assert items_to_settle(a, b, ["one"] * 20) is None
    assert items_to_settle(a, b, [str(i) for i in range(20)], alpha=0.005) > needed
    rng, detected = np.random.default_rng(1), 0
    for _ in range(200):
        draw = rng.random(needed) < 0.25
        detected += abs(draw.mean()) > 1.96 * math.sqrt(0.1875 / needed)
    assert 0.7 < detected / 200 < 0.9


def test_wilson_by_hand_and_at_the_ends():
    assert wilson_interval(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    low, high = wilson_interval(0, 20)
    assert low == 0
    assert 0.1 < high < 0.2
    assert wilson_interval(20, 20)[1] == 1
    for successes, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError):  # noqa: PT011  # the wording is scipy's
            wilson_interval(successes, n)


def test_calibration_by_hand():
    probabilities, correct = [0.0, 0.1, 0.15, 0.95, 1.0], [0, 0, 1, 1, 0]
    bins = reliability_bins(probabilities, correct)
    assert bins[0] == (2, pytest.approx(0.05), 0.0)  # 0.1 is in the first bin: its upper end belongs to it
    assert bins[1] == (1, 0.15, 1.0)
    assert bins[9] == (2, pytest.approx(0.975), 0.5)
    assert sum(n for n, _, _ in bins) == 5
    assert expected_calibration_error(probabilities, correct) == pytest.approx((2 * 0.05 + 0.85 + 2 * 0.475) / 5)
    assert brier(probabilities, correct) == pytest.approx((0 + 0.01 + 0.7225 + 0.0025 + 1) / 5)
    with pytest.raises(ValueError, match="from 0 to 1"):
        reliability_bins([1.2], [1])


def test_macro_f1_is_that_of_scikit_learn():
    rng = np.random.default_rng(4)
    gold, predicted = rng.integers(0, 5, 80), rng.integers(0, 7, 80)  # 5 and 6 are no labels; 4 may be never predicted
    predicted[predicted == 4] = 6
    one_hot = [of[:, None] == np.arange(5) for of in (gold, predicted)]
    sums = np.hstack([one_hot[0] & one_hot[1], *one_hot]).sum(0)
    assert macro_f1(sums) == pytest.approx(f1_score(gold, predicted, labels=range(5), average="macro", zero_division=0))


def test_interval_of_macro_f1_holds_score_and_truth_if_classes_are_small():
    """36 items of 20 classes: a resample lacks a third of the classes."""
    rng, inside, covered = np.random.default_rng(0), 0, 0
    for _ in range(100):
        gold = rng.permutation(np.arange(36) % 20)
        predicted = np.where(rng.random(36) < 0.55, gold, rng.integers(0, 20, 36))
        one_hot = [of[:, None] == np.arange(20) for of in (gold, predicted)]
        counts = np.hstack([one_hot[0] & one_hot[1], *one_hot]).astype(float)
        sums = bootstrap_sums(counts, [str(i) for i in range(36)], 400)
        found = cell(100 * macro_f1(sums), 36)
        inside += found["low"] <= found["score"] <= found["high"]
        covered += found["low"] <= 100 * (0.55 + 0.45 / 20) <= found["high"]  # what each class's F1 is near
    assert inside == 100
    assert covered >= 80


def test_scores_without_variance_have_wilsons_interval_of_their_clusters():
    for value, wanted in ((0.0, wilson_interval(0, 5)), (1.0, wilson_interval(5, 5))):
        low, high = (round(100 * end, 2) for end in wanted)
        expected = {"score": 100 * value, "low": low, "high": high}
        assert mean_cells(np.full((10, 1), value), [str(i // 2) for i in range(10)]) == [expected]
        assert cell(np.full(50, 100 * value), 5) == expected
    assert mean_cells(np.array([[1.0], [0.0]]), ["a", "b"]) == [{"score": 50, "low": 0, "high": 100}]
    assert cell(np.zeros(50)) == {"score": 0, "low": 0, "high": 0}  # a difference that is none


def test_mean_sd():
    assert mean_sd([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_sd([5.0]) == (5.0, None)


def test_scores_of_other_items_are_refused():
    with pytest.raises(ValueError, match="2 and 3 scores"):
        mcnemar_exact([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="at least one"):
        approximate_randomisation([], [], [])
