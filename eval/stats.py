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
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(scores, dtype=float))
    sizes = np.bincount(index).astype(float)
    count = len(sums)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    low, high = np.percentile((draws @ sums) / (draws @ sizes), [2.5, 97.5])
    return float(low), float(high)
