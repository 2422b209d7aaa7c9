"""Evaluations in, Axes out: methods beside each other, and what becomes of a metric along a number.

    dots(summary, metric)            one metric: a mean with its interval for each method, and the paper's beside it
    dot_table(summary, metrics)      the same for several metrics: methods are rows, metrics are columns
    curves(summary, metric, along)   one metric along a number, such as that of edits, a line for each method
    curve_panels(summary, metrics, along)
    methods_figure(summary, about)   the figure of evaluation.ipynb
    scorings_figure(summary, about)  four ways to say whether an edit holds, side by side
    plotted_numbers(summary, ...)    a summary with its units, as it is written beside a figure

`summary` is what `rome_lab.evaluation.metrics.summarise` returns. Metrics of one unit share their scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator

from rome_lab.evaluation import CASE_PARTS, METRICS, SCORINGS
from rome_lab.lab import COLOURS, FONT_SIZE, finish, layer_ticks, new_axes
from rome_lab.studies.evaluation.paper import paper_numbers
from rome_lab.studies.evaluation.tables import SCORED, scores_of

PAGE_WIDTH = 7.0  # inches, both columns of a page
SCORES = ("S", "ES", "PS", "NS", "known", "efficacy", "paraphrase", "specificity")  # shares, from 0 to 100
UNITS = {"S": "%", "perplexity": ""} | {name: metric.unit for name, metric in METRICS.items()}
STYLES = {
    "none": {"color": "#777777", "marker": "s", "linestyle": (0, (1, 1))},
    "rome": {"color": COLOURS["red"], "marker": "o", "linestyle": "-"},
    "joint": {"color": COLOURS["blue"], "marker": "^", "linestyle": (0, (4, 1.5))},
    "ft": {"color": COLOURS["green"], "marker": "v", "linestyle": (0, (2, 1))},
    "ft-linf": {"color": COLOURS["pink"], "marker": "D", "linestyle": (0, (4, 1.5, 1, 1.5))},
    "in-context": {"color": COLOURS["orange"], "marker": "P", "linestyle": (0, (2, 2))},
}
SCORED_PARTS = {"E": "rewrite", "P": "paraphrases", "N": "neighbours", "F": "follows", "K": "stays"}
SCORING_STYLES = dict(
    zip(SCORINGS, zip((COLOURS[x] for x in ("black", "blue", "orange", "red")), "sovD", strict=True), strict=True)
)
OTHERS = tuple(COLOURS[name] for name in ("red", "blue", "green", "black"))


def dots(
    summary: pd.DataFrame,
    metric: str,
    ax: Axes | None = None,
    by: str = "method",
    paper: pd.DataFrame | None = None,
) -> Axes:
    """One metric: a row a method, its mean as a dot with its interval and as a number; the paper's is a hollow diamond.

    Args:   paper: other means to draw beside ours, with the columns `by`, metric and mean, in the same unit.
    Raises: ValueError: the summary has nothing of this metric.
    """
    rows = of_metric(summary, metric)
    names = list(dict.fromkeys(summary[by]))
    ax = ax or new_axes(0.5 + 0.17 * len(names))
    for y, name in enumerate(names):
        for row in rows[rows[by] == name].itertuples():
            style = style_of(name, y)
            ax.plot([row.ci_low, row.ci_high], [y, y], color=style["color"], linewidth=1.2, solid_capstyle="butt")
            ax.plot([row.mean], [y], marker=style["marker"], color=style["color"], markersize=3.2)
            number = f"{row.mean:.2f}" if UNITS[metric] == "bits" else f"{row.mean:.1f}"
            ax.annotate(number, (1.05, y), xycoords=("axes fraction", "data"), fontsize=FONT_SIZE - 1.5, va="center")
    if paper is not None:
        theirs = paper[(paper["metric"] == metric) & paper[by].isin(names)]
        places = [names.index(name) for name in theirs[by]]
        ax.plot(theirs["mean"], places, "D", markersize=3.6, markerfacecolor="none", color="black", markeredgewidth=0.6)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_title(metric)
    ax.set_xlabel(UNITS[metric])
    ax.margins(x=0.12)
    ax.grid(axis="y", color="0.92", linewidth=0.5)
    if metric in SCORES:
        ax.set_xlim(-8, 108)
    ticks = [0, 50, 100] if metric in SCORES else outer_ticks(*ax.get_xlim())
    return finish(ax, FixedLocator(ticks), frame=False)


def dot_table(
    summary: pd.DataFrame,
    metrics: Sequence[str],
    by: str = "method",
    paper: pd.DataFrame | None = None,
    width: float = PAGE_WIDTH,
) -> Figure:
    """Several metrics side by side, methods as rows, as `dots` draws them; metrics that nobody has are left out."""
    metrics = [metric for metric in metrics if metric in set(summary["metric"])]
    height = 0.75 + 0.165 * summary[by].nunique()
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(width, height), sharey=True, layout="constrained", squeeze=False
    )
    for metric, ax in zip(metrics, axes[0], strict=True):
        dots(summary, metric, ax, by, paper)
        ax.tick_params(axis="y", length=0)
    figure.get_layout_engine().set(wspace=0.11)  # room for the numbers
    return figure


def methods_figure(summary: pd.DataFrame, about: str) -> Figure:
    """The table of methods as dots, with the paper's means as diamonds where the cases have its metrics.

    Args: about: the model and the cases, for the title.
    """
    counterfact = "ES" in set(summary["metric"])
    scores = scores_of(summary)
    paper = paper_numbers() if counterfact else None
    figure = dot_table(summary, [*scores, "RS", "GE", "perplexity", "known"], paper=paper)
    diamonds = "\ndiamonds: GPT-2 XL on CounterFact, Meng et al. (2022)" * counterfact
    figure.suptitle(f"{about}; means with {intervals_in_words(summary)}{diamonds}", fontsize=FONT_SIZE)
    return figure


def scorings_figure(summary: pd.DataFrame, about: str) -> Figure:
    """Each part of the case in a panel, methods as rows, with a mark and an interval for each scoring.

    Args: about: the model and the cases, for the title.
    """
    metrics = {SCORED[metric]: metric for metric in summary["metric"].unique() if metric in SCORED}
    names = list(dict.fromkeys(summary["method"]))
    parts = [part for part in CASE_PARTS if any(part == place[0] for place in metrics)]
    size = (PAGE_WIDTH, 1.0 + 0.24 * len(names))
    figure, axes = plt.subplots(1, len(parts), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for part, ax in zip(parts, axes[0], strict=True):
        for place, (scoring, (color, marker)) in enumerate(SCORING_STYLES.items()):
            rows = of_metric(summary, metrics[part, scoring]) if (part, scoring) in metrics else summary.iloc[:0]
            y = [names.index(name) + 0.18 * (place - 1.5) for name in rows["method"]]
            ax.hlines(y, rows["ci_low"], rows["ci_high"], color=color, linewidth=1.0)
            ax.plot(rows["mean"], y, marker, color=color, markersize=3.0, label=scoring)
        ax.set(title=SCORED_PARTS[part], xlabel="% of prompts", xlim=(-4, 104), ylim=(len(names) - 0.5, -0.5))
        ax.set_yticks(range(len(names)), names)
        ax.grid(axis="y", color="0.92", linewidth=0.5)
        finish(ax, FixedLocator([0, 50, 100]), frame=False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=FONT_SIZE)
    scored = summary[summary["metric"].isin(metrics.values())]
    figure.suptitle(f"{about}; means with {intervals_in_words(scored)}", fontsize=FONT_SIZE)
    return figure


def plotted_numbers(summary: pd.DataFrame, model: str, dataset: str | Path) -> pd.DataFrame:
    """A summary with the columns unit, interval, model and dataset, as it is written beside its figure."""
    interval = ("95% over " + summary["over"]).where(summary["ci_low"].notna(), None)
    numbers = summary.drop(columns="over").assign(unit=summary["metric"].map(UNITS), interval=interval)
    return numbers.assign(model=model, dataset=Path(dataset).name)


def intervals_in_words(summary: pd.DataFrame) -> str:
    """What the intervals of a summary are draws of, for a title: first what most are of, then who departs from it."""
    drawn = summary[summary["ci_low"].notna()]
    scores = drawn[drawn["over"] != "passages"]
    if scores.empty:
        return "no intervals"
    most, *others = scores["over"].value_counts().index
    parts = [f"95% intervals over {most}"]
    for over in others:
        parts.append(f"of {', '.join(dict.fromkeys(scores.loc[scores['over'] == over, 'method']))} over {over}")
    if len(scores) < len(drawn):
        parts.append("of perplexity over passages")
    return ", ".join(parts)


def curves(
    summary: pd.DataFrame,
    metric: str,
    along: str,
    ax: Axes | None = None,
    by: str = "method",
    log: bool = False,
    label: str | None = None,
) -> Axes:
    """One metric along a number, a line for each method, with bars for the intervals.

    On a logarithmic axis a method that has the number 0 alone, as the unedited model has, is a level line.

    Args:   along: the column of the number. log: whether its axis is logarithmic. label: of that axis.
    Raises: ValueError: the summary has nothing of this metric.
    """
    rows = of_metric(summary, metric)
    ax = ax or new_axes(2.2)
    names = list(dict.fromkeys(summary[by]))
    for place, name in enumerate(names):
        line = rows[rows[by] == name].sort_values(along)
        style = style_of(name, place)
        if (line[along] == 0).all() and log:  # what has no place on the axis holds all along it
            for mean in line["mean"]:
                ax.axhline(
                    mean, label=name, color=style["color"], linestyle=style["linestyle"], linewidth=0.9, zorder=0
                )
            continue
        spread = line[["ci_low", "ci_high"]].sub(line["mean"], axis=0).abs().to_numpy().T
        # Lines of several methods at the same numbers would hide each other's bars.
        shift = (place - (len(names) - 1) / 2) * 0.03
        x = line[along] * (1 + shift) if log else line[along] + shift * 3
        sizes = {"linewidth": 1.1, "markersize": 2.8, "elinewidth": 0.7, "capsize": 1.2}
        ax.errorbar(x, line["mean"], np.nan_to_num(spread), label=name, **sizes, **style)
    if log:
        ax.set_xscale("log")
        ax.set_xticks(sorted(set(rows[along]) - {0}))
        ax.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
        ax.xaxis.set_minor_locator(NullLocator())
    if metric in SCORES:
        ax.set_ylim(-4, 104)
    if metric == "perplexity" and rows["mean"].max() > 10 * rows["mean"].min():
        ax.set_yscale("log")
    ax.set_title(metric)
    ax.set_xlabel(label or along)
    ax.set_ylabel(UNITS[metric])
    return finish(ax, None if log else layer_ticks(), frame=False)


def curve_panels(
    summary: pd.DataFrame,
    metrics: Sequence[str],
    along: str,
    by: str = "method",
    log: bool = False,
    label: str | None = None,
) -> Figure:
    """Several metrics along a number, a panel each, at most three in a row, with one legend above."""
    metrics = [metric for metric in metrics if metric in set(summary["metric"])]
    n_rows = -(-len(metrics) // 3)
    figure, axes = plt.subplots(
        n_rows, 3, figsize=(PAGE_WIDTH, 0.4 + 1.6 * n_rows), layout="constrained", squeeze=False
    )
    for metric, ax in zip(metrics, axes.flat, strict=False):
        curves(summary, metric, along, ax, by, log, label)
    for ax in axes.flat[len(metrics) :]:
        ax.remove()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False, fontsize=FONT_SIZE)
    return figure


def style_of(name: object, place: int) -> Mapping[str, object]:
    """The style of a method; its variants, such as "rome-bare", have its colour and another marker."""
    if name in STYLES:
        return STYLES[name]
    family = str(name).split("-")[0]
    if family in STYLES:
        return STYLES[family] | {"marker": "o^vsDPX"[place % 7], "linestyle": (0, (2, 1 + place % 3))}
    return {"color": OTHERS[place % len(OTHERS)], "marker": "o^vsDPX"[place % 7], "linestyle": "-"}


def of_metric(summary: pd.DataFrame, metric: str) -> pd.DataFrame:
    rows = summary[summary["metric"] == metric]
    if rows.empty:
        present = ", ".join(dict.fromkeys(summary["metric"])) or "nothing"
        raise ValueError(
            f"evaluation_plots: the summary has no metric {metric!r}, only {present}; choose one of these."
        )
    return rows


def outer_ticks(low: float, high: float) -> list[float]:
    """The first and the last round number within a narrow axis, which has no room for more."""
    ticks = MaxNLocator(nbins=3, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    inside = [tick for tick in ticks if low <= tick <= high]
    return [inside[0], inside[-1]]
