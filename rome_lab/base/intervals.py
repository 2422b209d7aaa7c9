"""Means over facts, or cases, with their 95% intervals, which are computed nowhere else.

mean_ci(values)             of each column
harmonic_mean_ci(values)    of the columns together: S of ES, PS and NS
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


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
            labels = [i if x is None else (x,) for i, x in enumerate(clusters)]
            places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
            of_fact = [places[label] for label in labels]
            sums, there = np.zeros((2, len(places), *values.shape[1:]))
            np.add.at(sums, of_fact, np.where(present, values - mean, 0.0))
            np.add.at(there, of_fact, present)
            present = there > 0
        g = present.sum(axis=0)
        error = np.sqrt(g / (g - 1) * (sums**2).sum(axis=0)) / n
        half_width = stats.t.ppf(0.975, g - 1) * error
    return MeanCI(mean, mean - half_width, mean + half_width, n)


def harmonic_mean_ci(values: np.ndarray) -> MeanCI:
    """Harmonic mean of the columns' means, with a 95% interval by the delta method, over the rows without NaN.

        S = k / (1/m_1 + ... + 1/m_k),   dS/dm_j = (S / m_j)^2 / k

    The interval is the t-interval of the linearised cases, S + sum_j dS/dm_j (x_j - m_j), so it takes account of how the
    columns vary together.

    Args:    values: (F, k), none negative.
    Returns: MeanCI of scalars. S is 0 where a mean is 0; all its values are 0 then, so they add nothing to the spread.
    """
    complete = values[~np.isnan(values).any(axis=1)]
    if not len(complete):
        return mean_ci(complete[:, 0])
    means = complete.mean(axis=0)
    score = stats.hmean(means)
    gradient = np.divide(score, means, out=np.zeros_like(means), where=means > 0) ** 2 / len(means)
    return mean_ci(score + (complete - means) @ gradient)
