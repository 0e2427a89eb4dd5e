"""Intervals. A score never stands alone."""

from collections.abc import Sequence

import numpy as np


def cluster_interval(
    scores: Sequence[float], clusters: Sequence[str], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean score, resampling clusters (passages) with replacement.

    Questions about one passage are not independent; resampling questions would make the interval too narrow.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8.5 and 13.
    """
    number = {cluster: i for i, cluster in enumerate(sorted(set(clusters)))}
    index = [number[cluster] for cluster in clusters]
    sums = np.bincount(index, weights=np.asarray(scores, dtype=float))
    sizes = np.bincount(index).astype(float)
    count = len(sums)
    rng, shares = np.random.default_rng(seed), np.full(count, 1 / count)
    means = []
    # in pieces of about 8 MB: all draws of 11,000 clusters at once would take 880 MB
    for size in _pieces(resamples, max(1, 1_000_000 // count)):
        draws = rng.multinomial(count, shares, size=size)
        means.append((draws @ sums) / (draws @ sizes))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def _pieces(total: int, most: int) -> list[int]:
    return [min(most, total - done) for done in range(0, total, most)]
