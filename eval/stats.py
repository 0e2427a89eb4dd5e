"""Intervals, tests of two systems on the same items, and calibration. A score never stands alone.

Scores are from 0 to 1, one an item; `clusters` names for each item the passage or thread that it shares with others.
Every random draw depends on its seed alone.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

_Z = NormalDist().inv_cdf  # quantiles of the standard normal


def bootstrap_sums(columns: np.ndarray, clusters: Sequence[str], resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """Sums of each column [items, K], then of each resample of whole clusters (passages): [1 + resamples, K].

    Questions about one passage are not independent; resampling questions would make an interval too narrow. Columns of
    several systems, drawn together, make every difference between two systems a paired one. Sources: Efron and
    Tibshirani, An Introduction to the Bootstrap (1993), chapters 8.5 and 13; pairing by question and clustering by
    passage: Miller, Adding Error Bars to Evals (2024, arXiv 2411.00640).
    """
    sums = _cluster_sums(columns, clusters)
    rng, count = np.random.default_rng(seed), len(sums)
    draws = (rng.multinomial(count, np.full(count, 1 / count), size) for size in _pieces(resamples, count))
    return np.vstack([sums.sum(0), *(draw.astype(float) @ sums for draw in draws)])


def mean_cells(scores: np.ndarray, clusters: Sequence[str]) -> list[dict[str, float]]:
    """The `cell` of each column of scores [items, K], in percent."""
    sums = bootstrap_sums(np.column_stack([np.ones(len(scores)), scores]), clusters)
    return [cell(100 * column / sums[:, 0], len(set(clusters))) for column in sums[:, 1:].T]


def approximate_randomisation(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    clusters: Sequence[str],
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p of the difference of two systems on the same items: how often swapping the systems on random whole
    clusters gives one as large. Exactly 1 for a system against itself; at least 1 / (resamples + 1).

    a and b: scores [items], or columns [items, K] of which `statistic` turns the sums [..., K] into the score [...];
    without one the score is the mean. Source: Noreen, Computer-Intensive Methods for Testing Hypotheses (1989); the
    added 1 is Phipson and Smyth's (2010). Items of a cluster move together: alone they are not exchangeable.
    """
    _paired(a, b)
    first, second = _cluster_sums(a, clusters), _cluster_sums(b, clusters)
    unlike = (first - second)[(first != second).any(1)]  # swapping the others changes nothing
    if not len(unlike):
        return 1.0
    score = statistic or (lambda sums: sums[..., 0])
    both, base = (first + second).sum(0), second.sum(0)
    # 1e-9: sums of f1 in another order differ in the last digits, and a tie must count
    seen = abs(float(score(first.sum(0)) - score(base))) - 1e-9
    rng, extreme = np.random.default_rng(seed), 0
    for size in _pieces(resamples, len(unlike)):
        mine = base + rng.integers(0, 2, (size, len(unlike)), dtype=np.uint8).astype(float) @ unlike
        extreme += int((np.abs(score(mine) - score(both - mine)) >= seen).sum())
    return (1 + extreme) / (1 + resamples)


def mcnemar_exact(a: Sequence[float], b: Sequence[float]) -> tuple[float, int, int]:
    """Two-sided exact p on paired 0/1 scores, how many items only a has right, and how many only b.

    1 if no item is discordant. It takes items as independent: if several share a cluster it finds differences
    that are none, see `approximate_randomisation`. Source: McNemar (1947), in its exact binomial form; Edwards' (1948)
    correction approximates that one.
    """
    from scipy.stats import binomtest

    differences = _paired(a, b)
    only_a, only_b = int((differences > 0).sum()), int((differences < 0).sum())
    discordant = only_a + only_b
    return float(binomtest(only_a, discordant).pvalue) if discordant else 1.0, only_a, only_b


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values in the order given: those below 5 % are significant together, with at most 5 % risk that any
    of them is by chance. Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def items_to_settle(a: Sequence[float], b: Sequence[float], clusters: Sequence[str], alpha: float = 0.05) -> int | None:
    """About how many items in all, clustered alike, would show this difference at `alpha` (two-sided) with power 0.8.

    None if there is no difference, or one cluster only, of which no variance is known. Source: Miller (2024, arXiv
    2411.00640), clustered standard error of the paired differences, and power analysis.
    """
    differences = _paired(a, b)
    mean = differences.mean()
    if not mean or len(set(clusters)) < 2:
        return None
    variance = float((_cluster_sums(differences - mean, clusters) ** 2).sum()) / len(differences)
    return max(1, math.ceil(variance * ((_Z(1 - alpha / 2) + _Z(0.8)) / mean) ** 2))


