"""How far methods are from one of them, case by case: narrower than two means side by side, since the cases are the same.

differences_to(table, reference)     of every other method, with intervals over cases and over relations
table_of_differences(differences)    the same to read, a row a method
paired(table, metric, ...)           of two methods, by case
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from rome_lab.base import mean_ci
from rome_lab.evaluation import S_OF

DIFFERENCES_OF = (
    *("S", "ES", "PS", "NS", "P_written", "N_written", "follows", "efficacy", "paraphrase", "specificity"),
    *("known", "nll"),
)


def differences_to(table: pd.DataFrame, reference: str = "rome") -> pd.DataFrame:
    """Each method's metrics less those of a reference, paired within the case (`paired`), a row a method and metric.

    Where a method edits several cases in one model, its interval is that of a draw of models (`mean_ci`, clusters).

    Args:    table: what `evaluate` returns.
    Returns: DataFrame: method, minus, metric, difference, ci_low, ci_high, n; relations_low and relations_high: the interval
             where new relations, whose cases are alike, are drawn instead of cases.
    """
    rows = []
    for method in table["method"].drop_duplicates():
        cases = table[table["method"] == method].set_index("case")
        for metric in DIFFERENCES_OF if method != reference else ():
            pairs = paired(table, metric, method, reference)
            if pairs.empty:
                continue
            models, relations = (cases.loc[pairs.index, name] for name in ("model", "relation"))
            mean, low, high, n = mean_ci(pairs.to_numpy(), models.tolist())  # mostly a case has one of its own
            _, *wide, _ = mean_ci(pairs.to_numpy(), relations.where(relations.notna(), None).tolist())
            rows.append((method, reference, metric, *map(float, (mean, low, high)), int(n), *map(float, wide)))
    columns = ["method", "minus", "metric", "difference", "ci_low", "ci_high", "n", "relations_low", "relations_high"]
    return pd.DataFrame(rows, columns=columns)


def table_of_differences(differences: pd.DataFrame) -> pd.DataFrame:
    """A row a method, a column a metric, "difference (low, high)" in the cells, with a star where 0 is outside of both."""
    text = [
        f"{row.difference:+.2f} ({row.ci_low:+.2f}, {row.ci_high:+.2f})"
        + " *" * (min(row.ci_low, row.relations_low) > 0 or max(row.ci_high, row.relations_high) < 0)
        for row in differences.itertuples()
    ]
    wide = differences.assign(text=text).pivot(index="method", columns="metric", values="text").fillna("")
    return wide.loc[differences["method"].unique(), list(differences["metric"].unique())]


def paired(table: pd.DataFrame, metric: str, method: str, other: str) -> pd.Series:
    """Differences of two methods by case, over the cases that have both; none where the table has no such metric.

    Of S, which no single case has, they are those of jackknife pseudo-values: n S - (n - 1) S without the case.
    """
    needed = list(S_OF) if metric == "S" else [metric]
    if not (set(needed) <= set(table) and {method, other} <= set(table["method"])):
        return pd.Series(dtype=float)
    both = table[table["method"].isin([method, other])].pivot(index="case", columns="method", values=needed).dropna()
    ours, theirs = (both.xs(name, axis=1, level="method")[needed].to_numpy(float) for name in (method, other))
    if metric == "S":
        values = pseudo_values(ours) - pseudo_values(theirs) if len(both) > 1 else np.full(len(both), np.nan)
    else:
        values = (ours - theirs)[:, 0]
    return pd.Series(values, index=both.index).dropna()


def pseudo_values(values: np.ndarray) -> np.ndarray:
    """(F,) jackknife pseudo-values of S from the (F, 3) values of ES, PS and NS; n is at least 2."""
    n = len(values)
    without = (values.sum(axis=0) - values) / (n - 1)
    return n * stats.hmean(values.mean(axis=0)) - (n - 1) * stats.hmean(without, axis=-1)
