"""Tables to read, a row a method.

definitions()                  of the metrics
table_of_means(summary)        a column a metric
table_of_scorings(summary)     a column a part of the case and a scoring
scores_of(summary)             the scores that it has
SCORED                         metric -> the two that it is of, such as ("E", "score") of ES
"""

from __future__ import annotations

import pandas as pd

from rome_lab.evaluation import CASE_PARTS, METRICS, S_OF, SCORINGS, metric_of

SCORED = {metric_of(part, scoring): (part, scoring) for part in CASE_PARTS for scoring in SCORINGS}


def definitions() -> pd.DataFrame:
    """What each metric is: definition, unit, of (whole target or per token), teacher forcing, better."""
    table = pd.DataFrame.from_dict({name: vars(metric) for name, metric in METRICS.items()}, orient="index")
    return table.rename(columns={"whole": "of", "forced": "teacher forcing"}).rename_axis("metric")


def scores_of(summary: pd.DataFrame) -> list[str]:
    """Those of S, ES, PS and NS that a summary has, or, where it has none, of zsRE's."""
    kinds = (("S", *S_OF), ("efficacy", "paraphrase", "specificity"))
    return next(filter(None, ([x for x in kind if x in set(summary["metric"])] for kind in kinds)), [])


def table_of_means(summary: pd.DataFrame, every: bool = False) -> pd.DataFrame:
    """A row a method, a column a metric, "mean (low, high)" in the cells, and n, the cases; in the order of the summary.

    The scorings beside the paper's have a table of their own, `table_of_scorings`, and are left out but for `every`.
    """
    summary = summary if every else summary[~summary["metric"].str.contains("_")]
    text = [f"{row.mean:.1f} ({row.ci_low:.1f}, {row.ci_high:.1f})" for row in summary.itertuples()]
    wide = summary.assign(text=text).pivot(index="method", columns="metric", values="text")
    wide = wide.assign(n=summary.groupby("method")["n"].max())
    return wide.loc[summary["method"].unique(), [*summary["metric"].unique(), "n"]]


def table_of_scorings(summary: pd.DataFrame) -> pd.DataFrame:
    """A row a method, a column a part of the case and a scoring, "mean (low, high)" in the cells."""
    rows = summary[summary["metric"].isin(SCORED)].itertuples()
    text = pd.Series(
        {(row.method, *SCORED[row.metric]): f"{row.mean:.0f} ({row.ci_low:.0f}, {row.ci_high:.0f})" for row in rows}
    )
    wide = text.unstack([1, 2])
    return wide.loc[summary["method"].unique(), [x for x in SCORED.values() if x in wide]].fillna("")