def cell(values: np.ndarray, clusters: int | None = None) -> dict[str, float]:
    """The seen score in percent, values[0], and the 95 % percentile interval of its resamples, the rest; two decimals.
    If all are 0, or all 100, resamples say nothing, and the interval is Wilson's of that many clusters."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    if clusters and values.min() == values.max() in (0, 100):
        low, high = (100 * end for end in wilson_interval(clusters * int(values[0] / 100), clusters))
    return {"score": round(float(values[0]), 2), "low": round(float(low), 2), "high": round(float(high), 2)}


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion of n independent items; sound near 0 and 1, where the bootstrap has no width.

    Raises ValueError unless 0 <= successes <= n and n > 0. Source: Wilson (1927).
    """
    from scipy.stats import binomtest

    low, high = binomtest(successes, n).proportion_ci(method="wilson")
    return float(low), float(high)


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); one value has no deviation: None."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Unweighted mean of the classes' F1, from counts [..., 3 L]: hits of each class, then gold, then predicted.

    The mean is over the classes that occur as gold: one that a resample lacks would count as 0 and pull the whole
    interval below the score.
    """
    hits, gold, predicted = np.split(sums, 3, axis=-1)
    occurs = gold > 0
    return np.asarray((2 * hits / np.maximum(gold + predicted, 1) * occurs).sum(-1) / np.maximum(occurs.sum(-1), 1))


def reliability_bins(
    probabilities: Sequence[float], correct: Sequence[float], bins: int = 10
) -> list[tuple[int, float, float]]:
    """Items, mean probability and share of right answers in each bin ((i / bins, (i + 1) / bins], the first with 0);
    an empty bin is (0, 0, 0). Source: Guo et al., On Calibration of Modern Neural Networks (2017, arXiv 1706.04599)."""
    p, right = np.asarray(probabilities, dtype=float), np.asarray(correct, dtype=float)
    if not len(p) or ((p < 0) | (p > 1)).any():
        raise ValueError("probabilities: at least one, all of them from 0 to 1")
    index = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    means = [np.bincount(index, values, bins) / np.maximum(counts, 1) for values in (p, right)]
    return list(zip(counts.tolist(), *(mean.tolist() for mean in means), strict=True))


def expected_calibration_error(probabilities: Sequence[float], correct: Sequence[float], bins: int = 10) -> float:
    """Mean gap, 0 to 1, between the mean probability and the share of right answers of a bin, over bins of equal width
    weighted by their items. Source: Guo et al. (2017)."""
    found = reliability_bins(probabilities, correct, bins)
    return sum(n * abs(confidence - right) for n, confidence, right in found) / len(probabilities)


def brier(probabilities: Sequence[float], correct: Sequence[float]) -> float:
    """Mean squared gap, 0 to 1, between the probability of an answer and whether it is right. Source: Brier (1950),
    for the one event that the answer is right."""
    return float((_paired(probabilities, correct) ** 2).mean())


def _paired(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> np.ndarray:
    """a - b. Raises ValueError unless both are scores of the same items."""
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape != second.shape or not len(first):
        raise ValueError(
            f"{len(first)} and {len(second)} scores: two systems on the same items, at least one, are wanted"
        )
    return first - second


def _cluster_sums(columns: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Sums over each cluster's items, in sorted order of the clusters: [clusters, K]."""
    values = np.asarray(columns, dtype=float).reshape(len(clusters), -1)
    number = {cluster: i for i, cluster in enumerate(sorted(set(clusters)))}
    index = np.array([number[cluster] for cluster in clusters])
    sums = np.zeros((len(number), values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def _pieces(resamples: int, clusters: int) -> list[int]:
    """Resamples that are drawn at once, about 8 MB: all those of 11,000 clusters would take 880 MB."""
    most = max(1, 1_000_000 // clusters)
    return [min(most, resamples - done) for done in range(0, resamples, most)]
