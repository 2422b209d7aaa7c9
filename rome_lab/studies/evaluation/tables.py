"""Tables to read: `definitions` of the metrics, and `table_of_means`, a row a method and a column a metric."""

from __future__ import annotations

import pandas as pd

from rome_lab.evaluation import METRICS


def definitions() -> pd.DataFrame:
    """What each metric is: definition, unit, of (whole target or per token), teacher forcing, better."""
    table = pd.DataFrame.from_dict({name: vars(metric) for name, metric in METRICS.items()}, orient="index")
    return table.rename(columns={"whole": "of", "forced": "teacher forcing"}).rename_axis("metric")


def table_of_means(summary: pd.DataFrame) -> pd.DataFrame:
    """A row a method, a column a metric, "mean (low, high)" in the cells, and n, the cases; in the order of the summary."""
    text = [f"{row.mean:.1f} ({row.ci_low:.1f}, {row.ci_high:.1f})" for row in summary.itertuples()]
    wide = summary.assign(text=text).pivot(index="method", columns="metric", values="text")
    wide = wide.assign(n=summary.groupby("method")["n"].max())
    return wide.loc[summary["method"].unique(), [*summary["metric"].unique(), "n"]]
