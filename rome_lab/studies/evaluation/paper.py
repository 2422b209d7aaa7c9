"""The paper's numbers for GPT-2 XL on CounterFact, and whether ours say the same.

paper_numbers()      means of each method, in our units
agreement(table)     whether ROME is above or below each other method, here and in the paper
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from rome_lab.base import mean_ci
from rome_lab.evaluation import S_OF

# Meng et al. (2022), the table of quantitative editing results: S, ES, PS, NS, GE, RS. GE is printed in hundredths of bits.
METRICS_PRINTED = ("S", "ES", "PS", "NS", "GE", "RS")
PRINTED = {
    "none": (30.5, 22.2, 24.7, 78.1, 626.6, 31.9),
    "ft": (65.1, 100.0, 87.9, 40.4, 607.1, 40.5),
    "ft-linf": (66.9, 99.1, 48.7, 70.3, 621.4, 37.4),
    "rome": (89.2, 100.0, 96.4, 75.4, 621.9, 41.9),
}
MARGINS = {"GE": 0.01}  # least difference worth speaking of: 1 as the paper prints it


def paper_numbers() -> pd.DataFrame:
    """The paper's means: method, metric, mean, in the units of `rome_lab.evaluation.metrics` (GE in bits)."""
    rows = [
        (method, metric, value / 100 if metric == "GE" else value)
        for method, values in PRINTED.items()
        for metric, value in zip(METRICS_PRINTED, values, strict=True)
    ]
    return pd.DataFrame(rows, columns=["method", "metric", "mean"])


def agreement_with_paper(table: pd.DataFrame, method: str = "rome") -> pd.DataFrame:
    """Whether a method is above or below the others of the paper, one row a metric and other method.

    Our difference is paired within the case, over the cases that have both. That of S, which no single case has, is over
    jackknife pseudo-values: n S - (n - 1) S without the case. The verdict, with a margin of 1 as the paper prints it:

        "agrees"      both differences are above the margin, or both below minus it, or both within; ours with its
                      whole interval
        "differs"     the whole interval of ours is where the paper's is not
        "can't tell"  our interval reaches over a margin, or there are fewer than 3 cases

    Args:    table: what `evaluate` returns, of cases of the CounterFact form.
    Returns: DataFrame: metric, method, minus, paper, difference, ci_low, ci_high, n, verdict.
    """
    paper = paper_numbers().pivot(index="method", columns="metric", values="mean")
    rows = []
    for other in paper.index:
        if other == method or other not in set(table["method"]) or method not in set(table["method"]):
            continue
        for metric in METRICS_PRINTED:
            pairs = paired(table, metric, method, other)
            if len(pairs):
                theirs = paper.loc[method, metric] - paper.loc[other, metric]
                found = dict(zip(("difference", "ci_low", "ci_high"), map(float, mean_ci(pairs)[:3]), strict=True))
                said = verdict(theirs, found["ci_low"], found["ci_high"], MARGINS.get(metric, 1.0), len(pairs))
                about = {"metric": metric, "method": method, "minus": other, "paper": theirs}
                rows.append(about | found | {"n": len(pairs), "verdict": said})
    columns = ["metric", "method", "minus", "paper", "difference", "ci_low", "ci_high", "n", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def paired(table: pd.DataFrame, metric: str, method: str, other: str) -> np.ndarray:
    """(F,) differences of two methods over the cases that have both; of S, those of its pseudo-values."""
    needed = list(S_OF) if metric == "S" else [metric]
    if not set(needed) <= set(table):
        return np.zeros(0)
    sides = [table[table["method"] == name].set_index("case")[needed] for name in (method, other)]
    both = pd.concat(
        [one.add_prefix(side) for one, side in zip(sides, "ab", strict=True)], axis=1, join="inner"
    ).dropna()
    ours, theirs = np.split(both.to_numpy(float), 2, axis=1)
    if metric == "S":
        return pseudo_values(ours) - pseudo_values(theirs) if len(both) > 1 else np.zeros(0)
    return (ours - theirs)[:, 0]


def pseudo_values(values: np.ndarray) -> np.ndarray:
    """(F,) jackknife pseudo-values of S from the (F, 3) values of ES, PS and NS; n is at least 2."""
    n = len(values)
    without = (values.sum(axis=0) - values) / (n - 1)
    return n * harmonic(values.mean(axis=0)) - (n - 1) * harmonic(without)


def harmonic(means: np.ndarray) -> np.ndarray:
    """Harmonic mean over the last axis; 0 where one is 0."""
    with np.errstate(divide="ignore"):
        return means.shape[-1] / (1 / means).sum(axis=-1)


def verdict(paper: float, ci_low: float, ci_high: float, margin: float, n: int) -> str:
    """See `agreement`."""

    def side(value: float) -> int:
        return int(value > margin) - int(value < -margin)

    if n < 3 or side(ci_low) != side(ci_high):
        return "can't tell"
    return "agrees" if side(ci_low) == side(paper) else "differs"


def case_scores(table: pd.DataFrame) -> pd.Series:
    """The harmonic mean of ES, PS and NS of each row, by which single cases are told good from bad; NaN without all three.

    Cases of zsRE have that of efficacy, paraphrase and specificity.
    """
    names = list(S_OF) if set(S_OF) <= set(table) else ["efficacy", "paraphrase", "specificity"]
    return pd.Series(harmonic(table[names].to_numpy(float)), index=table.index)
