"""Means over facts, or cases, with their 95% intervals, which are computed nowhere else.

mean_ci(values)             of each column
share_ci(values)            of shares in percent, within 0 to 100
harmonic_mean_ci(values)    of several shares together: S of ES, PS and NS
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import scipy

RESAMPLES = 4000  # of a bootstrap: its bounds are then off by a fortieth of their distance from the mean


class MeanCI(NamedTuple):
    """A mean with its 95% confidence interval, and the number of facts (or cases) behind it; arrays of one shape."""

    mean: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    n_facts: np.ndarray


def mean_ci(values: np.ndarray, clusters: Sequence[Hashable] | None = None) -> MeanCI:
    """Mean and 95% t-interval over the first axis, NaN standing for facts without a value.

        mean +- t(0.975, g - 1) sqrt(g / (g - 1) sum over clusters of (sum of x - mean)^2) / n

    g is the number of clusters. Without clusters each fact is one of its own, and this is the common t-interval, of n - 1
    degrees of freedom; it is right for a random draw from a set of facts. With them it is right for a draw of new clusters,
    such as relations, whose facts are alike (Liang and Zeger 1986).

    The bounds are NaN where g = 1, all but n where n = 0. Nothing is clipped to possible probabilities.

    Args:
        values: (F, ...), one value a fact.
        clusters: F labels; None is a cluster of its own.

    Returns: MeanCI of arrays (...).
    """
    present = ~np.isnan(values)
    n = present.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(present, values, 0.0).sum(axis=0) / n
        sums = np.where(present, values - mean, 0.0)
        if clusters is not None:
            of_fact = cluster_places(clusters)
            sums, there = np.zeros((2, max(of_fact, default=-1) + 1, *values.shape[1:]))
            np.add.at(sums, of_fact, np.where(present, values - mean, 0.0))
            np.add.at(there, of_fact, present)
            present = there > 0
        g = present.sum(axis=0)
        error = np.sqrt(g / (g - 1) * (sums**2).sum(axis=0)) / n
        half_width = scipy.stats.t.ppf(0.975, g - 1) * error
    return MeanCI(mean, mean - half_width, mean + half_width, n)


def cluster_places(clusters: Sequence[Hashable]) -> list[int]:
    """The number of each fact's cluster, in the order of their first facts; None is a cluster of its own."""
    labels = [i if x is None else (x,) for i, x in enumerate(clusters)]
    places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    return [places[label] for label in labels]


def share_ci(values: np.ndarray, clusters: Sequence[Hashable] | None = None) -> MeanCI:
    """Mean of shares in percent, and a 95% interval that stays within 0 to 100; of differences of them, within their range.

    Where each fact is a success or none, 100 or 0, the exact interval of a share (Clopper and Pearson 1934); else the one of
    `harmonic_mean_ci`, for one column.

    Args:
        values: (F,), within [0, 100]; NaN stands for facts without a value.
        clusters: see `mean_ci`; shares of clusters are not all or nothing.

    Returns: MeanCI of scalars.
    """
    present = values[~np.isnan(values)]
    if clusters is not None or not np.isin(present, (0.0, 100.0)).all():
        return harmonic_mean_ci(values[:, None], clusters)
    return exact_share(present) if len(present) else mean_ci(present)


def exact_share(values: np.ndarray) -> MeanCI:
    """Of facts (F,) that are 100 or 0 each."""
    low, high = scipy.stats.binomtest(int((values > 0).sum()), len(values)).proportion_ci(0.95, method="exact")
    return MeanCI(values.mean(), 100 * low, 100 * high, len(values))


def harmonic_mean_ci(values: np.ndarray, clusters: Sequence[Hashable] | None = None) -> MeanCI:
    """Harmonic mean of the means of shares in percent, with a 95% interval by bootstrap, over the rows without NaN.

        S = k / (1/m_1 + ... + 1/m_k)

    Facts, with the values of all columns, are drawn anew `RESAMPLES` times from those there are, as many as there are, and
    the interval is that of the middle 95% of what S is then (Efron 1979); of clusters, whole clusters are drawn. So it is
    nowhere below 0 or above 100, and takes account of how the columns vary together. The bounds are NaN where there is one
    fact or cluster. A column that is the same in all facts adds nothing to the spread; where all columns are 100, or 0, in
    all facts, drawing tells nothing, and the bounds are the exact ones of as many successes, or failures.

    Args:    values: (F, k), within [0, 100]. clusters: see `mean_ci`.
    Returns: MeanCI of scalars. S is 0 where a mean is 0.
    """
    complete = (~np.isnan(values).any(axis=1)).nonzero()[0]
    values = values[complete]
    if not len(values):
        return mean_ci(values[:, 0])
    of_fact = cluster_places([None if clusters is None else clusters[i] for i in complete])
    sizes = np.bincount(of_fact).astype(float)
    sums = np.zeros((len(sizes), values.shape[1]))
    np.add.at(sums, of_fact, values)
    score = harmonic_means(values.mean(axis=0))
    if len(sizes) == 1:
        return MeanCI(score, np.nan, np.nan, len(values))
    if np.isin(values, (0.0, 100.0)).all() and (values == values[0]).all():
        return MeanCI(score, *exact_share(np.full(len(sizes), score))[1:3], len(values))
    counts = drawn_counts(len(sizes))
    low, high = np.percentile(harmonic_means(counts @ sums / (counts @ sizes)[:, None]), [2.5, 97.5])
    return MeanCI(score, low, high, len(values))


def harmonic_means(means: np.ndarray) -> np.ndarray:
    """Of the last axis; 0 where one of them is 0."""
    with np.errstate(divide="ignore"):
        return means.shape[-1] / (1.0 / means).sum(axis=-1)


@lru_cache(maxsize=4)
def drawn_counts(n: int) -> np.ndarray:
    """(RESAMPLES, n): how often each of n facts is drawn, in each draw of n; always the same."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)
