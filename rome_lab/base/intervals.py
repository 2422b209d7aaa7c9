"""Means over facts, or cases, with their 95% intervals: `mean_ci`, the one place where an interval is computed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats


class MeanCI(NamedTuple):
    """A mean with its 95% confidence interval, and the number of facts (or cases) behind it; arrays of one shape."""

    mean: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    n_facts: np.ndarray


def mean_ci(values: np.ndarray) -> MeanCI:
    """Mean and 95% t-interval over the first axis, NaN standing for facts without a value.

        mean +- t(0.975, n - 1) s / sqrt(n),   s the sample standard deviation over the n facts

    The bounds are NaN where n = 1, all but n where n = 0. Nothing is clipped to possible probabilities.

    Args:    values: (F, ...), one value a fact.
    Returns: MeanCI of arrays (...).
    """
    present = ~np.isnan(values)
    n = present.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(present, values, 0.0).sum(axis=0) / n
        variance = np.where(present, (values - mean) ** 2, 0.0).sum(axis=0) / (n - 1)
        half_width = stats.t.ppf(0.975, n - 1) * np.sqrt(variance / n)
    return MeanCI(mean, mean - half_width, mean + half_width, n)
