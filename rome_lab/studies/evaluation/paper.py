"""The paper's numbers for GPT-2 XL on CounterFact, and whether ours say the same.

paper_numbers()                 means of each method, in our units
agreement_with_paper(table)     whether ROME is above or below each other method, here and in the paper
verdicts_in_words(agreement)    how often, and for which metrics and methods
aims_in_words(summary)          whether ROME reaches the marks that this project has set itself
case_scores, worst_first        by which single cases are told good from bad, and the cases in that order
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from rome_lab.base import mean_ci
from rome_lab.evaluation import S_OF
from rome_lab.studies.evaluation.paired_differences import paired

# Meng et al. (2022), the table of quantitative editing results: S, ES, PS, NS, GE, RS. GE is printed in hundredths of bits.
METRICS_PRINTED = ("S", "ES", "PS", "NS", "GE", "RS")
PRINTED = {
    "none": (30.5, 22.2, 24.7, 78.1, 626.6, 31.9),
    "ft": (65.1, 100.0, 87.9, 40.4, 607.1, 40.5),
    "ft-linf": (66.9, 99.1, 48.7, 70.3, 621.4, 37.4),
    "rome": (89.2, 100.0, 96.4, 75.4, 621.9, 41.9),
}
AIMS = {"ES": 99, "PS": 90, "NS": 75, "S": 87}  # of ROME on the embedded model, near what the paper reports of GPT-2 XL
AIMED_ABOVE = {"ft": 15, "ft-linf": 15}  # points of S by which ROME is to be above fine-tuning
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

    Our difference is that of `paired`. The verdict, with a margin of 1 as the paper prints it:

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
                mean, low, high, n = mean_ci(pairs.to_numpy())
                outcome = verdict(theirs, low, high, MARGINS.get(metric, 1.0), n)
                rows.append((metric, method, other, theirs, float(mean), float(low), float(high), len(pairs), outcome))
    columns = ["metric", "method", "minus", "paper", "difference", "ci_low", "ci_high", "n", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def verdict(paper: float, ci_low: float, ci_high: float, margin: float, n: int) -> str:
    """See `agreement_with_paper`."""

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
    return pd.Series(stats.hmean(table[names].to_numpy(float), axis=-1), index=table.index)


def worst_first(table: pd.DataFrame, method: str = "rome") -> list[str]:
    """The judged cases by `case_scores` under the method, equals by PM; where it has none, each under its first method."""
    judged = table[table["judged"]]
    rows = judged[judged["method"] == method] if (judged["method"] == method).any() else judged.drop_duplicates("case")
    rows = rows.assign(score=case_scores)
    return rows.sort_values(["score", *(["PM"] if "PM" in rows else [])], kind="stable")["case"].tolist()


def verdicts_in_words(agreement: pd.DataFrame) -> str:
    """A line for each verdict of `agreement_with_paper`: how often, and for which metrics and methods."""
    lines = []
    for outcome, rows in agreement.groupby("verdict"):
        pairs = ", ".join(f"{row.metric} ({row.method} minus {row.minus})" for row in rows.itertuples())
        lines.append(f"{outcome}: {len(rows)} of {len(agreement)}: {pairs}")
    return "\n".join(lines)


def aims_in_words(summary: pd.DataFrame) -> str:
    """A line for each of `AIMS` and `AIMED_ABOVE`: ROME's value, the aim, and whether it is reached."""
    means = summary.set_index(["method", "metric"])["mean"]
    aims = {metric: (means.get(("rome", metric), np.nan), least) for metric, least in AIMS.items()}
    for other, least in AIMED_ABOVE.items():
        difference = means.get(("rome", "S"), np.nan) - means.get((other, "S"), np.nan)
        aims[f"S above {other}"] = (difference, least)
    lines = []
    for name, (value, least) in aims.items():
        short = (
            "cannot be told" if np.isnan(value) else "reached" if value >= least else f"missed by {least - value:.1f}"
        )
        lines.append(f"{name}: {value:.1f}, aim {least}: {short}")
    return "\n".join(lines)
